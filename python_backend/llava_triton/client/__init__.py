"""A client for people: open a session on a picture, ask, read the answer as it comes."""

from llava_triton.client.answer import Answer, AnswerStream
from llava_triton.client.async_session import AsyncAnswerStream, AsyncSession
from llava_triton.client.session import Session
from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.contract.history import PastTurn

__all__ = [
    "Answer",
    "AnswerStream",
    "AsyncAnswerStream",
    "AsyncSession",
    "ErrorCode",
    "PastTurn",
    "Session",
    "SessionError",
]
