"""`llava-sagemaker`: who may do what, compared with the calls that are really made."""

from __future__ import annotations

import fnmatch
import json
from pathlib import Path
from typing import Any

import pytest
from llava_sagemaker.deploy.template import TEMPLATE

from tests import aws_account
from tests.aws_account import REGION, Account, docker, good
from tests.aws_stacks import schema

moto, account = aws_account.moto, aws_account.account
image, repository = aws_account.image, aws_account.repository

ACCOUNT = "123456789012"


def policy(who: str) -> list[dict[str, Any]]:
    statements: list[dict[str, Any]] = json.loads(good("policy", "chat", "--who", who))["Statement"]
    assert all(statement["Effect"] == "Allow" for statement in statements)
    return statements


def allowed_by(document: dict[str, Any]) -> set[tuple[str, str]]:
    """Action and resource of all that a policy allows."""
    return {
        (action, resource)
        for statement in document["Statement"]
        for action in statement["Action"]
        for resource in statement["Resource"]
    }


def test_instances_may_only_what_they_need(account: Account, repository: Path, image: str) -> None:
    up = ("up", "chat", "--repository", repository, "--image", image, "--yes")
    good(*up, "--image-bucket", "pictures")
    iam = account.client("iam")
    (role,) = iam.list_roles()["Roles"]
    (trust,) = role["AssumeRolePolicyDocument"]["Statement"]
    assert trust["Principal"] == {"Service": "sagemaker.amazonaws.com"}
    assert trust["Condition"] == {"StringEquals": {"aws:SourceAccount": ACCOUNT}}
    assert iam.list_attached_role_policies(RoleName=role["RoleName"])["AttachedPolicies"] == []
    (name,) = iam.list_role_policies(RoleName=role["RoleName"])["PolicyNames"]
    document = iam.get_role_policy(RoleName=role["RoleName"], PolicyName=name)["PolicyDocument"]
    allowed = allowed_by(document)
    bucket = f"arn:aws:s3:::llava-triton-chat-{ACCOUNT}-{REGION}"
    pull = f"arn:aws:ecr:{REGION}:{ACCOUNT}:repository/team/llava"
    logs = f"arn:aws:logs:{REGION}:{ACCOUNT}:log-group:/aws/sagemaker/Endpoints/chat"
    names = ("CreateLogGroup", "CreateLogStream", "DescribeLogStreams", "PutLogEvents")
    assert allowed == {
        ("s3:GetObject", bucket + "/repository-*"),
        *((f"s3:{name}Object", bucket + "/journal/*") for name in ("Get", "Put", "Delete")),
        ("s3:ListBucket", bucket),
        ("s3:GetObject", "arn:aws:s3:::pictures/*"),
        ("ecr:BatchCheckLayerAvailability", pull),
        ("ecr:BatchGetImage", pull),
        ("ecr:GetDownloadUrlForLayer", pull),
        ("ecr:GetAuthorizationToken", "*"),
        ("cloudwatch:PutMetricData", "*"),
        *((f"logs:{name}", resource) for name in names for resource in (logs, logs + ":*")),
    }
    (metrics,) = [s for s in document["Statement"] if "cloudwatch:PutMetricData" in s["Action"]]
    assert "LlavaTriton" in metrics["Condition"]["StringEquals"]["cloudwatch:namespace"]

    # During an update both images may be pulled, afterwards only the new one.
    account.client("ecr").create_repository(repositoryName="team/newer")
    newer = account.push_image("team/newer", "second")
    account.calls.clear()
    good("update", "chat", "--image", newer)
    granted = [
        next(p["ParameterValue"] for p in params["Parameters"] if p["ParameterKey"] == "PullFrom")
        for _, operation, params in account.calls
        if operation == "UpdateStack"
    ]
    other = pull.replace("llava", "newer")
    assert granted == [f"{pull},{other}", other]
    document = iam.get_role_policy(RoleName=role["RoleName"], PolicyName=name)["PolicyDocument"]
    assert ("ecr:BatchGetImage", other) in allowed_by(document)
    assert ("ecr:BatchGetImage", pull) not in allowed_by(document)

    # A key of one's own may be used, and no other.
    key = f"arn:aws:kms:{REGION}:{ACCOUNT}:key/mine"
    good("update", "chat", "--kms-key", key)
    document = iam.get_role_policy(RoleName=role["RoleName"], PolicyName=name)["PolicyDocument"]
    keys = {pair for pair in allowed_by(document) if pair[0].startswith("kms:")}
    assert keys == {("kms:Decrypt", key), ("kms:GenerateDataKey", key)}


