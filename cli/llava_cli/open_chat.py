"""Which kind of chat a URL asks for."""

from __future__ import annotations

from llava_cli.conversation import Chat
from llava_cli.openai_chat import OpenAIChat
from llava_cli.session_chat import SessionChat
from llava_triton.client.opening import split_url


def open_chat(url: str) -> Chat:
    """A chat that asks the server at a URL; nothing is sent before the first turn.

    Args:
        url: `grpc://host:port`, `http://host:port` (Triton's, whole answers), `sagemaker://endpoint`
            as for `Session.open`, or `http://host:port/v1`: OpenAI's chat completions.

    Raises:
        SessionError: INVALID_ARG, the URL is none of these.
    """
    parts = split_url(url)
    if parts.scheme in ("http", "https") and parts.path.strip("/"):
        return OpenAIChat(url)
    return SessionChat(url)
