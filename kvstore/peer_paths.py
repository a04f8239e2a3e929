"""The data paths of one node's store: both ends, as far as settings, machine and libraries allow.

Covers: opening what is asked for, why something is missing, the puller's end for one peer.
Does not cover: which path a pair takes (`kvstore.transport.negotiation`), the paths themselves (`kvstore.transport`).
"""

import logging
import ssl
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from cluster.errors import LearnonceError
from kvstore.settings import PeerSettings, StoreSettings
from kvstore.tls import client_context, server_context
from kvstore.transport import Transport, TransportServer
from kvstore.transport.negotiation import Reach
from kvstore.transport.shm import ShmServer, ShmTransport
from kvstore.transport.tcp import TcpServer, TcpTransport

if TYPE_CHECKING:
    from kvstore.transport.nixl import NixlService

log = logging.getLogger(__name__)

_BOOT_ID: Final = "/proc/sys/kernel/random/boot_id"


def machine_boot_id(*, otherwise: str) -> str:
    """This boot of this machine; `otherwise` where the system does not tell."""
    try:
        with open(_BOOT_ID, encoding="ascii") as file:
            return file.read().strip() or otherwise
    except OSError:
        return otherwise


class Paths:
    """Both ends of every path that is there.

    Args:
        settings: The store's.
        peers: Which paths are wanted.
        secret: The cluster's.
        node_id: Ours.
        epoch: This life of the store.
        socket_path: The store's unix socket.
        arena: What that socket shares.
        bind_host: Interface to listen on.
        advertise_host: What others connect to, where `bind_host` means every interface.

    Raises:
        SettingsError: TLS files that cannot be used.
        OSError: The TCP path's port is taken.
    """

    def __init__(
        self,
        settings: StoreSettings,
        peers: PeerSettings,
        *,
        secret: bytes,
        node_id: str,
        epoch: str,
        socket_path: str,
        arena: memoryview,
        bind_host: str,
        advertise_host: str | None,
    ) -> None:
        self._settings, self._peers = settings, peers
        self._secret, self._node_id, self._epoch = secret, node_id, epoch
        tls = settings.tls
        self.client_tls: ssl.SSLContext | None = client_context(tls) if tls else None
        """For connections that we make; None for plain ones."""
        self.server_tls: ssl.SSLContext | None = server_context(tls) if tls else None
        """For those that we accept."""
        self._boot_id = machine_boot_id(otherwise=epoch)
        self._missing: dict[str, str] = {}
        self._nixl: NixlService | None = None
        self.shm = ShmServer(socket_path, arena=arena)
        self.servers: dict[str, TransportServer] = {}
        try:
            if "shm" in peers.transports:
                self.servers["shm"] = self.shm
            if "tcp" in peers.transports:
                self.servers["tcp"] = TcpServer(
                    bind_host=bind_host,
                    port=peers.data_port,
                    advertise_host=advertise_host,
                    max_connections_per_peer=peers.max_connections_per_peer,
                    transfer_s=peers.transfer_s,
                    min_bytes_per_s=peers.min_bytes_per_s,
                    tls=self.server_tls,
                )
            if "nixl" in peers.transports:
                self._open_nixl(settings)
        except BaseException:
            self.close()
            raise

    @property
    def reach(self) -> Reach:
        """What there is now."""
        addresses = {name: server.address for name, server in self.servers.items()}
        missing = dict(self._missing)
        if self._nixl is not None and (reason := self._nixl.unavailable_reason) is not None:
            addresses.pop("nixl", None)
            missing["nixl"] = reason
        return Reach(boot_id=self._boot_id, addresses=addresses, missing=missing)

    def connect(self, name: str, address: bytes, *, peer: str, epoch: str) -> Transport:
        """The puller's end of one path to one life of one peer; connects when it is used.

        Raises:
            LearnonceError: The address cannot be used.
        """
        makers: dict[str, Callable[[], Transport]] = {
            "shm": lambda: ShmTransport(
                address,
                secret=self._secret,
                node_id=self._node_id,
                epoch=epoch,
                connect_timeout_s=self._peers.connect_timeout_s,
            ),
            "tcp": lambda: TcpTransport(
                address,
                peer=peer,
                connect_timeout_s=self._peers.connect_timeout_s,
                max_connections=self._peers.max_connections_per_peer,
                tls=self.client_tls,
            ),
            "nixl": lambda: self._connect_nixl(address),
        }
        return makers[name]()

    def close(self) -> None:
        """End all paths. Blocks for a moment; repeating it is harmless."""
        for server in self.servers.values():
            server.close()
        if self._nixl is not None:
            self._nixl.close()

    def _open_nixl(self, settings: StoreSettings) -> None:
        try:
            # Imported here: most nodes do without.
            from kvstore.transport.nixl import NixlServer, NixlService
        except ImportError as error:
            self._missing["nixl"] = f"not installed: {error}"
            log.warning("nixl_missing reason=%s", self._missing["nixl"])
            return
        service = self._nixl = NixlService(settings.nixl, secret=self._secret, node_id=self._node_id, epoch=self._epoch)
        service.start()
        self.servers["nixl"] = NixlServer(service)

    def _connect_nixl(self, address: bytes) -> Transport:
        if self._nixl is None:
            raise LearnonceError("this node has no NIXL")
        from kvstore.transport.nixl import NixlTransport

        return NixlTransport(self._nixl, address=address)
