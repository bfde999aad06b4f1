"""What the adapter's turns cost Triton, counted by Triton."""

from __future__ import annotations

import asyncio
import uuid
from pathlib import Path
from typing import Any

from llava_sagemaker.adapter.turns import Triton, turn

from llava_triton.server.triton_server import TritonServer

PICTURE = sorted((Path(__file__).parents[2] / "examples" / "pictures").glob("*.*"))[0]


def steps(client: Any, model: str) -> int:
    """Requests that a model has begun so far."""
    (told,) = client.get_inference_statistics(model, as_json=True)["model_stats"]
    return int(told.get("execution_count", 0))


def test_pieces_of_an_answer_pass_no_other_model(server: TritonServer, grpc_client: Any) -> None:
    """Neither they nor the question; only pictures need the ensemble."""
    beside = "image_encoder", "disconnect_watch"
    long: dict[str, Any] = {"max_tokens": 200, "ignore_eos": True}

    async def talk() -> None:
        triton = Triton(server.grpc_address)
        session = uuid.uuid4().hex
        shown = await triton.whole(turn(session, start=True, images=[PICTURE.read_bytes()]))
        assert shown.finish_reason == "prefilled"
        before = [steps(grpc_client, model) for model in beside]
        pieces = [piece async for piece in triton.pieces(turn(session, text="?", sampling=long))]
        await triton.whole(turn(session, end=True))
        assert [steps(grpc_client, model) for model in beside] == before
        assert len(pieces) > 10
        assert pieces[-1].num_input_tokens > shown.num_input_tokens > 36  # of the picture
        await triton.close()

    asyncio.run(talk())
