"""Our engine behind a real Triton server, asked over gRPC streams as a client does."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.measurement import (
    Load,
    TurnTimes,
    mean_gap_ms,
    part_arguments,
    run_loads,
    write_loads,
)
from benchmarks.processes import device_memory_mib, with_descendants
from benchmarks.workload import Workload
from llava_triton.client.grpc import GrpcTransport
from llava_triton.client.transport import Transport, TurnMessage
from llava_triton.contract.delta import Delta
from llava_triton.server.triton_server import TritonServer, free_ports


class TritonLoad:
    """A running server, and sessions that ask it, a connection and a thread each.

    Args:
        workload: what they ask.
        server: the server.
        connect: makes a connection; by default straight to the server.
    """

    def __init__(
        self,
        workload: Workload,
        server: TritonServer,
        connect: Callable[[], Transport] | None = None,
    ) -> None:
        self._workload = workload
        self._server = server
        self._connect = connect or (lambda: GrpcTransport(server.grpc_address))
        self.hold_number(0, 1, 2)

    def hold(self, workload: Workload, sessions: int) -> Load:
        """All at once; each asks again when its last answer is complete."""
        seconds, turns = self.hold_number(sessions, sessions, workload.turns)
        peak = sum(process.peak_mib for process in with_descendants(self._server.pid))
        return Load(sessions, seconds, peak, turns, device_memory_mib())

    def hold_number(self, load: int, sessions: int, turns: int) -> tuple[float, list[TurnTimes]]:
        """Sessions of a load, which has pictures and questions of its own; seconds and turns."""
        done: list[TurnTimes] = []
        failures: list[Exception] = []
        ready = threading.Barrier(sessions + 1)

        def hold_one(session: int) -> None:
            transport = self._connect()
            try:
                picture = self._workload.picture(load, session)
                ready.wait()
                for turn in range(turns):
                    done.append(self._ask(transport, load, session, turn, turns, picture))
            except Exception as error:
                failures.append(error)
            finally:
                transport.close()

        threads = [threading.Thread(target=hold_one, args=(each,)) for each in range(sessions)]
        for thread in threads:
            thread.start()
        ready.wait()
        began = time.perf_counter()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return time.perf_counter() - began, done

    def _ask(
        self,
        transport: Transport,
        load: int,
        session: int,
        turn: int,
        turns: int,
        picture: bytes,
    ) -> TurnTimes:
        message = TurnMessage(
            f"bench-{load}-{session}",
            start=turn == 0,
            end=turn == turns - 1,
            text=self._workload.question(load, session, turn),
            images=[picture] if turn == 0 else [],
            sampling={"max_tokens": self._workload.answer_tokens, "ignore_eos": True},
        )
        asked = time.perf_counter()
        events: list[tuple[float, Delta]] = []
        for delta in transport.stream(message):
            if delta.num_output_tokens:  # else only a sign of life
                events.append((time.perf_counter(), delta))
        (first, first_delta), (last, final) = events[0], events[-1]
        after_first = final.num_output_tokens - first_delta.num_output_tokens
        return TurnTimes(
            session=session,
            turn=turn,
            first_token_ms=(first - asked) * 1000.0,
            between_tokens_ms=mean_gap_ms(first, last, after_first),
            output_tokens=final.num_output_tokens,
            cached_tokens=final.num_cached_tokens,
            prompt_tokens=final.num_input_tokens,
            text="".join(delta.text for _, delta in events),
            around_engine_ms=(first - asked) * 1000.0 - final.first_token_ms,
        )


def main() -> int:
    """Start a server and put it under the given loads."""
    parser = part_arguments(__doc__)
    options = parser.parse_args()
    workload = Workload.read(options.workload)
    log: Path = options.output.with_suffix(".log")
    with TritonServer(workload.repository, *free_ports(3), log=log) as server:
        load = TritonLoad(workload, server)
        write_loads(options.output, run_loads(workload, options.sessions, load.hold))
    return 0


if __name__ == "__main__":
    sys.exit(main())
