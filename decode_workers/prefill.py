"""Ask prefill replicas to compute a prompt, within one deadline, and say what came of it.

Covers: HTTP to `/internal/prefill`, the order of candidates, and turning every failure into a reason.
Does not cover: what is done with the answer (`decode_workers.plan`).
"""

import asyncio
import logging
import time
from dataclasses import replace
from typing import Final

import aiohttp
import msgspec

from decode_workers.metrics import PREFILL_WAIT_SECONDS
from decode_workers.plan import FallbackReason, PrefillOutcome
from decode_workers.settings import DecodeSettings
from kvstore.wire import NODE_HEADER, PLAN_HEADER, REQUEST_ID_HEADER, Peer, Plan, PrefillAnswer

logger = logging.getLogger(__name__)

PREFILL_PATH: Final = "/internal/prefill"
_DECODER: Final = msgspec.json.Decoder(PrefillAnswer)


class PrefillClient:
    """Connections to the prefill replicas. Cancelling a call closes its connection, and so the replica's work.

    Args:
        settings: Timeouts and bounds.
        node_id: Where the chunks are needed; "" where nobody knows.
    """

    def __init__(self, settings: DecodeSettings, *, node_id: str = "") -> None:
        self._settings = settings
        self._node_id = node_id
        self._session: aiohttp.ClientSession | None = None

    async def prefill(self, plan: Plan, header: str, *, budget_s: float) -> PrefillOutcome:
        """Have the prompt computed by the first candidate that will.

        Never raises: the caller can compute the prompt itself, so every failure is a reason.

        Args:
            plan: The plan, whose `prefill` lists the candidates.
            header: The same plan, signed.
            budget_s: Seconds for all candidates together.
        """
        started_s = time.monotonic()
        outcome = PrefillOutcome(reason=FallbackReason.ABSENT)
        try:
            async with asyncio.timeout(budget_s):
                for peer in plan.prefill:
                    outcome = await self._ask(peer, plan, header)
                    if outcome.answer is not None:
                        break
        except TimeoutError:
            outcome = PrefillOutcome(reason=FallbackReason.LATE)
        seconds = time.monotonic() - started_s
        PREFILL_WAIT_SECONDS.observe(seconds)
        return replace(outcome, seconds=seconds)

    async def _ask(self, peer: Peer, plan: Plan, header: str) -> PrefillOutcome:
        headers = {PLAN_HEADER: header, REQUEST_ID_HEADER: plan.request_id, NODE_HEADER: self._node_id}
        try:
            async with self._opened().post(peer.url + PREFILL_PATH, headers=headers) as response:
                body = await response.read()
                if response.status == 503:
                    return self._failed(peer, plan, FallbackReason.REFUSED, f"status {response.status}")
                if response.status != 200:
                    return self._failed(peer, plan, FallbackReason.BROKEN, f"status {response.status}")
                answer = _DECODER.decode(body)
        except (aiohttp.ClientError, OSError) as error:
            return self._failed(peer, plan, FallbackReason.DEAD, repr(error))
        except msgspec.MsgspecError as error:
            return self._failed(peer, plan, FallbackReason.BROKEN, repr(error))
        if answer.request_id != plan.request_id or len(answer.held) != len(plan.spans):
            return self._failed(peer, plan, FallbackReason.BROKEN, "answer to another request")
        return PrefillOutcome(replica_id=peer.replica_id, answer=answer)

    @staticmethod
    def _failed(peer: Peer, plan: Plan, reason: FallbackReason, detail: str) -> PrefillOutcome:
        logger.warning(
            "prefill failed request=%s replica=%s reason=%s detail=%s", plan.request_id, peer.replica_id, reason, detail
        )
        return PrefillOutcome(reason=reason)

    def _opened(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._settings.prefill_connections),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._settings.prefill_connect_s),
            )
        return self._session

    async def close(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()
