"""A server that hangs in its crash handler is found; one that only says so is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava_triton.server.crash_handler import CrashHandler

# One thread of several is in the handler, as a signal's own is blocked there.
STUCK = """
import signal, sys, threading, time
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.Signals(int(sys.argv[1]))})
thread = threading.Thread(target=time.sleep, args=(600,), daemon=True)
thread.start()
signal.pthread_sigmask(signal.SIG_SETMASK, set())
print("there", flush=True)
time.sleep(600)
"""
WELL = "import time; print('there', flush=True); time.sleep(600)"


@pytest.fixture
def log(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT)
    yield descriptor
    os.close(descriptor)


@pytest.fixture
def process() -> Iterator[list[subprocess.Popen[str]]]:
    """To be filled: all are ended."""
    running: list[subprocess.Popen[str]] = []
    yield running
    for each in running:
        each.kill()
        each.communicate()


def start(process: list[subprocess.Popen[str]], *arguments: str) -> int:
    command = [sys.executable, "-c", *arguments]
    process.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    output = process[-1].stdout
    assert output is not None
    assert output.readline() == "there\n"
    return process[-1].pid


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV])
def test_a_server_that_hangs_in_its_handler_is_found(
    log: int, process: list[subprocess.Popen[str]], number: signal.Signals
) -> None:
    handler = CrashHandler(start(process, STUCK, str(int(number))), log, 0)
    os.write(log, b"I1126 all is well\n")
    assert handler.caught() is None
    os.write(log, f"Signal ({int(number)}) rece".encode())
    assert handler.caught() is None
    os.write(log, b"ived.\n 0# 0x00005570E11AA7B2 in tritonserver\n")
    assert handler.caught() is number


def test_what_the_log_says_is_not_enough(log: int, process: list[subprocess.Popen[str]]) -> None:
    handler = CrashHandler(start(process, WELL), log, 0)
    os.write(log, b"Signal (6) received.\nSignal (15) received.\nSignal (99) received.\n")
    assert handler.caught() is None


def test_an_earlier_server_of_the_same_log_is_none_of_ours(
    log: int, process: list[subprocess.Popen[str]]
) -> None:
    os.write(log, b"Signal (6) received.\n")
    handler = CrashHandler(start(process, STUCK, "6"), log, os.fstat(log).st_size)
    assert handler.caught() is None
