"""A stage of `make gpu-check`: the engine's speed beside what the hardware allows."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict

import torch

from benchmarks.engine_way import EngineWay
from benchmarks.gpu_check.kernel_times import kernel_table, kernel_times
from benchmarks.gpu_check.stage import Options, read_findings, run_stage
from benchmarks.limits import Limits, decode_step_bytes, measure_limits, prefill_flops
from benchmarks.load import Answer, Ask, Way, exactly, joint_tokens_per_second
from benchmarks.workload import Workload
from llava_triton.checkpoint.configuration import llava_config
from llava_triton.checkpoint.vision_tower import features_shape
from llava_triton.contract.settings import Settings

RUNS = 3
"""Of what is measured over a whole answer; medians count."""


class Rows:
    """What is measured of any way of asking; the findings have the names of the report.

    Args:
        way: who is asked.
        options: of the stage.
        limits: of this device, measured in this run.
    """

    def __init__(self, way: Way, options: Options, limits: Limits) -> None:
        config = llava_config(options.checkpoint)
        self._way = way
        self._workload = Workload(str(options.checkpoint), "none")
        self._config = config.get_text_config()
        self._limits = limits
        self._itemsize = options.place.dtype.itemsize
        self._picture_tokens = features_shape(config, config.vision_config.image_size)[0]
        self._sizes = options.place.sizes
        self._findings = options.findings
        self._opened = 0

    def warm_up(self) -> None:
        """Kernels are compiled when they are first used."""
        session = self._open(self._sizes.context_tokens)
        self._question(session, 4).wait()
        self._end(session)

    def decode_one(self) -> None:
        """One session, alone."""
        sizes, seconds, contexts = self._sizes, [], []
        for _ in range(RUNS):
            before = sizes.context_tokens - sizes.question_tokens - sizes.answer_tokens // 2
            session = self._open(before)
            answer = self._question(session, sizes.answer_tokens).wait()
            self._end(session)
            gap = answer.between_tokens_seconds
            assert gap is not None, "all tokens came in one piece"
            seconds.append(gap)
            contexts.append(_mean_context(answer))
        step, context = statistics.median(seconds), statistics.mean(contexts)
        limit = self._step_limit([context])
        add = self._findings.add
        add("decode_one_ms", step * 1000, f"decode, 1 session: {step * 1000:.3f} ms a token")
        add("decode_one_limit_ms", limit * 1000, f"  the memory's limit: {limit * 1000:.3f} ms")
        add("decode_one_share", limit / step, f"  {100 * limit / step:.1f} % of the limit")

    def decode_many(self) -> None:
        """Many sessions at once, while all of them answer."""
        sizes = self._sizes
        before = sizes.context_tokens - sizes.question_tokens - sizes.answer_tokens // 2
        sessions = [self._open(before) for _ in range(sizes.many_sessions)]
        asked = [self._question(session, sizes.answer_tokens) for session in sessions]
        answers = [answer.wait() for answer in asked]
        for session in sessions:
            self._end(session)
        rate = joint_tokens_per_second(answers)
        if rate is None:
            why = "the answers did not come at the same time"
            self._findings.leave_out("decode_many_share", why)
            return
        limit = len(sessions) / self._step_limit([_mean_context(answer) for answer in answers])
        told = f"decode, {len(sessions)} sessions: {rate:.0f} tokens/s"
        self._findings.add("decode_many_tokens_per_second", rate, told)
        self._findings.add(
            "decode_many_limit_tokens_per_second", limit, f"  the memory's limit: {limit:.0f}"
        )
        share = rate / limit
        self._findings.add("decode_many_share", share, f"  {100 * share:.1f} % of the limit")

    def later_turn(self) -> None:
        """The first token of a later turn, less two decode steps; after `decode_one`."""
        seconds = []
        for _ in range(self._sizes.repeats):
            session = self._open(self._sizes.context_tokens)
            seconds.append(self._question(session, 1).wait().first_token_seconds)
            self._end(session)
        first = statistics.median(seconds) * 1000
        told = f"later turn of {self._sizes.question_tokens} tokens: {first:.2f} ms to its first"
        self._findings.add("later_ms", first, told)
        excess = first - 2 * self._findings.values["decode_one_ms"]
        self._findings.add("later_excess_ms", excess, f"  {excess:.2f} ms more than 2 decode steps")

    def prefill(self) -> None:
        """A picture's tokens and a text, to the first token of the answer."""
        rates, seconds = [], []
        for _ in range(self._sizes.repeats):
            session, picture = self._next()
            text = self._workload.text(self._sizes.opening_text_tokens, session)
            answer = self._way.ask(Ask(session, True, True, text, [picture], exactly(1))).wait()
            new = answer.done.num_input_tokens - answer.done.num_cached_tokens
            flops = prefill_flops(self._config, new, answer.done.num_cached_tokens)
            # By the engine's clock: the picture's digest, before it, is no prefill.
            seconds.append(answer.done.first_token_ms / 1000.0)
            rates.append(flops / seconds[-1])
        share = statistics.median(rates) / self._limits.matrix_flops_per_second
        milliseconds = statistics.median(seconds) * 1000
        told = f"prefill of {new} tokens: {milliseconds:.2f} ms"
        self._findings.add("prefill_ms", milliseconds, told)
        told = f"  {100 * share:.1f} % of the matrix rate"
        self._findings.add("prefill_share", share, told)

    def by_kernel(self, device: torch.device) -> None:
        """Where the time of an answer goes, and of an opening."""
        session = self._open(self._sizes.context_tokens)
        tokens = self._sizes.question_tokens
        for name, steps, run in (
            ("decode_one_kernels", tokens, lambda: self._question(session, tokens).wait()),
            ("opening_kernels", 1, lambda: self._end(self._open(self._sizes.context_tokens))),
        ):
            times = kernel_times(run, device)
            told = f"{name}, time by kernel:\n{kernel_table(times, steps)}"
            self._findings.add(name, times, told)
        self._end(session)

    def _step_limit(self, contexts: list[float]) -> float:
        """Seconds of one step, at the least."""
        read = decode_step_bytes(
            self._config,
            contexts,
            bytes_per_weight=self._itemsize,
            bytes_per_value=self._itemsize,
        )
        return read / self._limits.memory_bytes_per_second

    def _next(self) -> tuple[str, bytes]:
        """A new session and a new picture."""
        self._opened += 1
        picture = self._workload.picture(self._sizes.many_sessions, self._opened)
        return f"rows-{self._opened}", picture

    def _open(self, tokens: int) -> str:
        """A session with a picture and so many tokens in all, about."""
        session, picture = self._next()
        text = self._workload.text(max(4, tokens - self._picture_tokens), session)
        opening = Ask(session, start=True, text=text, images=[picture], sampling=exactly(1))
        self._way.ask(opening).wait()
        return session

    def _question(self, session: str, answer_tokens: int) -> Answer:
        text = self._workload.text(self._sizes.question_tokens, f"{session} again")
        return self._way.ask(Ask(session, text=text, sampling=exactly(answer_tokens)))

    def _end(self, session: str) -> None:
        self._way.ask(Ask(session, end=True)).wait()

    def measure(self, *parts: Callable[[], None]) -> None:
        """One part after the other; one that breaks does not stop the others."""
        for part in parts:
            self._findings.attempt(part.__name__, part)


