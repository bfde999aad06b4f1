"""Who may do what: as little as each needs. Actions without resource-level permissions have `*`.

The instances' permissions are the template's; the others are files in `iam/`.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

from llava_sagemaker.deploy.place import Place
from llava_sagemaker.deploy.template import TEMPLATE, Resolver

_FOLDER = Path(__file__).parent / "iam"


def policy(place: Place, who: str) -> dict[str, Any]:
    """An IAM policy for `deployer`, `caller` or `openai`: a file with this deployment's names."""
    text = string.Template((_FOLDER / f"{who}.json").read_text()).substitute(
        Name=place.name,
        Account=place.account_id,
        Region=place.region,
        Partition=place.partition,
    )
    document: dict[str, Any] = json.loads(text)
    return document


def instances_policy(place: Place) -> dict[str, Any]:
    """The execution role's, as the template writes it with its defaults."""
    known = {
        "Bucket.Arn": f"arn:{place.partition}:s3:::{place.bucket}",
        "LogGroup": place.log_group,
        "Repository.Arn": (
            f"arn:{place.partition}:ecr:{place.region}:{place.account_id}"
            f":repository/{place.image_repository}"
        ),
    }
    role = TEMPLATE["Resources"]["Role"]["Properties"]
    found = Resolver(place, {"Name": place.name}, known).of(role["Policies"][0])
    document: dict[str, Any] = found["PolicyDocument"]
    return document
