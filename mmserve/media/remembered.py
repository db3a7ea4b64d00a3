"""Media that were sent before, under the name their sender gave them (`uuid`).

Knows nothing about fetching. A name means something under its own salt only.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

from mmserve.errors import MediaNotFound, NotFound
from mmserve.media.local import local_media
from mmserve.media.store import ContentStore
from mmserve.request import MediaRef, Modality, tenant_of

LEAST_BYTES = 1 << 16  # what an item counts as at least, so that small ones are bounded too


class _Item(NamedTuple):
    ref: MediaRef
    size: int  # as counted
    is_stored: bool  # else a file of the user, where it was


_Name = tuple[str, Modality, str]  # salt, kind, uuid


class RememberedMedia:
    """Keeps files of `store`, at most `max_bytes` of all tenants together. Safe to use from several threads.

    What was not used for longest goes first, of the tenant that takes the most: nobody can push out
    others by sending much. The files go with the store.
    """

    def __init__(self, store: ContentStore, max_bytes: int) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._tenants: dict[str, OrderedDict[_Name, _Item]] = {}
        self._bytes: dict[str, int] = {}  # by tenant
        self._lock = threading.Lock()

    @property
    def total_bytes(self) -> int:
        return sum(self._bytes.values())

    def remember(self, salt: str, uuid: str, ref: MediaRef) -> None:
        """Keep an item that its caller holds; another one of the same name is forgotten."""
        tenant, name = tenant_of(salt), (salt, ref.modality, uuid)
        with self._lock:
            self._forget(tenant, name)
            stored = self._store.keep(ref.path)
            size = max(stored or 0, LEAST_BYTES)
            self._tenants.setdefault(tenant, OrderedDict())[name] = _Item(ref, size, stored is not None)
            self._bytes[tenant] = self._bytes.get(tenant, 0) + size
            while sum(self._bytes.values()) > self._max_bytes:
                largest = max(self._bytes, key=self._bytes.__getitem__)
                self._forget(largest, next(iter(self._tenants[largest])))

    def find(self, salt: str, uuid: str, modality: Modality) -> MediaRef:
        """The item, held for the caller; raises MediaNotFound."""
        name = salt, modality, uuid
        with self._lock:
            items = self._tenants.get(tenant_of(salt), OrderedDict())
            item = items.get(name)
            if item is None:
                raise _missing(uuid, modality)
            items.move_to_end(name)
            if item.is_stored:
                self._store.hold(item.ref.path)
                return item.ref
        try:
            # it may have changed since
            return local_media(item.ref.path, modality)
        except NotFound as error:
            raise _missing(uuid, modality) from error

    def _forget(self, tenant: str, name: _Name) -> None:
        items = self._tenants.get(tenant, OrderedDict())
        item = items.pop(name, None)
        if item is None:
            return
        self._bytes[tenant] -= item.size
        if item.is_stored:
            self._store.drop(item.ref.path)
        if not items:
            del self._tenants[tenant], self._bytes[tenant]


def _missing(uuid: str, modality: Modality) -> MediaNotFound:
    return MediaNotFound(
        f"Expected {modality} sent before under the uuid {uuid!r}, but found none: send it again"
    )
