"""An AWS account for tests: moto's server over real HTTP, and what moto lacks of the service."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import boto3
import pytest
from botocore.awsrequest import AWSResponse
from botocore.exceptions import ClientError
from botocore.loaders import create_loader
from llava_sagemaker.deploy import place as places
from llava_sagemaker.deploy.cli import app
from moto.applicationautoscaling.responses import ApplicationAutoScalingResponse
from moto.core.responses import ActionResult
from moto.sagemaker.models import FakeEndpointConfig
from moto.sagemaker.responses import SageMakerResponse
from moto.server import ThreadedMotoServer
from typer.testing import CliRunner, Result

from tests.aws_stacks import CloudFormation, StackError

REGION = "us-east-1"
_LOADER = create_loader()  # botocore's service models take long to read: once is enough
_SESSION = boto3.Session  # tests give the code under test a recording one
_READS = ("Describe", "List", "Get", "Head")


@dataclass
class Account:
    """What a test knows of the account, and can make happen in it."""

    calls: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    """Service, operation and parameters of each call of the code under test."""
    refuse: str | None = None
    """An operation that is answered with `refusal`."""
    refusal: tuple[str, str] = ("AccessDeniedException", "no")
    made: list[tuple[str, str]] = field(default_factory=list)
    """Service and operation of each call that CloudFormation made for the resources of stacks."""
    steps: list[str] = field(default_factory=list)
    """All writes, those of the code under test and of CloudFormation, in their order."""
    last_words: tuple[str, bytes] | None = None
    """Key and content of an object that instances write while they are taken away."""
    failure: str | None = None
    """Why the next endpoint or update fails."""
    updates: list[dict[str, Any]] = field(default_factory=list)
    """Requests of UpdateEndpoint."""
    scaling_tags: dict[str, dict[str, str]] = field(default_factory=dict)
    price_list: list[str] = field(default_factory=list)
    """What the Price List answers."""

    def __post_init__(self) -> None:
        self.stacks = CloudFormation(
            self._client_of_stacks, lambda: self.failure, self._endpoint_gone
        )

    def _client_of_stacks(self, service: str) -> Any:
        """What CloudFormation uses: refusals are for it too."""

        def before(model: Any, **_: Any) -> None:
            self.made.append((model.service_model.service_name, model.name))
            self.check(model.name)

        client = self.client(service)
        client.meta.events.register("before-parameter-build", before)
        return client

    def _endpoint_gone(self) -> None:
        if self.last_words is not None:
            bucket = self.client("s3").list_buckets()["Buckets"][0]["Name"]
            key, content = self.last_words
            self.client("s3").put_object(Bucket=bucket, Key=key, Body=content)

    def check(self, operation: str) -> None:
        """Raises ClientError for the operation that is to be refused."""
        if not operation.startswith(_READS):
            self.steps.append(operation)
        if operation == self.refuse:
            code, message = self.refusal
            raise ClientError({"Error": {"Code": code, "Message": message}}, operation)

    def client(self, service: str) -> Any:
        """A client that is not recorded, for the tests' own eyes."""
        session = _SESSION(region_name=REGION)
        session._session.register_component("data_loader", _LOADER)
        return session.client(service)

    def writes(self) -> list[str]:
        """The operations that were not mere questions."""
        return [name for _, name, _ in self.calls if not name.startswith(_READS)]

    def everything(self) -> dict[str, list[str]]:
        """Names of all there is in the account, by kind."""
        s3, sagemaker, scaling = map(self.client, ("s3", "sagemaker", "application-autoscaling"))
        buckets = [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]]
        return {
            "objects": [
                f"{bucket}/{entry['Key']}"
                for bucket in buckets
                for entry in s3.list_objects_v2(Bucket=bucket).get("Contents", [])
            ],
            "buckets": buckets,
            "repositories": [
                r["repositoryName"]
                for r in self.client("ecr").describe_repositories()["repositories"]
            ],
            "roles": [r["RoleName"] for r in self.client("iam").list_roles()["Roles"]],
            "stacks": [s.name for s in self.stacks.stacks if s.status != "DELETE_COMPLETE"],
            "models": [m["ModelName"] for m in sagemaker.list_models()["Models"]],
            "configs": [
                c["EndpointConfigName"]
                for c in sagemaker.list_endpoint_configs()["EndpointConfigs"]
            ],
            "endpoints": [e["EndpointName"] for e in sagemaker.list_endpoints()["Endpoints"]],
            "targets": [
                t["ResourceId"]
                for t in scaling.describe_scalable_targets(ServiceNamespace="sagemaker")[
                    "ScalableTargets"
                ]
            ],
            "policies": [
                p["PolicyName"]
                for p in scaling.describe_scaling_policies(ServiceNamespace="sagemaker")[
                    "ScalingPolicies"
                ]
            ],
            "alarms": [
                a["AlarmName"] for a in self.client("cloudwatch").describe_alarms()["MetricAlarms"]
            ],
            "log groups": [
                g["logGroupName"] for g in self.client("logs").describe_log_groups()["logGroups"]
            ],
        }

    def untagged(self, name: str) -> list[str]:
        """What there is without the deployment's tag (policies belong to their target)."""
        key, found = "llava-triton:endpoint", []
        s3, ecr, iam = map(self.client, ("s3", "ecr", "iam"))
        sagemaker, logs, watch = map(self.client, ("sagemaker", "logs", "cloudwatch"))

        def look(thing: str, tags: Any) -> None:
            if not isinstance(tags, dict):
                tags = {tag["Key"]: tag["Value"] for tag in tags}
            if tags.get(key) != name:
                found.append(thing)

        for bucket in s3.list_buckets()["Buckets"]:
            try:
                look(bucket["Name"], s3.get_bucket_tagging(Bucket=bucket["Name"])["TagSet"])
            except ClientError:
                found.append(bucket["Name"])
        for repository in ecr.describe_repositories()["repositories"]:
            arn = repository["repositoryArn"]
            look(arn, ecr.list_tags_for_resource(resourceArn=arn)["tags"])
        for role in iam.list_roles()["Roles"]:
            look(role["Arn"], iam.list_role_tags(RoleName=role["RoleName"])["Tags"])
        arns = [m["ModelArn"] for m in sagemaker.list_models()["Models"]]
        configs = sagemaker.list_endpoint_configs()["EndpointConfigs"]
        arns += [c["EndpointConfigArn"] for c in configs]
        arns += [e["EndpointArn"] for e in sagemaker.list_endpoints()["Endpoints"]]
        for arn in arns:
            look(arn, sagemaker.list_tags(ResourceArn=arn)["Tags"])
        for alarm in watch.describe_alarms()["MetricAlarms"]:
            arn = alarm["AlarmArn"]
            look(arn, watch.list_tags_for_resource(ResourceARN=arn)["Tags"])
        for group in logs.describe_log_groups()["logGroups"]:
            arn = group["arn"].removesuffix(":*")
            look(arn, logs.list_tags_for_resource(resourceArn=arn)["tags"])
        scaling = self.client("application-autoscaling")
        targets = scaling.describe_scalable_targets(ServiceNamespace="sagemaker")
        for target in targets["ScalableTargets"]:
            look(target["ResourceId"], self.scaling_tags.get(target["ScalableTargetARN"], {}))
        return found

    def push_image(self, repository: str, content: str) -> str:
        """An image in ECR; returns its URI by tag."""
        ecr = self.client("ecr")
        manifest = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
            "config": {"size": 1},
            "layers": [{"digest": content, "size": 1}],
        }
        ecr.put_image(
            repositoryName=repository, imageTag="latest", imageManifest=json.dumps(manifest)
        )
        return f"123456789012.dkr.ecr.{REGION}.amazonaws.com/{repository}:latest"


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """The URL of moto's server, on a free port of this process."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        yield f"http://{host}:{port}"
    finally:
        server.stop()


@pytest.fixture
def account(moto: str, monkeypatch: pytest.MonkeyPatch) -> Account:
    """An empty account, to which all boto3 calls of the test go."""
    # States are asked every 15 s of the real service.
    monkeypatch.setattr(places, "POLL_SECONDS", 0.01)
    urlopen(Request(f"{moto}/moto-api/reset", method="POST")).close()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", REGION)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    account = Account()
    _record(account, monkeypatch)
    _complete_moto(account, monkeypatch)
    return account


@pytest.fixture
def image(account: Account) -> str:
    """Somebody's image, in a repository that is not ours."""
    account.client("ecr").create_repository(repositoryName="team/llava")
    return account.push_image("team/llava", "first")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder like an exported model repository."""
    folder = tmp_path / "repository"
    for name, content in {
        "settings.json": b'{"max_sessions": 100}',
        "llava/config.pbtxt": b"llava",
        "language_model/config.pbtxt": b"language_model",
        "language_model/1/weights.bin": b"weights",
        "language_model/1/__pycache__/model.pyc": b"not this",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def run(*arguments: object, answer: str = "") -> Result:
    """The command line, in this process; `answer` is what the person types."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=answer)


