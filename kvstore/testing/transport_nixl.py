"""NIXL for the suites of `kvstore.testing.transport*`: holders, and peers in processes of their own.

Covers: a service per holder, UCX bound to the loopback device and to TCP, what a peer's sidecar has open.
Does not cover: the suites.

Two agents on one machine would copy through shared memory, also out of a frozen process; the faults of two machines
need `UCX_TLS=tcp`.
"""

import os
from collections.abc import Mapping
from typing import Any, Final

import psutil

from kvstore.settings import NixlSettings
from kvstore.testing.transport_faults import PlainHolder
from kvstore.transport import Offer
from kvstore.transport.nixl import NixlServer, NixlService
from kvstore.transport.nixl_life import SIDECAR_MODULE

SECRET: Final = b"a secret of a test cluster"
READY_S: Final = 60.0
NETWORK: Final = {"UCX_TLS": "tcp"}
"""Environment of sidecars that behave as on two machines."""
STAGING_BYTES: Final = 1 << 30
"""Room for the suites' largest records; memory is taken as it is used."""


def nixl_service(node_id: str, *, epoch: str = "e1", patience_s: float = 5.0, **options: Any) -> NixlService:
    """A service with an agent on the loopback device.

    Raises:
        RuntimeError: There is no agent; the message says why.
    """
    settings = NixlSettings(**{"staging_bytes": STAGING_BYTES, "net_devices": "lo", **options})
    service = NixlService(settings, secret=SECRET, node_id=node_id, epoch=epoch, patience_s=patience_s)
    service.start()
    if not service.wait_ready(READY_S):
        reason = service.unavailable_reason
        service.close()
        raise RuntimeError(f"no NIXL agent: {reason}")
    return service


class OwnServer(NixlServer):
    """A holder's end that waits for an agent, and closes its service with it."""

    def __init__(self, service: NixlService) -> None:
        super().__init__(service)
        self.service = service

    def offer(self, record: memoryview, *, peer: str, lifetime_s: float) -> Offer | None:
        """As any, but while a sidecar is being replaced it waits."""
        self.service.wait_ready(READY_S)
        return super().offer(record, peer=peer, lifetime_s=lifetime_s)

    def close(self) -> None:
        """End both."""
        super().close()
        self.service.close()


def nixl_holder(options: Mapping[str, Any], address: bytes) -> PlainHolder:
    """The factory of peers: every life of the node is another epoch.

    Args:
        options: Of the settings.
        address: Of the former life: an agent's address names one life, so it is not taken over.
    """
    os.environ.update(NETWORK)
    return PlainHolder(OwnServer(nixl_service("holder", epoch=os.urandom(4).hex(), **options)))


def sidecar_pids(parent: int | None = None) -> list[int]:
    """Processes of sidecars that a process has started, its own by default; zombies count."""
    children = psutil.Process(parent).children()
    return [child.pid for child in children if _is_sidecar(child)]


def _is_sidecar(process: psutil.Process) -> bool:
    try:
        return SIDECAR_MODULE in process.cmdline() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
