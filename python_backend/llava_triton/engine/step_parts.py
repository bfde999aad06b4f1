"""What a step is given of a session."""

from __future__ import annotations

from collections.abc import Sequence

from llava_triton.engine.session import Session
from llava_triton.model.step import Choice, ImageRows, StepPart


def step_part(ids: Sequence[int], session: Session, in_flight: int, choice: Choice) -> StepPart:
    """The tokens `ids` of a session behind those it remembers, with the pictures among them.

    Args:
        ids: not empty.
        session: whose blocks have room for them.
        in_flight: tokens behind those it remembers that the step in flight computes.
        choice: of the token after them.
    """
    start = session.key_values.computed + in_flight
    end = start + len(ids)
    rows = []
    for span in session.pictures(start, end):
        first, last = max(start, span.start), min(end, span.end)
        rows.append(ImageRows(first - start, span.image, first - span.start, last - span.start))
    return StepPart(ids, start, session.key_values.blocks[:], rows, choice)
