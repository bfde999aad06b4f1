"""`make hostile`: what strangers and heavy clients can do, with honest clients beside them.

One server and its session adapter; attacks one after the other; an honest client at every door
meanwhile, which opens a session on a picture, asks again and ends it, in a process of its own. The
attackers' own threads give way to both, as if they ran elsewhere. An attack has failed where it was
answered as it should, the honest clients' answers were right and their 99th percentile of the first
token was at most three times its quiet value, /ping said 200 within a second, no process ended, and
memory came back or does not grow when the attack is repeated (what allocators keep is kept once).
The exit status is 1 if any succeeded.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.export import DEMO, ExportFailedError, export
from benchmarks.findings import BUILD, ROOT, about, table, write_results

# In the order in which they are played.
from benchmarks.hostile import adapter_bodies, faults, neighbours, triton_ports  # noqa: F401
from benchmarks.hostile.attack import ATTACKS, Attack, Play, UnsafeError
from benchmarks.hostile.honest import HonestClients, Seen
from benchmarks.soak_clients import EVERY_KIND, learn_answers, make_scripts
from benchmarks.stand import Stand
from llava_triton.server.triton_server import ServerError

LIMITS: dict[str, Any] = {"session_idle_seconds": 4.0, "max_sessions": 64}
"""Sessions that attacks leave open expire before the next but one begins."""
DOORS = ("http", "grpc-stream", "adapter", "adapter-stream")
SCRIPTS = 6
MOST_SLOWER = 3.0
"""The honest clients' 99th percentile of the first token, over its quiet value."""
PING_SECONDS = 1.0
MEMORY_SHARE = 0.10
MEMORY_MIB = 10.0
"""A process may keep so much at least: 10 % of the small ones is a few pages of an allocator."""
MEMORY_WAIT_SECONDS = 15.0
PLAY_SECONDS = 60.0
QUIET_SECONDS = 20.0
RECOVERY_SECONDS = 20.0
"""So long after an attack every honest client must have been answered again."""
START_SECONDS = 60.0
ATTACKER_NICENESS = 10
"""Attackers bring machines of their own: what their clients compute here gives way to the server
and the honest clients."""


@dataclass
class Result:
    """What became of an attack."""

    name: str
    title: str
    seconds: float = 0.0
    answered: dict[str, int] = field(default_factory=dict)
    first_token_ms: dict[str, dict[str, float]] = field(default_factory=dict)
    """By door: requests, median, p95, p99, max, and p99 of the quiet server."""
    worst_ping_ms: float = 0.0
    memory_before_mib: dict[str, float] = field(default_factory=dict)
    memory_after_mib: dict[str, float] = field(default_factory=dict)
    memory_repeated_mib: dict[str, float] = field(default_factory=dict)
    """After the same once more; empty where memory came back the first time."""
    faults: dict[str, str] = field(default_factory=dict)
    """What is wrong: `answered`, `honest`, `first token`, `ping`, `processes`, `memory`,
    `recovery`."""


def first_tokens(seen: Seen, quiet_p99: dict[str, float]) -> dict[str, dict[str, float]]:
    """In milliseconds, by door."""
    told = {}
    for door, seconds in seen.first_tokens.items():
        median, p95, p99, most = np.percentile(seconds, (50, 95, 99, 100)) * 1000.0
        told[door] = {
            "requests": len(seconds),
            "median": float(median),
            "p95": float(p95),
            "p99": float(p99),
            "max": float(most),
            "quiet p99": quiet_p99.get(door, float(p99)),
        }
    return told


def play(stand: Stand, honest: HonestClients, attack: Attack, quiet: dict[str, float]) -> Result:
    """One attack, from before to after."""
    result = Result(attack.name, attack.title)
    prepared = attack.prepare(stand)
    result.memory_before_mib = stand.watch.memory()
    honest.seen()
    began = time.monotonic()
    _play(attack, prepared, result)
    result.seconds = time.monotonic() - began
    seen = honest.seen()
    if not attack.alone:
        _judge_honest(seen, result, quiet)
    with suppress(ProcessLookupError, FileNotFoundError):  # one has ended: see below
        _judge_memory(stand, result)
        if "memory" in result.faults:
            again = Result(attack.name, attack.title)
            again.memory_before_mib = result.memory_after_mib
            _play(attack, attack.prepare(stand), again)
            _judge_memory(stand, again)
            result.memory_repeated_mib = again.memory_after_mib
            if "memory" not in again.faults:
                del result.faults["memory"]
    if dead := stand.watch.dead():
        result.faults["processes"] = f"ended: {', '.join(dead)}"
        stand.restart()
    if still := _silent_doors(honest, RECOVERY_SECONDS):
        result.faults["recovery"] = f"no answers at {', '.join(still)}; both were started anew"
        stand.restart()
        _wait_until_all_speak(honest)
    return result


def _play(attack: Attack, prepared: Play, result: Result) -> None:
    answered: Counter[str] = Counter()

    def run() -> None:
        # This thread's, and so that of all that it starts.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), ATTACKER_NICENESS)
        try:
            answered.update(prepared())
        except UnsafeError as error:
            answered[f"unsafe: {error}"] += 1
        except Exception as error:
            answered[f"failed: {error!r}"] += 1

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(PLAY_SECONDS)
    if thread.is_alive():
        answered["not over"] += 1
    result.answered = dict(answered)
    if unexpected := attack.unexpected(answered):
        result.faults["answered"] = f"{'; '.join(unexpected)[:300]} (right: {attack.right})"


