"""A checkpoint's pictures and videos, from the client's bytes to the rows that stand in their
tokens' places.

The vision encoder only knows tiles of one shape. What is before and behind it differs from family
to family: see `llava_triton.checkpoint.families`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from llava_triton.checkpoint.configuration import llava_config
from llava_triton.checkpoint.families import VideoFamily, family_of
from llava_triton.checkpoint.video_processor import load_video_processor
from llava_triton.checkpoint.vision_tower import features_shape, load_newline
from llava_triton.checkpoint.weights import CheckpointWeights
from llava_triton.contract.errors import SessionError, invalid
from llava_triton.contract.models import VIDEO
from llava_triton.contract.settings import Settings
from llava_triton.pictures.decode import (
    OpenPicture,
    check_size,
    open_picture,
)
from llava_triton.pictures.frame_pixels import FramePixels
from llava_triton.pictures.tiles import PixelValues, Tiles
from llava_triton.pictures.video_decoder import VideoDecoder
from llava_triton.pictures.videos import Video, is_video, video_of, with_num_frames

VIDEO_FRAMES = 16
"""Of a video, where neither the settings nor the checkpoint say how many."""


class PictureAssembly:
    """Makes pixel values of pictures and videos and, of their encoded tiles, image features.

    Args:
        checkpoint: its directory; of the weights only the newline embedding is read.
        processor: directory of its image processor, and of its video processor.
        settings: limits.
    """

    def __init__(self, checkpoint: Path, processor: Path, settings: Settings) -> None:
        config = llava_config(checkpoint)
        self._kind = config.model_type
        self._settings = settings
        self._family = family_of(config)
        self._newline = load_newline(CheckpointWeights(checkpoint))
        self._pixel_values = PixelValues(processor, whole=self._family.takes_whole_pictures)
        side = int(config.vision_config.image_size)
        self._tile_tokens, width = features_shape(config, side)
        self.context_length = int(config.get_text_config().max_position_embeddings)
        """Tokens of a conversation at the most."""
        self.most_bytes = self.context_length * width * torch.float32.itemsize
        """Of the features of a turn's pictures at the most."""
        self._videos: _VideoFrames | None = None
        if isinstance(self._family, VideoFamily):
            self._videos = _VideoFrames(processor, settings)

    def look(self, item: bytes) -> LookedAt | LookedAtVideo:
        """A picture or a video as it was sent, checked without decoding it.

        Raises:
            SessionError: as `open_picture` and `video_of`.
        """
        if not is_video(item):
            return LookedAt(open_picture(item, self._settings), self)
        if self._videos is None:
            raise invalid(
                f"is a video, and this checkpoint ({self._kind}) has not learned to see videos; "
                "send some of its frames as pictures",
                VIDEO.name,
            )
        return LookedAtVideo(self._videos.look(item), self)

    def as_shown(self, item: bytes) -> bytes:
        """An item that `look` has taken, such that it is shown in the same way whatever the
        settings are: a video says of how many frames it is."""
        if self._videos is None or not is_video(item):
            return item
        return self._videos.as_shown(item)

    def decode(self, picture: OpenPicture) -> DecodedPicture:
        """A picture's tiles.

        Raises:
            SessionError: as `OpenPicture.decode`.
        """
        return DecodedPicture(self._pixel_values.of_open(picture), self)

    def decode_video(self, video: OpenVideo) -> DecodedVideo:
        """A video's frames, a tile each.

        Raises:
            SessionError: as `OpenPicture.decode` and `VideoDecoder.frames`.
        """
        assert self._videos is not None
        return DecodedVideo(self._videos.pixels(video), self)

    def num_tokens(self, tiles: Tiles) -> int:
        """Tokens of a picture."""
        return self._family.num_tokens(tiles.height, tiles.width, self._tile_tokens)

    def num_video_tokens(self, frames: int) -> int:
        """Tokens of a video of so many frames."""
        return self._video_family.num_video_tokens(frames, self._tile_tokens)

    def features(self, picture: Tiles, tiles: Tensor) -> Tensor:
        """Encoded tiles [N, T, D] of a picture -> its features [R, D], on the same device."""
        newline = self._newline_on(tiles)
        return self._family.rows(tiles, picture.height, picture.width, newline)

    def video_features(self, frames: Tensor) -> Tensor:
        """Encoded frames [N, T, D] of a video -> its features [R, D], on the same device."""
        return self._video_family.video_rows(frames, self._newline_on(frames))

    def close(self) -> None:
        """End what decodes videos; nothing is decoded any more."""
        if self._videos is not None:
            self._videos.close()

    @property
    def _video_family(self) -> VideoFamily:
        assert isinstance(self._family, VideoFamily)  # else `look` refuses videos
        return self._family

    def _newline_on(self, tiles: Tensor) -> Tensor | None:
        if self._newline is not None and self._newline.device != tiles.device:
            self._newline = self._newline.to(tiles.device)
        return self._newline


