"""`make fuzz`: a million inputs for the parsers of what clients send, guided by coverage (atheris).

Each parser has a process of its own. A finding is an exception that is no refusal, a crash, a hang,
or memory that grows. What was found interesting is then sent to a real server, which must refuse or
answer all of it, and answer a conversation afterwards as before.
"""

from __future__ import annotations

import argparse
import http.client
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from tests.adapter_process import Adapter

BUILD = Path("build/fuzz")
INPUTS = 1_000_000
MOST_BYTES = 4096
"""Of an input."""
SECONDS_AN_INPUT = 10
MOST_GROWN_BYTES = 64 << 20
"""Of memory, from a quarter of the inputs on: until then caches and the corpus fill."""
SEED = 1
SENT_TO_THE_SERVER = 500
"""Of the requests, and of the pictures."""


def main() -> int:
    """All parsers, or one of them in this process."""
    options = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    options.add_argument("--inputs", type=int, default=INPUTS, help="of all parsers together")
    options.add_argument("--target", help="one parser, in this process")
    options.add_argument("--repository", type=Path, default=Path("build/repositories/demo"))
    given = options.parse_args()
    if given.target:
        fuzz(given.target, given.inputs)
        return 0
    from tests.fuzz.targets import targets

    findings = 0
    for name, target in targets().items():
        inputs, began = int(given.inputs * target.share), time.monotonic()
        print(f"{name}: {inputs:,} inputs ...", flush=True)
        command = [sys.executable, "-m", "tests.fuzz", "--target", name, "--inputs", str(inputs)]
        log = BUILD / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as written:
            code = subprocess.run(command, stderr=written, check=False).returncode
        seconds = time.monotonic() - began
        if code:
            findings += 1
            print(f"{name}: FOUND something after {seconds:.0f} s; see {log} and {BUILD}/{name}-*")
        else:
            print(f"{name}: nothing found in {seconds:.0f} s", flush=True)
    findings += not server_stands(given.repository)
    print("nothing found" if not findings else f"{findings} findings")
    return int(findings > 0)


def fuzz(name: str, inputs: int) -> None:
    """Give one parser so many inputs; does not return. libFuzzer tells findings."""
    import atheris

    with atheris.instrument_imports(include=["llava_triton", "llava_sagemaker"]):
        from tests.fuzz.targets import targets
    target = targets()[name]
    corpus = BUILD / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    expected = [target.run(seed) for seed in target.seeds]
    process, count, settled = psutil.Process(), 0, 0

    def one(data: bytes) -> None:
        nonlocal count, settled
        target.run(data)
        count += 1
        if count == max(1, inputs // 4):
            settled = process.memory_info().rss
        if count >= inputs:
            assert [target.run(seed) for seed in target.seeds] == expected
            rss = process.memory_info().rss
            print(f"{name}: memory {settled >> 20} MiB, at the end {rss >> 20} MiB", flush=True)
            assert rss - settled < MOST_GROWN_BYTES, "memory grows"
            os._exit(0)

    options = {
        "max_len": MOST_BYTES,
        "timeout": SECONDS_AN_INPUT,
        "seed": SEED,
        "artifact_prefix": f"{BUILD}/{name}-",
        "rss_limit_mb": 4096,
    }
    atheris.Setup(
        [sys.argv[0], str(corpus), *(f"-{key}={value}" for key, value in options.items())], one
    )
    atheris.Fuzz()


def server_stands(repository: Path) -> bool:
    """Whether a real server takes the corpus of HTTP requests and pictures, and then answers."""
    from llava_triton.server.triton_server import TritonServer, free_ports
    from tests.adapter_process import Adapter
    from tests.fuzz.seeds import PNG, request

    corpus = sorted((BUILD / "corpus" / "requests").iterdir())[:SENT_TO_THE_SERVER]
    sent = [file.read_bytes() for file in corpus]
    shown = sorted((BUILD / "corpus" / "pictures").iterdir())[:SENT_TO_THE_SERVER]
    sent += [
        request("/invocations", file.read_bytes(), Content_Type="image/x", **NEW) for file in shown
    ]
    with TritonServer(repository, *free_ports(3), log=BUILD / "triton.log") as server:
        adapter = Adapter(server, repository)
        try:
            adapter.wait_until(lambda: adapter.ping() == 200)
            before = conversation(adapter, PNG)
            statuses = Counter(status_of(adapter, data) for data in sent)
            same = conversation(adapter, PNG) == before
        finally:
            adapter.stop()
    told = ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
    print(f"a real server: {len(sent)} requests, {told}; the conversation afterwards is", end=" ")
    print("the same" if same else "ANOTHER")
    # 503: there are only so many sessions, and these open them without an end.
    return same and not any(status >= 500 and status != 503 for status in statuses)


NEW = {"X_Amzn_SageMaker_Session_Id": "NEW_SESSION"}
NEW_SESSION = "X-Amzn-SageMaker-New-Session-Id"


def conversation(adapter: Adapter, picture: bytes) -> list[str]:
    """Answers to two questions about a picture."""
    session = adapter.invoke(picture, "NEW_SESSION", "image/png").new_session
    texts = [
        str(adapter.invoke({"prompt": text, "max_tokens": 8}, session).json["choices"][0]["text"])
        for text in ("What is in the picture?", "And its colour?")
    ]
    adapter.invoke({"requestType": "CLOSE"}, session)
    return texts


def status_of(adapter: Adapter, data: bytes) -> int:
    """Of the answer to a request as the parser's inputs are; 0 where HTTP cannot say it. What it
    opens is closed."""
    head, _, body = data.partition(b"\n\n")
    first, *lines = head.decode("latin-1").split("\n")
    method, _, path = first.partition(" ")
    headers = dict(line.split(": ", 1) for line in lines if ": " in line)
    try:
        answer = adapter.request(method, path or "/", body, headers)
    except (OSError, ValueError, http.client.HTTPException):
        return 0
    if NEW_SESSION in answer.headers:
        adapter.invoke({"requestType": "CLOSE"}, answer.new_session)
    return answer.status


if __name__ == "__main__":
    sys.exit(main())
