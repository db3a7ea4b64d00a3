"""What the API process counts, in Prometheus' text format.

Takes plain numbers and names. Knows nothing about requests, HTTP or the pipeline: what it does not
count itself it asks from the function it was given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
# events and bytes by name; those of one tier of the embedding cache are named like "hits/disk"
WorkCounts = tuple[Mapping[str, int], Mapping[str, int]]
_GAUGES = ("active", "waiting")  # of the dispatcher's counts; the others only grow


class Metrics:
    """The counters of one server, in their own registry: two servers in a process do not mix."""

    def __init__(
        self,
        dispatcher_counts: Callable[[], Mapping[str, int]],
        is_ready: Callable[[], bool],
        work_counts: Callable[[], WorkCounts],
        held_bytes: Callable[[], Mapping[str, int]],
    ) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(_Dispatcher(dispatcher_counts))
        self._registry.register(_Encoding(work_counts))
        self._registry.register(_Held(held_bytes))
        self._requests = Counter(
            "mmserve_requests",
            "Requests for an answer by how they ended: a finish reason or an error code",
            ["outcome"],
            registry=self._registry,
        )
        self._tokens = Counter(
            "mmserve_tokens", "Tokens of finished requests", ["kind"], registry=self._registry
        )
        self._visual = Counter(
            "mmserve_visual_tokens",
            "Visual tokens of finished requests: before reduction, after it, and taken from the cache",
            ["state"],
            registry=self._registry,
        )
        self._sparsity = Gauge(
            "mmserve_prefill_sparsity_ratio",
            "Share of dense prefill attention that finished requests left out, mean over layers and tokens",
            registry=self._registry,
        )
        self._left_out, self._prefilled = 0.0, 0
        self._kv_bytes = Counter(
            "mmserve_kv_bytes",
            "Bytes of prefilled KV of finished requests, before and after compression",
            ["state"],
            registry=self._registry,
        )
        self._kv_bytes_saved = Counter(
            "mmserve_kv_bytes_saved",
            "Bytes of KV that eviction and the type of its pages have saved finished requests",
            registry=self._registry,
        )
        self._stages = Histogram(
            "mmserve_stage_seconds",
            "Time of finished requests per stage",
            ["stage"],
            registry=self._registry,
            buckets=_SECONDS,
        )
        self._slow_readers = Counter(
            "mmserve_slow_readers", "Streams ended because nobody read them", registry=self._registry
        )
        self._keep = Gauge(
            "mmserve_keep",
            "Share of visual tokens that the last request keeps which left that to prune_under_load",
            registry=self._registry,
        )
        Gauge("mmserve_ready", "Whether every stage has a worker", registry=self._registry).set_function(
            lambda: float(is_ready())
        )

    def count_request(self, outcome: str) -> None:
        self._requests.labels(outcome).inc()

    def note_keep(self, keep: float) -> None:
        """What the last request keeps whose share follows the load."""
        self._keep.set(keep)

    def note_density(self, layers: Sequence[float], tokens: int) -> None:
        """The share of dense attention that was computed for so many tokens of a prompt, of every layer."""
        if layers and tokens > 0:
            self._left_out += tokens * (1.0 - sum(layers) / len(layers))
            self._prefilled += tokens
            self._sparsity.set(self._left_out / self._prefilled)

    def count_slow_reader(self) -> None:
        self._slow_readers.inc()

    def count_finished(self, usage: Mapping[str, int], timings_ms: Mapping[str, float]) -> None:
        """Add what one finished request used, by the names of `Usage` and `Timings`."""
        self._tokens.labels("prompt").inc(usage["prompt_tokens"])
        self._tokens.labels("generated").inc(usage["completion_tokens"])
        self._tokens.labels("cached").inc(usage["cached_tokens"])
        self._visual.labels("before").inc(usage["visual_tokens"])
        self._visual.labels("kept").inc(usage["visual_tokens_kept"])
        self._visual.labels("cached").inc(usage["visual_tokens_cached"])
        self._kv_bytes.labels("uncompressed").inc(usage["kv_bytes_uncompressed"])
        self._kv_bytes.labels("compressed").inc(usage["kv_bytes"])
        self._kv_bytes_saved.inc(max(usage["kv_bytes_uncompressed"] - usage["kv_bytes"], 0))
        for stage, milliseconds in timings_ms.items():
            self._stages.labels(stage).observe(milliseconds / 1e3)

    def render(self) -> bytes:
        """Everything as text; may wait for the dispatcher."""
        return generate_latest(self._registry)


class _Asked(Collector):
    """Asks when it is read."""

    def describe(self) -> list[Metric]:
        return []  # so that registering asks nobody


class _Dispatcher(_Asked):
    def __init__(self, counts: Callable[[], Mapping[str, int]]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        counts = dict(self._counts())
        now = GaugeMetricFamily(
            "mmserve_dispatcher_now",
            "Requests in the dispatcher and jobs waiting for a worker",
            labels=["what"],
        )
        for name in _GAUGES:
            now.add_metric([name], counts.pop(name, 0))
        events = CounterMetricFamily(
            "mmserve_dispatcher_events", "Events in the dispatcher by reason", labels=["event"]
        )
        for name, count in sorted(counts.items()):
            events.add_metric([name], count)
        yield from (now, events)


class _Encoding(_Asked):
    def __init__(self, counts: Callable[[], WorkCounts]) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        totals, now = self._counts()
        work = CounterMetricFamily(
            "mmserve_encode_events",
            "What the encode workers have opened, decoded and encoded",
            labels=["event"],
        )
        waiting = GaugeMetricFamily(
            "mmserve_encode_now", "What waits in the encode workers, and bytes decoded ahead", labels=["what"]
        )
        cache = CounterMetricFamily(
            "mmserve_embedding_cache_events",
            "Frames and images in the embedding cache by tier; a tier is asked for what those before it miss",
            labels=["tier", "event"],
        )
        held = GaugeMetricFamily(
            "mmserve_embedding_cache_bytes", "Bytes in the embedding cache by tier", labels=["tier"]
        )
        for name, count in sorted(totals.items()):
            event, _, tier = name.partition("/")
            (cache.add_metric([tier, event], count) if tier else work.add_metric([event], count))
        for name, count in sorted(now.items()):
            what, _, tier = name.partition("/")
            (held.add_metric([tier], count) if tier else waiting.add_metric([what], count))
        yield from (work, waiting, cache, held)


class _Held(_Asked):
    def __init__(self, held_bytes: Callable[[], Mapping[str, int]]) -> None:
        self._held_bytes = held_bytes

    def collect(self) -> Iterator[Metric]:
        held = GaugeMetricFamily(
            "mmserve_held_bytes", "Bytes of requests that the API process holds now", labels=["what"]
        )
        for what, size in sorted(self._held_bytes().items()):
            held.add_metric([what], size)
        yield held
