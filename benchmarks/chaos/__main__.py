"""Faults of every kind, one after the other, beside sessions that must not notice.

Two local instances with two engines each and one journal in a folder. Clients hold sessions with a
picture and questions about it, and ask again where they are not answered. Meanwhile processes are
killed and stopped, and the journal's disk is full or away. In the end no session is lost, no answer
is another than that of a quiet endpoint, and the journal has only what faults have left.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.chaos.clients import Client, Tally, learn_answers, make_scripts
from benchmarks.chaos.disk import Disk
from benchmarks.chaos.endpoint import Endpoint
from benchmarks.chaos.faults import FAULTS, Faults
from benchmarks.export import DEMO, ExportFailedError, export
from benchmarks.findings import BUILD, ROOT, about, table, write_results

INSTANCES = 2
ENGINES = 2
CLIENTS = 12
BETWEEN_SECONDS = (3.0, 8.0)
IDLE_SECONDS = 900.0
"""Longer than anybody waits for an answer: while nothing serves, sessions age all the same."""
DELETED_SECONDS = 10.0
"""Sessions that have ended are deleted within this time."""
SWEPT_SECONDS = 60.0
"""When an endpoint has started, what has expired is deleted within this time."""


def settings(journal: Path) -> dict[str, Any]:
    """Of the model repository: an answer is safe before its client has it."""
    return {
        "journal": journal.as_uri(),
        "journal_sync": True,
        "session_idle_seconds": IDLE_SECONDS,
        "max_sessions": 64,
        "kv_cache_bytes": 32 << 20,
        "host_cache_bytes": 8 << 20,
    }


def sessions_in(journal: Path) -> int:
    """Sessions that the journal has something of."""
    # Folders may vanish meanwhile, which `rglob` does not take.
    return sum(
        any(files for _, _, files in os.walk(folder))
        for folder in (journal.iterdir() if journal.exists() else ())
    )


def make_old(journal: Path) -> None:
    """As if all of it had been written long ago."""
    then = time.time() - 3 * IDLE_SECONDS
    for file in journal.rglob("*"):
        if file.is_file():
            os.utime(file, (then, then))


def run(options: argparse.Namespace) -> int:
    """Export, serve, harm, judge, write."""
    folder = options.output.parent / "chaos"
    shutil.rmtree(folder, ignore_errors=True)
    disk = Disk(folder / "disk")
    if not disk.is_own:
        print("this user may mount no file system: the disk is never full", flush=True)
    try:
        return _run(options, folder, disk)
    finally:
        disk.close()


def _run(options: argparse.Namespace, folder: Path, disk: Disk) -> int:
    journal = disk.journal
    print(f"exporting the demo checkpoint to {options.repository} ...", flush=True)
    export(DEMO, options.repository, settings(journal))
    endpoint = Endpoint(options.repository, folder / "logs", INSTANCES, ENGINES)
    scripts, tally = make_scripts(options.seed), Tally()
    seconds = options.minutes * 60.0
    try:
        endpoint.start()
        print("asking a quiet endpoint", flush=True)
        learn_answers(endpoint, scripts)
        faults = Faults(endpoint, disk, BETWEEN_SECONDS, options.seed)
        until = time.monotonic() + seconds
        clients = [Client(endpoint, scripts, tally, n, until) for n in range(options.clients)]
        for client in clients:
            client.start()
        faults.start()
        time.sleep(seconds)
        faults.end()
        print("no more faults", flush=True)
        for client in clients:
            client.join()
        deadline = time.monotonic() + DELETED_SECONDS
        while (left := sessions_in(journal)) and time.monotonic() < deadline:
            time.sleep(0.1)
        held = verdict(tally, left, faults.counts.total())
        if options.sweep and left:
            # What an opening left whose client has not heard of it: to be swept when it is old.
            print(f"{left} sessions of nobody are made old, and are to be swept", flush=True)
            endpoint.stop()
            make_old(journal)
            endpoint.start()
            deadline = time.monotonic() + SWEPT_SECONDS
            while sessions_in(journal) and time.monotonic() < deadline:
                time.sleep(1.0)
            held["nothing is left in the journal when it has expired"] = not sessions_in(journal)
    finally:
        endpoint.stop()
    values = {
        "seconds": seconds,
        "clients": options.clients,
        "instances": INSTANCES,
        "engines": ENGINES,
        "faults": {fault: faults.counts[fault] for fault in FAULTS},
        "counts": dict(tally.counts),
        "left_in_journal": left,
        "waited_seconds": _quantiles(tally.waits),
        "failures": tally.sentences,
        "verdict": held,
    }
    write_results(options.output, report(values), values, about())
    print(f"logs: {folder / 'logs'}")
    return 0 if all(held.values()) else 1


def verdict(tally: Tally, left: int, faults: int) -> dict[str, bool]:
    """What must hold, and whether it does."""
    counts = tally.counts
    return {
        "sessions were held": counts["sessions"] > 0,
        "no session lost": counts["lost"] == 0,
        "no wrong answer": counts["wrong"] == 0,
        "no other error": counts["error"] == 0,
        # An opening, or an end, whose process was killed before all of it was done.
        "the journal has only what faults have left": (
            left <= counts["openings that failed"] + faults
        ),
    }


def _quantiles(waits: list[float]) -> dict[str, float]:
    if not waits:
        return {}
    return {"median": statistics.median(waits), "worst": max(waits)}


def report(values: dict[str, Any]) -> str:
    """Everything for a person."""
    counts, waited = values["counts"], values["waited_seconds"]
    lines = [table(("fault", "times"), [(name, str(n)) for name, n in values["faults"].items()])]
    lines.append(
        f"{counts.get('sessions', 0)} sessions, {counts.get('answers', 0)} answers in "
        f"{values['seconds']:.0f} s by {values['clients']} clients; {counts.get('asked again', 0)} "
        "requests were sent again"
    )
    if waited:
        lines.append(
            f"those not answered at once waited {waited['median']:.1f} s "
            f"(median), {waited['worst']:.1f} s (worst)"
        )
    lines.append(
        f"{counts.get('openings that failed', 0)} openings failed; "
        f"{values['left_in_journal']} sessions were left in the journal"
    )
    lines += [""]
    lines += [f"{'yes' if holds else 'NO ':3}  {name}" for name, holds in values["verdict"].items()]
    lines += ["", *values["failures"]] if values["failures"] else []
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """See `--help`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chaos", description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0, help="of faults (%(default)s)")
    parser.add_argument("--clients", type=int, default=CLIENTS, help="side by side (%(default)s)")
    parser.add_argument("--seed", type=int, default=19, help="of what happens when (%(default)s)")
    parser.add_argument(
        "--no-sweep", dest="sweep", action="store_false", help="do not look at what is swept"
    )
    parser.add_argument("--repository", type=Path, default=ROOT / "build/repositories/chaos")
    parser.add_argument("--output", type=Path, default=BUILD / "chaos.json")
    options = parser.parse_args(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        return run(options)
    except (RuntimeError, ExportFailedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
