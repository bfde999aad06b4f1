"""The deployment's CloudFormation stack: read, brought to what is wanted, deleted."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from botocore.exceptions import ClientError

from llava_sagemaker.deploy import place as places
from llava_sagemaker.deploy import report, storage, template
from llava_sagemaker.deploy.errors import DeployError, explain_reason, is_absent, message_of
from llava_sagemaker.deploy.place import Place

_UPDATABLE = {
    "CREATE_COMPLETE",
    "UPDATE_COMPLETE",
    "UPDATE_ROLLBACK_COMPLETE",
}
_CANCELLED = "cancelled"  # what CloudFormation says of what it stops on account of another fault


class RolledBack(DeployError):  # noqa: N818 - it names what happened
    """A change failed, and everything is what it was before."""


@dataclass(frozen=True)
class Stack:
    """A stack that exists, or has just been deleted."""

    id: str
    status: str
    parameters: dict[str, str]

    @property
    def image(self) -> str:
        """The image that is served; empty where there is no endpoint."""
        return self.parameters.get("ImageUri", "")


def read(place: Place) -> Stack | None:
    """The stack, when nothing changes in it any more; None when there is none.

    Raises:
        DeployError: it is not ours.
    """
    found = _describe(place, place.stack)
    if found is None:
        return None
    place.must_own("CloudFormation stack", place.stack, found.get("Tags", []))
    if _is_changing(found):
        report.say(f"{place.stack} is changing already: waiting for that")
        found = _wait(place, found["StackId"], _last_event(place, found["StackId"]))[0]
    if found["StackStatus"] == "DELETE_COMPLETE":
        return None
    return _stack(found)


def resources(place: Place) -> list[tuple[str, str]]:
    """What the stack has: names in the template, and in AWS."""
    found = place.client("cloudformation").describe_stack_resources(StackName=place.stack)
    return [
        (resource["LogicalResourceId"], resource["PhysicalResourceId"])
        for resource in found["StackResources"]
        if resource["ResourceStatus"] != "DELETE_COMPLETE" and "PhysicalResourceId" in resource
    ]


def bring_base(place: Place, given: Mapping[str, str]) -> Stack:
    """The stack, made without an endpoint where there is none: bucket, repository, role, log group.

    Args:
        place: where.
        given: parameters that differ from the template's defaults.

    Raises:
        DeployError: it could not be made, or cannot be changed.
    """
    now = read(place)
    if now is None:
        return bring(place, {**template.defaults(), **given, "Name": place.name})
    _check_updatable(place, now)
    return now


def bring(place: Place, wanted: Mapping[str, str]) -> Stack:
    """Create the stack, or change what differs, and wait.

    Args:
        place: where.
        wanted: all parameters.

    Raises:
        RolledBack: the change failed.
        DeployError: the stack could not be made, or cannot be changed.
    """
    client = place.client("cloudformation")
    now = read(place)
    if now is not None:
        _check_updatable(place, now)
    if now is not None and now.parameters == dict(wanted) and _template(place) == template.TEXT:
        return now
    arguments: dict[str, Any] = {
        "StackName": place.stack,
        "TemplateBody": template.TEXT,
        "Parameters": [
            {"ParameterKey": key, "ParameterValue": value} for key, value in wanted.items()
        ],
        "Capabilities": ["CAPABILITY_IAM"],
        "Tags": place.tags,
    }
    if now is None:
        began = None
        stack_id = client.create_stack(**arguments, OnFailure="DELETE")["StackId"]
    else:
        began = _last_event(place, now.id)
        try:
            stack_id = client.update_stack(**arguments)["StackId"]
        except ClientError as error:
            if "No updates are to be performed" not in message_of(error):
                raise
            # An option of the autoscaling, for example, where there is none.
            report.say("that changes nothing as things are; give it again when it matters")
            return now
    found, reasons = _wait(place, stack_id, began)
    if found["StackStatus"] in ("CREATE_COMPLETE", "UPDATE_COMPLETE"):
        return _stack(found)
    reason = "\n".join(map(explain_reason, reasons)) or "CloudFormation gives no reason"
    logs = (
        f"\nThe containers' own messages: aws logs tail {place.log_group} "
        f"--region {place.region} --since 1h"
    )
    if now is not None and found["StackStatus"] == "UPDATE_ROLLBACK_COMPLETE":
        what = "the endpoint serves what it served before" if now.image else "nothing is served"
        raise RolledBack(
            f"the change of {place.name} failed and was rolled back; {what}.\n{reason}{logs}"
        )
    raise DeployError(f"{place.stack} is {found['StackStatus']}.\n{reason}{logs}")


def remove(place: Place) -> None:
    """Delete the stack with all that it has.

    S3 deletes no bucket that has something in it, and instances write to the journal until they are
    gone: where that was so, it is emptied and deleted once more.

    Raises:
        DeployError: names what is left.
    """
    for _ in range(3):
        stack = read(place)
        if stack is None:
            return
        ours = ("Bucket", place.bucket) in resources(place)
        if ours:
            storage.empty_bucket(place)
        began = _last_event(place, stack.id)
        place.client("cloudformation").delete_stack(StackName=place.stack)
        found, reasons = _wait(place, stack.id, began)
        if found["StackStatus"] == "DELETE_COMPLETE":
            return
        if not (ours and storage.has_objects(place)):
            break
    left = "\n".join(map(explain_reason, reasons))
    raise DeployError(f"not everything could be removed; run it again.\n{left}")


def alarm_is_raised(place: Place) -> bool:
    """Whether the alarm cannot guard an update: SageMaker refuses one that is already raised."""
    found = place.client("cloudwatch").describe_alarms(AlarmNames=[place.alarm])
    return any(alarm["StateValue"] == "ALARM" for alarm in found["MetricAlarms"])


def describe_endpoint(place: Place) -> Any:
    """DescribeEndpoint's answer, None where there is no endpoint."""
    try:
        return place.client("sagemaker").describe_endpoint(EndpointName=place.name)
    except ClientError as error:
        if is_absent(error):
            return None
        raise