def test_the_printed_policy_of_the_instances_is_the_one_that_they_get(
    account: Account, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docker(tmp_path, monkeypatch)
    good("up", "chat", "--repository", repository, "--yes")
    iam = account.client("iam")
    (role,) = iam.list_roles()["Roles"]
    document = iam.get_role_policy(RoleName=role["RoleName"], PolicyName="instances")
    assert document["PolicyDocument"]["Statement"] == policy("instances")


def test_who_chats_may_only_chat(account: Account) -> None:
    (statement,) = policy("caller")
    assert statement["Action"] == [
        "sagemaker:InvokeEndpoint",
        "sagemaker:InvokeEndpointWithResponseStream",
    ]
    assert statement["Resource"] == [f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:endpoint/chat"]


def test_bearer_tokens_are_for_this_endpoint_only(account: Account) -> None:
    """AWS names no resource for the token itself; it opens what its maker may open."""
    chat, token = policy("openai")
    assert [chat] == policy("caller")
    assert token["Action"] == ["sagemaker:CallWithBearerToken"]


S3_ACTIONS = {
    "HeadBucket": "ListBucket",
    "ListObjectsV2": "ListBucket",
    "HeadObject": "GetObject",
    "DeleteObjects": "DeleteObject",
    "CreateMultipartUpload": "PutObject",
    "UploadPart": "PutObject",
    "UploadPartCopy": "PutObject",
    "CompleteMultipartUpload": "PutObject",
    "CopyObject": "PutObject",
    "PutBucketEncryption": "PutEncryptionConfiguration",
    "PutBucketLifecycleConfiguration": "PutLifecycleConfiguration",
    "PutPublicAccessBlock": "PutBucketPublicAccessBlock",
}
# What AWS checks besides the operation's own action, and what docker does behind our back.
BESIDES = {
    "iam:CreateServiceLinkedRole",
    "sagemaker:InvokeEndpoint",
    "sagemaker:InvokeEndpointWithResponseStream",
    "s3:AbortMultipartUpload",
    "ecr:BatchCheckLayerAvailability",
    "ecr:BatchGetImage",
    "ecr:CompleteLayerUpload",
    "ecr:GetDownloadUrlForLayer",
    "ecr:InitiateLayerUpload",
    "ecr:PutImage",
    "ecr:UploadLayerPart",
}


def of_cloudformation(*handlers: str) -> set[str]:
    """The actions that AWS's schemas name for the template's resources."""
    return {
        action
        for definition in TEMPLATE["Resources"].values()
        for handler in handlers
        for action in schema(definition["Type"])["handlers"].get(handler, {}).get("permissions", [])
    }


def action_of(service: str, operation: str) -> str:
    if service == "s3":
        operation = S3_ACTIONS.get(operation, operation)
    return f"{service.replace('monitoring', 'cloudwatch')}:{operation}"


def resource_of(service: str, params: dict[str, Any]) -> str | None:
    """The ARN that a call is about, where its parameters say it."""
    here = f"{REGION}:{ACCOUNT}"
    if arn := params.get("ResourceArn", params.get("resourceArn", params.get("ResourceARN"))):
        return str(arn)
    if service == "s3":
        key = f"/{params['Key']}" if "Key" in params else "/x" if "Delete" in params else ""
        return f"arn:aws:s3:::{params['Bucket']}{key}"
    for key, arn in {
        "RoleName": f"arn:aws:iam::{ACCOUNT}:role/",
        "repositoryName": f"arn:aws:ecr:{here}:repository/",
        "ModelName": f"arn:aws:sagemaker:{here}:model/",
        "EndpointName": f"arn:aws:sagemaker:{here}:endpoint/",
        "EndpointConfigName": f"arn:aws:sagemaker:{here}:endpoint-config/",
        "logGroupName": f"arn:aws:logs:{here}:log-group:",
        "AlarmName": f"arn:aws:cloudwatch:{here}:alarm:",
        "StackName": f"arn:aws:cloudformation:{here}:stack/",
    }.items():
        if key in params:
            name = str(params[key])
            if key == "StackName":
                name = name.removeprefix(arn) + "/id"
            return f"{arn}{name}"
    return None


def test_who_deploys_may_what_the_commands_do_and_no_more(
    account: Account, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docker(tmp_path, monkeypatch)
    up = ("up", "chat", "--repository", repository, "--max", 2, "--yes")
    good(*up)
    (repository / "llava/config.pbtxt").write_text("new")
    good(*up, "--build", "--min", 2)
    good(*up, "--min", 1, "--max", 1)
    good("status", "chat")
    good("down", "chat", "--yes")
    statements = policy("deployer")
    granted = {action for statement in statements for action in statement["Action"]}
    used = {action_of(service, operation) for service, operation, _ in account.calls}
    assert used <= granted
    assert granted <= used | BESIDES | of_cloudformation("create", "read", "update", "delete")
    # What CloudFormation does to look at a thing or to remove it does not depend on properties.
    needed = of_cloudformation("read", "delete")
    kept_out = ("kms:", "iam:Untag", "iam:TagRole", "logs:DeleteDataProtection", "iam:Detach")
    assert {action for action in needed if not action.startswith(kept_out)} <= granted
    assert {action_of(*call) for call in account.made if not call[1].startswith("List")} <= granted
    for service, operation, params in account.calls:
        action, arn = action_of(service, operation), resource_of(service, params)
        resources = [r for s in statements if action in s["Action"] for r in s["Resource"]]
        if arn is not None:
            assert any(fnmatch.fnmatch(arn, resource) for resource in resources), (action, arn)
    # Nothing that writes is allowed on everything, except where AWS knows no resources.
    for statement in statements:
        if statement["Resource"] == ["*"]:
            assert all(
                action.split(":")[1].startswith(("Describe", "Get", "List"))
                for action in statement["Action"]
            )
        assert not any("*" in action for action in statement["Action"])


def test_a_policy_needs_no_credentials(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    output = good("policy", "chat", "--account", "210987654321")
    assert ":210987654321:endpoint/chat" in output
