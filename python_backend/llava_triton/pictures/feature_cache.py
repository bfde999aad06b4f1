"""Image features by the picture they were made of, so that no picture is encoded twice."""

from __future__ import annotations

import hashlib
from collections import OrderedDict

from torch import Tensor


class EncodedImages:
    """Remembers the features of the latest pictures, every tenant's for himself.

    Not to be used by several threads at once, except for `key`.

    Args:
        budget_bytes: of features that are remembered.
        fingerprint: what else decides the features: the image processor's configuration.
    """

    def __init__(self, budget_bytes: int, fingerprint: bytes) -> None:
        self._budget = budget_bytes
        self._fingerprint = hashlib.sha256(fingerprint).digest()
        self._features: OrderedDict[bytes, Tensor] = OrderedDict()
        """Longest unused first."""
        self._bytes = 0

    def key(self, tenant: str, picture: bytes) -> bytes:
        """Under what a picture's features are found: by this tenant, and nobody else."""
        digest = hashlib.sha256(self._fingerprint)
        digest.update(hashlib.sha256(tenant.encode(errors="surrogatepass")).digest())
        digest.update(picture)
        return digest.digest()

    def find(self, key: bytes) -> Tensor | None:
        """The features [T, D] of a picture that came lately."""
        features = self._features.get(key)
        if features is not None:
            self._features.move_to_end(key)
        return features

    def add(self, key: bytes, features: Tensor) -> None:
        """Remember features [T, D], in memory that nobody else changes."""
        self._features[key] = features
        self._bytes += features.nbytes
        while self._bytes > self._budget:
            _, forgotten = self._features.popitem(last=False)
            self._bytes -= forgotten.nbytes
