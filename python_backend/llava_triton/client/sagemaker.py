"""SageMaker, by boto3: whole answers and streamed ones, of an endpoint that runs our container."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import tritonclient.http as triton
from urllib3.exceptions import HTTPError

from llava_triton.client.transport import LostConnectionError, Transport, TurnMessage
from llava_triton.contract import protocol
from llava_triton.contract.answers import ANSWER
from llava_triton.contract.delta import Delta
from llava_triton.contract.errors import (
    SESSION,
    ErrorCode,
    SessionError,
    invalid,
    not_found,
    unavailable,
)
from llava_triton.contract.models import IMAGE, VIDEO

try:
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config
    from botocore.exceptions import (
        BotoCoreError,
        ClientError,
        ConnectionError,
        EventStreamError,
        HTTPClientError,
    )
except ModuleNotFoundError as error:
    raise invalid(
        "a sagemaker:// URL needs the package boto3, which is not installed; "
        "run `pip install boto3`"
    ) from error

MAX_BODY_BYTES = 6 * 1024 * 1024
"""SageMaker's limit of a request."""
_READ_SECONDS = 75.0
"""SageMaker itself gives up after 60 s without an answer."""
_CONNECTIONS = 64
"""Kept open to an endpoint by all sessions of this process."""
_JSON = "application/json"
_CODES = {
    "session_not_found": ErrorCode.NOT_FOUND,
    "unavailable": ErrorCode.UNAVAILABLE,
    "internal": ErrorCode.INTERNAL,
}
"""By the container's codes; the others say what is wrong with the request."""
_SUBJECTS = {
    "session_not_found": SESSION,
    "image_invalid": IMAGE.name,
    "video_invalid": VIDEO.name,
}
"""What they are about, where they say so."""
_LATER = ("ThrottlingException", "ModelNotReadyException")


class SageMakerTransport(Transport):
    """An endpoint.

    Args:
        endpoint: its name.
        region: AWS region; by default what AWS's own settings say.
        endpoint_url: another SageMaker runtime than AWS's, such as a local one.
        tenant: see `Transport`; it goes as a custom attribute.
    """

    def __init__(
        self,
        endpoint: str,
        region: str | None = None,
        endpoint_url: str | None = None,
        tenant: str | None = None,
    ) -> None:
        super().__init__(tenant)
        self._common = {"EndpointName": endpoint}
        if tenant is not None:
            self._common["CustomAttributes"] = f"{protocol.TENANT}={tenant}"
        self._endpoint = endpoint
        self._place = region, endpoint_url
        with _told(endpoint):
            try:
                self._client = _runtime(region, endpoint_url)
            except ValueError as error:
                raise invalid(f"the endpoint_url is {endpoint_url!r}: {error}") from error

    def open(self, turn: TurnMessage) -> tuple[str, Delta]:
        """Send a turn that opens a session, under an ID that the server chooses."""
        with _told(self._endpoint):
            answer = self._client.invoke_endpoint(
                SessionId="NEW_SESSION", **self._common, **_request(turn)
            )
            final = _delta_of_outputs(answer["Body"].read())
        return self._minted(answer), final

    def another(self) -> SageMakerTransport:
        """The same endpoint; all share their connections."""
        return SageMakerTransport(self._endpoint, *self._place, tenant=self.tenant)

    def fork(
        self, source: int | str, session_id: int | str | None
    ) -> tuple[SageMakerTransport, str]:
        """Open a session as a copy of another one, where that one is; the server chooses its ID."""
        if session_id is not None:
            raise invalid("SageMaker's server chooses session IDs; leave session_id out")
        with _told(self._endpoint):
            answer = self._client.invoke_endpoint(
                SessionId=str(source), **self._common, **_session_request("FORK")
            )
            answer["Body"].read()
        return self.another(), self._minted(answer)

    def stop_answer(self, session_id: int | str) -> Delta:
        """End the session's running answer as it is."""
        with _told(self._endpoint):
            answer = self._client.invoke_endpoint(
                SessionId=str(session_id), **self._common, **_session_request("STOP")
            )
            return _delta_of_message(answer["Body"].read())

    def ask(self, turn: TurnMessage) -> Delta:
        """One call, one answer; a turn that ends its session does only that."""
        request = _session_request("CLOSE") if turn.end else _request(turn)
        with _told(self._endpoint):
            answer = self._client.invoke_endpoint(
                SessionId=str(turn.session_id), **self._common, **request
            )
            body = answer["Body"].read()
            return Delta("", "closed", 0, 0, 0, 0.0) if turn.end else _delta_of_outputs(body)

    def stream(self, turn: TurnMessage) -> Generator[Delta, None, None]:
        """Pieces as they come; left early, the connection is closed and so the turn cancelled."""
        request = _request(turn) | {"Accept": "text/event-stream"}
        with _told(self._endpoint):
            events = self._client.invoke_endpoint_with_response_stream(
                SessionId=str(turn.session_id), **self._common, **request
            )["Body"]
            try:
                for message in messages(event["PayloadPart"]["Bytes"] for event in events):
                    delta = _delta_of_message(message)
                    yield delta
                    if delta.is_final:
                        return
            finally:
                events.close()
        raise LostConnectionError(f"the endpoint {self._endpoint} ended an answer before its end")

    def _minted(self, answer: dict[str, Any]) -> str:
        """The ID of the session that the server has opened."""
        minted: str = answer.get("NewSessionId", "").partition(";")[0]
        if not minted:
            raise SessionError(
                ErrorCode.INTERNAL,
                f"the endpoint {self._endpoint} opened no session; does it run this project's "
                "container?",
            )
        return minted

    def close(self) -> None:
        """Nothing to do: the process's sessions share their connections."""