def _mean_context(answer: Answer) -> float:
    """Tokens attended to, over the steps of an answer."""
    return answer.done.num_input_tokens + answer.done.num_output_tokens / 2


def limits_of(options: Options) -> Limits:
    """Measured now, or by the stage that ran first in this run; kept among the findings."""
    known = read_findings(options.folder / "findings-rows.json")["values"].get("limits")
    if known is not None:
        limits = Limits(**known)
    else:
        limits = measure_limits(options.place.device, options.place.dtype)
    if options.place.device.type == "cuda":
        torch.cuda.empty_cache()
    read = limits.memory_bytes_per_second / 1e9
    matrix = limits.matrix_flops_per_second / 1e12
    told = f"limits: memory {read:.0f} GB/s, matrices {matrix:.1f} TFLOP/s"
    options.findings.add("limits", asdict(limits), told)
    return limits


def engine_rows(options: Options, weights: str = "unrounded") -> tuple[Rows, EngineWay]:
    """An engine on the stage's checkpoint, its weights as in `Settings`, and what is measured."""
    place = options.place
    known = limits_of(options)  # before the engine takes the memory
    settings = Settings(
        dtype=place.dtype_name, max_sessions=place.sizes.many_sessions, weights=weights
    )
    way = EngineWay(options.checkpoint, settings, device=place.device)
    if place.device.type == "cuda":
        recorded = way.runner.has_decode_graphs
        options.findings.add("recorded", recorded, f"decode steps are CUDA graphs: {recorded}")
        if not recorded:
            options.findings.fault("decode steps could not be recorded; see the warning above")
    return Rows(way, options, known), way


def measure(options: Options) -> None:
    """The stage."""
    rows, way = engine_rows(options)
    rows.measure(rows.warm_up, rows.decode_one, rows.later_turn, rows.prefill, rows.decode_many)
    options.findings.attempt("time by kernel", lambda: rows.by_kernel(options.place.device))
    way.close()


if __name__ == "__main__":
    sys.exit(run_stage(__doc__, measure))
