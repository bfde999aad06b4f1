"""Pictures of sessions into the journal: image_encoder's part of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from torch import Tensor

from llava_triton.contract.settings import Settings
from llava_triton.device import work_beside
from llava_triton.engine.image_store import digest_of
from llava_triton.journal.background import Background
from llava_triton.journal.pictures import PictureWriter
from llava_triton.journal.records import session_key
from llava_triton.journal.store import Store
from llava_triton.journal.writer import FLUSH_SECONDS

log = logging.getLogger(__name__)


class PictureJournal:
    """Keeps what was shown, under the names by which language_model knows it.

    Args:
        settings: where the journal lies.
        as_shown: makes of an item one that does not depend on the settings.

    Raises:
        StoreError: it cannot be used at all.
    """

    def __init__(self, settings: Settings, as_shown: Callable[[bytes], bytes]) -> None:
        self._as_shown = as_shown
        self._background = Background("journal")
        self._pictures = PictureWriter(Store(settings.journal), self._background)
        self._digests = ThreadPoolExecutor(1, "journal digests")

    @property
    def written(self) -> int:
        """Pictures."""
        return self._pictures.written

    @property
    def dropped(self) -> int:
        """Pictures that were not written; their sessions cannot be resumed."""
        return self._pictures.dropped

    def keep(
        self,
        session_id: int | str,
        tenant: str,
        items: Sequence[bytes],
        features: Sequence[Tensor],
    ) -> None:
        """Write the pictures of a turn; from any thread, at once.

        Args:
            session_id: whose turn.
            tenant: whose session.
            items: N pictures as they were sent.
            features: of each [T, D].
        """
        self._digests.submit(self._keep, session_key(session_id, tenant), tenant, items, features)

    def close(self) -> None:
        """Write what is not written yet, as far as that is soon, and end."""
        self._digests.shutdown()
        self._pictures.close(FLUSH_SECONDS)
        self._background.close()

    def _keep(
        self, key: str, tenant: str, items: Sequence[bytes], features: Sequence[Tensor]
    ) -> None:
        try:
            for item, each in zip(items, features, strict=True):
                with work_beside(each.device):
                    name = digest_of(each, tenant).hex()
                self._pictures.keep(key, name, self._as_shown(item))
        except Exception:  # the answers go on
            log.exception("the pictures of a turn were not written to the journal")
