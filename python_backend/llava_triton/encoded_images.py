"""Image features by the picture they were made of, so that no picture is encoded twice."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

Encode = Callable[[Sequence[bytes]], Tensor]
"""Encoded picture files -> features [N, T, D] on any device, in memory that may be taken back."""


class EncodedImages:
    """Remembers the features of the latest pictures, and waits for those that are being made.

    May be used from several threads.

    Args:
        budget_bytes: of features that are remembered.
        fingerprint: what else decides the features: the image processor's configuration.
    """

    def __init__(self, budget_bytes: int, fingerprint: bytes) -> None:
        self._budget = budget_bytes
        self._fingerprint = hashlib.sha256(fingerprint).digest()
        self._lock = threading.Lock()
        self._done: OrderedDict[bytes, Tensor] = OrderedDict()
        """Longest unused first."""
        self._bytes = 0
        self._coming: dict[bytes, Future[Tensor]] = {}
        self.hits = 0
        """Pictures that did not have to be encoded."""
        self.misses = 0
        """Pictures that had to."""

    def features(self, pictures: Sequence[bytes], encode: Encode) -> Tensor:
        """Features [N, T, D] of pictures; `encode` is called for those that are new.

        Raises:
            Exception: whatever `encode` raises; nothing is remembered of it.
        """
        digests = [hashlib.sha256(self._fingerprint + picture).digest() for picture in pictures]
        found: dict[bytes, Tensor | Future[Tensor]] = {}
        ours: dict[bytes, bytes] = {}
        with self._lock:
            for digest, picture in zip(digests, pictures, strict=True):
                if digest in self._done:
                    self._done.move_to_end(digest)
                    found[digest] = self._done[digest]
                elif digest in self._coming:
                    found[digest] = self._coming[digest]
                else:
                    ours[digest] = picture
                    found[digest] = self._coming[digest] = Future()
            self.misses += len(ours)
            self.hits += len(pictures) - len(ours)
        if ours:  # before waiting for anybody: two threads may wait for each other's pictures
            self._encode(ours, encode)
        return torch.stack(
            [
                self._waited_for(found[digest], digest in ours, picture, encode)
                for digest, picture in zip(digests, pictures, strict=True)
            ]
        )

    def _waited_for(
        self, found: Tensor | Future[Tensor], ours: bool, picture: bytes, encode: Encode
    ) -> Tensor:
        if not isinstance(found, Future):
            return found
        try:
            return found.result()
        except Exception:
            if ours:
                raise
            # Whoever made it may have failed for another of its pictures.
            return self.features([picture], encode)[0]

    def _encode(self, pictures: dict[bytes, bytes], encode: Encode) -> None:
        try:
            features = encode(list(pictures.values()))
            # Copies: a row of a batch would keep the whole batch in memory.
            copies = [each.clone() for each in features]
            if features.is_cuda:  # only begun yet, and `features` is another's when this returns
                torch.cuda.current_stream(features.device).synchronize()
        except BaseException as error:
            with self._lock:
                coming = [self._coming.pop(digest) for digest in pictures]
            for future in coming:
                future.set_exception(error)
            raise
        with self._lock:
            coming = [self._coming.pop(digest) for digest in pictures]
            for digest, copy in zip(pictures, copies, strict=True):
                self._done[digest] = copy
                self._bytes += copy.nbytes
            while self._bytes > self._budget:
                _, forgotten = self._done.popitem(last=False)
                self._bytes -= forgotten.nbytes
        for future, copy in zip(coming, copies, strict=True):
            future.set_result(copy)
