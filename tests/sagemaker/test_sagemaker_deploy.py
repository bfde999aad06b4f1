"""`llava-sagemaker` against moto's server: an empty account, an endpoint, and back."""

from __future__ import annotations

import datetime
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests import aws_account
from tests.aws_account import REGION, Account, bad, good, run
from tests.aws_stacks import Stack

BUCKET = f"llava-triton-chat-123456789012-{REGION}"
STACK = "llava-triton-chat"

moto, account = aws_account.moto, aws_account.account
image, repository = aws_account.image, aws_account.repository


def describe(account: Account) -> tuple[Any, Any, Any]:
    """The endpoint, its configuration's variant and its model, as SageMaker has them."""
    sagemaker = account.client("sagemaker")
    endpoint = sagemaker.describe_endpoint(EndpointName="chat")
    config = sagemaker.describe_endpoint_config(EndpointConfigName=endpoint["EndpointConfigName"])
    (variant,) = config["ProductionVariants"]
    return endpoint, variant, sagemaker.describe_model(ModelName=variant["ModelName"])


def role_of(account: Account) -> str:
    """The name that CloudFormation gave to the instances' role."""
    (name,) = [n for n in account.everything()["roles"] if n.startswith(f"{STACK}-Role-")]
    return name


# ---- up ----


