"""Through the real server: one tenant's picture is new to another."""

from __future__ import annotations

import io
import re
import time
import urllib.request
import uuid
from typing import Any

import tritonclient.grpc
from PIL import Image

from llava_triton.server.triton_server import TritonServer
from tests.triton import inputs
from tests.unit.test_image_encoding import until


def counted(server: TritonServer) -> dict[str, int]:
    """Pictures that the image encoder found, and did not find, encoded."""
    text = urllib.request.urlopen(server.metrics_url).read().decode()
    found = re.findall(r'llava_image_cache_total\{.*result="(\w+)".*\} ([\d.]+)', text)
    return {result: int(float(count)) for result, count in found}


def settled(server: TritonServer) -> dict[str, int]:
    """The counts, once they have not changed for longer than they are published apart."""
    seen, since = counted(server), time.monotonic()
    while time.monotonic() - since < 1.5:
        time.sleep(0.1)
        if counted(server) != seen:
            seen, since = counted(server), time.monotonic()
    return seen


def test_one_tenants_picture_is_new_to_another(server: TritonServer, grpc_client: Any) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((40, 40), 99).convert("RGB").save(buffer, "PNG")

    def show(tenant: str | None) -> None:
        grpc_client.infer(
            "llava",
            inputs(tritonclient.grpc, images=[buffer.getvalue()]),
            sequence_id=uuid.uuid4().hex,
            sequence_start=True,
            sequence_end=True,
            parameters={} if tenant is None else {"tenant": tenant},
        )

    before = settled(server)
    for tenant in ("anna", "bert", "anna", None, "bert", None):
        show(tenant)
    expected = {"hit": before["hit"] + 3, "miss": before["miss"] + 3}
    until(lambda: counted(server) == expected)
