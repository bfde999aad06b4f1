"""Whose request it is, by its headers.

Whoever is in front of the adapter says so: SageMaker passes a caller's custom attributes on as they
are, and what authenticates other callers sets a header. The adapter believes both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

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
    named.update(_attributes(headers.getlist(CUSTOM_ATTRIBUTES)))
    if not named:
        return protocol.NO_TENANT
    if len(named) > 1:
        raise invalid_request("the request's headers name different tenants; name one")
    return protocol.parse_tenant({protocol.TENANT: named.pop()})


def _attributes(values: Iterable[str]) -> Iterator[str]:
    for value in values:
        for attribute in value.replace(",", ";").split(";"):
            name, is_given, tenant = attribute.partition("=")
            if is_given and name.strip().lower() == protocol.TENANT:
                yield tenant.strip()