def good(*arguments: object) -> str:
    """A command that succeeds; returns what it prints."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def bad(*arguments: object) -> str:
    """A mistake is told in a sentence: no traceback, exit status 1."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stderr.startswith("error: ")
    return result.stderr


# A shell starts it: a "#!" line cannot name a Python whose path has spaces.
DOCKER = """#!/bin/sh
'exec' 'PYTHON' "$0" "$@"
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


def _record(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    def before(params: dict[str, Any], model: Any, **_: Any) -> None:
        account.calls.append((model.service_model.service_name, model.name, dict(params)))
        account.check(model.name)

    def prices(**_: Any) -> tuple[Any, dict[str, Any]]:
        """The Price List, of which moto has nothing; the request has been validated by now."""
        return AWSResponse("", 200, {}, None), {"PriceList": account.price_list}

    def stacks(model: Any, **_: Any) -> tuple[Any, dict[str, Any]]:
        params = account.calls[-1][2]
        if model.name == "DescribeStacks":  # the first call of all: whether there is an AWS
            account.client("sts").get_caller_identity()
        try:
            said = account.stacks.answer(model.name, params)
        except StackError as error:
            refused = {"Code": error.code, "Message": str(error)}
            return AWSResponse("", 400, {}, None), {"Error": refused}
        return AWSResponse("", 200, {}, None), said

    class RecordingSession(_SESSION):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._session.register_component("data_loader", _LOADER)
            self.events.register("before-parameter-build", before)
            self.events.register("before-call.pricing.GetProducts", prices)
            self.events.register("before-call.cloudformation", stacks)

    monkeypatch.setattr(boto3, "Session", RecordingSession)


def _complete_moto(account: Account, monkeypatch: pytest.MonkeyPatch) -> None:
    """moto knows no UpdateEndpoint, and no tags of scalable targets."""
    register = ApplicationAutoScalingResponse.register_scalable_target

    def update_endpoint(response: Any) -> ActionResult:
        account.updates.append(json.loads(response.body))
        endpoint = response.sagemaker_backend.endpoints[account.updates[-1]["EndpointName"]]
        endpoint.endpoint_config_name = account.updates[-1]["EndpointConfigName"]
        return ActionResult({"EndpointArn": endpoint.arn})

    def register_scalable_target(response: Any) -> str:
        answer = register(response)
        if tags := json.loads(response.body).get("Tags"):
            account.scaling_tags[json.loads(answer)["ScalableTargetARN"]] = tags
        return str(answer)

    def list_tags_for_resource(response: Any) -> str:
        arn = json.loads(response.body)["ResourceARN"]
        return json.dumps({"Tags": account.scaling_tags.get(arn, {})})

    # Its list of instance types is years old; botocore's is looked at by the code under test.
    monkeypatch.setattr(FakeEndpointConfig, "validate_instance_type", lambda *_: None)
    monkeypatch.setattr(SageMakerResponse, "update_endpoint", update_endpoint, raising=False)
    scaling = ApplicationAutoScalingResponse
    monkeypatch.setattr(scaling, "register_scalable_target", register_scalable_target)
    monkeypatch.setattr(scaling, "list_tags_for_resource", list_tags_for_resource, raising=False)
