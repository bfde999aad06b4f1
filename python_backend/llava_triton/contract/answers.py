"""An answer's pieces as tensors, as what protocols carry, as plain values by the outputs' names.

All of it follows from the fields of `Delta`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from itertools import chain
from typing import Any, Generic, TypeVar, get_type_hints

import numpy as np

from llava_triton.contract.delta import Delta
from llava_triton.contract.tensors import TensorSpec

Piece = TypeVar("Piece", bound=Delta)


class AnswerTensors(Generic[Piece]):
    """The outputs that a class of pieces declares.

    Args:
        piece: `Delta`, or one of more fields.
    """

    def __init__(self, piece: type[Piece]) -> None:
        self._piece = piece
        hints = get_type_hints(piece, include_extras=True)
        self._specs: dict[str, TensorSpec] = {
            field.name: hints[field.name].__metadata__[0] for field in fields(piece)
        }
        self.outputs = tuple(self._specs.values())
        """In the order of the fields."""

    def to_values(self, piece: Piece) -> dict[str, Any]:
        """Plain values by the names of the outputs."""
        return {spec.name: getattr(piece, field) for field, spec in self._specs.items()}

    def from_values(self, values: Mapping[str, Any]) -> Piece:
        """The piece of such values, which may have been JSON.

        Raises:
            LookupError: one is missing.
        """
        return self._piece(
            **{
                field: spec.value(spec.elements(values[spec.name]))
                for field, spec in self._specs.items()
            }
        )

    def to_arrays(self, piece: Piece) -> dict[str, np.ndarray]:
        """Arrays by the names of the outputs."""
        return {
            spec.name: spec.to_array(getattr(piece, field)) for field, spec in self._specs.items()
        }

    def from_arrays(self, array_of: Callable[[str], np.ndarray]) -> Piece:
        """The piece of the arrays that `array_of` gives by their names."""
        return self._piece(
            **{field: spec.from_array(array_of(spec.name)) for field, spec in self._specs.items()}
        )

    def to_raw(self, piece: Piece) -> dict[str, bytes]:
        """What Triton's protocols carry, by the names of the outputs."""
        return {
            spec.name: spec.to_raw(getattr(piece, field)) for field, spec in self._specs.items()
        }

    def from_raw(self, raw: Mapping[str, bytes]) -> Piece:
        """The piece of what Triton's protocols carry."""
        return self._piece(
            **{field: spec.from_raw(raw[spec.name]) for field, spec in self._specs.items()}
        )

    def joined(self, pieces: Sequence[Piece]) -> Piece:
        """Pieces that follow one another as one: their texts and lists, the last one's numbers."""
        changed: dict[str, Any] = {
            field: tuple(chain.from_iterable(getattr(piece, field) for piece in pieces))
            for field, spec in self._specs.items()
            if spec.is_list
        }
        changed["text"] = "".join(piece.text for piece in pieces)
        return replace(pieces[-1], **changed)


ANSWER = AnswerTensors(Delta)
