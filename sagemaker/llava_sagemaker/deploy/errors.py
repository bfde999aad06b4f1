"""What went wrong, in a sentence that says what to do about it."""

from __future__ import annotations

import re

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    EndpointConnectionError,
    NoCredentialsError,
    NoRegionError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
)

_DENIED = {"AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "403"}
_BAD_CREDENTIALS = {
    "InvalidClientTokenId",
    "UnrecognizedClientException",
    "SignatureDoesNotMatch",
    "InvalidAccessKeyId",
    "AuthFailure",
}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired"}
_QUOTA = {"ResourceLimitExceeded", "LimitExceeded", "LimitExceededException", "TooManyBuckets"}
_ABSENT = {
    "NoSuchEntity",
    "NoSuchBucket",
    "NoSuchTagSet",
    "404",
    "RepositoryNotFoundException",
    "ResourceNotFoundException",
}
_DENIED_ACTION = re.compile(r"(?:not authorized to perform|perform):? ([\w-]+:\w+)")
_QUOTA_CONSOLE = "https://console.aws.amazon.com/servicequotas/home/services/sagemaker/quotas"


class DeployError(Exception):
    """Something a person can mend; the text says what was given, what was expected, what to do."""


def code_of(error: ClientError) -> str:
    """AWS's error code."""
    return str(error.response.get("Error", {}).get("Code", ""))


def message_of(error: ClientError) -> str:
    """AWS's own words."""
    return str(error.response.get("Error", {}).get("Message", ""))


def is_absent(error: ClientError) -> bool:
    """Whether AWS says that the thing asked about does not exist (SageMaker has no code for it)."""
    if code_of(error) in _ABSENT:
        return True
    message = message_of(error).lower()
    return code_of(error) in {"ValidationException", "ValidationError"} and (
        "could not find" in message or "does not exist" in message
    )


def explain(error: BotoCoreError | ClientError) -> str:
    """An AWS error -> one or two plain sentences."""
    match error:
        case NoCredentialsError() | PartialCredentialsError():
            return (
                "there are no AWS credentials: run `aws configure` or `aws sso login`, "
                "or set AWS_PROFILE"
            )
        case ProfileNotFound():
            return f"{error}: set AWS_PROFILE to one that `aws configure list-profiles` names"
        case NoRegionError():
            return "no AWS region is set: give --region, for example --region us-east-1"
        case EndpointConnectionError():
            return f"AWS does not answer ({error}): look at the network and at the region's name"
        case ParamValidationError():
            return f"AWS would refuse this request: {error}"
        case ClientError():
            return _explain_answer(error)
    return f"{type(error).__name__}: {error}"


def _explain_answer(error: ClientError) -> str:
    code, message, operation = code_of(error), message_of(error), error.operation_name
    if code in _DENIED:
        return _denied(message, operation)
    if code in _BAD_CREDENTIALS:
        return f"AWS does not know these credentials ({code}: {message}): run `aws configure`"
    if code in _EXPIRED:
        return "the AWS credentials have expired: sign in again (`aws sso login`)"
    if code in _QUOTA:
        return _used_up(message, operation)
    return f"{operation} failed with {code}. AWS says: {message}"


def explain_reason(reason: str) -> str:
    """What CloudFormation says of a thing that failed -> the same, and what to do about it."""
    if _DENIED_ACTION.search(reason) or "AccessDenied" in reason:
        return _denied(reason, "what CloudFormation did for you")
    if "LimitExceeded" in reason or "service limit" in reason:
        return _used_up(reason, "CloudFormation")
    if "already exist" in reason.lower():
        advice = "It is somebody else's: choose another deployment name, or remove it yourself"
        return f"{reason}\n{advice}"
    return reason


def _denied(message: str, operation: str) -> str:
    named = _DENIED_ACTION.search(message)
    action = named.group(1) if named else operation
    return (
        f"your AWS user may not do {action}. AWS says: {message or 'access denied'}\n"
        "`llava-sagemaker policy NAME` prints the policy that a person who deploys needs"
    )


def _used_up(message: str, operation: str) -> str:
    return (
        f"a quota of this AWS account is used up ({operation}). AWS says: {message}\n"
        f"ask for more at {_QUOTA_CONSOLE} (the quota is named '<instance type> for endpoint "
        "usage'; an update needs twice the instances for a while), or take another type"
    )
