"""The log group of the endpoint's containers, and the alarm that watches their answers.

SageMaker would make the log group by itself, without our tag and kept for ever: so it is made
first.
"""

from __future__ import annotations

from typing import Any

from llava_sagemaker.deploy import report
from llava_sagemaker.deploy.place import VARIANT, Place

_KEPT_DAYS = 14


def bring_log_group(place: Place) -> None:
    """Create the log group."""
    logs = place.client("logs")
    group = _describe_log_group(place)
    if group is None:
        logs.create_log_group(
            logGroupName=place.log_group, tags={tag["Key"]: tag["Value"] for tag in place.tags}
        )
        report.say(f"created the log group {place.log_group}")
    else:
        place.must_own("log group", place.log_group, _log_group_tags(place))
    if group is None or group.get("retentionInDays") != _KEPT_DAYS:
        logs.put_retention_policy(logGroupName=place.log_group, retentionInDays=_KEPT_DAYS)


def find_log_group(place: Place) -> bool:
    """Whether the log group exists and is ours."""
    return _describe_log_group(place) is not None and place.owns(_log_group_tags(place))


def remove_log_group(place: Place) -> None:
    """Delete the log group with all it has."""
    place.client("logs").delete_log_group(logGroupName=place.log_group)


def _describe_log_group(place: Place) -> Any:
    found = place.client("logs").describe_log_groups(logGroupNamePrefix=place.log_group)
    return next((g for g in found["logGroups"] if g["logGroupName"] == place.log_group), None)


def _log_group_tags(place: Place) -> list[dict[str, str]]:
    arn = place.arn("logs", f"log-group:{place.log_group}")
    tags = place.client("logs").list_tags_for_resource(resourceArn=arn)["tags"]
    return [{"Key": key, "Value": value} for key, value in tags.items()]


def bring_alarm(place: Place) -> bool:
    """Create the alarm that rolls an update back: most requests of two minutes ended in a 5xx.

    Returns:
        Whether it can guard an update now: SageMaker refuses an alarm that is already raised.
    """
    cloudwatch = place.client("cloudwatch")
    alarm = _describe_alarm(place)
    if alarm is not None:
        place.must_own("CloudWatch alarm", place.alarm, _alarm_tags(place, alarm))
        return bool(alarm["StateValue"] != "ALARM")
    cloudwatch.put_metric_alarm(
        AlarmName=place.alarm,
        AlarmDescription=f"More than half of the requests to {place.name} end in a 5xx",
        Namespace="AWS/SageMaker",
        MetricName="Invocation5XXErrors",
        Dimensions=[
            {"Name": "EndpointName", "Value": place.name},
            {"Name": "VariantName", "Value": VARIANT},
        ],
        Statistic="Average",
        Period=60,
        EvaluationPeriods=2,
        Threshold=0.5,
        ComparisonOperator="GreaterThanThreshold",
        TreatMissingData="notBreaching",
        Tags=place.tags,
    )
    report.say(f"created the CloudWatch alarm {place.alarm}")
    return True


def find_alarm(place: Place) -> bool:
    """Whether the alarm exists and is ours."""
    alarm = _describe_alarm(place)
    return alarm is not None and place.owns(_alarm_tags(place, alarm))


def remove_alarm(place: Place) -> None:
    """Delete the alarm."""
    place.client("cloudwatch").delete_alarms(AlarmNames=[place.alarm])


def _describe_alarm(place: Place) -> Any:
    found = place.client("cloudwatch").describe_alarms(AlarmNames=[place.alarm])
    return next(iter(found["MetricAlarms"]), None)


def _alarm_tags(place: Place, alarm: Any) -> list[dict[str, str]]:
    cloudwatch = place.client("cloudwatch")
    tags: list[dict[str, str]] = cloudwatch.list_tags_for_resource(ResourceARN=alarm["AlarmArn"])[
        "Tags"
    ]
    return tags
