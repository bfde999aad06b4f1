"""vLLM's CPU build as a way of answering, in its own environment."""

from __future__ import annotations

import asyncio
import io
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tokenizers import Tokenizer
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM

from benchmarks.load import Answer, Ask, Way
from benchmarks.peers.play import Conversation, play
from benchmarks.script import Script
from llava_triton.contract.delta import Delta

BLOCK_TOKENS = 32
"""Of the prefix cache. The CPU's default of 128 computes up to 127 tokens of every turn again."""


@dataclass
class _Session:
    conversation: Conversation
    picture: Any
    """Decoded once; vLLM recognizes it by the session's ID, and encodes it once."""


class VllmWay(Way):
    """`AsyncLLM`, streamed, with its caches of prefixes and pictures.

    Args:
        script: what will be asked.
    """

    def __init__(self, script: Script) -> None:
        self._tokenizer = Tokenizer.from_file(str(Path(script.checkpoint) / "tokenizer.json"))
        self._sessions: dict[int | str, _Session] = {}
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._asked = 0
        arguments = AsyncEngineArgs(
            model=script.checkpoint,
            dtype=script.dtype,
            block_size=BLOCK_TOKENS,
            enable_prefix_caching=True,
            limit_mm_per_prompt={"image": 1},
            enable_log_requests=False,
        )
        self._engine = asyncio.run_coroutine_threadsafe(self._start(arguments), self._loop).result()

    @staticmethod
    async def _start(arguments: AsyncEngineArgs) -> AsyncLLM:
        return AsyncLLM.from_engine_args(arguments)

    def ask(self, ask: Ask, answer: Answer | None = None) -> Answer:
        """See `Way`."""
        answer = answer or Answer()
        if ask.start:
            picture = Image.open(io.BytesIO(ask.images[0])).convert("RGB")
            self._sessions[ask.session_id] = _Session(Conversation(self._tokenizer), picture)
        self._asked += 1
        asyncio.run_coroutine_threadsafe(
            self._answer(ask, answer, f"turn {self._asked}"), self._loop
        )
        return answer

    async def _answer(self, ask: Ask, answer: Answer, request: str) -> None:
        session = self._sessions[ask.session_id]
        prompt = {
            "prompt_token_ids": session.conversation.add_question(ask),
            "multi_modal_data": {"image": session.picture},
            "multi_modal_uuids": {"image": [str(ask.session_id)]},
        }
        sampling = SamplingParams(
            temperature=0.0,
            max_tokens=ask.sampling["max_tokens"],
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        said: list[int] = []
        try:
            async for output in self._engine.generate(prompt, sampling, request):
                (piece,) = output.outputs
                said += piece.token_ids
                answer.take(
                    Delta(
                        session.conversation.add_answer(said) if output.finished else "",
                        "length" if output.finished else "",
                        len(output.prompt_token_ids or ()),
                        len(said),
                        output.num_cached_tokens or 0,
                        0.0,
                    )
                )
        except Exception as error:
            answer.end(error)
            return
        if ask.end:
            del self._sessions[ask.session_id]
        answer.end()

    def close(self) -> None:
        """Stop the engine."""
        self._engine.shutdown()


if __name__ == "__main__":
    sys.exit(play(__doc__, lambda script, _prepared: VllmWay(script)))
