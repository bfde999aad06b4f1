"""Autoscaling: as many instances as the open sessions need, and more when their memory fills up.

Both metrics are published by each instance about itself (see `container/`), so the average over
what comes in is the value per instance. The higher demand wins; instances are taken away only on
account of the sessions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from llava_sagemaker.deploy import endpoint, report
from llava_sagemaker.deploy.place import TAG, VARIANT, Place
from llava_sagemaker.deploy.settings import Deployment
from llava_sagemaker.scaling_metrics import ENDPOINT, GPU_MEMORY_USED, NAMESPACE, OPEN_SESSIONS

_SESSIONS, _MEMORY = "llava-triton-sessions", "llava-triton-gpu-memory"
_MEMORY_PERCENT = 90.0
_SCALE_OUT_SECONDS = 600
"""About as long as a new instance needs before it takes sessions."""
_SCALE_IN_SECONDS = 1200
"""An unused session's life: the instance that goes next is chosen among emptier ones."""


def bring_scaling(place: Place, wanted: Deployment) -> None:
    """Make instance limits and policies what is wanted; the endpoint must be in service."""
    running = endpoint.read_running(place)
    assert running is not None, "scaling comes after the endpoint"
    count = min(max(running.instances, wanted.min_instances), wanted.max_instances)
    if wanted.min_instances == wanted.max_instances:
        if find_scaling(place):
            remove_scaling(place)
    else:
        _bring_target(place, wanted)
        _bring_policies(place, wanted)
    if count != running.instances:
        report.say(f"going from {running.instances} to {count} instances")
        endpoint.set_instances(place, count)


def read_scaling(place: Place, deployment: Deployment) -> Deployment:
    """The deployment with what autoscaling says about it."""
    target = _describe_target(place)
    if target is None:
        return deployment
    policy = _describe_policies(place).get(_SESSIONS, {})
    return dataclasses.replace(
        deployment,
        min_instances=target["MinCapacity"],
        max_instances=target["MaxCapacity"],
        sessions_per_instance=policy.get("TargetValue", 0.0),
        scale_in=not policy.get("DisableScaleIn", False),
    )


def find_scaling(place: Place) -> bool:
    """Whether the endpoint scales, and by our doing."""
    target = _describe_target(place)
    return target is not None and _owned(place, target)


def remove_scaling(place: Place) -> None:
    """Delete the policies (AWS deletes their alarms with them) and forget the limits."""
    client = place.client("application-autoscaling")
    for name in _describe_policies(place):
        client.delete_scaling_policy(PolicyName=name, **_variant(place))
    client.deregister_scalable_target(**_variant(place))
    report.say("removed the autoscaling")


def _bring_target(place: Place, wanted: Deployment) -> None:
    limits = {"MinCapacity": wanted.min_instances, "MaxCapacity": wanted.max_instances}
    target = _describe_target(place)
    if target is not None and all(target[name] == value for name, value in limits.items()):
        return
    client = place.client("application-autoscaling")
    if target is None:
        client.register_scalable_target(**_variant(place), **limits, Tags={TAG: place.name})
    else:  # tags are only taken with the first registration
        client.register_scalable_target(**_variant(place), **limits)
    report.say(f"autoscaling: {wanted.min_instances} to {wanted.max_instances} instances")


def _bring_policies(place: Place, wanted: Deployment) -> None:
    policies = {
        _SESSIONS: _tracking(
            place, OPEN_SESSIONS, wanted.sessions_per_instance, scale_in=wanted.scale_in
        ),
        # Memory that is full of idle sessions' state is no reason to keep an instance.
        _MEMORY: _tracking(place, GPU_MEMORY_USED, _MEMORY_PERCENT, scale_in=False),
    }
    present = _describe_policies(place)
    for name, policy in policies.items():
        if present.get(name) != policy:
            place.client("application-autoscaling").put_scaling_policy(
                PolicyName=name,
                PolicyType="TargetTrackingScaling",
                TargetTrackingScalingPolicyConfiguration=policy,
                **_variant(place),
            )
            report.say(f"autoscaling: policy {name}, target {policy['TargetValue']:g}")


def _tracking(place: Place, metric: str, target: float, scale_in: bool) -> dict[str, Any]:
    return {
        "TargetValue": float(target),
        "CustomizedMetricSpecification": {
            "MetricName": metric,
            "Namespace": NAMESPACE,
            "Dimensions": [{"Name": ENDPOINT, "Value": place.name}],
            "Statistic": "Average",
        },
        "ScaleOutCooldown": _SCALE_OUT_SECONDS,
        "ScaleInCooldown": _SCALE_IN_SECONDS,
        "DisableScaleIn": not scale_in,
    }


def _variant(place: Place) -> dict[str, str]:
    return {
        "ServiceNamespace": "sagemaker",
        "ResourceId": f"endpoint/{place.name}/variant/{VARIANT}",
        "ScalableDimension": "sagemaker:variant:DesiredInstanceCount",
    }


def _describe_target(place: Place) -> Any:
    variant = _variant(place)
    found = place.client("application-autoscaling").describe_scalable_targets(
        ServiceNamespace="sagemaker",
        ResourceIds=[variant["ResourceId"]],
        ScalableDimension=variant["ScalableDimension"],
    )["ScalableTargets"]
    return next(iter(found), None)


def _owned(place: Place, target: Any) -> bool:
    client = place.client("application-autoscaling")
    tags = client.list_tags_for_resource(ResourceARN=target["ScalableTargetARN"])["Tags"]
    return bool(tags.get(TAG) == place.name)


def _describe_policies(place: Place) -> dict[str, dict[str, Any]]:
    found = place.client("application-autoscaling").describe_scaling_policies(**_variant(place))
    return {
        policy["PolicyName"]: policy["TargetTrackingScalingPolicyConfiguration"]
        for policy in found["ScalingPolicies"]
    }
