"""The CloudFormation template by itself: as AWS's linter and moto's CloudFormation see it."""

from __future__ import annotations

import ast
import warnings

import boto3
import cfnlint.api as cfnlint
import pytest
from cfnlint.config import ManualArgs
from llava_sagemaker.deploy import template
from llava_sagemaker.deploy.place import TAG, Place
from llava_sagemaker.scaling_metrics import GPU_MEMORY_USED, NAMESPACE, OPEN_SESSIONS
from moto import mock_aws

PARAMETERS = {
    "Name": "chat",
    "ImageUri": "123456789012.dkr.ecr.eu-west-1.amazonaws.com/team/llava@sha256:" + "0" * 64,
    "ModelDataUri": "s3://models/repository-1/",
    "Version": "1",
    "MaxInstances": "4",
    "ImageBuckets": "pictures",
    "ImageObjects": "arn:aws:s3:::pictures/*",
    "Routing": "PREFIX_AWARE",
}


REGIONS = ["us-east-1", "eu-west-1", "cn-north-1", "us-gov-west-1"]
"""Of all three partitions."""


def lint(text: str, regions: list[str]) -> list[str]:
    """What cfn-lint finds, by AWS's own schemas of the resources."""
    return [str(match) for match in cfnlint.lint(text, config=ManualArgs(regions=regions))]


def test_the_linter_has_nothing_to_say() -> None:
    assert lint(template.TEXT, REGIONS) == []


def test_it_may_be_sent_as_it_is() -> None:
    assert len(template.TEXT.encode()) < 51_200  # a larger one would have to lie in S3


def test_the_linter_would_see_it() -> None:
    (found,) = lint(template.TEXT.replace("Strategy: !Ref Routing", "Strategy: NEAR"), REGIONS[:1])
    assert "NEAR" in found


@mock_aws  # type: ignore[untyped-decorator]
def test_motos_cloudformation_makes_of_it_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another reading of the template's functions than ours."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    session = boto3.Session(region_name="eu-west-1")
    client = session.client("cloudformation")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of alarm and scaling, which it does not know
        monkeypatch.setattr(
            "moto.sagemaker.models.FakeEndpointConfig.validate_instance_type", lambda *_: None
        )
        client.create_stack(
            StackName="llava-triton-chat",
            TemplateBody=template.TEXT,
            Parameters=[{"ParameterKey": k, "ParameterValue": v} for k, v in PARAMETERS.items()],
            Tags=[{"Key": TAG, "Value": "chat"}],
        )
    sagemaker = session.client("sagemaker")
    (endpoint,) = sagemaker.list_endpoints()["Endpoints"]
    config = sagemaker.describe_endpoint(EndpointName=endpoint["EndpointName"])
    (variant,) = sagemaker.describe_endpoint_config(
        EndpointConfigName=config["EndpointConfigName"]
    )["ProductionVariants"]
    model = sagemaker.describe_model(ModelName=variant["ModelName"])
    (role,) = session.client("iam").list_roles()["Roles"]
    assert model["ExecutionRoleArn"] == role["Arn"]
    place = Place(session, "chat", "123456789012")
    known = {
        "Model.ModelName": variant["ModelName"],
        "Role.Arn": role["Arn"],
        "Bucket.Arn": f"arn:aws:s3:::{place.bucket}",
        "LogGroup": place.log_group,
        "Repository.Arn": f"arn:aws:ecr:eu-west-1:123456789012:repository/{place.image_repository}",
    }
    ours = template.Resolver(place, PARAMETERS, known)
    resources = ours.of(template.TEMPLATE["Resources"])
    assert variant == resources["EndpointConfig"]["Properties"]["ProductionVariants"][0]
    assert model["PrimaryContainer"] == resources["Model"]["Properties"]["PrimaryContainer"]
    document = session.client("iam").get_role_policy(
        RoleName=role["RoleName"], PolicyName="instances"
    )["PolicyDocument"]
    wanted = resources["Role"]["Properties"]["Policies"][0]["PolicyDocument"]
    found = ast.literal_eval(document)  # moto keeps it as Python's text, and NoValue in lists
    found["Statement"] = [statement for statement in found["Statement"] if statement is not None]
    assert found == wanted
    assert session.client("s3").head_bucket(Bucket=place.bucket)
    groups = session.client("logs").describe_log_groups()["logGroups"]
    assert [group["logGroupName"] for group in groups] == [place.log_group]


def test_autoscaling_asks_for_what_instances_publish() -> None:
    policies = [
        template.TEMPLATE["Resources"][name]["Properties"]
        for name in ("SessionsPolicy", "MemoryPolicy")
    ]
    metrics = [
        policy["TargetTrackingScalingPolicyConfiguration"]["CustomizedMetricSpecification"]
        for policy in policies
    ]
    assert {metric["Namespace"] for metric in metrics} == {NAMESPACE}
    assert [metric["MetricName"] for metric in metrics] == [OPEN_SESSIONS, GPU_MEMORY_USED]


def test_the_version_is_of_what_a_fleet_is_made_of() -> None:
    place = Place(boto3.Session(region_name="eu-west-1"), "chat", "123456789012")
    first = template.version(place, PARAMETERS)
    scaled = {"MinInstances": "2", "InitialInstances": "3", "SessionsPerInstance": "9"}
    assert template.version(place, {**PARAMETERS, **scaled, "Version": "2"}) == first
    for changed in ({"InstanceType": "ml.g6.xlarge"}, {"Settings": '{"max_sessions": 1}'}):
        assert template.version(place, {**PARAMETERS, **changed}) != first
