"""What the KV of a prompt depends on, slot by slot: the key of the prefix cache.

Knows nothing about pages, and not which settings matter: the caller names them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmserve.kv.sequence import IntArray

WORDS = 4
KEY_BYTES = 16  # of a media key
AXIS_BITS = 21  # of a position, where a slot has three


@dataclass(frozen=True, slots=True, eq=False)
class Identity:
    """`salt` names the tenant, `settings` everything that changes the numbers, `rows` each slot's content.

    A slot depends on the rows up to its own and on nothing else.
    """

    salt: bytes
    settings: bytes
    rows: NDArray[np.uint64]  # [n, WORDS], from `identity_rows`
    _chains: dict[int, list[bytes]] = field(default_factory=dict, repr=False)

    @property
    def root(self) -> tuple[bytes, bytes]:
        return self.salt, self.settings

    def chain(self, block: int) -> list[bytes]:
        """For each whole block of rows, a hash of everything up to its end."""
        if block not in self._chains:
            length = len(self.salt).to_bytes(8, "little")
            parent = blake2b(length + self.salt + self.settings, digest_size=16).digest()
            chain = []
            for index in range(len(self.rows) // block):
                parent = blake2b(parent + self.content(index, block), digest_size=16).digest()
                chain.append(parent)
            self._chains[block] = chain
        return self._chains[block]

    def common(self, other: Identity) -> int:
        """How many leading rows two prompts share."""
        if self.root != other.root:
            return 0
        length = min(len(self.rows), len(other.rows))
        different = (self.rows[:length] != other.rows[:length]).any(axis=1)
        return int(different.argmax()) if different.any() else length

    def extended(self, token_ids: NDArray[np.int64], order: IntArray, position: IntArray) -> Identity:
        """This prompt with text behind it."""
        rows = identity_rows(held=token_ids, order=order, position=position)
        return Identity(self.salt, self.settings, np.concatenate([self.rows, rows]))

    def content(self, index: int, block: int) -> bytes:
        """The rows of one block, to be compared."""
        return self.rows[index * block : (index + 1) * block].tobytes()


def identity_rows(
    *,
    held: NDArray[np.integer[Any]],
    order: IntArray,
    position: IntArray,
    keys: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint64]:
    """Rows of a prompt: what each of them holds, and where.

    A text row holds its token id, a visual one its index under a key, of `keys` [n, KEY_BYTES]; text has
    no keys, or zeros. `position` is [n], or [n, 3] with values below 2 million.
    """
    rows = np.zeros((len(order), WORDS), np.uint64)
    if keys is not None:
        assert keys.shape == (len(order), KEY_BYTES), f"keys are [n, {KEY_BYTES}]"
        rows[:, :2] = np.ascontiguousarray(keys).view("<u8")
    rows[:, 2] = held.astype(np.uint64) << np.uint64(32) | order.astype(np.uint64)
    axes = position.reshape(len(position), -1).astype(np.uint64)
    assert axes.shape[1] == 1 or (axes < 1 << AXIS_BITS).all(), "a position is too large"
    for axis in range(axes.shape[1]):
        rows[:, 3] |= axes[:, axis] << np.uint64(axis * AXIS_BITS)
    return rows


def orders_of(rows: NDArray[np.uint64]) -> IntArray:
    return (rows[:, 2] & np.uint64(0xFFFFFFFF)).astype(np.int32)


def positions_of(rows: NDArray[np.uint64], axes: int) -> IntArray:
    """RoPE positions as the page table wants them: [n] with one axis, else [n, axes]."""
    if axes == 1:
        return rows[:, 3].astype(np.int32)
    shifts = np.arange(axes, dtype=np.uint64) * np.uint64(AXIS_BITS)
    return (rows[:, 3, None] >> shifts & np.uint64((1 << AXIS_BITS) - 1)).astype(np.int32)
