"""Model, endpoint configuration and endpoint.

A model and a configuration never change in SageMaker. Their names carry a hash of what they say, so
one that exists by the wanted name says what is wanted, and an update is a switch to another name.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import ClientError

from llava_sagemaker.deploy import place as places
from llava_sagemaker.deploy import report
from llava_sagemaker.deploy.errors import DeployError, is_absent, message_of
from llava_sagemaker.deploy.place import VARIANT, Place
from llava_sagemaker.deploy.settings import Deployment

_CHANGING = {"Creating", "Updating", "SystemUpdating", "RollingBack", "Deleting"}
_DOWNLOAD_SECONDS = 1800
_START_SECONDS = 1800
"""For the container to answer /ping; a TensorRT engine may have to be built first."""
_GPU_AMI = "al2023-ami-sagemaker-inference-gpu-4-1"
"""The machine image with NVIDIA driver 580, which CUDA 13's libraries need."""
_OLD_FLEET_SECONDS = 300
"""How long the old instances are kept after an update, to go back to."""


@dataclass(frozen=True)
class Running:
    """An endpoint that exists."""

    status: str
    failure: str
    config: str
    model: str
    image: str
    data_uri: str
    instances: int
    deployment: Deployment
    """As the configuration and the model say; the instance limits are the present number."""


class RolledBack(DeployError):  # noqa: N818 - it names what happened
    """An update failed and the endpoint runs what it ran before."""


def read_running(place: Place) -> Running | None:
    """The endpoint as it is, None when there is none; raises DeployError when it is not ours."""
    sagemaker = place.client("sagemaker")
    endpoint = _describe(place)
    if endpoint is None:
        return None
    tags = sagemaker.list_tags(ResourceArn=endpoint["EndpointArn"])["Tags"]
    place.must_own("SageMaker endpoint", place.name, tags)
    config = sagemaker.describe_endpoint_config(EndpointConfigName=endpoint["EndpointConfigName"])
    variant = config["ProductionVariants"][0]
    model = sagemaker.describe_model(ModelName=variant["ModelName"])
    container = model["PrimaryContainer"]
    environment = container.get("Environment", {})
    # A failed endpoint has no instances to count.
    counts: dict[str, Any] = next(iter(endpoint.get("ProductionVariants", [])), {})
    instances = int(counts.get("DesiredInstanceCount", variant["InitialInstanceCount"]))
    return Running(
        status=endpoint["EndpointStatus"],
        failure=endpoint.get("FailureReason", ""),
        config=endpoint["EndpointConfigName"],
        model=variant["ModelName"],
        image=container["Image"],
        data_uri=container["ModelDataSource"]["S3DataSource"]["S3Uri"],
        instances=instances,
        deployment=Deployment(
            instance_type=variant["InstanceType"],
            min_instances=instances,
            max_instances=instances,
            sessions_per_instance=0.0,
            scale_in=True,
            volume_gb=variant.get("VolumeSizeInGB"),
            image_hosts=_listed(environment, "LLAVA_IMAGE_HOSTS"),
            image_buckets=_listed(environment, "LLAVA_IMAGE_BUCKETS"),
        ),
    )


def bring_model(
    place: Place, deployment: Deployment, image: str, data_uri: str, role_arn: str
) -> str:
    """Create the model if there is none that says this; returns its name."""
    environment = {"LLAVA_ENDPOINT_NAME": place.name, "AWS_DEFAULT_REGION": place.region}
    if deployment.image_hosts:
        environment["LLAVA_IMAGE_HOSTS"] = ",".join(deployment.image_hosts)
    if deployment.image_buckets:
        environment["LLAVA_IMAGE_BUCKETS"] = ",".join(deployment.image_buckets)
    definition = {
        "PrimaryContainer": {
            "Image": image,
            "ModelDataSource": {
                "S3DataSource": {
                    "S3Uri": data_uri,
                    "S3DataType": "S3Prefix",
                    "CompressionType": "None",
                }
            },
            "Environment": environment,
        },
        "ExecutionRoleArn": role_arn,
    }
    name = f"{place.name}-{_digest(definition)}"
    if name not in find_models(place):
        _create_model(place, name, definition)
        report.say(f"created the model {name}")
    return name


