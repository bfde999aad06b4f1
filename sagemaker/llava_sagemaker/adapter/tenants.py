"""Whose request it is, by its headers.

Whoever is in front of the adapter says so: SageMaker passes a caller's custom attributes on as they
are, and what authenticates other callers sets a header. The adapter believes both.
"""

from __future__ import annotations

from collections.abc import Iterator

from starlette.datastructures import Headers

from llava_sagemaker.adapter.errors import invalid_request
from llava_triton.contract import protocol

TENANT = "X-Llava-Tenant"
"""The tenant's name and nothing else."""
CUSTOM_ATTRIBUTES = "X-Amzn-SageMaker-Custom-Attributes"
"""boto3's CustomAttributes: `tenant=NAME`, among others behind semicolons or commas."""


def tenant_of(headers: Headers) -> str:
    """The tenant that a request's headers name; `NO_TENANT` where they name none.

    Raises:
        SessionError: INVALID_ARG, the name is none.
        AdapterError: invalid_request, they name several.
    """
    named = {name.strip() for name in headers.getlist(TENANT)}
    named.update(custom_attributes(headers, protocol.TENANT))
    if not named:
        return protocol.NO_TENANT
    if len(named) > 1:
        raise invalid_request("the request's headers name different tenants; name one")
    return protocol.parse_tenant({protocol.TENANT: named.pop()})


def custom_attributes(headers: Headers, wanted: str) -> Iterator[str]:
    """What boto3's CustomAttributes say of a name: `NAME=VALUE`, among others behind semicolons or
    commas."""
    for value in headers.getlist(CUSTOM_ATTRIBUTES):
        for attribute in value.replace(",", ";").split(";"):
            name, is_given, said = attribute.partition("=")
            if is_given and name.strip().lower() == wanted:
                yield said.strip()
