"""Why few requests at a time wait as Triton's payloads: more than 1,000 break the server's heap.

    python -m benchmarks.payload_backlog                # the server crashes within seconds
    python -m benchmarks.payload_backlog --waiting 800  # the same load in smaller waves: lives
    python -m benchmarks.payload_backlog --batched      # `plain` has a batcher, too: lives

Two models and nothing of ours in them: waves of requests wait for `plain`, four clients ask
`batched`, which has `dynamic_batching`. The cause, by reading Triton's core (r24.10, and main of
2026-11): `RateLimiter::PayloadRelease` keeps 1,000 payloads, in use or not, and drops the others.
So `DynamicBatchScheduler::BatcherThread` may hold the last reference to its payload. It replaces
it (`NewPayload`) while it holds the mutex that the payload owns, and then unlocks freed memory:
the first four bytes of a free chunk of `malloc` become zero. A model without batching makes a
payload for every request that waits; so does a sequence batcher of strategy `oldest`, because
`PayloadSlotAvailable` looks at the queue of all instances and it fills the one of its instance.

Exit status: 0 where the server lived, 1 where it crashed.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from llava_triton.server.server_error import ServerError
from llava_triton.server.triton_server import TritonServer, free_ports

_CONFIG = """
name: "{name}"
backend: "python"
max_batch_size: 0
{batching}
input [ {{ name: "text" data_type: TYPE_STRING dims: [ 1 ] }} ]
output [ {{ name: "text" data_type: TYPE_STRING dims: [ 1 ] }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
"""
_MODEL = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        return [
            pb_utils.InferenceResponse([pb_utils.get_input_tensor_by_name(each, "text")])
            for each in requests
        ]
"""
ASKING = 4


def write_repository(folder: Path, *, batched: bool) -> None:
    """The two models."""
    batching = {
        "plain": "dynamic_batching { }" if batched else "",
        "batched": "dynamic_batching { }",
    }
    for name, how in batching.items():
        (folder / name / "1").mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(_CONFIG.format(name=name, batching=how))
        (folder / name / "1" / "model.py").write_text(_MODEL)


def requests_until_crash(server: TritonServer, seconds: float, waiting: int) -> tuple[int, str]:
    """How many requests were answered, and what became of the server ("" where it lived)."""
    answered, ends, crashed = [0] * (ASKING + 1), time.monotonic() + seconds, ""
    text = triton.InferInput("text", [1], "BYTES")
    text.set_data_from_numpy(np.array([b"question"], dtype=np.object_))

    def going() -> bool:
        return not crashed and time.monotonic() < ends

    def ask(number: int) -> None:
        with triton.InferenceServerClient(server.grpc_address) as client:
            while going():
                try:
                    client.infer("batched", [text], client_timeout=5.0)
                except InferenceServerException:
                    continue
                answered[number] += 1

    def send_waves() -> None:
        with triton.InferenceServerClient(server.grpc_address) as client:
            while going():
                over = threading.Semaphore(0)
                for _ in range(waiting):
                    client.async_infer(
                        "plain", [text], lambda result, error, over=over: over.release()
                    )
                for _ in range(waiting):
                    if not over.acquire(timeout=5.0):
                        break
                    answered[ASKING] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(ASKING)]
    threads.append(threading.Thread(target=send_waves))
    for thread in threads:
        thread.start()
    while going():
        time.sleep(0.2)
        try:
            crashed = server.fault() or ""
        except ServerError as error:
            crashed = str(error)
    for thread in threads:
        thread.join()
    return sum(answered), crashed


def main(arguments: list[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.payload_backlog", description=__doc__
    )
    parser.add_argument("--waiting", type=int, default=3000, help="requests a wave (%(default)s)")
    parser.add_argument(
        "--batched", action="store_true", help="with a batcher for the waves' model"
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="at most (%(default)s)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        write_repository(Path(folder), batched=options.batched)
        with TritonServer(folder, *free_ports(3)) as server:
            began = time.monotonic()
            requests, crashed = requests_until_crash(server, options.seconds, options.waiting)
            took = time.monotonic() - began
            server.stop(at_once=True)
            print(f"the server {crashed or 'lived'}: {requests:,} requests in {took:.0f} s")
    return int(bool(crashed))


if __name__ == "__main__":
    sys.exit(main())
