"""How SageMaker's runtime writes errors and streamed answers (botocore's service model)."""

from __future__ import annotations

import json
import struct
import zlib

from starlette.responses import Response

_PRELUDE = struct.Struct(">II")
_CRC = struct.Struct(">I")
_STRING = 7
"""The type of a header's value in an event stream."""


class ServiceError(Exception):
    """An error of the service's own.

    Args:
        status: HTTP status.
        code: its name in the service model.
        message: for people.
        members: others of its members.
    """

    def __init__(self, status: int, code: str, message: str, **members: object) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.members = {"Message": message, **members}

    def response(self) -> Response:
        """The whole HTTP answer."""
        headers = {"x-amzn-ErrorType": self.code}
        return Response(json.dumps(self.members), self.status, headers, "application/json")


def validation_error(message: str) -> ServiceError:
    """The request is wrong, whatever the model would say."""
    return ServiceError(400, "ValidationError", message)


def model_error(status: int, body: str, message: str | None = None) -> ServiceError:
    """The container answered with an error, or not at all."""
    told = f'Received error ({status}) from primary with message "{body}".'
    return ServiceError(
        424,
        "ModelError",
        message or told,
        OriginalStatusCode=status,
        OriginalMessage=body,
        LogStreamArn="",
    )


def payload_part(data: bytes) -> bytes:
    """An event with a piece of the container's answer."""
    return _event(
        {
            ":message-type": "event",
            ":event-type": "PayloadPart",
            ":content-type": "application/octet-stream",
        },
        data,
    )


def stream_error(message: str) -> bytes:
    """An event that ends a stream whose container has failed."""
    headers = {
        ":message-type": "exception",
        ":exception-type": "ModelStreamError",
        ":content-type": "application/json",
    }
    body = {"Message": message, "ErrorCode": "StreamBroken"}
    return _event(headers, json.dumps(body).encode())


def _event(headers: dict[str, str], payload: bytes) -> bytes:
    encoded = b"".join(
        struct.pack(">B", len(name))
        + name.encode()
        + struct.pack(">BH", _STRING, len(value))
        + value.encode()
        for name, value in headers.items()
    )
    # Lengths, their checksum, headers, payload, the checksum of everything before it.
    total = _PRELUDE.size + _CRC.size + len(encoded) + len(payload) + _CRC.size
    prelude = _PRELUDE.pack(total, len(encoded))
    message = b"".join([prelude, _CRC.pack(zlib.crc32(prelude)), encoded, payload])
    return message + _CRC.pack(zlib.crc32(message))
