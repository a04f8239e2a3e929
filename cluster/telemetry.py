"""Logs and metrics that look the same in every process.

Covers: log lines as `event key=value` (or JSON), metric definitions that also make `docs/metrics.md`.
Does not cover: which metrics exist (each room declares its own in its `metrics.py`), or HTTP endpoints for them.
"""

import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""Few buckets on purpose: every series is multiplied by processes."""

REGISTRY: Final = CollectorRegistry()
"""This process' metrics. vLLM's own live in prometheus_client's default registry."""


class MetricKind(Enum):
    """What a series may do."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricDefinition:
    """One row of `docs/metrics.md`."""

    name: str
    """`learnonce_<room>_<noun>_<unit>`, counters end in `_total`."""
    kind: MetricKind
    meaning: str
    when_it_moves: str
    """What an operator does about it."""
    labels: tuple[str, ...] = ()
    """Names whose values come from small closed sets, never ids."""


DEFINITIONS: Final[dict[str, MetricDefinition]] = {}
"""Every metric declared in this process, by name, in order of declaration."""


def _define(name: str, kind: MetricKind, labels: Sequence[str], meaning: str, when_it_moves: str) -> tuple[str, ...]:
    DEFINITIONS[name] = MetricDefinition(
        name=name, kind=kind, meaning=meaning, when_it_moves=when_it_moves, labels=tuple(labels)
    )
    return tuple(labels)


def counter(name: str, meaning: str, *, when_it_moves: str, labels: Sequence[str] = ()) -> Counter:
    """Declare a counter; `name` ends in `_total`."""
    names = _define(name, MetricKind.COUNTER, labels, meaning, when_it_moves)
    return Counter(name, meaning, names, registry=REGISTRY)


def gauge(name: str, meaning: str, *, when_it_moves: str, labels: Sequence[str] = ()) -> Gauge:
    """Declare a gauge."""
    names = _define(name, MetricKind.GAUGE, labels, meaning, when_it_moves)
    return Gauge(name, meaning, names, registry=REGISTRY)


def histogram(name: str, meaning: str, *, when_it_moves: str, labels: Sequence[str] = ()) -> Histogram:
    """Declare a histogram of seconds."""
    names = _define(name, MetricKind.HISTOGRAM, labels, meaning, when_it_moves)
    return Histogram(name, meaning, names, registry=REGISTRY, buckets=SECONDS_BUCKETS)


class JsonFormatter(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and the exception if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """Render one record."""
        entry = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


def configure_logging(*, level: str = "INFO", json_lines: bool = False) -> None:
    """Send this project's log records to standard error, once per process.

    Only our own loggers are touched; vLLM's and Ray's keep their handlers.
    """
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s")
    handler.setFormatter(JsonFormatter() if json_lines else text)
    for room in ("cluster", "router", "prefill_workers", "decode_workers", "kvstore", "loadtest"):
        logger = logging.getLogger(room)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False


def short(key: bytes) -> str:
    """A chunk key as 12 hex digits, for log lines."""
    return key.hex()[:12]
