"""The limits of the models that an operator may want to set, in one place.

The export writes one `settings.json` into the model repository, generates the numbers in Triton's
`config.pbtxt` files from the same object, and the Python models read it when they load.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path

FILE_NAME = "settings.json"
VARIABLE = "LLAVA_CHANGED_SETTINGS"
"""An environment variable: settings that differ from the repository's, a JSON object."""
DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("unrounded", "int8", "int4")
JOURNAL_SCHEMES = ("file:///", "s3://")
_COLOUR = re.compile("#[0-9a-fA-F]{6}")


@dataclass(frozen=True)
class Settings:
    """What an operator may want to change; everything else is derived from the checkpoint."""

    max_sessions: int = 256
    """Sessions in memory at once; one more START is refused with UNAVAILABLE, unless a journal lets
    an idle one hibernate."""
    max_queued_turns: int = 1024
    """Turns waiting or running over all sessions; one more is refused with UNAVAILABLE. (An END
    without text or picture is taken in an open session whatever waits: it makes room.)"""
    max_queued_turns_per_session: int = 32
    """Turns waiting or running in one session; one more is refused with UNAVAILABLE, so that one
    session cannot take the places of all others."""
    max_queued_features_bytes: int = 1024 * 1024 * 1024
    """Memory for the image features of turns that have not begun: those that are being prepared,
    and, in half of it, those behind another turn of their session. Where it is full, turns with
    pictures are refused with UNAVAILABLE; one turn always has room. It lies where features are
    computed, on the GPU or in host memory, beside `image_features_bytes`."""
    session_idle_seconds: float = 1200.0
    """A session unused for this long after the end of its last turn is closed, within a second."""
    session_lifetime_seconds: float = 86_400.0
    """A session is closed this long after it was opened, used or not; a turn that runs then is
    answered to its end."""
    default_max_tokens: int = 256
    """Length of an answer, in tokens, when the client names none."""
    target_between_tokens_ms: float = 80.0
    """While prompts are computed, running answers get a token about this often, and prompts the
    time that is left. Where answers alone take more than half of it, it is twice their time."""
    target_first_token_ms: float = 1000.0
    """A turn that has waited longer than this for its first token is computed in every second
    interval between tokens at least, however many shorter prompts come; until then those go
    first."""
    prefill_chunk_tokens: int | None = None
    """A step computes at most this many prompt tokens; fewer while answers are running, so that
    they do not stall. null: 512 on a CPU; 1,024 on a GPU, where a picture and its first question
    are computed at once."""
    kv_cache_bytes: int | None = None
    """Memory on the device for keys and values; null: most of what is free when the server starts
    (a quarter where the CPU is the device)."""
    host_cache_bytes: int | None = None
    """Host memory for keys and values of sessions that had to leave the device, and as much again
    for image features; null: a quarter of what is free when the server starts (where the CPU is
    the device an eighth, and none for image features)."""
    image_features_bytes: int | None = None
    """Memory on the device for image features; null: what all sessions could need, up to 40 %
    of what is left after the reserve (an eighth of what is free where the CPU is the device)."""
    cache_freed_blocks: bool = True
    """Whether keys and values that no open session holds on the device can still be found by a
    session with the same beginning. false: what only ended sessions said and showed is computed
    again; sessions that are open at the same time share as before (docs/sharing.md)."""
    encoded_images_bytes: int = 256 * 1024 * 1024
    """Memory in which the image encoder keeps what it made of the latest pictures, so that a
    picture sent again is not encoded again."""
    dtype: str = "auto"
    """In what the language model computes: float32, bfloat16, float16 or auto (float32 on a CPU, a
    half type on a GPU)."""
    weights: str = "unrounded"
    """How the language model's layers keep their weights: "unrounded", in `dtype`, as "int8" with
    a scale a row, or as "int4" with a scale and a zero point for every 128 of a row. Integers of 8
    bits are a half or a quarter of what a decode step reads, those of 4 bits about half of that;
    they round every answer, 8 bits a little, 4 bits more (`make accuracy`). Weights that the
    checkpoint has as 4-bit integers stay so; with "int8" such a checkpoint is refused."""
    max_image_pixels: int = 50_000_000
    """Larger pictures are refused before they are decoded."""
    max_image_bytes: int = 32 * 1024 * 1024
    """Larger encoded pictures are refused."""
    picture_background: str = "#ffffff"
    """What is transparent in a picture is shown on this colour, `#rrggbb`."""
    max_images_per_turn: int = 64
    """More pictures in one turn are refused before they are read. How many it may really have is
    decided by their tokens, which must fit into the model's context."""
    max_images_bytes_per_turn: int = 256 * 1024 * 1024
    """Pictures of one turn that are longer together, as they were sent, are refused."""
    video_frames: int | None = None
    """Frames that are shown of a video, evenly over its length, where a request names no number;
    null: as the checkpoint's video processor says, or 16."""
    max_video_frames: int = 64
    """Frames of one video at the most."""
    max_video_bytes: int = 32 * 1024 * 1024
    """Larger encoded videos are refused."""
    max_video_pixels: int = 4096 * 2304
    """Videos whose frames have more pixels are refused before they are decoded."""
    max_video_seconds: float = 300.0
    """Longer videos are refused before they are decoded."""
    max_video_decode_seconds: float = 30.0
    """A video that takes longer to decode is given up. Meanwhile other videos wait, and nothing
    else."""
    max_text_bytes: int = 256 * 1024
    """Longer texts are refused before they are tokenized."""
    vision_max_batch: int = 8
    """Tiles the vision encoder takes in one batch; a picture is one or several."""
    journal: str = ""
    """Where sessions are written down, so that they survive the loss of their server:
    file:///a/folder or s3://bucket/prefix; "": nowhere. What is beside the bucket, such as region
    and credentials, comes from AWS's environment variables or the instance's role."""
    journal_sync: bool = False
    """Whether the end of an answer waits until the turn is in the journal. Where it cannot be
    written, the turn fails. false: turns are written behind their answers."""
    log_turns: bool = False
    """Whether the log has a line of JSON for each turn: tokens, times, outcome, and a hash of the
    session's ID."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(field.default, str) or (value is None and field.default is None):
                continue
            if isinstance(field.default, bool):
                if not isinstance(value, bool):
                    raise ValueError(f"setting {field.name} is {value!r}; it must be true or false")
                continue
            if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
                raise ValueError(f"setting {field.name} is {value!r}; it must be a number above 0")
        background = self.picture_background
        if not isinstance(background, str) or not _COLOUR.fullmatch(background):
            raise ValueError(
                f"setting picture_background is {background!r}; it must be a colour, #rrggbb"
            )
        named = isinstance(self.journal, str) and self.journal.startswith(JOURNAL_SCHEMES)
        if self.journal != "" and not named:
            raise ValueError(
                f"setting journal is {self.journal!r}; it must be empty, file:///a/folder or "
                "s3://bucket/prefix"
            )
        if self.journal_sync and not self.journal:
            raise ValueError("setting journal_sync is true and journal is empty; name a journal")
        if self.dtype not in DTYPES:
            raise ValueError(f"setting dtype is {self.dtype!r}; it must be one of {DTYPES}")
        if self.weights not in WEIGHTS:
            raise ValueError(f"setting weights is {self.weights!r}; it must be one of {WEIGHTS}")

    @property
    def triton_idle_microseconds(self) -> int:
        """Triton's own idle limit of a sequence: longer than any session lives. Triton counts from
        a turn's arrival, whatever is answered meanwhile, and does not tell the model when it lets a
        sequence go; so the engine alone decides, and language_model tells Triton."""
        longest = self.session_lifetime_seconds + self.session_idle_seconds
        return int(longest * 1_000_000)

    @property
    def max_candidate_sequences(self) -> int:
        """Sequences Triton admits: above `max_sessions`, so that the engine can refuse at once;
        Triton would let one more wait silently."""
        return max(20_000, 16 * self.max_sessions)

    def to_json(self) -> str:
        """This object as JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Read settings back; a name that no setting has is an error, not a typo ignored.

        Raises:
            ValueError: an unknown name, or a value out of range.
        """
        values = json.loads(text)
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"unknown settings: {', '.join(unknown)}")
        return cls(**values)

    @classmethod
    def of_repository(cls, repository: Path) -> Settings:
        """The settings that the export wrote into a model repository, and what the environment
        variable LLAVA_CHANGED_SETTINGS says instead.

        Raises:
            OSError: there are none.
            ValueError: an unknown name, a value out of range, or one that cannot change any more.
        """
        exported = cls.from_json((repository / FILE_NAME).read_text())
        return exported.changed(os.environ.get(VARIABLE, ""))

    def changed(self, text: str) -> Settings:
        """These settings with others in their place.

        Args:
            text: a JSON object of names and values; empty: nothing changes.

        Raises:
            ValueError: an unknown name, a value out of range, or one that Triton's files hold.
        """
        if not text:
            return self
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{VARIABLE} is not JSON ({error}): {text!r}") from None
        if not isinstance(values, dict):
            raise ValueError(f'{VARIABLE} is {text!r}; it must be an object, {{"name": value}}')
        new = self.from_json(json.dumps({**asdict(self), **values}))
        # The export wrote these into the models' config.pbtxt.
        if new.vision_max_batch != self.vision_max_batch:
            written = "vision_max_batch"
        elif new.triton_idle_microseconds > self.triton_idle_microseconds:
            written = "a longer session_lifetime_seconds or session_idle_seconds"
        elif new.max_candidate_sequences > self.max_candidate_sequences:
            written = f"max_sessions above {self.max_candidate_sequences // 16}"
        else:
            return new
        raise ValueError(
            f"{VARIABLE} cannot set {written}: Triton's files hold it since the export. Export the "
            "repository again, with --settings"
        )
