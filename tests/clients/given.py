"""What each client's script is given: where to ask, what, and what the models answer."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass

_VARIABLE = "LLAVA_CLIENT_TEST"


@dataclass(frozen=True)
class Given:
    """Passed on through the environment."""

    openai_url: str
    """Of the adapter, `.../v1`."""
    runtime_url: str
    """The `endpoint_url` of a SageMaker runtime."""
    endpoint: str
    """The SageMaker endpoint's name."""
    token: str
    """For the runtime's OpenAI path."""
    picture: str
    """A PNG, in base64."""
    questions: Sequence[str]
    """Two about the picture, one after the other."""
    answers: Sequence[str]
    """What Triton answers them in a session."""

    @property
    def data_uri(self) -> str:
        """The picture."""
        return f"data:image/png;base64,{self.picture}"

    @property
    def picture_bytes(self) -> bytes:
        """The picture's file."""
        return base64.b64decode(self.picture)

    @property
    def invocations_url(self) -> str:
        """Where the SageMaker endpoint is invoked."""
        return f"{self.runtime_url}/endpoints/{self.endpoint}/invocations"

    @property
    def sagemaker_openai_url(self) -> str:
        """The SageMaker endpoint's OpenAI path."""
        return f"{self.runtime_url}/endpoints/{self.endpoint}/openai/v1"

    def to_environment(self) -> dict[str, str]:
        """For the script's process."""
        return {_VARIABLE: json.dumps(asdict(self))}


def given() -> Given:
    """What this script was given."""
    return Given(**json.loads(os.environ[_VARIABLE]))