@lru_cache
def _runtime(region: str | None, endpoint_url: str | None) -> Any:
    """A client, which any number of threads may use; making one takes a while."""
    session = boto3.session.Session(region_name=region)
    config = Config(
        # A turn that is sent twice would be asked twice.
        retries={"total_max_attempts": 1},
        read_timeout=_READ_SECONDS,
        max_pool_connections=_CONNECTIONS,
    )
    if endpoint_url is None:
        return session.client("sagemaker-runtime", config=config)
    if session.get_credentials() is None:  # a local endpoint wants none
        config = config.merge(Config(signature_version=UNSIGNED))
    return session.client(
        "sagemaker-runtime",
        region_name=session.region_name or "local",
        endpoint_url=endpoint_url,
        config=config,
    )


def _request(turn: TurnMessage) -> dict[str, Any]:
    """Triton's own request format: the pictures go as they are, not in base64."""
    outputs = [triton.InferRequestedOutput(spec.name, False) for spec in ANSWER.outputs]
    body, json_bytes = triton.InferenceServerClient.generate_request_body(
        turn.inputs(triton), outputs=outputs, parameters=turn.parameters or None
    )
    if len(body) > MAX_BODY_BYTES:
        raise invalid(
            f"the turn is {len(body):,} bytes long, and SageMaker takes at most "
            f"{MAX_BODY_BYTES:,}; send smaller pictures, or one after the other"
        )
    kind = "application/vnd.sagemaker-triton.binary+json;json-header-size="
    return {
        "ContentType": _JSON if json_bytes is None else f"{kind}{json_bytes}",
        "Accept": _JSON,
        "Body": bytes(body),
    }


def _session_request(kind: str) -> dict[str, Any]:
    """One of the container's own requests about a session."""
    body = json.dumps({"requestType": kind}).encode()
    return {"ContentType": _JSON, "Accept": _JSON, "Body": body}


def _delta_of_outputs(body: bytes) -> Delta:
    """A whole answer: Triton's response in JSON."""
    try:
        data = {output["name"]: output["data"] for output in json.loads(body)["outputs"]}
        return ANSWER.from_values(
            {spec.name: spec.value(data[spec.name]) for spec in ANSWER.outputs}
        )
    except (ValueError, LookupError, TypeError) as error:
        raise _unreadable(body) from error


def _delta_of_message(message: bytes) -> Delta:
    """A piece of a streamed answer, or what a session request is answered with."""
    try:
        value = json.loads(message)
        if "error" not in value:
            return ANSWER.from_values(value)
    except (ValueError, LookupError, TypeError) as error:
        raise _unreadable(message) from error
    raise _container_error(500, message.decode(), message.decode())


def _unreadable(body: bytes) -> SessionError:
    return SessionError(
        ErrorCode.INTERNAL,
        f"the endpoint answered what this client cannot read: {body[:200]!r}; does it run this "
        "project's container?",
    )


def messages(parts: Iterator[bytes]) -> Iterator[bytes]:
    """The messages (`data:` lines) of server-sent events, however their bytes are cut in parts."""
    rest = b""
    for part in parts:
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip()


@contextmanager
def _told(endpoint: str) -> Iterator[None]:
    """What boto3 raises, in our terms."""
    try:
        yield
    except EventStreamError as error:
        raise _stream_error(endpoint, error) from error
    except ClientError as error:
        raise _service_error(endpoint, error) from error
    except (HTTPClientError, ConnectionError, HTTPError) as error:
        raise LostConnectionError(f"no answer from the endpoint {endpoint}: {error}") from error
    except BotoCoreError as error:  # no credentials, no region, ...
        raise invalid(f"the endpoint {endpoint} cannot be asked: {error}") from error


def _service_error(endpoint: str, error: ClientError) -> SessionError:
    """An answer of SageMaker's that is none of the model's."""
    code = error.response["Error"]["Code"]
    sentence = f"{code} from the endpoint {endpoint}: {error.response['Error']['Message']}"
    if code == "ModelError":
        status = int(error.response.get("OriginalStatusCode", 0))
        return _container_error(status, error.response.get("OriginalMessage", ""), sentence)
    if code == "ValidationError" and "session" in sentence.lower():
        # Our IDs are well-formed, for the server has made them: it has forgotten this one.
        return not_found(sentence)
    if code == "InternalFailure":
        return LostConnectionError(sentence)
    if error.response["ResponseMetadata"]["HTTPStatusCode"] >= 500 or code in _LATER:
        return unavailable(sentence)
    return invalid(sentence)


def _container_error(status: int, body: str, otherwise: str = "") -> SessionError:
    """What the container answered, or what SageMaker says where no container did."""
    try:
        told = json.loads(body)["error"]
        code = _CODES.get(told["code"], ErrorCode.INVALID_ARG)
        return SessionError(code, told["message"], _SUBJECTS.get(told["code"], ""))
    except (ValueError, LookupError, TypeError):
        if status == 0:  # SageMaker's 60 s are over
            return unavailable(otherwise)
        return LostConnectionError(otherwise) if status >= 500 else invalid(otherwise)


def _stream_error(endpoint: str, error: EventStreamError) -> SessionError:
    """An answer that SageMaker breaks off."""
    told = error.response["Error"]
    sentence = f"the endpoint {endpoint} broke the answer off: {told['Code']}: {told['Message']}"
    return LostConnectionError(sentence)
