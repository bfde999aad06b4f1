"""The CloudFormation template, and what it says with given parameters."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from llava_sagemaker.deploy.place import Place

TEXT = (Path(__file__).parent / "template.yaml").read_text()
_SCALED = ("MinInstances", "MaxInstances", "InitialInstances")
_NOTHING = {"Ref": "AWS::NoValue"}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML with CloudFormation's short forms: `!Ref X` is `{"Ref": "X"}`."""


def _long_form(loader: _Loader, suffix: str, node: yaml.Node) -> dict[str, Any]:
    name = suffix if suffix in ("Ref", "Condition") else f"Fn::{suffix}"
    if isinstance(node, yaml.ScalarNode):
        text = loader.construct_scalar(node)
        return {name: text.split(".") if suffix == "GetAtt" else text}
    assert isinstance(node, yaml.SequenceNode)
    return {name: loader.construct_sequence(node, deep=True)}


_Loader.add_multi_constructor("!", _long_form)
TEMPLATE: dict[str, Any] = yaml.load(TEXT, _Loader)


def defaults() -> dict[str, str]:
    """The parameters that have a default, as CloudFormation wants all of them: texts."""
    parameters = TEMPLATE["Parameters"]
    return {name: str(p["Default"]) for name, p in parameters.items() if "Default" in p}


def version(place: Place, parameters: Mapping[str, str]) -> str:
    """A name for what model and configuration say: they never change in SageMaker.

    The number of instances is no part of it: scaling is no reason for another fleet.
    """
    fixed = dict.fromkeys(("Version", *_SCALED), "0")
    found = Resolver(place, {**parameters, **fixed})
    said = [found.of(TEMPLATE["Resources"][name]) for name in ("Model", "EndpointConfig")]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:12]


class Resolver:
    """What the template's functions come to. What only AWS knows stays as it stands.

    Args:
        place: gives account and region.
        parameters: of the template; those that have a default may be missing.
        attributes: of resources, by `Resource` (what `Ref` gives) and `Resource.Attribute`.
    """

    def __init__(
        self,
        place: Place,
        parameters: Mapping[str, str],
        attributes: Mapping[str, str] | None = None,
    ) -> None:
        self._values: dict[str, Any] = {
            "AWS::AccountId": place.account_id,
            "AWS::Partition": place.partition,
            "AWS::Region": place.region,
            **(attributes or {}),
        }
        for name, value in {**defaults(), **parameters}.items():
            match TEMPLATE["Parameters"][name]["Type"]:
                case "CommaDelimitedList":
                    self._values[name] = value.split(",")
                case "Number":
                    self._values[name] = json.loads(value)
                case _:
                    self._values[name] = value

    def holds(self, condition: str) -> bool:
        """Whether a condition of the template is true."""
        return bool(self.of(TEMPLATE["Conditions"][condition]))

    def of(self, node: Any) -> Any:
        """A part of the template without its functions."""
        match node:
            case {"Ref": str(name)}:
                return self._values.get(name, node)
            case {"Condition": str(name), **rest} if not rest:
                return self.holds(name)
            case {"Fn::GetAtt": [name, attribute]}:
                return self._values.get(f"{name}.{attribute}", node)
            case {"Fn::Sub": str(text)}:
                return re.sub(r"\$\{(.*?)\}", lambda m: str(self._values.get(m[1], m[0])), text)
            case {"Fn::Join": [separator, items]}:
                return separator.join(self.of(items))
            case {"Fn::If": [condition, yes, no]}:
                return self.of(yes if self.holds(condition) else no)
            case {"Fn::Equals": [left, right]}:
                return str(self.of(left)) == str(self.of(right))
            case {"Fn::Not": [part]}:
                return not self.of(part)
            case {"Fn::And": parts}:
                return all(self.of(part) for part in parts)
            case dict():
                found = {key: self.of(value) for key, value in node.items()}
                return {key: value for key, value in found.items() if value != _NOTHING}
            case list():
                return [value for value in map(self.of, node) if value != _NOTHING]
        return node