def bring_instances(place: Place, minimum: int, maximum: int) -> None:
    """Ask for as many instances as the limits want, and wait for them.

    The configuration's count is that of the first day, so CloudFormation would not.
    """
    endpoint = describe_endpoint(place)
    now = int(endpoint["ProductionVariants"][0]["DesiredInstanceCount"])
    count = min(max(now, minimum), maximum)
    if count == now:
        return
    report.say(f"going from {now} to {count} instances")
    place.client("sagemaker").update_endpoint_weights_and_capacities(
        EndpointName=place.name,
        DesiredWeightsAndCapacities=[
            {"VariantName": places.VARIANT, "DesiredInstanceCount": count}
        ],
    )
    while (endpoint := describe_endpoint(place))["EndpointStatus"] != "InService":
        if endpoint["EndpointStatus"] == "Failed":
            raise DeployError(explain_reason(endpoint.get("FailureReason", "no reason is given")))
        time.sleep(places.POLL_SECONDS)


def _check_updatable(place: Place, stack: Stack) -> None:
    if stack.status not in _UPDATABLE:
        raise DeployError(
            f"the CloudFormation stack {place.stack} is {stack.status} and cannot be changed: "
            f"`llava-sagemaker down {place.name}`, then `up` again"
        )


def _stack(found: Any) -> Stack:
    parameters = {p["ParameterKey"]: p["ParameterValue"] for p in found.get("Parameters", [])}
    return Stack(found["StackId"], found["StackStatus"], parameters)


def _describe(place: Place, name: str) -> Any:
    try:
        return place.client("cloudformation").describe_stacks(StackName=name)["Stacks"][0]
    except ClientError as error:
        if is_absent(error):
            return None
        raise


def _is_changing(found: Any) -> bool:
    # A change set that nobody has executed is nothing that ends.
    status = str(found["StackStatus"])
    return status.endswith("_IN_PROGRESS") and status != "REVIEW_IN_PROGRESS"


def _template(place: Place) -> str:
    body = place.client("cloudformation").get_template(
        StackName=place.stack, TemplateStage="Original"
    )["TemplateBody"]
    return body if isinstance(body, str) else ""


def _wait(place: Place, stack_id: str, after: str | None) -> tuple[Any, list[str]]:
    """Wait until nothing changes any more; tells what happens.

    There is no time limit: every service has its own.

    Args:
        place: where.
        stack_id: a stack that is deleted is only found by it.
        after: the last event before this change.

    Returns:
        DescribeStacks' answer, and what the events say of faults.
    """
    began, reasons, first = time.monotonic(), [], after
    quiet = False
    while True:
        found = _describe(place, stack_id)
        changing = _is_changing(found)
        for event in _events(place, stack_id, after):
            after = event["EventId"]
            status, what = event["ResourceStatus"], event["LogicalResourceId"]
            reason = event.get("ResourceStatusReason", "")
            if status.endswith("_FAILED") and _CANCELLED not in reason.lower():
                reasons.append(f"{what}: {reason}")
            minutes = int((time.monotonic() - began) / 60)
            if what != place.stack:
                report.say(f"  {what} {status.lower().replace('_', ' ')}, {minutes} min")
        # The state may still be the one before the change: an event tells, or a second look.
        if not changing and (quiet or after != first):
            return found, reasons
        quiet = not changing
        time.sleep(places.POLL_SECONDS)


def _events(place: Place, stack_id: str, after: str | None) -> list[Any]:
    """The events that came after one, oldest first."""
    new: list[Any] = []
    pages = place.client("cloudformation").get_paginator("describe_stack_events")
    for page in pages.paginate(StackName=stack_id):
        for event in page["StackEvents"]:  # newest first
            if event["EventId"] == after:
                return new[::-1]
            new.append(event)
    return new[::-1]


def _last_event(place: Place, stack_id: str) -> str | None:
    found = place.client("cloudformation").describe_stack_events(StackName=stack_id)["StackEvents"]
    return found[0]["EventId"] if found else None
