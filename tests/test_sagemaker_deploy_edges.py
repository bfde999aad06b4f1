"""`llava-sagemaker`: costs before creation, policies, images, and mistakes told in plain words."""

from __future__ import annotations

import fnmatch
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llava_sagemaker.deploy.cli import app

from llava_triton.client import ErrorCode, Session, SessionError
from tests import aws_account
from tests.aws_account import REGION, Account, bad, good, run

moto, account = aws_account.moto, aws_account.account
image, repository = aws_account.image, aws_account.repository

ACCOUNT = "123456789012"
ROLE = f"llava-triton-chat-{REGION}"


# ---- costs ----


def listed(component: str, dollars: str) -> str:
    """An entry of the Price List."""
    terms = {"a": {"priceDimensions": {"b": {"pricePerUnit": {"USD": dollars}}}}}
    return json.dumps(
        {"product": {"attributes": {"component": component}}, "terms": {"OnDemand": terms}}
    )


def test_the_cost_comes_first_and_no_leaves_nothing(
    account: Account, repository: Path, image: str
) -> None:
    account.price_list = [listed("Hosting", "1.5000000000"), listed("Notebook", "99")]
    before = account.everything()
    account.calls.clear()
    arguments = ("up", "chat", "--repository", repository, "--image", image, "--max", 2)
    result = run(*arguments, answer="n\n")
    assert result.exit_code == 1
    assert "AWS Price List, us-east-1" in result.output
    assert "1 instance: $1.50 an hour" in result.output
    assert "2 instances: $3.00 an hour, $2,190 a month" in result.output
    assert account.writes() == []
    assert account.everything() == before
    (filters,) = [params["Filters"] for _, name, params in account.calls if name == "GetProducts"]
    assert {entry["Field"]: entry["Value"] for entry in filters} == {
        "instanceName": "ml.g5.xlarge",
        "regionCode": REGION,
    }
    assert run(*arguments, answer="y\n").exit_code == 0
    # More cost is asked about again.
    running = account.everything()
    assert run("up", "chat", "--max", 9, answer="n\n").exit_code == 1
    assert account.everything() == running


def test_a_price_that_is_not_listed_is_said_to_be_old(account: Account) -> None:
    output = good("cost", "chat", "--instance-type", "ml.g5.xlarge")
    assert "late 2025" in output
    assert "$1.41 an hour" in output
    assert "unknown" in good("cost", "chat", "--instance-type", "ml.m5.large")
    account.refuse = "GetProducts"
    assert "AccessDeniedException" in good("cost", "chat")
    assert account.writes() == []


# ---- policies ----


def policy(who: str) -> list[dict[str, Any]]:
    statements: list[dict[str, Any]] = json.loads(good("policy", "chat", "--who", who))["Statement"]
    assert all(statement["Effect"] == "Allow" for statement in statements)
    return statements


def test_instances_may_only_what_they_need(account: Account, repository: Path, image: str) -> None:
    up = ("up", "chat", "--repository", repository, "--image", image, "--yes")
    good(*up, "--image-bucket", "pictures")
    iam = account.client("iam")
    role = iam.get_role(RoleName=ROLE)["Role"]
    (trust,) = role["AssumeRolePolicyDocument"]["Statement"]
    assert trust["Principal"] == {"Service": "sagemaker.amazonaws.com"}
    assert trust["Condition"] == {"StringEquals": {"aws:SourceAccount": ACCOUNT}}
    assert iam.list_attached_role_policies(RoleName=ROLE)["AttachedPolicies"] == []
    (name,) = iam.list_role_policies(RoleName=ROLE)["PolicyNames"]
    document = iam.get_role_policy(RoleName=ROLE, PolicyName=name)["PolicyDocument"]
    allowed = {
        (action, resource)
        for statement in document["Statement"]
        for action in statement["Action"]
        for resource in statement["Resource"]
    }
    bucket = f"arn:aws:s3:::llava-triton-chat-{ACCOUNT}-{REGION}"
    pull = f"arn:aws:ecr:{REGION}:{ACCOUNT}:repository/team/llava"
    logs = f"arn:aws:logs:{REGION}:{ACCOUNT}:log-group:/aws/sagemaker/Endpoints/chat"
    names = ("CreateLogGroup", "CreateLogStream", "DescribeLogStreams", "PutLogEvents")
    assert allowed == {
        ("s3:GetObject", bucket + "/*"),
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
        [s["Resource"] for s in json.loads(params["PolicyDocument"])["Statement"]]
        for _, operation, params in account.calls
        if operation == "PutRolePolicy"
    ]
    assert [[pull, pull.replace("llava", "newer")] in resources for resources in granted] == [
        True,
        False,
    ]