@dataclass(frozen=True)
class OpenVideo:
    """A video that has passed every check that needs no decoding."""

    video: Video
    frames: Sequence[OpenPicture] = ()
    """Those that came themselves."""


class _VideoFrames:
    """Makes pixel values of a checkpoint's videos.

    Args:
        processor: directory of its video processor.
        settings: limits.
    """

    def __init__(self, processor: Path, settings: Settings) -> None:
        numbers = load_video_processor(processor)
        self._settings = settings
        pixels = min(settings.max_image_pixels, settings.max_video_pixels)
        self._of_frames = replace(settings, max_image_pixels=pixels)
        """Limits of frames that come as pictures: nothing ends their decoding."""
        self._pixels = FramePixels(numbers)
        wanted = settings.video_frames or numbers.num_frames or VIDEO_FRAMES
        self._wanted = min(wanted, settings.max_video_frames)
        self._decoder = VideoDecoder(settings)

    def look(self, item: bytes) -> OpenVideo:
        """See `PictureAssembly.look`."""
        video = video_of(item, self._settings)
        most = self._settings.max_video_frames
        if len(video.frames) > most:
            raise invalid(f"has more than {most} frames; leave some out", VIDEO.name)
        frames = []
        for number, frame in enumerate(video.frames, 1):
            try:
                frames.append(open_picture(frame, self._of_frames))
            except SessionError as error:
                raise _of_frame(error, number) from error
        return OpenVideo(video, frames)

    def as_shown(self, item: bytes) -> bytes:
        """See `PictureAssembly.as_shown`."""
        video = video_of(item, self._settings)
        says = video.frames or video.num_frames
        return item if says else with_num_frames(item, self._wanted)

    def pixels(self, video: OpenVideo) -> np.ndarray:
        """Float32 [N, 3, S, S], a tile a frame."""
        if video.video.file:
            wanted = video.video.num_frames or self._wanted
            tiles = self._decoder.frames(video.video.file, wanted, self._tile)
        else:
            tiles = [self._tile_of(each, number) for number, each in enumerate(video.frames, 1)]
        return np.concatenate(tiles)

    def close(self) -> None:
        """End the decoder's process."""
        self._decoder.close()

    def _tile_of(self, frame: OpenPicture, number: int) -> np.ndarray:
        try:
            return self._pixels.tile(np.array(frame.decode()))
        except SessionError as error:
            raise _of_frame(error, number) from error

    def _tile(self, frame: np.ndarray) -> np.ndarray:
        height, width = frame.shape[:2]
        try:
            check_size(width, height, self._settings.max_video_pixels)
        except SessionError as error:
            raise SessionError(error.code, error.sentence, VIDEO.name) from error
        return self._pixels.tile(frame)


def _of_frame(error: SessionError, number: int) -> SessionError:
    """What is wrong with a frame that came as a picture."""
    return SessionError(error.code, f"has a frame {number} that {error.sentence}", VIDEO.name)


@dataclass(frozen=True)
class LookedAt:
    """See `llava_triton.pictures.encoding.Picture`."""

    picture: OpenPicture
    assembly: PictureAssembly
    is_video = False

    @property
    def is_large(self) -> bool:
        """See `OpenPicture`."""
        return self.picture.is_large

    def decode(self) -> DecodedPicture:
        """See `PictureAssembly.decode`."""
        return self.assembly.decode(self.picture)


@dataclass(frozen=True)
class DecodedPicture:
    """See `llava_triton.pictures.encoding.Decoded`."""

    tiles: Tiles
    assembly: PictureAssembly

    @property
    def pixels(self) -> np.ndarray:
        """Float32 [N, 3, H, W]."""
        return self.tiles.pixels

    @property
    def tokens(self) -> int:
        """See `PictureAssembly.num_tokens`."""
        return self.assembly.num_tokens(self.tiles)

    def features(self, tiles: Tensor) -> Tensor:
        """See `PictureAssembly.features`."""
        return self.assembly.features(self.tiles, tiles)


@dataclass(frozen=True)
class LookedAtVideo:
    """See `llava_triton.pictures.encoding.Picture`."""

    video: OpenVideo
    assembly: PictureAssembly
    is_large = True
    is_video = True

    def decode(self) -> DecodedVideo:
        """See `PictureAssembly.decode_video`."""
        return self.assembly.decode_video(self.video)


@dataclass(frozen=True)
class DecodedVideo:
    """See `llava_triton.pictures.encoding.Decoded`."""

    pixels: np.ndarray
    """Float32 [N, 3, H, W], a frame each."""
    assembly: PictureAssembly

    @property
    def tokens(self) -> int:
        """See `PictureAssembly.num_video_tokens`."""
        return self.assembly.num_video_tokens(len(self.pixels))

    def features(self, tiles: Tensor) -> Tensor:
        """See `PictureAssembly.video_features`."""
        return self.assembly.video_features(tiles)
