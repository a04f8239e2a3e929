"""One metrics page for the whole cluster: our own, and the replicas' with labels that say whose they are.

Covers: fetching within a bound, adding `replica` and `role`, merging families so that Prometheus reads the page.
Does not cover: which metrics exist.
"""

import asyncio
import logging
import re
from collections.abc import Iterable, Sequence
from typing import Final

from prometheus_client import generate_latest

from cluster.telemetry import REGISTRY
from kvstore.wire import WorkerReport
from router.errors import ReplicaFailedError
from router.relay import ReplicaClient

log = logging.getLogger(__name__)

_SAMPLE: Final = re.compile(r"([A-Za-z_:][A-Za-z0-9_:]*)(?:\{(.*)\})? +([0-9.eE+-]+|NaN|[+-]Inf)( -?[0-9]+)?")


class Families:
    """Metric families in text form, merged from several pages. Help and type come from the first page.

    Lines that are no samples are left out: one broken page must not make the whole page unreadable.
    """

    def __init__(self) -> None:
        self._comments: dict[str, list[str]] = {}
        self._samples: dict[str, list[str]] = {}

    def add(self, page: str, *, labels: str) -> None:
        """Add a page; `labels` (`a="b",c="d"`, or "") go into every sample."""
        family = ""
        fresh = False
        for line in page.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                name = line.split(" ", 3)[2]
                if name != family:
                    family, fresh = name, name not in self._comments
                if fresh:
                    self._comments.setdefault(name, []).append(line)
            elif line and not line.startswith("#"):
                sample = _labelled(line, labels)
                if sample is not None:
                    self._samples.setdefault(family, []).append(sample)

    def render(self) -> bytes:
        """All families as one page."""
        lines: list[str] = []
        for family, samples in self._samples.items():
            lines += self._comments.get(family, ())
            lines += samples
        return ("\n".join(lines) + "\n").encode()


async def merged_metrics(
    client: ReplicaClient, reports: Sequence[WorkerReport], *, budget_s: float, max_bytes: int
) -> bytes:
    """The cluster's page. A replica that does not answer in time is left out."""
    pages = await asyncio.gather(*(_page(client, report, budget_s, max_bytes) for report in reports))
    families = Families()
    families.add(generate_latest(REGISTRY).decode(), labels="")
    for report, page in zip(reports, pages, strict=True):
        families.add(page, labels=_label_text((("replica", report.peer.replica_id), ("role", report.role.value))))
    return families.render()


async def _page(client: ReplicaClient, report: WorkerReport, budget_s: float, max_bytes: int) -> str:
    try:
        body = await client.get(report.peer, "/metrics", budget_s=budget_s, max_bytes=max_bytes)
    except ReplicaFailedError as error:
        log.warning("metrics_missing replica=%s error=%s", report.peer.replica_id, error)
        return ""
    return body.decode("utf-8", errors="replace")


def _label_text(labels: Iterable[tuple[str, str]]) -> str:
    escaped = ((name, value.replace("\\", "\\\\").replace('"', '\\"')) for name, value in labels)
    return ",".join(f'{name}="{value}"' for name, value in escaped)


def _labelled(sample: str, labels: str) -> str | None:
    match = _SAMPLE.fullmatch(sample)
    if match is None:
        return None
    name, own, value, _ = match.groups()
    both = ",".join(part for part in (labels, own) if part)
    return f"{name}{{{both}}} {value}" if both else f"{name} {value}"
