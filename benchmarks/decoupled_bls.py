"""Why no model here reads tensors from a decoupled BLS call: it kills the process that makes it.

    python -m benchmarks.decoupled_bls            # the caller's process dies within a minute
    python -m benchmarks.decoupled_bls --empty    # the same calls, answered without tensors: lives
    python -m benchmarks.decoupled_bls --once     # tensors, but a model that answers once: lives

Two models and nothing of ours in them: `source` answers with strings, `caller` calls it by BLS from
a few threads. The cause, by reading the backend's source (r24.10):
`Stub::SendCleanupId` erases the call's `ResponseIterator` on the stub's message thread, which does
not hold the interpreter's lock. Where Python has dropped the iterator by then, that erases the
last reference to the responses' tensors, and so frees NumPy arrays without the lock. (Since 24.12
the tensors' destructor takes the lock, but the map's mutex is held meanwhile, which a thread with
the lock may be waiting for.) Responses without tensors own no Python objects.

Exit status: 0 where the caller's process lived, 1 where it died.
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

from llava_triton.server.triton_server import TritonServer, free_ports

_CONFIG = """
name: "{name}"
backend: "python"
max_batch_size: 0
model_transaction_policy {{ decoupled: {decoupled} }}
input [ {{ name: "text" data_type: TYPE_STRING dims: [ 1 ] }} ]
output [ {{ name: "text" data_type: TYPE_STRING dims: [ 1 ] }} ]
instance_group [ {{ kind: KIND_CPU count: 1 }} ]
"""
_SOURCE = """
import numpy as np
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            for last in [False] * {pieces} + [True]:
                text = pb_utils.Tensor("text", np.array([b"answer " * 20], dtype=np.object_))
                response = pb_utils.InferenceResponse([] if {empty} else [text])
                sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL * last)
"""
_CALLER = """
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import triton_python_backend_utils as pb_utils
class TritonPythonModel:
    def initialize(self, args):
        self.threads = ThreadPoolExecutor(8)
    def execute(self, requests):
        for request in requests:
            self.threads.submit(answer, request.inputs(), request.get_response_sender())
def answer(inputs, sender):
    call = pb_utils.InferenceRequest(
        model_name="source", requested_output_names=["text"], inputs=inputs)
    for response in [call.exec()] if {once} else call.exec(decoupled=True):
        response.output_tensors()
    text = pb_utils.Tensor("text", np.array([b"done"], dtype=np.object_))
    sender.send(pb_utils.InferenceResponse([text]),
                flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""


def write_repository(folder: Path, *, empty: bool, once: bool) -> None:
    """The two models.

    Args:
        folder: where.
        empty: `source` answers without tensors.
        once: `source` is not decoupled.
    """
    source = _SOURCE.format(empty=empty, pieces=0 if once else 3)
    models = {"source": source, "caller": _CALLER.format(once=once)}
    for name, code in models.items():
        (folder / name / "1").mkdir(parents=True)
        decoupled = str(name == "source" and not once).lower()
        (folder / name / "config.pbtxt").write_text(_CONFIG.format(name=name, decoupled=decoupled))
        (folder / name / "1" / "model.py").write_text(code)


def calls_until_death(server: TritonServer, seconds: float, clients: int) -> tuple[int, bool]:
    """Ask `caller` from many clients; how many answers came, and whether its process died."""
    stubs, answered, ends = set(server.stubs()), [0] * clients, time.monotonic() + seconds

    def ask(number: int) -> None:
        text = triton.InferInput("text", [1], "BYTES")
        text.set_data_from_numpy(np.array([b"question"], dtype=np.object_))
        with triton.InferenceServerClient(server.grpc_address) as client:
            while time.monotonic() < ends and stubs <= set(server.stubs()):
                try:
                    client.infer("caller", [text], client_timeout=10.0)
                except InferenceServerException:
                    return
                answered[number] += 1

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(answered), not stubs <= set(server.stubs())


def main(arguments: list[str] | None = None) -> int:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoupled_bls", description=__doc__)
    parser.add_argument("--empty", action="store_true", help="answer the calls without tensors")
    parser.add_argument("--once", action="store_true", help="call a model that is not decoupled")
    parser.add_argument("--seconds", type=float, default=120.0, help="at most (%(default)s)")
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        write_repository(Path(folder), empty=options.empty, once=options.once)
        with TritonServer(folder, *free_ports(3)) as server:
            began = time.monotonic()
            calls, died = calls_until_death(server, options.seconds, options.clients)
            took = time.monotonic() - began
            print(f"the caller {'DIED' if died else 'lived'}: {calls:,} calls in {took:.0f} s")
            if died:
                print(server.log_tail(6))
    return int(died)


if __name__ == "__main__":
    sys.exit(main())
