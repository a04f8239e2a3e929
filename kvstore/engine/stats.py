"""What the connector did, in vLLM's metrics.

Covers: vLLM's statistics class around `kvstore.engine.tally`, and its Prometheus series.
Does not cover: metrics of the store (`kvstore.metrics`).
"""

from typing import Any, Final

from prometheus_client import Counter, Histogram
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

from cluster.telemetry import SECONDS_BUCKETS
from kvstore.engine.metrics import COUNTERS, LABELLED, SECONDS, Metric

_BUCKETS: Final = (0.001, 0.0025, *SECONDS_BUCKETS)


class LearnonceStats(KVConnectorStats):
    """Counts and durations of some interval: `{"counts": {name: n}, "seconds": {series: [s, ...]}}`."""

    def __init__(self, data: dict[str, Any] | None = None) -> None:
        super().__init__(data={} if data is None else data)

    def reset(self) -> None:
        """Forget everything."""
        self.data: dict[str, Any] = {}

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another interval to this one."""
        counts = self.data.setdefault("counts", {})
        for name, amount in other.data.get("counts", {}).items():
            counts[name] = counts.get(name, 0) + amount
        seconds = self.data.setdefault("seconds", {})
        for series, values in other.data.get("seconds", {}).items():
            seconds.setdefault(series, []).extend(values)
        return self

    def reduce(self) -> dict[str, int | float]:
        """One line for vLLM's log."""
        line: dict[str, int | float] = dict(self.data.get("counts", {}))
        for series, values in self.data.get("seconds", {}).items():
            if values:
                line[f"mean_{series}"] = round(sum(values) / len(values), 4)
        return line

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not self.data.get("counts") and not self.data.get("seconds")


_series: dict[tuple[Any, str], Any] = {}
"""Series of this process: an engine that is built again in the same process goes on counting in them."""


class LearnoncePromMetrics(KVConnectorPromMetrics):
    """Prometheus series of `kvstore.engine.metrics`, labelled by vLLM's engine labels."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {key: self._make(metric_types[Counter], metric) for key, metric in COUNTERS.items()}
        self._labelled = {key: self._make(metric_types[Counter], metric) for key, metric in LABELLED.items()}
        self._seconds = {
            key: self._make(metric_types[Histogram], metric, buckets=_BUCKETS) for key, metric in SECONDS.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one interval."""
        engine = self.per_engine_labelvalues[engine_idx]
        for name, amount in transfer_stats_data.get("counts", {}).items():
            family, _, label = name.partition(".")
            if label and family in self._labelled:
                self._labelled[family].labels(*engine, label).inc(amount)
            elif name in self._counters:
                self._counters[name].labels(*engine).inc(amount)
        for series, values in transfer_stats_data.get("seconds", {}).items():
            if series in self._seconds:
                child = self._seconds[series].labels(*engine)
                for value in values:
                    child.observe(value)

    def _make(self, kind: Any, metric: Metric, **extra: Any) -> Any:
        key = (kind, metric.name)
        if key not in _series:
            labels = [*self._labelnames, *metric.labels]
            _series[key] = kind(name=metric.name, documentation=metric.meaning, labelnames=labels, **extra)
        return _series[key]
