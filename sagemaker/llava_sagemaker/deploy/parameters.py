"""The template's parameters: what the command line says, then what runs, then the defaults."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping

from llava_sagemaker.deploy import template
from llava_sagemaker.deploy.errors import DeployError
from llava_sagemaker.deploy.instance_types import engines_of
from llava_sagemaker.deploy.place import Place
from llava_triton.contract.settings import VARIABLE, Settings

_TARGET_LOAD = 0.7
"""Share of an instance's sessions at which another is wanted: it takes minutes to start."""
_LONGEST_VARIABLE = 1024  # of text, in a container's environment
_DAY = 86_400.0


def resolve(
    place: Place, given: Mapping[str, str | None], now: Mapping[str, str]
) -> dict[str, str]:
    """All parameters of the deployment that is wanted, but for what the model repository decides.

    Args:
        place: where.
        given: what was asked for; None: leave it as it is.
        now: what the stack says; empty where there is none.

    Raises:
        DeployError: no such instance type, or numbers that make no sense.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    known = template.TEMPLATE["Parameters"]  # an older template may have had others
    kept = {name: value for name, value in now.items() if name in known}
    wanted = {**template.defaults(), "Name": place.name, **kept, **asked}
    _check_type(place, wanted["InstanceType"])
    gpu = wanted["InstanceType"].startswith(("ml.g", "ml.p"))
    wanted["AmiVersion"] = template.defaults()["AmiVersion"] if gpu else ""
    minimum, maximum = int(wanted["MinInstances"]), int(wanted["MaxInstances"])
    if "MaxInstances" not in asked:
        # Who asks for more at least than there may be at most means more at most.
        maximum = max(minimum, maximum)
    if not 1 <= minimum <= maximum:
        raise DeployError(
            f"{minimum} to {maximum} instances were asked for: at least 1 is expected, and --max "
            "not below --min"
        )
    wanted["MaxInstances"] = str(maximum)
    if not now.get("ImageUri"):
        wanted["InitialInstances"] = str(minimum)
    if float(wanted["SessionsPerInstance"]) <= 0:
        raise DeployError(
            f"{wanted['SessionsPerInstance']} sessions per instance were asked for: more than 0 "
            "are expected"
        )
    return wanted


def complete(
    wanted: Mapping[str, str],
    given: Mapping[str, str | None],
    now: Mapping[str, str],
    exported: Settings,
) -> dict[str, str]:
    """`wanted` with what the model repository's settings decide.

    Args:
        wanted: `resolve`'s answer.
        given, now: as there.
        exported: the settings of the repository that is to be served.

    Raises:
        DeployError: a setting that does not exist, or cannot be changed any more.
    """
    try:
        settings = exported.changed(wanted["Settings"])
    except (ValueError, TypeError) as error:
        raise DeployError(f"--setting: {str(error).removeprefix(VARIABLE).strip()}") from error
    found = dict(wanted)
    engines = engines_of(wanted["InstanceType"])
    if given.get("SessionsPerInstance") is None:
        if not now.get("ImageUri"):
            sessions = max(1.0, round(_TARGET_LOAD * engines * settings.max_sessions))
        else:  # what was once asked for, of an engine
            sessions = float(now["SessionsPerInstance"])
            sessions *= engines / engines_of(now["InstanceType"])
        found["SessionsPerInstance"] = f"{sessions:g}"
    longest = settings.session_lifetime_seconds + settings.session_idle_seconds
    found["JournalDays"] = str(math.ceil(longest / _DAY))
    return found


def changed_settings(place: Place, text: str | None, assignments: Iterable[str]) -> str:
    """The parameter `Settings` with what `--setting NAME=VALUE` says.

    Args:
        place: where.
        text: what it was; None before the first time, when journal and log are switched on.
        assignments: values are JSON, or else texts; `null` takes a setting back.

    Raises:
        DeployError: not NAME=VALUE, or too many for a variable.
    """
    first = {"journal": f"s3://{place.bucket}/journal", "log_turns": True}
    settings = first if text is None else json.loads(text)
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise DeployError(
                f"--setting {assignment} was given; NAME=VALUE is expected, for example "
                "max_sessions=100"
            )
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
        if settings[name] is None:
            del settings[name]
    changed = json.dumps(settings, sort_keys=True)
    if len(changed) > _LONGEST_VARIABLE:
        raise DeployError(
            f"the settings are {len(changed)} characters long; SageMaker takes {_LONGEST_VARIABLE}:"
            " give them to `make export` in a file (--settings)"
        )
    return changed


def _check_type(place: Place, given: str) -> None:
    known: list[str] = (
        place.client("sagemaker").meta.service_model.shape_for("ProductionVariantInstanceType").enum
    )
    if given not in known:
        alike = difflib.get_close_matches(given, known, n=3)
        raise DeployError(
            f"SageMaker has no instance type {given!r} for endpoints: "
            + (
                f"did you mean {', '.join(alike)}?"
                if alike
                else "one like ml.g5.xlarge is expected"
            )
        )
