"""The router as a Ray Serve deployment.

Covers: reports through deployment handles, wiring, life cycle. Does not cover: anything that needs no Ray.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from cluster.telemetry import configure_logging
from kvstore.wire import Role, WorkerReport, cluster_secret
from router.feeds import store_feeds
from router.ingress import build_app
from router.service import RouterService
from router.settings import RouterSettings
from router.tokenizer import ModelTokenizer

log = logging.getLogger(__name__)


class HandleReports:
    """Asks workers through Serve: every replica of a deployment answers `report()`."""

    def __init__(self, handles: dict[Role, DeploymentHandle | None]) -> None:
        self._handles = handles

    async def reports(self, role: Role, *, timeout_s: float) -> Sequence[WorkerReport]:
        """Reports of all replicas that answered; none if the deployment has no replica yet.

        Raises:
            TimeoutError: Serve itself did not answer in time.
        """
        handle = self._handles[role]
        if handle is None:
            return []
        try:
            answers = await asyncio.wait_for(_broadcast(handle, timeout_s), 1.5 * timeout_s)
        except DeploymentUnavailableError:
            return []
        reports = [answer for answer in answers if isinstance(answer, WorkerReport)]
        for answer in answers:
            if not isinstance(answer, WorkerReport):
                log.warning("report_missing role=%s error=%s", role.value, type(answer).__name__)
        return reports


async def _broadcast(handle: DeploymentHandle, timeout_s: float) -> list[Any]:
    answers: list[Any] = await handle.broadcast("report").results_async(timeout_s=timeout_s, return_exceptions=True)
    return answers


@serve.deployment(name="Router", max_ongoing_requests=4096)
@serve.ingress()
class RouterIngress:
    """The HTTP ingress: segments, plans, relays.

    Bind it with the worker deployments: `RouterIngress.bind(settings, model_folder, name, decode, prefill)`.

    Raises:
        SettingsError: No usable tokenizer in the model folder, or no cluster secret in the environment.
    """

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self,
        settings: RouterSettings,
        model_folder: str,
        served_model_name: str,
        decode_handle: DeploymentHandle,
        prefill_handle: DeploymentHandle | None = None,
        *,
        log_level: str = "INFO",
        log_json: bool = False,
    ) -> None:
        configure_logging(level=log_level, json_lines=log_json)
        secret = cluster_secret()
        tokenizer = await asyncio.to_thread(
            ModelTokenizer, model_folder, cache_tokens=settings.limits.token_cache_tokens
        )
        self._service = RouterService(
            settings,
            tokenizer=tokenizer,
            served_model=served_model_name,
            secret=secret,
            source=HandleReports({Role.DECODE: decode_handle, Role.PREFILL: prefill_handle}),
            open_feed=store_feeds(secret),
        )

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """The application that Serve runs; its lifespan starts and stops the service."""
        # Serve's proxy takes the client's id or makes one, hands it to us, and puts it on the answer.
        return build_app(self._service, name_answers=False)
