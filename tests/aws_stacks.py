"""CloudFormation for tests: a template becomes real calls to moto's other services.

moto's own CloudFormation knows neither scaling nor alarms, and its updates look at no conditions.
Here each resource is made by boto3, so that its properties are validated against botocore's models.
What makes a resource new rather than changed is read from AWS's own resource schemas, as cfn-lint
carries them.
"""

from __future__ import annotations

import copy
import json
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import boto3
import cfnlint
from botocore.exceptions import ClientError
from llava_sagemaker.deploy.place import Place
from llava_sagemaker.deploy.template import TEMPLATE, Resolver

_SCHEMAS = Path(cfnlint.__file__).parent / "data" / "schemas"
Client = Callable[[str], Any]
Properties = dict[str, Any]


@cache
def schema(resource_type: str) -> dict[str, Any]:
    """AWS's schema of a resource type."""
    index = json.loads((_SCHEMAS / "providers" / "us-east-1.json").read_text())
    text = (_SCHEMAS / "resources" / f"{index[resource_type]}.json").read_text()
    found: dict[str, Any] = json.loads(text)
    return found


class StackError(Exception):
    """What CloudFormation answers a call with."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass
class Made:
    """A resource that exists."""

    type: str
    name: str
    properties: Properties
    attributes: dict[str, str]


@dataclass
class Stack:
    """A stack, or one that was deleted."""

    name: str
    tags: list[dict[str, str]]
    body: str
    parameters: dict[str, str]
    status: str = "CREATE_COMPLETE"
    resources: dict[str, Made] = field(default_factory=dict)
    events: list[dict[str, str]] = field(default_factory=list)
    doing: str | None = None
    """What DescribeStacks says the first time: nothing is done at once."""
    id: str = ""

    def __post_init__(self) -> None:
        where = "arn:aws:cloudformation:us-east-1:123456789012:stack"
        self.id = f"{where}/{self.name}/{uuid.uuid4()}"

    def tell(self, what: str, status: str, reason: str = "") -> None:
        """A line of DescribeStackEvents."""
        event = {"EventId": str(uuid.uuid4()), "LogicalResourceId": what, "ResourceStatus": status}
        self.events.insert(0, event | ({"ResourceStatusReason": reason} if reason else {}))


class CloudFormation:
    """Answers the calls that `deploy` makes.

    Args:
        client: gives boto3 clients for moto; what they refuse fails the resource.
        endpoint_failure: why the next endpoint or update of one fails, if it does.
        endpoint_gone: called when an endpoint has been deleted.
    """

    def __init__(
        self,
        client: Client,
        endpoint_failure: Callable[[], str | None],
        endpoint_gone: Callable[[], None],
    ) -> None:
        self._client = client
        self._failure = endpoint_failure
        self._gone = endpoint_gone
        self.stacks: list[Stack] = []

    def answer(self, operation: str, params: dict[str, Any]) -> dict[str, Any]:
        """Raises StackError where CloudFormation would refuse."""
        name = params["StackName"]
        found = [
            stack
            for stack in self.stacks
            if name == stack.id or (name == stack.name and stack.status != "DELETE_COMPLETE")
        ]
        if operation == "CreateStack":
            if found:
                raise StackError("AlreadyExistsException", f"Stack [{name}] already exists")
            return self._create(params)
        if not found:
            raise StackError("ValidationError", f"Stack with id {name} does not exist")
        (stack,) = found
        match operation:
            case "DescribeStacks":
                status, stack.doing = stack.doing or stack.status, None
                shown = [
                    {"ParameterKey": key, "ParameterValue": value}
                    for key, value in stack.parameters.items()
                ]
                told = {"StackId": stack.id, "StackName": stack.name, "StackStatus": status}
                return {"Stacks": [{**told, "Parameters": shown, "Tags": stack.tags}]}
            case "DescribeStackEvents":
                return {"StackEvents": copy.deepcopy(stack.events)}
            case "DescribeStackResources":
                listed = [
                    {
                        "LogicalResourceId": name,
                        "PhysicalResourceId": made.name,
                        "ResourceStatus": "CREATE_COMPLETE",
                    }
                    for name, made in stack.resources.items()
                ]
                return {"StackResources": listed}
            case "GetTemplate":
                return {"TemplateBody": stack.body}
            case "UpdateStack":
                return self._update(stack, params)
            case "DeleteStack":
                self._delete(stack)
                return {}
        raise AssertionError(operation)

    def _create(self, params: dict[str, Any]) -> dict[str, Any]:
        assert params["Capabilities"] == ["CAPABILITY_IAM"]
        assert params["OnFailure"] == "DELETE"
        given = {p["ParameterKey"]: p["ParameterValue"] for p in params["Parameters"]}
        stack = Stack(params["StackName"], params["Tags"], params["TemplateBody"], given)
        self.stacks.append(stack)
        stack.doing = "CREATE_IN_PROGRESS"
        stack.status = "CREATE_COMPLETE" if self._apply(stack, given) else "DELETE_COMPLETE"
        return {"StackId": stack.id}

    def _update(self, stack: Stack, params: dict[str, Any]) -> dict[str, Any]:
        given = {p["ParameterKey"]: p["ParameterValue"] for p in params["Parameters"]}
        if self._wanted(stack, given) == {
            name: made.properties for name, made in stack.resources.items()
        }:
            raise StackError("ValidationError", "No updates are to be performed.")
        stack.doing = "UPDATE_IN_PROGRESS"
        if self._apply(stack, given):
            stack.parameters, stack.body = given, params["TemplateBody"]
            stack.status = "UPDATE_COMPLETE"
        else:
            stack.status = "UPDATE_ROLLBACK_COMPLETE"
        return {"StackId": stack.id}

    def _delete(self, stack: Stack) -> None:
        stack.doing = "DELETE_IN_PROGRESS"
        for name in reversed(_order()):
            made = stack.resources.get(name)
            if made is None:
                continue
            try:
                self._remove(made)
            except ClientError as error:
                stack.tell(name, "DELETE_FAILED", str(error))
                stack.status = "DELETE_FAILED"
                return
            stack.tell(name, "DELETE_COMPLETE")
            del stack.resources[name]
        stack.status = "DELETE_COMPLETE"

    def _resolver(self, stack: Stack, parameters: dict[str, str]) -> Resolver:
        """Knows what the stack has by now."""
        place = Place(boto3.Session(region_name="us-east-1"), parameters["Name"], "123456789012")
        known = {}
        for name, made in stack.resources.items():
            known[name] = made.name
            known |= {f"{name}.{attribute}": v for attribute, v in made.attributes.items()}
        return Resolver(place, parameters, known)

    def _wanted(self, stack: Stack, parameters: dict[str, str]) -> dict[str, Properties]:
        """What the resources would be."""
        resolver = self._resolver(stack, parameters)
        return {
            name: resolver.of(definition["Properties"])
            for name, definition in TEMPLATE["Resources"].items()
            if "Condition" not in definition or resolver.holds(definition["Condition"])
        }

    def _apply(self, stack: Stack, parameters: dict[str, str]) -> bool:
        """Bring the resources to what the template says; False: it failed, and all is as before."""
        before = dict(stack.resources)
        undo: list[Callable[[], Any]] = []
        garbage: list[Made] = []
        wanted = []
        for name in _order():
            resolver = self._resolver(stack, parameters)
            definition = TEMPLATE["Resources"][name]
            if "Condition" in definition and not resolver.holds(definition["Condition"]):
                continue
            wanted.append(name)
            properties = resolver.of(definition["Properties"])
            assert "Fn::" not in json.dumps(properties), properties
            assert '"Ref"' not in json.dumps(properties), properties
            old = stack.resources.get(name)
            if old is not None and old.properties == properties:
                continue
            try:
                stack.resources[name] = self._bring(
                    stack, name, definition["Type"], old, properties, undo, garbage
                )
            except (ClientError, StackError) as error:
                stack.tell(name, "CREATE_FAILED" if old is None else "UPDATE_FAILED", str(error))
                for step in reversed(undo):
                    step()
                stack.resources = before
                return False
            stack.tell(name, "CREATE_COMPLETE" if old is None else "UPDATE_COMPLETE")
        for name in [name for name in reversed(_order()) if name not in wanted]:
            if name in stack.resources:
                garbage.append(stack.resources.pop(name))
        for made in reversed(garbage):
            self._remove(made)
        return True

    def _bring(
        self,
        stack: Stack,
        name: str,
        resource_type: str,
        old: Made | None,
        properties: Properties,
        undo: list[Callable[[], Any]],
        garbage: list[Made],
    ) -> Made:
        if old is not None:
            changed = {
                key
                for key in {**old.properties, **properties}
                if old.properties.get(key) != properties.get(key)
            }
            fixed = {path.split("/")[2] for path in schema(resource_type)["createOnlyProperties"]}
            if not changed & fixed:
                self._change(old, properties)
                undo.append(lambda: self._change(old, old.properties))
                return Made(resource_type, old.name, properties, old.attributes)
            garbage.append(old)
        made = self._make(stack, name, resource_type, properties)
        undo.append(lambda: self._remove(made))
        if resource_type == "AWS::SageMaker::Endpoint" and (reason := self._failure()):
            raise StackError("", reason)
        return made

    # ---- each type, by its own service ----

    def _make(self, stack: Stack, logical: str, resource_type: str, props: Properties) -> Made:
        tags = stack.tags
        tag_map = {tag["Key"]: tag["Value"] for tag in tags}
        attributes: dict[str, str] = {}
        match resource_type.removeprefix("AWS::"):
            case "S3::Bucket":
                name = props["BucketName"]
                s3 = self._client("s3")
                # moto's us-east-1, as the real one, makes a bucket that is ours once more.
                if any(bucket["Name"] == name for bucket in s3.list_buckets()["Buckets"]):
                    raise StackError("", f"{name} already exists")
                attributes = {"Arn": f"arn:aws:s3:::{name}"}
                made = Made(resource_type, name, props, attributes)
                s3.create_bucket(Bucket=name)
                with self._whole(made):
                    s3.put_bucket_tagging(Bucket=name, Tagging={"TagSet": tags})
                    self._change(made, props)
            case "ECR::Repository":
                name = props["RepositoryName"]
                assert props == {"RepositoryName": name, "EmptyOnDelete": True}
                answer = self._client("ecr").create_repository(repositoryName=name, tags=tags)
                attributes = {"Arn": answer["repository"]["repositoryArn"]}
            case "Logs::LogGroup":
                name = props["LogGroupName"]
                logs = self._client("logs")
                logs.create_log_group(logGroupName=name, tags=tag_map)
                with self._whole(Made(resource_type, name, props, {})):
                    logs.put_retention_policy(
                        logGroupName=name, retentionInDays=props["RetentionInDays"]
                    )
            case "IAM::Role":
                name = f"{stack.name}-{logical}-{uuid.uuid4().hex[:12].upper()}"
                iam = self._client("iam")
                answer = iam.create_role(
                    RoleName=name,
                    AssumeRolePolicyDocument=json.dumps(props["AssumeRolePolicyDocument"]),
                    Description=props["Description"],
                    Tags=tags,
                )
                attributes = {"Arn": answer["Role"]["Arn"]}
                made = Made(resource_type, name, props, attributes)
                with self._whole(made):
                    self._change(made, props)
            case "SageMaker::Model":
                name = props["ModelName"]
                self._client("sagemaker").create_model(**props, Tags=tags)
                attributes = {"ModelName": name}
            case "SageMaker::EndpointConfig":
                name = props["EndpointConfigName"]
                self._client("sagemaker").create_endpoint_config(**props, Tags=tags)
                attributes = {"EndpointConfigName": name}
            case "SageMaker::Endpoint":
                name = props["EndpointName"]
                given = {k: v for k, v in props.items() if not k.startswith("Retain")}
                sagemaker = self._client("sagemaker")
                if any(e["EndpointName"] == name for e in sagemaker.list_endpoints()["Endpoints"]):
                    raise StackError("", f"the endpoint {name} already exists")  # moto takes it
                sagemaker.create_endpoint(**given, Tags=tags)
                attributes = {"EndpointName": name}
            case "CloudWatch::Alarm":
                name = props["AlarmName"]
                self._client("cloudwatch").put_metric_alarm(**props, Tags=tags)
            case "ApplicationAutoScaling::ScalableTarget":
                name = "|".join([props["ResourceId"], props["ScalableDimension"], "sagemaker"])
                scaling = self._client("application-autoscaling")
                scaling.register_scalable_target(**props, Tags=tag_map)
            case "ApplicationAutoScaling::ScalingPolicy":
                name = props["PolicyName"]
                self._change(Made(resource_type, name, props, {}), props)
            case _:
                raise AssertionError(resource_type)
        return Made(resource_type, name, props, attributes)

    @contextmanager
    def _whole(self, made: Made) -> Iterator[None]:
        """What takes several calls goes again when it stops halfway."""
        try:
            yield
        except ClientError:
            self._remove(made)
            raise

    def _change(self, made: Made, props: Properties) -> None:
        match made.type.removeprefix("AWS::"):
            case "S3::Bucket":
                s3 = self._client("s3")
                rules = []
                for rule in copy.deepcopy(props["LifecycleConfiguration"]["Rules"]):
                    if "ExpirationInDays" in rule:
                        rule["Expiration"] = {"Days": rule.pop("ExpirationInDays")}
                    rule["ID"], rule["Filter"] = rule.pop("Id"), {"Prefix": rule.pop("Prefix")}
                    rules.append(rule)
                s3.put_bucket_lifecycle_configuration(
                    Bucket=made.name, LifecycleConfiguration={"Rules": rules}
                )
                (rule,) = props["BucketEncryption"]["ServerSideEncryptionConfiguration"]
                encryption = copy.deepcopy(rule)
                encryption["ApplyServerSideEncryptionByDefault"] = encryption.pop(
                    "ServerSideEncryptionByDefault"
                )
                s3.put_bucket_encryption(
                    Bucket=made.name, ServerSideEncryptionConfiguration={"Rules": [encryption]}
                )
                s3.put_public_access_block(
                    Bucket=made.name,
                    PublicAccessBlockConfiguration=props["PublicAccessBlockConfiguration"],
                )
            case "IAM::Role":
                for policy in props["Policies"]:
                    self._client("iam").put_role_policy(
                        RoleName=made.name,
                        PolicyName=policy["PolicyName"],
                        PolicyDocument=json.dumps(policy["PolicyDocument"]),
                    )
            case "SageMaker::Endpoint":
                if reason := self._failure():
                    raise StackError("", reason)
                self._client("sagemaker").update_endpoint(**props)
            case "ApplicationAutoScaling::ScalableTarget":
                self._client("application-autoscaling").register_scalable_target(**props)
            case "ApplicationAutoScaling::ScalingPolicy":
                resource, dimension, service = props["ScalingTargetId"].split("|")
                self._client("application-autoscaling").put_scaling_policy(
                    ServiceNamespace=service,
                    ResourceId=resource,
                    ScalableDimension=dimension,
                    **{k: v for k, v in props.items() if k != "ScalingTargetId"},
                )
            case "CloudWatch::Alarm":
                self._client("cloudwatch").put_metric_alarm(**props)
            case other:
                raise AssertionError(f"{other} cannot be changed in place: {props}")

    def _remove(self, made: Made) -> None:
        match made.type.removeprefix("AWS::"):
            case "S3::Bucket":
                self._client("s3").delete_bucket(Bucket=made.name)
            case "ECR::Repository":
                self._client("ecr").delete_repository(repositoryName=made.name, force=True)
            case "Logs::LogGroup":
                self._client("logs").delete_log_group(logGroupName=made.name)
            case "IAM::Role":
                iam = self._client("iam")
                for policy in iam.list_role_policies(RoleName=made.name)["PolicyNames"]:
                    iam.delete_role_policy(RoleName=made.name, PolicyName=policy)
                iam.delete_role(RoleName=made.name)
            case "SageMaker::Model":
                self._client("sagemaker").delete_model(ModelName=made.name)
            case "SageMaker::EndpointConfig":
                self._client("sagemaker").delete_endpoint_config(EndpointConfigName=made.name)
            case "SageMaker::Endpoint":
                self._client("sagemaker").delete_endpoint(EndpointName=made.name)
                self._gone()
            case "CloudWatch::Alarm":
                self._client("cloudwatch").delete_alarms(AlarmNames=[made.name])
            case "ApplicationAutoScaling::ScalableTarget":
                resource, dimension, service = made.name.split("|")
                self._client("application-autoscaling").deregister_scalable_target(
                    ServiceNamespace=service, ResourceId=resource, ScalableDimension=dimension
                )
            case "ApplicationAutoScaling::ScalingPolicy":
                resource, dimension, service = made.properties["ScalingTargetId"].split("|")
                self._client("application-autoscaling").delete_scaling_policy(
                    PolicyName=made.name,
                    ServiceNamespace=service,
                    ResourceId=resource,
                    ScalableDimension=dimension,
                )
            case other:
                raise AssertionError(other)


@cache
def _order() -> list[str]:
    """The template's resources, each after those that it needs."""
    resources = TEMPLATE["Resources"]
    text = {name: json.dumps(definition) for name, definition in resources.items()}
    ordered: list[str] = []

    def add(name: str) -> None:
        if name in ordered:
            return
        for other in resources:
            quoted = rf'"{other}"|\$\{{{other}[.}}]'
            if other != name and re.search(quoted, text[name]):
                add(other)
        ordered.append(name)

    for name in resources:
        add(name)
    return ordered