def test_who_chats_may_only_chat(account: Account) -> None:
    (statement,) = policy("caller")
    assert statement["Action"] == [
        "sagemaker:InvokeEndpoint",
        "sagemaker:InvokeEndpointWithResponseStream",
    ]
    assert statement["Resource"] == [f"arn:aws:sagemaker:{REGION}:{ACCOUNT}:endpoint/chat"]


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
}
# What AWS checks besides the operation's own action, and what docker does behind our back.
BESIDES = {
    "ecr:TagResource",
    "iam:TagRole",
    "iam:PassRole",
    "iam:CreateServiceLinkedRole",
    "sagemaker:AddTags",
    "sagemaker:InvokeEndpoint",
    "sagemaker:InvokeEndpointWithResponseStream",
    "application-autoscaling:TagResource",
    "cloudwatch:TagResource",
    "cloudwatch:DeleteAlarms",
    "logs:TagResource",
    "s3:AbortMultipartUpload",
    "ecr:BatchCheckLayerAvailability",
    "ecr:BatchGetImage",
    "ecr:CompleteLayerUpload",
    "ecr:GetDownloadUrlForLayer",
    "ecr:InitiateLayerUpload",
    "ecr:PutImage",
    "ecr:UploadLayerPart",
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
    }.items():
        if key in params:
            return f"{arn}{params[key]}"
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
    assert granted <= used | BESIDES
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


# ---- the image ----

DOCKER = """#!PYTHON
import json, os, sys
import boto3
with open("LOG", "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
if sys.argv[1] == "login":
    assert sys.stdin.read(), "no password"
if sys.argv[1] == "push" != os.environ.get("DOCKER_FAILS"):
    name = sys.argv[2].split("/", 1)[1].rsplit(":", 1)[0]
    manifest = {
        "schemaVersion": 2,
        "config": {"size": 1},
        "layers": [{"digest": str(open("LOG").read().count("push")), "size": 1}],
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
    }
    # Under a second tag too: moto drops an image that loses its last one, ECR keeps it.
    for tag in ("build-" + manifest["layers"][0]["digest"], "latest"):
        boto3.client("ecr").put_image(
            repositoryName=name, imageTag=tag, imageManifest=json.dumps(manifest)
        )
sys.exit(int(os.environ.get("DOCKER_FAILS", "") == sys.argv[1]))
"""


