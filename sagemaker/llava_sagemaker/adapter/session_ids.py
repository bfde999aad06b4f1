"""Session IDs in HTTP headers, exactly as AWS's own servers write them."""

from __future__ import annotations

import hashlib
import re
import time
import uuid

from llava_sagemaker.adapter.errors import invalid_request

# Named as in model_hosting_container_standards.sagemaker.sessions. (Importing it costs
# half a second, FastAPI, and a session store in files that nobody would use; the tests compare.)
SESSION_ID = "X-Amzn-SageMaker-Session-Id"
NEW_SESSION_ID = "X-Amzn-SageMaker-New-Session-Id"
CLOSED_SESSION_ID = "X-Amzn-SageMaker-Closed-Session-Id"

SESSION_NAME = "X-Session-Id"
"""A name that a client of OpenAI's API gives to its session."""
MAX_NAME_CHARACTERS = 256
NEW_SESSION = "NEW_SESSION"
"""What stands in for the ID of a session that is to be opened."""
MAX_CHARACTERS = 128
"""Triton takes no longer ones; SageMaker would take 256."""
_NAMED = "named-"
_PATTERN = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9])*")


def new_session_id() -> str:
    """A session ID that nobody can guess."""
    return str(uuid.uuid4())


def checked_session_id(given: str) -> str:
    """An ID as a client gave it.

    Raises:
        AdapterError: invalid_request, no session can have this ID, or it has a name, by which alone
            it is entered: whoever knows that can work the ID out, for any tenant.
    """
    if is_named(given):
        raise invalid_request(
            f"the session ID {given[:80]!r} is one of a session with a name; name it in the header "
            f"{SESSION_NAME}"
        )
    if len(given) > MAX_CHARACTERS or not _PATTERN.fullmatch(given):
        raise invalid_request(
            f"the session ID {given[:80]!r} is none; it has letters, digits and hyphens, at most "
            f"{MAX_CHARACTERS}, and comes from the answer that opened the session"
        )
    return given


def checked_session_name(given: str) -> str:
    """A name as a client gave it.

    Raises:
        AdapterError: invalid_request, it is empty or long.
    """
    if not 0 < len(given) <= MAX_NAME_CHARACTERS:
        raise invalid_request(
            f"the header {SESSION_NAME} has {len(given)} characters; a session's name has 1 to "
            f"{MAX_NAME_CHARACTERS}"
        )
    return given


def named_session_id(tenant: str, name: str) -> str:
    """The ID of the session that a tenant calls so. No other name, tenant or ID of ours leads to
    it."""
    digest = hashlib.sha256(f"{len(tenant)} {tenant} {name}".encode(errors="surrogateescape"))
    return f"{_NAMED}{digest.hexdigest()}"


def is_named(session_id: str) -> bool:
    """Whether it may be an ID of `named_session_id`: the only ones of which a second opening may
    come."""
    return session_id.startswith(_NAMED)


def opened_header(session_id: str, lifetime_seconds: float) -> tuple[str, str]:
    """The header of an answer that opens a session."""
    expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + lifetime_seconds))
    return NEW_SESSION_ID, f"{session_id}; Expires={expires}"


def closed_header(session_id: str) -> tuple[str, str]:
    """The header of an answer that closes a session."""
    return CLOSED_SESSION_ID, session_id