def bring_config(place: Place, deployment: Deployment, model: str) -> str:
    """Create the endpoint configuration if there is none that says this; returns its name."""
    variant: dict[str, Any] = {
        "VariantName": VARIANT,
        "ModelName": model,
        "InstanceType": deployment.instance_type,
        "InitialVariantWeight": 1.0,
        "ModelDataDownloadTimeoutInSeconds": _DOWNLOAD_SECONDS,
        "ContainerStartupHealthCheckTimeoutInSeconds": _START_SECONDS,
        # Where a new session goes; later requests follow their session.
        "RoutingConfig": {"RoutingStrategy": "LEAST_OUTSTANDING_REQUESTS"},
    }
    if deployment.volume_gb is not None:
        variant["VolumeSizeInGB"] = deployment.volume_gb
    if deployment.instance_type.startswith(("ml.g", "ml.p")):
        variant["InferenceAmiVersion"] = _GPU_AMI
    # The number of instances is no part of the name: scaling is no reason for another fleet.
    name = f"{place.name}-{_digest(variant)}"
    if name not in find_configs(place):
        place.client("sagemaker").create_endpoint_config(
            EndpointConfigName=name,
            ProductionVariants=[variant | {"InitialInstanceCount": deployment.min_instances}],
            Tags=place.tags,
        )
        report.say(f"created the endpoint configuration {name}")
    return name


def bring_endpoint(place: Place, config: str, guarded: bool) -> None:
    """Create the endpoint with this configuration, or switch it over, and wait until it serves.

    Args:
        place: the deployment's.
        config: the wanted configuration's name.
        guarded: whether the alarm may roll an update back.

    Raises:
        RolledBack: the update failed; the endpoint serves as before.
        DeployError: the endpoint failed.
    """
    sagemaker = place.client("sagemaker")
    endpoint = wait(place)
    if endpoint is not None and endpoint["EndpointStatus"] == "Failed":
        report.say("the endpoint has failed before, and SageMaker only lets it be deleted")
        remove_endpoint(place)
        endpoint = None
    if endpoint is None:
        report.say(f"creating the endpoint {place.name}: 5 to 20 minutes")
        sagemaker.create_endpoint(
            EndpointName=place.name, EndpointConfigName=config, Tags=place.tags
        )
    elif endpoint["EndpointConfigName"] != config:
        report.say(f"updating the endpoint {place.name}: 10 to 30 minutes, it serves meanwhile")
        rollback = {"AutoRollbackConfiguration": {"Alarms": [{"AlarmName": place.alarm}]}}
        sagemaker.update_endpoint(
            EndpointName=place.name,
            EndpointConfigName=config,
            # As many instances as autoscaling wants now, not as many as the first time.
            RetainAllVariantProperties=True,
            DeploymentConfig={
                "BlueGreenUpdatePolicy": {
                    "TrafficRoutingConfiguration": {
                        "Type": "ALL_AT_ONCE",
                        "WaitIntervalInSeconds": 0,
                    },
                    "TerminationWaitInSeconds": _OLD_FLEET_SECONDS,
                },
                **(rollback if guarded else {}),
            },
        )
    endpoint = wait(place)
    if endpoint is None or endpoint["EndpointStatus"] != "InService":
        raise DeployError(_failure(place, endpoint))
    if endpoint["EndpointConfigName"] != config:
        raise RolledBack(
            f"the update of {place.name} failed and was rolled back; the endpoint serves what it "
            f"served before. {_reason(place, endpoint)}"
        )


def set_instances(place: Place, count: int) -> None:
    """Ask for another number of instances, and wait for them."""
    place.client("sagemaker").update_endpoint_weights_and_capacities(
        EndpointName=place.name,
        DesiredWeightsAndCapacities=[{"VariantName": VARIANT, "DesiredInstanceCount": count}],
    )
    wait(place)