def docker(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A docker on the PATH that pushes an image made of nothing; returns the log of its calls."""
    log = folder / "docker.log"
    (folder / "bin").mkdir()
    (folder / "bin/docker").write_text(
        DOCKER.replace("PYTHON", sys.executable).replace("LOG", str(log))
    )
    (folder / "bin/docker").chmod(0o755)
    checkout = folder / "checkout"
    (checkout / "sagemaker").mkdir(parents=True)
    (checkout / "sagemaker/Dockerfile").write_text(
        "FROM 763104351884.dkr.ecr.us-west-2.amazonaws.com/triton:1\n"
    )
    monkeypatch.setattr("llava_sagemaker.deploy.image.CHECKOUT", checkout)
    monkeypatch.setenv("PATH", str(folder / "bin"))
    return log


def test_docker_builds_and_pushes(
    account: Account, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = docker(tmp_path, monkeypatch)
    good("up", "chat", "--repository", repository, "--yes")
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    uri = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/llava-triton/chat"
    assert [call[0] for call in calls] == [*("info", "info", "login", "build", "login", "push")]
    assert calls[2][-1] == "763104351884.dkr.ecr.us-west-2.amazonaws.com"
    assert calls[3][1:3] == ["--platform", "linux/amd64"]
    assert f"{uri}:latest" in calls[3]
    assert calls[4][-1] == uri.split("/")[0]
    assert calls[5] == ["push", f"{uri}:latest"]
    (pushed,) = account.client("ecr").describe_images(repositoryName="llava-triton/chat")[
        "imageDetails"
    ]
    assert f"{uri}@{pushed['imageDigest']}" in good("status", "chat")
    # What runs stays unless asked otherwise; then the image before is deleted.
    good("up", "chat")
    assert len(log.read_text().splitlines()) == 6
    good("update", "chat", "--build")
    (newer,) = account.client("ecr").describe_images(repositoryName="llava-triton/chat")[
        "imageDetails"
    ]
    assert newer["imageDigest"] != pushed["imageDigest"]
    assert newer["imageDigest"] in good("status", "chat")


@pytest.mark.parametrize("fails", ["build", "push"])
def test_docker_that_fails(
    account: Account,
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fails: str,
) -> None:
    docker(tmp_path, monkeypatch)
    monkeypatch.setenv("DOCKER_FAILS", fails)
    message = bad("up", "chat", "--repository", repository, "--yes")
    assert f"`docker {fails}` failed" in message
    good("down", "chat", "--yes")
    assert not any(account.everything().values())


def test_without_docker_the_commands_for_elsewhere_are_told(
    account: Account, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docker(tmp_path, monkeypatch)
    monkeypatch.setenv("DOCKER_FAILS", "info")  # installed, but nobody answers
    first = bad("up", "chat", "--repository", repository, "--yes")
    monkeypatch.setenv("PATH", str(tmp_path))
    second = bad("up", "chat", "--repository", repository, "--yes")
    assert "daemon does not answer" in first
    assert "docker is not installed" in second
    uri = f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/llava-triton/chat:latest"
    for message in (first, second):
        assert f"docker push {uri}" in message
        assert f"--image {uri}" in message
    assert not any(account.everything().values())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("nvcr.io/nvidia/tritonserver:26.01-py3", "not in Amazon ECR"),
        (f"{ACCOUNT}.dkr.ecr.eu-west-1.amazonaws.com/team/llava:latest", "both in one region"),
        (f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/team/llava:none", "there is no image"),
        (f"{ACCOUNT}.dkr.ecr.{REGION}.amazonaws.com/none:latest", "there is no image"),
    ],
)
def test_images_that_cannot_be_used(
    account: Account, repository: Path, image: str, given: str, expected: str
) -> None:
    assert expected in bad("up", "chat", "--repository", repository, "--image", given, "--yes")


# ---- chat ----


class FakeSession:
    """The client's Session; the real one is tested with the local endpoint."""

    def __enter__(self) -> FakeSession:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def stream(self, question: str) -> Iterator[str]:
        if question == "bad":
            raise SessionError(ErrorCode.INVALID_ARG, "not that")
        yield from ("you said ", question)


def test_chat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def open_session(url: str, **arguments: Any) -> FakeSession:
        opened.append((url, arguments))
        return FakeSession()

    monkeypatch.setattr(Session, "open", open_session)
    picture = tmp_path / "cat.png"
    picture.write_bytes(b"png")
    chat = ("chat", "chat", "--image", picture, "--region", REGION)
    for ending in ("\n", ""):  # an empty line, the end of the input
        result = run(*chat, answer=f"hello\nbad\nagain\n{ending}")
        assert result.exit_code == 0, result.output
        assert "you said hello\n" in result.stdout
        assert "you said again\n" in result.stdout  # a refused question ends nothing
        assert "not that" in result.stderr
    assert opened[0] == (f"sagemaker://chat?region={REGION}", {"image": picture, "replay": True})


def test_chat_with_something_else(account: Account, tmp_path: Path) -> None:
    """What answers here is moto, which knows nothing of pictures."""
    picture = tmp_path / "cat.png"
    picture.write_bytes(b"png")
    bad("chat", "chat", "--image", picture)


# ---- mistakes ----


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        (("--instance-type", "ml.g5.xlrge"), "did you mean ml.g5.xlarge"),
        (("--instance-type", "cheap"), "one like ml.g5.xlarge"),
        (("--min", "0"), "at least 1"),
        (("--min", "3", "--max", "2"), "--max not below --min"),
        (("--sessions-per-instance", "-1"), "more than 0"),
        (("--repository", "/nowhere"), "settings.json"),
        (("--region", "mars-north-1"), "no AWS region called 'mars-north-1'"),
    ],
)
def test_wrong_options(
    account: Account, repository: Path, image: str, option: tuple[str, ...], expected: str
) -> None:
    before = account.everything()
    up = ("up", "chat", "--repository", repository, "--image", image, "--yes")
    assert expected in bad(*up, *option)
    assert account.everything() == before


