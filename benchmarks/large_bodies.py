"""`make bench-bodies`: what streams notice of the worst bodies that the session adapter takes.

Streams of one-token pieces run through the adapter while one client at a time sends bodies of one
kind over and over, and another asks /ping. Each kind is held for some seconds; `none` is the same
without any body. Without a model behind it: a stub sends pieces at a steady rate, each with the
time at which it was sent. So a piece's delay is the adapter's, the machine's, or the client's own;
what the stub itself loses, which receives the bodies too, does not count.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.findings import BUILD, Verdict, about, table, verdict_table, write_results
from benchmarks.piece_server import PieceServer
from benchmarks.processes import with_descendants
from benchmarks.stand import adapter, ping, request
from llava_triton.contract.settings import Settings

STREAMS = 16
MOST_DELAY_MS = 50.0
"""More than the usual delay, at most."""
SETTINGS = Settings()


def _bodies() -> dict[str, Callable[[], tuple[bytes, dict[str, str]]]]:
    """Bodies by kind, near what each limit lets through."""
    largest = SETTINGS.max_image_bytes * 4 // 3
    as_json = {"Content-Type": "application/json"}
    picture = b"iVBORw0KGgo+" * (largest // 12)

    def chat(picture: bytes) -> bytes:
        return (
            b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}, '
            b'{"type": "image_url", "image_url": {"url": "data:image/png;base64,%b"}}]}]}' % picture
        )

    def of(body: bytes, headers: dict[str, str] = as_json) -> tuple[bytes, dict[str, str]]:
        return body, headers

    raw = {"Content-Type": "image/png", "X-Amzn-SageMaker-Session-Id": "NEW_SESSION"}
    return {
        "none": lambda: of(b""),
        "lists, 6 MB": lambda: of(b"[" + b"[]," * 2_000_000 + b"0]"),
        "lists, as many as are taken": lambda: of(b'{"a": [' + b"[]," * 36_000 + b"0]}"),
        "1.5 million keys": lambda: of(
            b"{" + b",".join(b'"%d":0' % number for number in range(1_500_000)) + b"}"
        ),
        "a text of 2 MB": lambda: of(b'{"a": "%b"}' % (b"\\n" * 1_000_000)),
        "data URI, 6 MB": lambda: of(chat(picture[:6_000_000])),
        "data URI, 40 MB": lambda: of(chat(picture[:40_000_000])),
        "data URI, 40 MB, escaped": lambda: of(
            chat(picture[:24_000_000].replace(b"+", b"\\u002B"))
        ),
        "picture, 40 MB": lambda: of(picture[:40_000_000], raw),
    }


def _stream(port: int, until: float, delays: list[float]) -> None:
    """Keep one stream after another open; collect how long its pieces were on their way, in ms."""
    body = json.dumps({"messages": [{"role": "user", "content": "?"}], "stream": True})
    while time.monotonic() < until:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60.0)
        connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        while line := answer.readline():
            now = time.monotonic()
            if line.startswith(b"data: {"):
                for choice in json.loads(line.removeprefix(b"data: "))["choices"]:
                    if sent := choice["delta"].get("content"):
                        delays += [(now - float(each)) * 1000.0 for each in sent.split()]
            if now > until:
                break
        connection.close()


def _ping(port: int, until: float, times: list[float]) -> None:
    while time.monotonic() < until:
        began = time.monotonic()
        ping(port, 60.0)
        times.append((time.monotonic() - began) * 1000.0)
        time.sleep(0.05)


def _send(port: int, seconds: float, body: bytes, headers: dict[str, str]) -> list[int]:
    """Send a body over and over; the statuses of the answers, 0 where the connection ended."""
    until = time.monotonic() + seconds
    done = []
    while body and time.monotonic() < until:
        try:
            done.append(request(port, "/invocations", body, headers).status)
        except OSError:
            done.append(0)
    return done


@contextmanager
def _running(threads: list[threading.Thread]) -> Iterator[None]:
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join()


def measure(kind: str, port: int, pid: int, seconds: float) -> dict[str, Any]:
    """What is noticed while bodies of a kind come; times in ms, memory in MiB."""
    body, headers = _bodies()[kind]()
    delays: list[float] = []
    pings: list[float] = []
    # In a process of its own: what it sends must not hold up the streams' clocks.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(int).result()  # it has started, which takes seconds
        until = time.monotonic() + seconds
        threads = [
            threading.Thread(target=_stream, args=(port, until, delays)) for _ in range(STREAMS)
        ]
        threads.append(threading.Thread(target=_ping, args=(port, until, pings)))
        with _running(threads):
            done = pool.submit(_send, port, seconds, body, headers).result()
    (process,) = (each for each in with_descendants(pid) if each.pid == pid)
    return {
        "kind": kind,
        "bodies": len(done),
        "statuses": sorted(set(done)),
        "delay_ms": _spread(delays),
        "ping_ms": _spread(pings),
        "resident_mib": process.resident_mib,
        "peak_mib": process.peak_mib,
    }


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": statistics.median(values),
        "95th": statistics.quantiles(values, n=20)[-1],
        "max": max(values),
    }


def report(rows: list[dict[str, Any]]) -> str:
    """A table for people."""
    spread = ("median", "95th", "max")
    heads = ("bodies", "number", "status", "delay, ms", "95th", "max", "/ping, ms")
    cells = [
        (
            *(row["kind"], str(row["bodies"]), ",".join(map(str, row["statuses"]))),
            *(f"{row[name][part]:.1f}" for name in ("delay_ms", "ping_ms") for part in spread),
            *(f"{row['resident_mib']:.0f}", f"{row['peak_mib']:.0f}"),
        )
        for row in rows
    ]
    told = f"{STREAMS} streams; medians, the 95th of 100, and the longest; memory in MiB"
    return f"{told}\n\n{table((*heads, '95th', 'max', 'resident', 'peak'), cells)}"


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each kind of body")
    parser.add_argument("--output", type=Path, default=BUILD / "bodies.json")
    options = parser.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory(prefix="llava-bench-") as name, PieceServer() as server:
        folder = Path(name)
        (folder / "settings.json").write_text(SETTINGS.to_json())
        for kind in _bodies():
            with adapter(server.address, folder) as (port, pid):  # each with memory of its own
                rows.append(measure(kind, port, pid, options.seconds))
            print(f"  {kind}: done", flush=True)
    usual = rows[0]["delay_ms"]["max"]
    longest = max(row["delay_ms"]["max"] for row in rows)
    text = f"longest delay ({longest:.0f} ms) less that without bodies ({usual:.0f} ms)"
    verdict = Verdict(text, longest - usual, MOST_DELAY_MS, unit="ms")
    values = {"rows": rows, "targets": [verdict.values()], "target_met": verdict.met}
    told = f"{report(rows)}\n{verdict_table([verdict])}"
    write_results(options.output, told, values, about())
    return 0


if __name__ == "__main__":
    sys.exit(main())