def wait(place: Place) -> Any:
    """Wait until nothing changes any more; returns DescribeEndpoint's answer, None if it is gone.

    There is no time limit: SageMaker has its own, and ends in "Failed".
    """
    began, told = time.monotonic(), ""
    while True:
        endpoint = _describe(place)
        if endpoint is None or endpoint["EndpointStatus"] not in _CHANGING:
            return endpoint
        minutes, status = int((time.monotonic() - began) / 60), endpoint["EndpointStatus"]
        if told != (told := f"{place.name} is {status}, {minutes} min"):
            report.say(told)
        time.sleep(places.POLL_SECONDS)


def find_endpoint(place: Place) -> bool:
    """Whether the endpoint exists and is ours."""
    endpoint = _describe(place)
    return endpoint is not None and _owned(place, endpoint["EndpointArn"])


def find_models(place: Place) -> list[str]:
    """Our models' names, of half-finished runs too."""
    pages = (
        place.client("sagemaker")
        .get_paginator("list_models")
        .paginate(NameContains=f"{place.name}-")
    )
    return [
        model["ModelName"]
        for page in pages
        for model in page["Models"]
        if model["ModelName"].startswith(f"{place.name}-") and _owned(place, model["ModelArn"])
    ]


def find_configs(place: Place) -> list[str]:
    """Our endpoint configurations' names, of half-finished runs too."""
    pages = (
        place.client("sagemaker")
        .get_paginator("list_endpoint_configs")
        .paginate(NameContains=f"{place.name}-")
    )
    return [
        config["EndpointConfigName"]
        for page in pages
        for config in page["EndpointConfigs"]
        if config["EndpointConfigName"].startswith(f"{place.name}-")
        and _owned(place, config["EndpointConfigArn"])
    ]


def remove_endpoint(place: Place) -> None:
    """Delete the endpoint, and wait until it is gone."""
    wait(place)  # SageMaker deletes none that changes
    place.client("sagemaker").delete_endpoint(EndpointName=place.name)
    wait(place)


def remove_model(place: Place, name: str) -> None:
    """Delete a model."""
    place.client("sagemaker").delete_model(ModelName=name)


def remove_config(place: Place, name: str) -> None:
    """Delete an endpoint configuration."""
    place.client("sagemaker").delete_endpoint_config(EndpointConfigName=name)


def _describe(place: Place) -> Any:
    try:
        return place.client("sagemaker").describe_endpoint(EndpointName=place.name)
    except ClientError as error:
        if is_absent(error):
            return None
        raise


def _owned(place: Place, arn: str) -> bool:
    return place.owns(place.client("sagemaker").list_tags(ResourceArn=arn)["Tags"])


def _create_model(place: Place, name: str, definition: dict[str, Any]) -> None:
    """CreateModel; a role made a moment ago is not known everywhere for some seconds."""
    for attempt in range(12):
        try:
            place.client("sagemaker").create_model(ModelName=name, Tags=place.tags, **definition)
            return
        except ClientError as error:
            message = message_of(error).lower()
            new_role = "role" in message and ("assume" in message or "invalid" in message)
            if not new_role or attempt == 11:
                raise
            if attempt == 0:
                report.say("waiting until the new role is known everywhere")
            time.sleep(places.POLL_SECONDS / 3)


def _failure(place: Place, endpoint: Any) -> str:
    status = endpoint["EndpointStatus"] if endpoint is not None else "deleted by somebody else"
    return f"the endpoint {place.name} does not serve: it is {status}. {_reason(place, endpoint)}"


def _reason(place: Place, endpoint: Any) -> str:
    reason = (endpoint or {}).get("FailureReason") or "SageMaker gives no reason"
    return (
        f"{reason.rstrip('.')}.\nThe containers' own messages: "
        f"aws logs tail {place.log_group} --region {place.region} --since 1h"
    )


def _digest(definition: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:12]


def _listed(environment: dict[str, str], name: str) -> tuple[str, ...]:
    return tuple(item for item in environment.get(name, "").split(",") if item)
