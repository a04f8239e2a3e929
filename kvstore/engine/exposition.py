"""This process' metrics in Prometheus' text form.

Covers: this project's registry, and vLLM's beside it where there is one. Does not cover: which metrics exist.
"""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response

from cluster.telemetry import REGISTRY


def metrics_endpoint(foreign: Callable[[], CollectorRegistry] | None = None) -> Callable[[Request], Response]:
    """A Starlette endpoint for `/metrics`.

    Args:
        foreign: The registry of the engine in this process, asked at every scrape; None if it has none.
    """

    def metrics(_: Request) -> Response:
        registries = [REGISTRY] if foreign is None else [foreign(), REGISTRY]
        return Response(b"".join(generate_latest(each) for each in registries), media_type=CONTENT_TYPE_LATEST)

    return metrics
