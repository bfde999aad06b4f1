"""`make soak`: tens of thousands of sessions against one server, and then: is it as it was?

Clients hold sessions side by side: a picture, one to three questions, over `llava` and
`llava_stream`. Most close their session, some forget it, some disconnect in the middle of an
answer. Every whole answer is compared with the one that the quiet server gave. The exit status is 1
if an answer was wrong, a session was lost, anything failed or the server's memory grew.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.provenance import BUILD, ROOT, about, write_results
from benchmarks.soak_clients import (
    FATES,
    Clients,
    Conversation,
    Script,
    Tally,
    explain,
    learn_answers,
    make_scripts,
)
from benchmarks.soak_memory import JUDGED_SESSIONS, Growth, MemorySampler, growths
from llava_triton.client.grpc import GrpcTransport
from llava_triton.client.transport import TurnMessage
from llava_triton.errors import ErrorCode, SessionError
from llava_triton.server import ServerError, TritonServer, free_ports
from llava_triton.settings import Settings

LIMITS: dict[str, Any] = {
    "session_idle_seconds": 8.0,
    "max_sessions": 1024,
    "kv_cache_bytes": 32 << 20,
    "host_cache_bytes": 8 << 20,
}
"""Sessions that nobody closes expire while the soak runs, many times over, and there are blocks for
about 100 sessions on the device and 25 more in host memory, of about 200 that are open: sessions
leave and come back all the time."""
MOST_RAN_ON = 0.005
"""Of the answers whose client left, those that Triton let run to their end."""
PROGRESS_SECONDS = 10.0
LAST_ANSWERS_SECONDS = 60.0
"""When no more sessions are opened, the open ones must end within this time."""


def export(repository: Path) -> None:
    """Export the demo checkpoint with a short idle limit, unless that is there already."""
    repository.parent.mkdir(parents=True, exist_ok=True)
    settings = repository.with_suffix(".settings.json")
    settings.write_text(json.dumps(LIMITS))
    command = [sys.executable, "-m", "llava_export", "--model", str(ROOT / "demo/checkpoint")]
    command += ["--output", str(repository), "--settings", str(settings)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def run_clients(server: TritonServer, clients: Clients, tally: Tally, seconds: float) -> float:
    """Let them work, printing how far they are; the seconds they took."""
    began = time.monotonic()
    clients.start(seconds)
    next_line = began + PROGRESS_SECONDS
    while clients.running and time.monotonic() < began + seconds + LAST_ANSWERS_SECONDS:
        if not server.alive:
            tally.count("error", f"the server died; its last words:\n{server.log_tail()}")
            break
        time.sleep(0.1)
        if time.monotonic() >= next_line:
            next_line += PROGRESS_SECONDS
            took, counts = time.monotonic() - began, tally.counts
            print(
                f"[{took:5.0f} s] {tally.sessions:6} sessions ({tally.sessions / took:.0f}/s), "
                f"{counts['answers']} answers, {counts['wrong']} wrong, {counts['lost']} lost, "
                f"{counts['error']} other errors",
                flush=True,
            )
    else:
        if clients.running:
            tally.count("error", "clients still wait for answers that do not come")
    return time.monotonic() - began


def check_afterwards(address: str, script: Script, tally: Tally) -> dict[str, bool]:
    """Is the server as it was? A new session answers, a forgotten one is gone."""
    transport = GrpcTransport(address)
    checks = {}
    try:
        fresh = Conversation(transport, script, uuid.uuid4().hex)
        said = fresh.ask(0, start=True, end=True, streamed=True)
        checks["a new session answers as before"] = said == script.answers[0]
        if tally.first_abandoned is not None:
            session_id, left_at = tally.first_abandoned
            expired_at = left_at + Settings(**LIMITS).session_idle_seconds + 2.0
            time.sleep(max(0.0, expired_at - time.monotonic()))
            try:
                transport.ask(TurnMessage(session_id, text="Are you there?"))
                checks["a forgotten session has expired"] = False
            except SessionError as error:
                gone = error.code is ErrorCode.NOT_FOUND
                checks["a forgotten session has expired"] = gone
    finally:
        transport.close()
    return checks


def verdict(tally: Tally, memory: Sequence[Growth], checks: dict[str, bool]) -> dict[str, bool]:
    """What must hold, and whether it does."""
    counts = tally.counts
    held = {
        f"all {tally.sessions_wanted:,} sessions were held": (
            tally.sessions == tally.sessions_wanted
        ),
        "no wrong answer": counts["wrong"] == 0,
        "no lost session": counts["lost"] == 0,
        "no other error": counts["error"] == 0,
        f"at most {MOST_RAN_ON:.1%} of the left answers ran on": (
            counts["ran on"] <= max(1.0, MOST_RAN_ON * counts["disconnected"])
        ),
    }
    if tally.sessions >= JUDGED_SESSIONS:
        held["memory is flat"] = bool(memory) and all(growth.flat for growth in memory)
    return held | checks


def table(tally: Tally, seconds: float, memory: Sequence[Growth], held: dict[str, bool]) -> str:
    """Everything for a person."""
    counts = tally.counts
    fates = ", ".join(f"{counts[fate]:,} {fate}" for fate in FATES)
    lines = [
        f"{tally.sessions:,} sessions in {seconds:.0f} s ({fates}); {counts['answers']:,} answers "
        f"compared; {counts['ran on']} left answers ran to their end",
        "",
        "memory, MiB             2nd quarter  last quarter  per 1,000 sessions",
    ]
    for growth in memory:
        lines.append(
            f"  {growth.part:20}  {growth.second_quarter:11.1f}  {growth.last_quarter:12.1f}"
            f"  {growth.per_thousand_sessions:+18.2f}  {'' if growth.flat else 'GROWS'}".rstrip()
        )
    if tally.sessions < JUDGED_SESSIONS:
        lines.append(f"  (not judged: fewer than {JUDGED_SESSIONS:,} sessions)")
    lines.append("")
    lines += [f"{'yes' if holds else 'NO ':3}  {name}" for name, holds in held.items()]
    lines += ["", *tally.sentences] if tally.sentences else []
    return "\n".join(lines) + "\n"


def soak(options: argparse.Namespace) -> int:
    """Export, serve, hold the sessions, judge, write."""
    scripts = make_scripts()
    tally = Tally(options.sessions)
    print(f"exporting the demo checkpoint to {options.repository} ...", flush=True)
    export(options.repository)
    log = options.output.with_suffix(".log")
    with TritonServer(options.repository, *free_ports(3), log=log) as server:
        learn_answers(server.grpc_address, scripts)
        print(f"{options.clients} clients begin {options.sessions:,} sessions", flush=True)
        clients = Clients(server.grpc_address, scripts, tally, options.clients)
        with MemorySampler(server.pid, lambda: tally.sessions) as sampler:
            seconds = run_clients(server, clients, tally, options.minutes * 60.0)
        checks = {"the server lives": server.alive}
        if server.alive:
            explain(server.grpc_address, tally)
            checks |= check_afterwards(server.grpc_address, scripts[0], tally)
    memory = growths(sampler.samples)
    held = verdict(tally, memory, checks)
    values: dict[str, Any] = {
        "sessions": tally.sessions,
        "seconds": seconds,
        "clients": options.clients,
        "counts": dict(tally.counts),
        "failures": tally.sentences,
        "verdict": held,
        "memory": [asdict(growth) for growth in memory],
        "samples": [asdict(sample) for sample in sampler.samples],
    }
    write_results(options.output, table(tally, seconds, memory, held), values, about())
    print(f"the server's log: {log}")
    return 0 if all(held.values()) else 1


def main(arguments: list[str] | None = None) -> int:
    """See `--help`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--sessions", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=32, help="side by side (%(default)s)")
    parser.add_argument("--minutes", type=float, default=10.0, help="at most")
    parser.add_argument("--repository", type=Path, default=ROOT / "build/repositories/soak")
    parser.add_argument("--output", type=Path, default=BUILD / "soak.json")
    options = parser.parse_args(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        return soak(options)
    except (ServerError, subprocess.CalledProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