def _judge_honest(seen: Seen, result: Result, quiet: dict[str, float]) -> None:
    result.first_token_ms = first_tokens(seen, quiet)
    if seen.failures:
        result.faults["honest"] = f"{len(seen.failures)} failures, such as {seen.failures[0][:200]}"
    slow = [
        f"{door} {told['p99']:.0f} ms"
        for door, told in result.first_token_ms.items()
        if told["p99"] > MOST_SLOWER * told["quiet p99"]
    ]
    if missing := set(quiet) - set(result.first_token_ms):
        slow += [f"{door}: none" for door in sorted(missing)] if result.seconds > 1.0 else []
    if slow:
        result.faults["first token"] = f"p99 of {', '.join(slow)}"
    result.worst_ping_ms = max((seconds for _, seconds in seen.pings), default=0.0) * 1000.0
    bad = [status for status, _ in seen.pings if status != 200]
    if bad or result.worst_ping_ms > PING_SECONDS * 1000.0:
        result.faults["ping"] = f"{len(bad)} of {len(seen.pings)} failed"


def _judge_memory(stand: Stand, result: Result) -> None:
    deadline = time.monotonic() + MEMORY_WAIT_SECONDS
    while True:
        result.memory_after_mib = stand.watch.memory()
        grown = [
            f"{part} by {after - before:.0f} MiB"
            for part, after in result.memory_after_mib.items()
            if after - (before := result.memory_before_mib.get(part, 0.0))
            > max(MEMORY_SHARE * before, MEMORY_MIB)
        ]
        if not grown or time.monotonic() > deadline:
            break
        time.sleep(0.5)
    if grown:
        result.faults["memory"] = f"grew: {', '.join(grown)}"


QUANTILES = ("median", "p95", "p99", "max")


def report(results: list[Result], quiet: dict[str, dict[str, float]]) -> str:
    """Everything for a person."""
    alone = [(door, *(f"{told[name]:.0f}" for name in QUANTILES)) for door, told in quiet.items()]
    heads = ("honest clients alone, first token, ms", *QUANTILES)
    beside = (
        "beside an attack",
        "first token, ms: median",
        *QUANTILES[1:],
        "/ping, ms",
        "memory, MiB",
    )
    figures = [(result.name, result.title, *_figures(result)) for result in results]
    lines = [table(heads, alone), table(("", *beside, "after", "again"), figures)]
    lines.append("First tokens are of the door that suffers most.\n")
    for result in results:
        lines.append(f"{result.name:4} answered {_answers(result.answered)}")
        lines += [f"     NOT HELD, {kind}: {what}" for kind, what in result.faults.items()]
    held = sum(not result.faults for result in results)
    lines += ["", f"{held} of {len(results)} attacks did no harm"]
    return "\n".join(lines) + "\n"


def _figures(result: Result) -> list[str]:
    memories = (result.memory_before_mib, result.memory_after_mib, result.memory_repeated_mib)
    memory = [f"{sum(each.values()):.0f}" if each else "" for each in memories]
    if not result.first_token_ms:
        return ["-"] * 5 + memory
    worst = max(
        result.first_token_ms.values(), key=lambda told: told["p99"] / max(1.0, told["quiet p99"])
    )
    return [*(f"{worst[name]:.0f}" for name in QUANTILES), f"{result.worst_ping_ms:.0f}", *memory]


def _answers(answered: dict[str, int]) -> str:
    return ", ".join(f"{count} x {answer[:100]}" for answer, count in answered.items()) or "nothing"


def hostile(options: argparse.Namespace) -> int:
    """Serve, look at the quiet server, play the attacks, judge, write."""
    chosen = [
        attack
        for attack in ATTACKS
        if (attack.cheap or not options.quick) and (not options.only or attack.name in options.only)
    ]
    repository = options.repository
    if repository is None:
        repository = ROOT / "build/repositories/hostile"
        export(DEMO, repository, LIMITS)
    scripts = [each for each in make_scripts(EVERY_KIND) if each.kind == "small"][:SCRIPTS]
    for script in scripts:
        script.max_tokens = 4
    results = []
    with Stand(repository, options.output.with_suffix(".log")) as stand:
        learn_answers(stand.doors["grpc-stream"], scripts)
        with HonestClients(stand.server, stand.adapter_port, DOORS, scripts) as honest:
            _wait_until_all_speak(honest)
            time.sleep(2.0 if options.quick else QUIET_SECONDS)
            quiet = first_tokens(honest.seen(), {})
            quiet_p99 = {door: told["p99"] for door, told in quiet.items()}
            for attack in chosen:
                results.append(play(stand, honest, attack, quiet_p99))
                told = "; ".join(results[-1].faults) or "held"
                print(f"{attack.name:4} {attack.title}: {told}", flush=True)
    values = {"quiet": quiet, "attacks": [asdict(result) for result in results]}
    write_results(options.output, report(results, quiet), values, about())
    return 0 if not any(result.faults for result in results) else 1


def _silent_doors(honest: HonestClients, seconds: float) -> list[str]:
    """Where no honest client gets an answer in so many seconds."""
    honest.seen()
    silent = set(DOORS)
    deadline = time.monotonic() + seconds
    while silent and time.monotonic() < deadline:
        time.sleep(0.1)
        silent -= set(honest.seen().first_tokens)
    return sorted(silent)


def _wait_until_all_speak(honest: HonestClients) -> None:
    if silent := _silent_doors(honest, START_SECONDS):
        raise ServerError(f"honest clients get no answers at {', '.join(silent)}")


def main(arguments: list[str] | None = None) -> int:
    """See `--help`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the cheap ones only")
    parser.add_argument("--only", nargs="+", help="attacks by name")
    parser.add_argument("--repository", type=Path, help="serve this one as it is")
    parser.add_argument("--output", type=Path, default=BUILD / "hostile.json")
    options = parser.parse_args(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    try:
        return hostile(options)
    except (ServerError, ExportFailedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
