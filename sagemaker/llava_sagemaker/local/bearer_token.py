"""The bearer tokens that SageMaker's OpenAI path takes, as far as their form goes.

The real ones are made by `generate_token` of AWS's SDK: a prefix, and in base64 a URL for the
action CallWithBearerToken that was signed with the caller's credentials. Nobody here could check
the signature, so it may be missing.
"""

from __future__ import annotations

import base64
import binascii

from llava_sagemaker.local.aws_wire import ServiceError

PREFIX = "sagemaker-api-key-"
_SIGNED = "sagemaker.amazonaws.com/?Action=CallWithBearerToken"


def local_token() -> str:
    """A token that is good for the local endpoint only."""
    return PREFIX + base64.b64encode(f"{_SIGNED}&Version=1".encode()).decode()


def check_bearer(authorization: str) -> None:
    """Check a request's header `Authorization`.

    Raises:
        ServiceError: it has no token of this form.
    """
    scheme, _, token = authorization.partition(" ")
    try:
        signed = base64.b64decode(token.strip().removeprefix(PREFIX), validate=True)
    except (binascii.Error, ValueError):
        signed = b""
    has_form = token.strip().startswith(PREFIX) and signed.startswith(_SIGNED.encode())
    if scheme.lower() != "bearer" or not has_form:
        raise ServiceError(
            403,
            "AccessDeniedException",
            "the request has no bearer token of SageMaker's; make one by generate_token of AWS's "
            "SDK, or take the one that the local endpoint prints when it starts",
        )
