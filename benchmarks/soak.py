"""`make soak`: sessions through every door of one server, and then: is it as it was?

Clients hold sessions side by side: no picture, a small or a large one, one to three questions, over
Triton's HTTP and gRPC, whole and streamed, and through the session adapter, whole and streamed.
Most close their session; some forget it, disconnect in the middle of an answer or give it little
time. With `--requests` they hold two-turn sessions instead, half of them opened on a large JPEG,
all closed. Every whole answer is compared with the one that the quiet server gave. The exit status
is 1 if an answer was wrong, a session was lost, a request hung, a process ended, anything failed or
memory grew.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.doors import DOORS, Connection, Door
from benchmarks.export import DEMO, ExportFailedError, export
from benchmarks.findings import BUILD, ROOT, about, table, write_results
from benchmarks.load import Ask
from benchmarks.process_watch import (
    JUDGED_SESSIONS,
    Growth,
    MemorySampler,
    ProcessWatch,
    growths,
)
from benchmarks.soak_clients import (
    EVERY_KIND,
    FATES,
    TWO_REQUESTS,
    Clients,
    Script,
    Tally,
    explain,
    hold_whole,
    learn_answers,
    make_scripts,
)
from benchmarks.stand import Stand
from llava_triton.contract.errors import ErrorCode, SessionError
from llava_triton.contract.settings import Settings
from llava_triton.server.triton_server import ServerError

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
LOOK_SECONDS = 0.5
PROGRESS_SECONDS = 10.0
LAST_ANSWERS_SECONDS = 60.0
"""When no more sessions are opened, the open ones must end within this time."""


def run_clients(watch: ProcessWatch, clients: Clients, tally: Tally, seconds: float) -> float:
    """Let them work, printing how far they are, until a process ends or a request hangs; the
    seconds they took."""
    began = time.monotonic()
    clients.start(seconds)
    next_line = began + PROGRESS_SECONDS
    while clients.running:
        time.sleep(LOOK_SECONDS)
        took = time.monotonic() - began
        for ended in (dead := watch.dead()):
            tally.count(
                "dead", f"after {took:.0f} s and {tally.counts['requests']} requests {ended}"
            )
        for doing in (hung := clients.hung()):
            tally.count("hung", doing)
        if took > seconds + LAST_ANSWERS_SECONDS:
            tally.count("error", "clients still wait for answers that do not come")
            break
        if dead or hung:
            break
        if time.monotonic() >= next_line:
            next_line += PROGRESS_SECONDS
            print(f"[{took:5.0f} s] {_progress(tally, took)}", flush=True)
    clients.stop()
    return time.monotonic() - began


def _progress(tally: Tally, took: float) -> str:
    counts = tally.counts
    return (
        f"{tally.sessions:6} sessions, {counts['requests']} requests "
        f"({counts['requests'] / took:.0f}/s), {counts['wrong']} wrong, {counts['lost']} lost, "
        f"{counts['error']} other errors"
    )


def check_afterwards(doors: Sequence[Door], script: Script, tally: Tally) -> dict[str, bool]:
    """Is the server as it was? A new session answers through each door, a forgotten one is gone."""
    checks = {}
    for door in doors:
        connection = Connection(door)
        try:
            right = hold_whole(connection, script) == script.answers
        except SessionError as error:
            right = False
            tally.count("error", f"a new session through {door.name}: {error}")
        checks[f"a new session through {door.name} answers as before"] = right
        connection.close()
    if tally.first_abandoned is not None:
        session_id, left_at = tally.first_abandoned
        expired_at = left_at + Settings(**LIMITS).session_idle_seconds + 2.0
        time.sleep(max(0.0, expired_at - time.monotonic()))
        connection = Connection(doors[0])
        try:
            connection.ask(Ask(session_id, text="Are you there?"))
            gone = False
        except SessionError as error:
            gone = error.code is ErrorCode.NOT_FOUND
        checks["a forgotten session has expired"] = gone
        connection.close()
    return checks


def verdict(tally: Tally, memory: Sequence[Growth], checks: dict[str, bool]) -> dict[str, bool]:
    """What must hold, and whether it does."""
    counts = tally.counts
    held = {
        "no wrong answer": counts["wrong"] == 0,
        "no lost session": counts["lost"] == 0,
        "no request hung": counts["hung"] == 0,
        "no process ended": counts["dead"] == 0,
        "no other error": counts["error"] == 0,
        f"at most {MOST_RAN_ON:.1%} of the left answers ran on": (
            counts["ran on"] <= max(1.0, MOST_RAN_ON * counts["disconnected"])
        ),
    }
    if tally.sessions_wanted is not None:
        complete = tally.sessions == tally.sessions_wanted
        held[f"all {tally.sessions_wanted:,} sessions were held"] = complete
    if tally.sessions >= JUDGED_SESSIONS:
        held["memory is flat"] = bool(memory) and all(growth.flat for growth in memory)
    return held | checks


def report(values: dict[str, Any], memory: Sequence[Growth]) -> str:
    """Everything for a person."""
    counts, answers = values["counts"], values["answers"]
    fates = ", ".join(f"{counts.get(fate, 0):,} {fate}" for fate in FATES)
    compared = ", ".join(f"{answers.get(door, 0):,} {door}" for door in values["doors"])
    failures = ("wrong", "lost", "hung", "dead", "error")
    lines = [
        f"{values['sessions']:,} sessions in {values['seconds']:.0f} s by "
        f"{values['clients']} clients: {fates}",
        f"{counts['requests']:,} requests, {values['requests_per_second']:.1f}/s; they cost the "
        f"clients' process {values['client_ms_per_request']:.1f} ms of a core each",
        f"answers compared: {compared}; {counts.get('ran on', 0)} left ones ran to their end",
        ", ".join(f"{counts.get(kind, 0)} {kind}" for kind in failures),
        "",
    ]
    rows = [
        (
            *(growth.part, f"{growth.second_quarter:.1f}", f"{growth.last_quarter:.1f}"),
            *(f"{growth.per_thousand_sessions:+.2f}", "" if growth.flat else "GROWS"),
        )
        for growth in memory
    ]
    heads = ("memory, MiB", "2nd quarter", "last quarter", "per 1,000 sessions", "")
    lines.append(table(heads, rows))
    if values["sessions"] < JUDGED_SESSIONS:
        lines.append(f"(not judged: fewer than {JUDGED_SESSIONS:,} sessions)\n")
    lines += [f"{'yes' if holds else 'NO ':3}  {name}" for name, holds in values["verdict"].items()]
    lines += ["", *values["failures"]] if values["failures"] else []
    return "\n".join(lines) + "\n"


def soak(options: argparse.Namespace) -> int:
    """Export, serve, hold the sessions, judge, write."""
    mix = EVERY_KIND if options.requests is None else TWO_REQUESTS
    scripts = make_scripts(mix)
    tally = Tally(options.sessions if options.requests is None else options.requests // 2)
    print(f"exporting the demo checkpoint to {options.repository} ...", flush=True)
    export(DEMO, options.repository, LIMITS)
    log = options.output.with_suffix(".log")
    with Stand(options.repository, log) as stand:
        doors = [stand.doors[name] for name in options.doors]
        learn_answers(stand.doors["grpc-stream"], scripts)
        clients = Clients(doors, scripts, mix, tally, options.clients)
        print(f"{options.clients} clients begin", flush=True)
        client_seconds = -time.process_time()
        with MemorySampler(stand.watch, lambda: tally.sessions) as sampler:
            seconds = run_clients(stand.watch, clients, tally, options.minutes * 60.0)
        client_seconds += time.process_time()
        checks = {}
        if not tally.counts["dead"]:
            explain(stand.doors["grpc-stream"], tally)
            checks = check_afterwards(doors, scripts[-1], tally)
    memory = growths(sampler.samples)
    held = verdict(tally, memory, checks)
    requests = tally.counts["requests"]
    values: dict[str, Any] = {
        "sessions": tally.sessions,
        "seconds": seconds,
        "clients": options.clients,
        "doors": options.doors,
        "requests_per_second": requests / seconds,
        "client_ms_per_request": client_seconds * 1000.0 / max(1, requests),
        "counts": dict(tally.counts),
        "answers": dict(tally.answers),
        "failures": tally.sentences,
        "verdict": held,
        "memory": [asdict(growth) for growth in memory],
        "samples": [asdict(sample) for sample in sampler.samples],
    }
    write_results(options.output, report(values, memory), values, about())
    print(f"the server's log: {log}")
    return 0 if all(held.values()) else 1


def main(arguments: list[str] | None = None) -> int:
    """See `--help`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0, help="at most (%(default)s)")
    parser.add_argument("--sessions", type=int, help="as many instead, all within the minutes")
    parser.add_argument("--requests", type=int, help="so many instead, in two-turn sessions")
    parser.add_argument("--clients", type=int, default=64, help="side by side (%(default)s)")
    parser.add_argument("--doors", nargs="+", choices=DOORS, default=DOORS, help="by default all")
    parser.add_argument("--repository", type=Path, default=ROOT / "build/repositories/soak")
    parser.add_argument("--output", type=Path, default=BUILD / "soak.json")
    options = parser.parse_args(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        return soak(options)
    except (ServerError, ExportFailedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
