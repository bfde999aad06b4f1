"""OpenVINO GenAI as a way of answering, in its own environment."""

from __future__ import annotations

import io
import queue
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from openvino import Tensor
from openvino_genai import ContinuousBatchingPipeline, GenerationConfig, SchedulerConfig
from PIL import Image
from tokenizers import Tokenizer

from benchmarks.load import PATIENCE_SECONDS, Answer, Ask, Way
from benchmarks.peers.play import play
from benchmarks.script import Script, turn_text
from llava_triton.contract.delta import Delta

CACHE_GIB = 2
"""Of keys and values: ample for the sessions."""


@dataclass
class _Session:
    picture: Any
    text: str = ""
    """Everything said: the pipeline takes texts, and no token IDs beside a picture."""


@dataclass
class _Turn:
    ask: Ask
    answer: Answer
    session: _Session
    handle: Any
    said: list[int] = field(default_factory=list)


class OpenVinoWay(Way):
    """`ContinuousBatchingPipeline` with its cache of prefixes, in a thread of its own.

    Args:
        exported: the checkpoint in OpenVINO's format.
        properties: of the language model and of the vision encoder.
        tokenizer: of the checkpoint.
    """

    def __init__(self, exported: Path, properties: Mapping[str, Any], tokenizer: Tokenizer) -> None:
        scheduler = SchedulerConfig()
        scheduler.cache_size = CACHE_GIB
        scheduler.enable_prefix_caching = True
        self._pipeline = ContinuousBatchingPipeline(
            exported,
            scheduler,
            "CPU",
            properties=dict(properties),
            vision_encoder_properties=dict(properties),
        )
        self._tokenizer = tokenizer
        self._sessions: dict[int | str, _Session] = {}
        self._begun = 0
        """Turns, whose numbers are their IDs."""
        self._asks: queue.SimpleQueue[tuple[Ask, Answer] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def ask(self, ask: Ask, answer: Answer | None = None) -> Answer:
        """See `Way`."""
        answer = answer or Answer()
        self._asks.put((ask, answer))
        return answer

    def _run(self) -> None:
        running: list[_Turn] = []
        due = 0
        """Sessions that have their answer and will ask at once. They are waited for: a step keeps
        the interpreter's lock, so who asks would be kept out until it ends."""
        while True:
            while due > 0 or not running or not self._asks.empty():
                asked = self._asks.get(timeout=PATIENCE_SECONDS if due > 0 else None)
                if asked is None:
                    return
                due = max(0, due - 1)
                try:
                    running.append(self._begin(*asked))
                except Exception as error:
                    asked[1].end(error)
            try:
                self._pipeline.step()
                ended = [turn for turn in running if self._read(turn)]
            except Exception as error:
                for turn in running:
                    turn.answer.end(error)
                running = []
                continue
            running = [turn for turn in running if turn not in ended]
            for turn in ended:
                due += not turn.ask.end
                turn.answer.end()

    def _begin(self, ask: Ask, answer: Answer) -> _Turn:
        if ask.start:
            pixels = np.asarray(Image.open(io.BytesIO(ask.images[0])).convert("RGB"))
            self._sessions[ask.session_id] = _Session(Tensor(pixels[np.newaxis]))
        session = self._sessions[ask.session_id]
        session.text += _text(ask)
        config = GenerationConfig()
        config.max_new_tokens = ask.sampling["max_tokens"]
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        self._begun += 1
        handle = self._pipeline.add_request(self._begun, session.text, [session.picture], config)
        if ask.end:
            del self._sessions[ask.session_id]
        return _Turn(ask, answer, session, handle)

    def _read(self, turn: _Turn) -> bool:
        """Takes what has come, and says whether it was the end."""
        while turn.handle.can_read():
            for output in turn.handle.read().values():
                turn.said += output.generated_ids
                final = len(turn.said) == turn.ask.sampling["max_tokens"]
                text = ""
                if final:
                    text = self._tokenizer.decode(turn.said, skip_special_tokens=True)
                    turn.session.text += text
                    text = text.removeprefix(" ")
                # It says neither how long the prompt was nor how much of it was cached.
                turn.answer.take(Delta(text, "length" if final else "", 0, len(turn.said), 0, 0.0))
                if final:
                    return True
        return False

    def close(self) -> None:
        """Stop the thread."""
        self._asks.put(None)
        self._thread.join()


def _text(ask: Ask) -> str:
    """What is sent: the pipeline itself begins every text with <s> and ends the picture's line."""
    text = turn_text(str(ask.text), start=ask.start)
    return text.removeprefix("<s>").replace("<image>\n", "<image>")


def way_of(script: Script, exported: Path) -> Way:
    """In the script's dtype: "auto" is what the plugin chooses by itself."""
    hint = {} if script.dtype == "auto" else {"INFERENCE_PRECISION_HINT": "f32"}
    tokenizer = Tokenizer.from_file(str(Path(script.checkpoint) / "tokenizer.json"))
    return OpenVinoWay(exported, hint, tokenizer)


if __name__ == "__main__":
    sys.exit(play(__doc__, way_of))
