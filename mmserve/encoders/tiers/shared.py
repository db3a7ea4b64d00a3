"""Records on a Redis or Valkey server that several mmserve instances share.

What the server may keep, and what it evicts, is the server's business (`maxmemory`, `allkeys-lru`); records
expire besides. However it behaves, a read waits no longer than its time limit for each record.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from mmserve.encoders.tiers.base import Stored, TierError
from mmserve.encoders.tiers.lane import Lane
from mmserve.errors import ConfigError

if TYPE_CHECKING:
    import redis

_PREFIX: Final = b"mmserve:embedding:"
_WRITE_TIMEOUT_S: Final = 2.0


class SharedTier:
    """One connection for reads and one for writes, each made when it is first needed."""

    name = "redis"

    def __init__(self, url: str, *, timeout_s: float, expire_s: int) -> None:
        self._expire_s = expire_s
        self._reads = _Connection(url, "read", timeout_s)
        self._writes = _Connection(url, "write", _WRITE_TIMEOUT_S)

    def get_many(self, addresses: Sequence[bytes]) -> dict[bytes, bytes]:
        def fetch(client: redis.Redis) -> Iterator[object]:
            return (client.get(_PREFIX + name) for name in addresses)

        found = zip(addresses, self._reads.each(fetch), strict=True)
        return {name: record for name, record in found if isinstance(record, bytes)}

    def put_many(self, records: Mapping[bytes, Stored]) -> None:
        def store(client: redis.Redis) -> Iterator[object]:
            for name, stored in records.items():
                yield client.set(_PREFIX + name, stored.record, ex=self._expire_s)

        self._writes.run(store)

    def discard(self, addresses: Collection[bytes]) -> None:
        self._writes.run(lambda client: iter([client.delete(*(_PREFIX + name for name in addresses))]))

    def used_bytes(self) -> None:
        return None

    def evicted(self) -> None:
        return None

    def close(self) -> None:
        self._reads.close()
        self._writes.close()


class _Connection:
    def __init__(self, url: str, what: str, timeout_s: float) -> None:
        self._client = _client(url, timeout_s)
        self._lane: Lane[object] = Lane(f"embedding-cache-{what}")
        self._timeout_s = timeout_s

    def each(self, task: Callable[[redis.Redis], Iterator[object]]) -> Iterator[object]:
        try:
            yield from self._lane.each(lambda: task(self._client), self._timeout_s)
        except TierError:
            # what still comes would be taken for the answer to the next question
            self._client.connection_pool.disconnect()
            raise

    def run(self, task: Callable[[redis.Redis], Iterator[object]]) -> None:
        for _ in self.each(task):
            pass

    def close(self) -> None:
        self._lane.close()
        self._client.connection_pool.disconnect()


def _client(url: str, timeout_s: float) -> redis.Redis:
    try:
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry
    except ImportError as error:
        raise ConfigError(
            "Expected the redis package for a shared embedding cache, but it is absent: "
            "pip install 'mmserve[redis]'"
        ) from error
    try:
        return redis.Redis.from_url(
            url,
            protocol=2,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError as error:
        raise ConfigError("Expected the embedding cache's redis_url to be a redis:// address") from error