def test_not_a_model_repository(account: Account, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{}")
    assert "is not an exported model repository" in bad("package", "chat", tmp_path)
    assert "give --repository" in bad("up", "chat", "--yes")
    assert not any(account.everything().values())


@pytest.mark.parametrize("name", ["Chat", "a--b", "-a", "a" * 21, "a.b", ""])
def test_names_that_aws_would_not_take(account: Account, name: str) -> None:
    message = bad("status", "--", name)
    assert "lower-case letters" in message


def test_no_credentials(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    assert "there are no AWS credentials" in bad("status", "chat")


def test_no_region(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    assert "give --region" in bad("status", "chat")


def test_nobody_answers(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("time.sleep", lambda _: None)  # between botocore's attempts
    assert "AWS does not answer" in bad("status", "chat")


@pytest.mark.parametrize(
    ("operation", "code", "said", "expected"),
    [
        (
            "CreateEndpoint",
            "ResourceLimitExceeded",
            "The account-level service limit 'ml.g5.xlarge for endpoint usage' is 0 Instances",
            ["ml.g5.xlarge for endpoint usage", "servicequotas"],
        ),
        (
            "CreateRole",
            "AccessDenied",
            "User: me is not authorized to perform: iam:CreateRole on resource: x",
            ["may not do iam:CreateRole", "llava-sagemaker policy"],
        ),
        ("PutObject", "AccessDenied", "no", ["may not do PutObject"]),
        ("GetCallerIdentity", "InvalidClientTokenId", "bad token", ["aws configure"]),
        ("GetCallerIdentity", "ExpiredToken", "too late", ["sign in again"]),
        ("CreateModel", "InternalFailure", "oops", ["CreateModel failed with InternalFailure"]),
    ],
)
def test_what_aws_refuses(
    account: Account,
    repository: Path,
    image: str,
    operation: str,
    code: str,
    said: str,
    expected: list[str],
) -> None:
    account.refuse, account.refusal = operation, (code, said)
    message = bad("up", "chat", "--repository", repository, "--image", image, "--yes")
    for words in expected:
        assert words in message


def test_a_new_role_is_waited_for(
    account: Account, repository: Path, image: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """IAM takes some seconds to tell all of AWS about a role."""
    account.refuse = "CreateModel"
    account.refusal = ("ValidationException", f"Could not assume role arn:aws:iam::1:role/{ROLE}.")
    tries = []

    def sleep(_: float) -> None:
        tries.append(1)
        if len(tries) == 3:
            account.refuse = None

    monkeypatch.setattr("llava_sagemaker.deploy.endpoint.time.sleep", sleep)
    output = good("up", "chat", "--repository", repository, "--image", image, "--yes")
    assert len(tries) == 3
    assert "new role" in output


def test_help_names_every_command() -> None:
    output = good("--help")
    for command in ("package", "image", "up", "update", "chat", "status", "down", "policy", "cost"):
        assert command in output
    assert len(app.registered_commands) == 9
