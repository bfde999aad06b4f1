"""The image features of all open sessions: one copy of each picture, in however many sessions a
tenant shows it."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llava_triton.contract.errors import unavailable
from llava_triton.contract.protocol import NO_TENANT
from llava_triton.device import bytes_on_host, to_host

Digest = bytes
"""SHA-256 of a picture's features, of everything that an answer can depend on, and of whose they
are."""


def salt_of(tenant: str) -> bytes:
    """What makes the digests and keys of one tenant differ from those of all others."""
    return hashlib.sha256(tenant.encode()).digest() if tenant else b""


def digest_of(features: Tensor, tenant: str = NO_TENANT) -> Digest:
    """The identity of one picture's features [T, D]: shape, type and every bit of them, and whose
    they are. Two tenants' are never one, because one could tell that the other's is there."""
    content = features.detach().cpu().contiguous()
    digest = hashlib.sha256(salt_of(tenant))
    digest.update(f"{tuple(content.shape)} {content.dtype} ".encode())
    digest.update(content.view(torch.uint8).numpy().data)
    return digest.digest()


@dataclass(eq=False)
class Image:
    """One picture's features."""

    digest: Digest
    features: Tensor
    """[T, D], on the device or, after an eviction, in host memory."""
    holders: int = 0
    """How many times sessions hold it."""

    @property
    def tokens(self) -> int:
        """How many the language model reads of it, `T`."""
        return int(self.features.shape[0])

    @property
    def bytes(self) -> int:
        """Of the features."""
        return self.features.numel() * self.features.itemsize

    @property
    def host_bytes(self) -> int:
        """What they take in host memory."""
        return bytes_on_host(self.features)


class ImageStore:
    """Holds features by what they are, so that equal pictures share them.

    Args:
        place: puts features [T, D] of any float type where and how the model computes.
        device_bytes: what may lie on the device; what was shown the longest time ago goes to host
            memory first.
        host_bytes: what may lie there.
    """

    def __init__(
        self, place: Callable[[Tensor], Tensor], device_bytes: int, host_bytes: int
    ) -> None:
        self._place = place
        self.budgets = (device_bytes, host_bytes)
        """Bytes that may be in use on the device and on the host."""
        # Those first that were brought the longest time ago.
        self._on_device: OrderedDict[Digest, Image] = OrderedDict()
        self._on_host: OrderedDict[Digest, Image] = OrderedDict()
        self.device_bytes = 0
        """In use."""
        self.host_bytes = 0
        """In use."""
        self.hits = 0
        """Pictures that were there already when a session brought them."""
        self.evictions = 0
        """Pictures that went to host memory."""

    def __len__(self) -> int:
        return len(self._on_device) + len(self._on_host)

    def on_device(self) -> Iterator[Image]:
        """Those on the device, first the one that was brought the longest time ago."""
        return iter(self._on_device.values())

    def on_host(self) -> Iterator[Image]:
        """Those in host memory, likewise."""
        return iter(self._on_host.values())

    def hold(self, digest: Digest, features: Tensor) -> Image:
        """A picture that a session brings, held once more.

        Raises:
            SessionError: UNAVAILABLE, neither device nor host has room for it.
        """
        image = self._on_device.get(digest) or self._on_host.get(digest)
        if image is not None:
            self.hits += 1
            tier = self._on_device if digest in self._on_device else self._on_host
            tier.move_to_end(digest)
        else:
            image = Image(digest, self._place(features))
            self._make_room(image.bytes)
            self._on_device[digest] = image
            self.device_bytes += image.bytes
        image.holders += 1
        return image

    def hold_all(self, digests: Sequence[Digest], features: Sequence[Tensor]) -> list[Image]:
        """The pictures of a turn, all of them held or none.

        Args:
            digests: N.
            features: of each [T, D].

        Raises:
            SessionError: as `hold`.
        """
        held: list[Image] = []
        try:
            for digest, each in zip(digests, features, strict=True):
                held.append(self.hold(digest, each))
        except Exception:
            for image in held:
                self.release(image)
            raise
        return held

    def hold_again(self, images: Sequence[Image]) -> None:
        """Hold pictures once more that are held already."""
        for image in images:
            image.holders += 1

    def release(self, image: Image) -> None:
        """Hold a picture once less; one that nobody holds is forgotten."""
        image.holders -= 1
        if image.holders == 0:
            if self._on_device.pop(image.digest, None) is not None:
                self.device_bytes -= image.bytes
            else:
                del self._on_host[image.digest]
                self.host_bytes -= image.host_bytes

    def _make_room(self, wanted: int) -> None:
        on_device, on_host = self.budgets
        excess = max(0, self.device_bytes + wanted - on_device)
        # Look before anything is moved: a refusal changes nothing.
        moved, arriving, victims = 0, 0, []
        for image in self.on_device():
            if moved >= excess:
                break
            victims.append(image)
            moved += image.bytes
            arriving += image.host_bytes
        if moved < excess or self.host_bytes + arriving > on_host:
            raise unavailable("the memory for pictures is full; try again later")
        for image in victims:
            del self._on_device[image.digest]
            self._on_host[image.digest] = image
            # Not waited for: whoever shows it again copies it back in the order of the same stream.
            image.features = to_host(image.features)
            self.device_bytes -= image.bytes
            self.host_bytes += image.host_bytes
            self.evictions += 1
