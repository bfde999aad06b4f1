"""`llava-sagemaker`: costs before creation, images, and mistakes told in plain words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from llava_sagemaker.deploy.cli import app

from llava_triton.client import ErrorCode, Session, SessionError
from tests import aws_account
from tests.aws_account import REGION, Account, bad, docker, good, run

moto, account = aws_account.moto, aws_account.account
image, repository = aws_account.image, aws_account.repository

ACCOUNT = "123456789012"


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


# ---- the image ----


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
        ("CreateModel", "InternalFailure", "oops", ["Model: ", "InternalFailure", "oops"]),
        ("CreateStack", "InternalFailure", "oops", ["CreateStack failed with InternalFailure"]),
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


def test_help_names_every_command() -> None:
    output = good("--help")
    for command in ("package", "image", "up", "update", "chat", "status", "down", "policy", "cost"):
        assert command in output
    assert len(app.registered_commands) == 9