def test_up_creates_everything(account: Account, repository: Path, image: str) -> None:
    output = good(
        *("up", "chat", "--repository", repository, "--image", image, "--yes"),
        *("--min", 1, "--max", 4, "--image-bucket", "pictures", "--image-host", "example.org"),
    )
    assert "Bucket create complete" in output
    assert "Endpoint create complete" in output
    assert "in service" in output

    endpoint, variant, model = describe(account)
    assert endpoint["EndpointStatus"] == "InService"
    assert variant["VariantName"] == "sessions"
    assert variant["InstanceType"] == "ml.g5.xlarge"
    assert variant["InitialInstanceCount"] == 1
    assert variant["RoutingConfig"] == {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"}
    assert variant["ContainerStartupHealthCheckTimeoutInSeconds"] == 1800
    container = model["PrimaryContainer"]
    source = container["ModelDataSource"]["S3DataSource"]
    assert (source["S3DataType"], source["CompressionType"]) == ("S3Prefix", "None")
    assert source["S3Uri"].startswith(f"s3://{BUCKET}/repository-")
    assert source["S3Uri"].endswith("/")
    assert "/team/llava@sha256:" in container["Image"]
    assert container["Environment"] == {
        "LLAVA_ENDPOINT_NAME": "chat",
        "LLAVA_IMAGE_HOSTS": "example.org",
        "LLAVA_IMAGE_BUCKETS": "pictures",
        "LLAVA_CHANGED_SETTINGS": json.dumps(
            {"journal": f"s3://{BUCKET}/journal", "log_turns": True}
        ),
        "AWS_DEFAULT_REGION": REGION,
    }
    role = f"arn:aws:iam::123456789012:role/{role_of(account)}"
    assert model["ExecutionRoleArn"] == role

    prefix = source["S3Uri"].removeprefix(f"s3://{BUCKET}/")
    assert account.everything()["objects"] == [
        f"{BUCKET}/{prefix}{name}"
        for name in (
            "language_model/1/weights.bin",
            "language_model/config.pbtxt",
            "llava/config.pbtxt",
            "settings.json",
        )
    ]
    stored = account.client("s3").get_object(
        Bucket=BUCKET, Key=f"{prefix}language_model/1/weights.bin"
    )
    local = (repository / "language_model/1/weights.bin").read_bytes()
    assert stored["Body"].read() == local
    (alarm,) = account.client("cloudwatch").describe_alarms()["MetricAlarms"]
    assert alarm["MetricName"] == "Invocation5XXErrors"
    (group,) = account.client("logs").describe_log_groups()["logGroups"]
    assert group["logGroupName"] == "/aws/sagemaker/Endpoints/chat"
    assert group["retentionInDays"] == 14
    # All of it is tagged, except the image that was there before.
    assert account.untagged("chat") == [f"arn:aws:ecr:{REGION}:123456789012:repository/team/llava"]


def test_the_bucket_is_closed_encrypted_and_forgets_the_journal(
    account: Account, repository: Path, image: str
) -> None:
    up = ("up", "chat", "--repository", repository, "--image", image, "--yes")
    good(*up)
    s3 = account.client("s3")

    def encryption() -> Any:
        found = s3.get_bucket_encryption(Bucket=BUCKET)["ServerSideEncryptionConfiguration"]
        return found["Rules"][0]["ApplyServerSideEncryptionByDefault"]

    assert set(
        s3.get_public_access_block(Bucket=BUCKET)["PublicAccessBlockConfiguration"].values()
    ) == {True}
    assert encryption() == {"SSEAlgorithm": "AES256"}
    rules = {
        rule["ID"]: rule for rule in s3.get_bucket_lifecycle_configuration(Bucket=BUCKET)["Rules"]
    }
    assert rules["journal"]["Expiration"] == {"Days": 2}  # a session lives a day
    assert rules["journal"]["Filter"] == {"Prefix": "journal/"}
    assert "Expiration" not in rules["uploads"]
    key = f"arn:aws:kms:{REGION}:123456789012:key/mine"
    account.calls.clear()
    good(*up, "--kms-key", key)
    assert encryption() == {"SSEAlgorithm": "aws:kms", "KMSMasterKeyID": key}
    assert account.updates == []  # no other fleet


def test_settings_of_the_server(account: Account, repository: Path, image: str) -> None:
    up = ("up", "chat", "--repository", repository, "--image", image, "--yes")
    good(*up, "--setting", "max_sessions=10", "--setting", "journal=")

    def settings() -> Any:
        return json.loads(
            describe(account)[2]["PrimaryContainer"]["Environment"]["LLAVA_CHANGED_SETTINGS"]
        )

    assert settings() == {"max_sessions": 10, "journal": "", "log_turns": True}
    good("update", "chat", "--setting", "log_turns=null", "--setting", "weights=int8")
    assert settings() == {"max_sessions": 10, "weights": "int8", "journal": ""}
    assert "unknown settings: wieghts" in bad("update", "chat", "--setting", "wieghts=int8")
    assert "NAME=VALUE is expected" in bad("update", "chat", "--setting", "weights")
    assert "vision_max_batch" in bad("update", "chat", "--setting", "vision_max_batch=2")
    assert settings() == {"max_sessions": 10, "weights": "int8", "journal": ""}


def test_an_option_that_does_not_matter_yet(account: Account, repository: Path, image: str) -> None:
    good("up", "chat", "--repository", repository, "--image", image, "--yes")
    before = account.everything()
    output = good("update", "chat", "--sessions-per-instance", 5)  # nothing scales
    assert "changes nothing" in output
    assert account.everything() == before


def test_routing_by_prefix(account: Account, repository: Path, image: str) -> None:
    up = ("up", "chat", "--repository", repository, "--image", image, "--yes")
    good(*up, "--routing", "prefix-aware", "--max", 2)
    assert describe(account)[1]["RoutingConfig"] == {
        "RoutingStrategy": "PREFIX_AWARE",
        "PrefixAwareRoutingConfig": {"PrefixLength": 16384, "ConcurrencyThreshold": 32},
    }


def test_scaling_follows_sessions_and_memory(
    account: Account, repository: Path, image: str
) -> None:
    up = ("up", "chat", "--repository", repository, "--image", image, "--yes")
    good(*up, "--min", 1, "--max", 4)
    client = account.client("application-autoscaling")
    (target,) = client.describe_scalable_targets(ServiceNamespace="sagemaker")["ScalableTargets"]
    assert target["ResourceId"] == "endpoint/chat/variant/sessions"
    assert (target["MinCapacity"], target["MaxCapacity"]) == (1, 4)

    def policies() -> dict[str, Any]:
        found = client.describe_scaling_policies(ServiceNamespace="sagemaker")["ScalingPolicies"]
        name = "TargetTrackingScalingPolicyConfiguration"
        return {
            policy[name]["CustomizedMetricSpecification"]["MetricName"]: policy[name]
            for policy in found
        }

    first = policies()
    assert first["OpenSessions"]["CustomizedMetricSpecification"] == {
        "Namespace": "LlavaTriton",
        "MetricName": "OpenSessions",
        "Dimensions": [{"Name": "EndpointName", "Value": "chat"}],
        "Statistic": "Average",
    }
    assert first["OpenSessions"]["TargetValue"] == 70.0  # of the repository's 100
    assert first["OpenSessions"]["DisableScaleIn"] is False
    assert first["OpenSessions"]["ScaleInCooldown"] == 1200
    assert first["GpuMemoryUsed"]["DisableScaleIn"] is True

    account.calls.clear()
    account.made.clear()
    good("update", "chat", "--sessions-per-instance", 20, "--no-scale-in", "--yes")
    assert account.writes() == ["UpdateStack"]
    assert account.made == [("application-autoscaling", "PutScalingPolicy")]
    assert policies()["OpenSessions"]["TargetValue"] == 20.0
    assert policies()["OpenSessions"]["DisableScaleIn"] is True
    assert policies()["GpuMemoryUsed"] == first["GpuMemoryUsed"]

    # Limits above what runs: more instances, and the same configuration (no other fleet).
    good("update", "chat", "--min", 2, "--yes")
    assert describe(account)[0]["ProductionVariants"][0]["DesiredInstanceCount"] == 2
    assert account.updates == []
    # An instance with four GPUs has four engines, each with sessions of its own.
    good("update", "chat", "--instance-type", "ml.g5.12xlarge", "--yes")
    assert policies()["OpenSessions"]["TargetValue"] == 80.0
    # As many at least as at most: no autoscaling.
    good("update", "chat", "--max", 2, "--yes")
    assert account.everything()["targets"] == account.everything()["policies"] == []


def test_a_second_up_changes_nothing(account: Account, repository: Path, image: str) -> None:
    up = ("up", "chat", "--repository", repository, "--image", image, "--max", 3)
    good(*up, "--yes")
    before = account.everything()
    account.calls.clear()
    good(*up)  # nor does it ask
    assert account.calls
    assert account.writes() == []
    good("up", "chat")  # what is not given stays
    assert account.writes() == []
    assert account.everything() == before


# ---- update ----


def test_update_keeps_the_endpoint_and_sends_what_changed(
    account: Account, repository: Path, image: str
) -> None:
    # A file that travels in parts: its ETag says nothing about its content.
    (repository / "language_model/1/weights.bin").write_bytes(bytes(range(256)) * 36000)
    good("up", "chat", "--repository", repository, "--image", image, "--max", 3, "--yes")
    assert [call for call in account.calls if call[1] == "UploadPart"]
    old_endpoint, old_variant, old_model = describe(account)
    (repository / "llava/config.pbtxt").write_text("new")
    (repository / "settings.json").write_text('{"max_sessions": 50}')
    (repository / "language_model/config.pbtxt").rename(repository / "kept")
    shutil.copy(repository / "kept", repository / "language_model/config.pbtxt")
    (repository / "kept").unlink()
    account.calls.clear()
    account.steps.clear()
    good("update", "chat", "--repository", repository)
    assert not [call for call in account.calls if call[1] == "UploadPart"]
    sent = [params for _, operation, params in account.calls if operation == "PutObject"]
    assert sorted(Path(params["Key"]).name for params in sent) == ["config.pbtxt", "settings.json"]

    endpoint, variant, model = describe(account)
    assert endpoint["EndpointArn"] == old_endpoint["EndpointArn"]
    assert endpoint["CreationTime"] == old_endpoint["CreationTime"]
    assert endpoint["EndpointConfigName"] != old_endpoint["EndpointConfigName"]
    assert variant["InstanceType"] == old_variant["InstanceType"]
    assert model["PrimaryContainer"]["Image"] == old_model["PrimaryContainer"]["Image"]
    (request,) = account.updates
    assert request["RetainAllVariantProperties"] is True
    deployment = request["DeploymentConfig"]
    assert deployment["BlueGreenUpdatePolicy"]["TrafficRoutingConfiguration"]["Type"]
    assert deployment["AutoRollbackConfiguration"]["Alarms"] == [
        {"AlarmName": "llava-triton-chat-errors"}
    ]
    # The old version is gone, and only after the switch.
    assert account.steps.index("UpdateEndpoint") < account.steps.index("DeleteModel")
    left = account.everything()
    assert left["models"] == [variant["ModelName"]]
    assert left["configs"] == [endpoint["EndpointConfigName"]]
    prefix = model["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]["S3Uri"]
    assert len(left["objects"]) == 4
    assert all(f"s3://{name}".startswith(prefix) for name in left["objects"])
    body = account.client("s3").get_object(
        Bucket=BUCKET, Key=prefix.split("/", 3)[3] + "language_model/1/weights.bin"
    )["Body"]
    assert body.read() == (repository / "language_model/1/weights.bin").read_bytes()


def test_a_failed_update_goes_back(account: Account, repository: Path, image: str) -> None:
    good("up", "chat", "--repository", repository, "--image", image, "--yes")
    before = account.everything()
    (repository / "llava/config.pbtxt").write_text("broken")
    account.failure = "the alarm llava-triton-chat-errors was raised"
    message = bad("update", "chat", "--repository", repository)
    assert "rolled back" in message
    assert account.failure in message
    assert "/aws/sagemaker/Endpoints/chat" in message
    assert account.everything() == before
    # Once more, as it was: nothing to do.
    account.failure = None
    account.calls.clear()
    good("update", "chat")
    assert account.writes() == []


def test_a_raised_alarm_does_not_keep_a_broken_endpoint_from_being_mended(
    account: Account, repository: Path, image: str
) -> None:
    good("up", "chat", "--repository", repository, "--image", image, "--yes")
    account.client("cloudwatch").set_alarm_state(
        AlarmName="llava-triton-chat-errors", StateValue="ALARM", StateReason="all answers are 500"
    )
    (repository / "llava/config.pbtxt").write_text("mended")
    good("update", "chat", "--repository", repository)
    assert "AutoRollbackConfiguration" not in account.updates[0]["DeploymentConfig"]


def test_update_needs_an_endpoint(account: Account) -> None:
    assert "there is no endpoint chat" in bad("update", "chat", "--max", 2)


def test_a_failed_endpoint_is_told_and_made_anew(
    account: Account, repository: Path, image: str
) -> None:
    up = ("up", "chat", "--repository", repository, "--image", image, "--yes")
    account.failure = "The container did not pass the ping health check"
    message = bad(*up)
    assert account.failure in message
    assert "/aws/sagemaker/Endpoints/chat" in message
    assert "nothing is served" in message
    assert account.everything()["endpoints"] == []
    account.failure = None
    good(*up)
    account.calls.clear()
    good(*up)
    assert account.writes() == []


# ---- failures, and down ----


def test_what_a_failed_run_leaves_is_tagged_and_removed(
    account: Account, repository: Path, image: str
) -> None:
    """Each write of `up`, and of CloudFormation for it, refused in turn: the error names it, and
    `down` leaves nothing."""
    up = ("up", "chat", "--repository", repository, "--image", image, "--max", 2, "--yes")
    empty = account.everything()
    theirs = account.untagged("chat")
    good(*up)
    steps = list(dict.fromkeys(account.steps))
    assert len(steps) >= 16, steps
    good("down", "chat", "--yes")
    assert account.everything() == empty
    for count, step in enumerate(steps):
        account.refuse = step
        message = bad(*up)
        assert "may not" in message, message
        assert step in message, message
        assert account.untagged("chat") == theirs, step
        account.refuse = None
        if count % 4 == 3 or step == steps[-1]:  # else the next run goes on from here
            good("down", "chat", "--yes")
            assert account.everything() == empty, step


def test_down_removes_ours_and_nothing_else(account: Account, repository: Path, image: str) -> None:
    good("up", "chatty", "--repository", repository, "--image", image, "--max", 2, "--yes")
    sagemaker = account.client("sagemaker")
    account.client("s3").create_bucket(Bucket="somebodys")
    account.client("s3").put_object(Bucket="somebodys", Key="file", Body=b"x")
    account.client("iam").create_role(RoleName="llava-triton-other", AssumeRolePolicyDocument="{}")
    sagemaker.create_model(
        ModelName="chat-by-hand", ExecutionRoleArn="arn:aws:iam::123456789012:role/theirs"
    )
    before = account.everything()
    good("up", "chat", "--repository", repository, "--image", image, "--max", 3, "--yes")
    assert len(account.everything()["models"]) == 3
    result = run("down", "chat", answer="n\n")
    assert result.exit_code == 1
    assert len(account.everything()["models"]) == 3
    # The scaling goes first, then the endpoint; what instances need until they are gone, last.
    output = good("down", "chat", "--yes")
    order = [line.split()[0] for line in output.splitlines() if "delete complete" in line]
    assert order.index("ScalableTarget") < order.index("Endpoint")
    for needed in ("EndpointConfig", "Role", "Bucket", "Repository", "LogGroup"):
        assert order.index("Endpoint") < order.index(needed)
    assert account.everything() == before
    assert "nothing exists of chat" in good("down", "chat", "--yes")
    assert "nothing exists of chat" in good("status", "chat")


def test_down_takes_what_instances_write_to_the_end(
    account: Account, repository: Path, image: str
) -> None:
    before = account.everything()
    good("up", "chat", "--repository", repository, "--image", image, "--yes")
    account.client("s3").put_object(Bucket=BUCKET, Key="journal/a/1", Body=b"first")
    account.last_words = ("journal/a/2", b"second")
    good("down", "chat", "--yes")
    assert account.everything() == before


def test_an_update_leaves_the_journal(account: Account, repository: Path, image: str) -> None:
    good("up", "chat", "--repository", repository, "--image", image, "--yes")
    account.client("s3").put_object(Bucket=BUCKET, Key="journal/a/1", Body=b"first")
    (repository / "llava/config.pbtxt").write_text("new")
    good("update", "chat", "--repository", repository)
    assert f"{BUCKET}/journal/a/1" in account.everything()["objects"]


def test_down_goes_on_where_something_cannot_be_removed(
    account: Account, repository: Path, image: str
) -> None:
    before = account.everything()
    good("up", "chat", "--repository", repository, "--image", image, "--yes")
    role = role_of(account)
    account.refuse, account.refusal = "DeleteRole", ("DeleteConflict", "still in use")
    message = bad("down", "chat", "--yes")
    assert "Role: " in message
    assert "still in use" in message
    assert account.everything()["endpoints"] == []
    assert account.everything()["roles"] == [role]
    assert "cannot be changed" in bad("up", "chat", "--repository", repository, "--image", image)
    account.refuse = None
    good("down", "chat", "--yes")
    assert account.everything() == before


@pytest.mark.parametrize("kind", ["endpoint", "bucket", "stack", "log group", "repository"])
def test_a_name_that_somebody_has_is_left_alone(
    account: Account, repository: Path, image: str, kind: str
) -> None:
    sagemaker = account.client("sagemaker")
    if kind == "endpoint":
        sagemaker.create_model(ModelName="theirs", ExecutionRoleArn="arn:aws:iam::1:role/theirs")
        variant = {
            "VariantName": "sessions",
            "ModelName": "theirs",
            "InstanceType": "ml.m5.large",
            "InitialInstanceCount": 1,
        }
        sagemaker.create_endpoint_config(EndpointConfigName="theirs", ProductionVariants=[variant])
        sagemaker.create_endpoint(EndpointName="chat", EndpointConfigName="theirs")
        account.client("application-autoscaling").register_scalable_target(
            ServiceNamespace="sagemaker",
            ResourceId="endpoint/chat/variant/sessions",
            ScalableDimension="sagemaker:variant:DesiredInstanceCount",
            MinCapacity=1,
            MaxCapacity=2,
        )
    elif kind == "bucket":
        account.client("s3").create_bucket(Bucket=BUCKET)
    elif kind == "stack":
        account.stacks.stacks.append(Stack(STACK, [], "{}", {}))
    elif kind == "repository":
        account.client("ecr").create_repository(repositoryName="llava-triton/chat")
    else:
        account.client("logs").create_log_group(logGroupName="/aws/sagemaker/Endpoints/chat")
    before = account.everything()
    message = bad("up", "chat", "--repository", repository, "--image", image, "--yes")
    assert "somebody else's" in message
    if kind == "stack":
        assert "somebody else's" in bad("down", "chat", "--yes")
    else:
        good("down", "chat", "--yes")
    assert account.everything() == before


def test_a_stack_that_somebody_left_half_made(
    account: Account, repository: Path, image: str
) -> None:
    """As `aws cloudformation deploy` leaves it when its change set fails. A bucket of our name is
    not the stack's then, and stays as it is."""
    account.client("s3").create_bucket(Bucket=BUCKET)
    account.client("s3").put_object(Bucket=BUCKET, Key="file", Body=b"theirs")
    before = account.everything()
    tags = [{"Key": "llava-triton:endpoint", "Value": "chat"}]
    assert before["stacks"] == []
    account.stacks.stacks.append(Stack(STACK, tags, "", {}, status="REVIEW_IN_PROGRESS"))
    up = ("up", "chat", "--repository", repository, "--image", image, "--yes")
    assert "is REVIEW_IN_PROGRESS and cannot be changed" in bad(*up)
    good("down", "chat", "--yes")
    assert account.everything() == before


def test_status_tells_how_it_is(account: Account, repository: Path, image: str) -> None:
    good("up", "chat", "--repository", repository, "--image", image, "--max", 2, "--yes")
    minute_ago = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=1)
    account.client("cloudwatch").put_metric_data(
        Namespace="LlavaTriton",
        MetricData=[
            {
                "MetricName": "OpenSessions",
                "Dimensions": [{"Name": "EndpointName", "Value": "chat"}],
                "Value": value,
                "Timestamp": minute_ago,
            }
            for value in (4, 9)
        ],
    )
    account.calls.clear()
    output = good("status", "chat")
    assert account.writes() == []
    role = role_of(account)
    for expected in ("InService", BUCKET, role, "team/llava@sha256:", "(1 to 2), ml.g5.xlarge"):
        assert expected in output
    assert "sessions per instance:  6.5" in output, output


def test_package_alone(account: Account, repository: Path) -> None:
    good("package", "chat", repository)
    account.calls.clear()
    assert "unchanged" in good("package", "chat", repository)
    assert account.writes() == []
    # A file that a broken run left in the version's folder goes.
    key = account.everything()["objects"][0].split("/")[1] + "/stray"
    account.client("s3").put_object(Bucket=BUCKET, Key=key, Body=b"x")
    good("package", "chat", repository)
    assert len(account.everything()["objects"]) == 4
    assert json.loads(
        account.client("s3")
        .get_object(Bucket=BUCKET, Key=key[:-5] + "settings.json")["Body"]
        .read()
    ) == {"max_sessions": 100}
