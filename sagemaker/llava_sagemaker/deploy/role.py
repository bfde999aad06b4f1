"""The IAM role that the endpoint's instances run under."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from botocore.exceptions import ClientError

from llava_sagemaker.deploy import report
from llava_sagemaker.deploy.errors import is_absent
from llava_sagemaker.deploy.place import Place
from llava_sagemaker.deploy.policies import execution_policy, trust_policy

_POLICY = "instances"


def bring_role(place: Place, image_uris: Iterable[str], image_buckets: Sequence[str]) -> str:
    """Create the role, or give it exactly the wanted permissions; returns its ARN."""
    iam = place.client("iam")
    role = _describe(place, iam)
    if role is None:
        role = iam.create_role(
            RoleName=place.role,
            AssumeRolePolicyDocument=json.dumps(trust_policy(place)),
            Description=f"Instances of the SageMaker endpoint {place.name}",
            Tags=place.tags,
        )["Role"]
        report.say(f"created the IAM role {place.role}")
    else:
        place.must_own("IAM role", place.role, role.get("Tags", []))
    wanted = execution_policy(place, image_uris, image_buckets)
    if _policy(place, iam) != wanted:
        iam.put_role_policy(
            RoleName=place.role, PolicyName=_POLICY, PolicyDocument=json.dumps(wanted)
        )
    return str(role["Arn"])


def find_role(place: Place) -> bool:
    """Whether the role exists and is ours."""
    role = _describe(place, place.client("iam"))
    return role is not None and place.owns(role.get("Tags", []))


def remove_role(place: Place) -> None:
    """Delete the role with its permissions."""
    iam = place.client("iam")
    for name in iam.list_role_policies(RoleName=place.role)["PolicyNames"]:
        iam.delete_role_policy(RoleName=place.role, PolicyName=name)
    iam.delete_role(RoleName=place.role)


def _describe(place: Place, iam: Any) -> Any:
    try:
        return iam.get_role(RoleName=place.role)["Role"]
    except ClientError as error:
        if is_absent(error):
            return None
        raise


def _policy(place: Place, iam: Any) -> Any:
    try:
        return iam.get_role_policy(RoleName=place.role, PolicyName=_POLICY)["PolicyDocument"]
    except ClientError as error:
        if is_absent(error):
            return None
        raise
