"""One sidecar process as the store sees it: the process, its staging memory, reads under way, offers.

Covers: starting the process, its control socket, the outcome of every read, what its death ends. Does not cover: when
a sidecar is started or replaced (`kvstore.transport.nixl_service`, whose lock guards everything here).
"""

import itertools
import json
import logging
import math
import os
import secrets
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Final

import msgspec

from kvstore import metrics
from kvstore.settings import NixlSettings
from kvstore.transport.nixl_staging import LandingSlot, StagedRecord, Staging
from kvstore.transport.nixl_wire import (
    TOKEN_BYTES,
    AddPeer,
    Address,
    Config,
    Done,
    Failed,
    Order,
    Ping,
    Pong,
    Read,
    Ready,
    Report,
    Unusable,
    agent_name,
    encode,
)

log = logging.getLogger(__name__)

SIDECAR_MODULE: Final = "kvstore.transport.nixl_sidecar"
_ROOT: Final = str(Path(__file__).resolve().parents[2])
_STANDARD_ERROR: Final = 2
_PASSED_NAMES: Final = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "LEARNONCE_CLUSTER_ID")
_PASSED_PREFIXES: Final = ("UCX_", "NIXL_", "CUDA_")
UCX_DEFAULTS: Final = {
    # Twice the speed at half the processor time over TCP (measured, docs/adr/0010-nixl-in-a-sidecar.md).
    "UCX_TCP_TX_SEG_SIZE": "256k",
    "UCX_TCP_RX_SEG_SIZE": "256k",
    # A crash is to end the process, not to wait for a debugger.
    "UCX_HANDLE_ERRORS": "none",
}


class LifeState(Enum):
    """Where a sidecar is in its life; only `READY` takes new work, `RETIRED` ends what it has."""

    STARTING = "starting"
    READY = "ready"
    RETIRED = "retired"
    DEAD = "dead"


class Outcome(Enum):
    """How a read ended."""

    DONE = "done"
    FAILED = "failed"
    """By NIXL's word: the peer, or the way to it."""
    LOST = "lost"
    """With the sidecar, or because whoever waited was told to stop."""


class PendingRead:
    """One read that a thread waits for; `done` is set with the outcome."""

    __slots__ = ("done", "has_landed", "is_abandoned", "number", "outcome", "reason", "slot")

    def __init__(self, number: int, slot: LandingSlot) -> None:
        self.number = number
        self.slot = slot
        self.done = threading.Event()
        self.outcome: Outcome | None = None
        self.reason = ""
        self.is_abandoned = False
        self.has_landed = False
        """Whether NIXL said that it ended well, also when the waiting thread was told something else before."""

    def end(self, outcome: Outcome, reason: str = "") -> None:
        """Wake the thread that waits; the first outcome counts."""
        if self.outcome is None:
            self.outcome, self.reason = outcome, reason
            self.done.set()


class SidecarLife:
    """One sidecar from start to death. Not for several threads: the service's lock guards it.

    Args:
        settings: The sidecar's.
        node_id: Of the store.
        epoch: Of the store's life.
        generation: Counts sidecars in it.
        now_s: Monotonic time.

    Raises:
        OSError: The process, or memory for it, cannot be had.
    """

    def __init__(self, settings: NixlSettings, *, node_id: str, epoch: str, generation: int, now_s: float) -> None:
        self.node_id, self.epoch, self.generation = node_id, epoch, generation
        self.agent = agent_name(node_id, epoch=epoch, generation=generation)
        self.state = LifeState.STARTING
        self.started_s = now_s
        self.asked_s = now_s
        """When it was last asked for a sign of life."""
        self.unanswered = 0
        """How often it was asked since it gave one. Counted, because time also passes while the *store* is frozen."""
        self.retired_s = now_s
        self.is_worn = False
        """Whether a successor is wanted."""
        self.address: Address | None = None
        self.progress_delay_us: int | None = None
        self.unusable: Unusable | None = None
        self.staging = Staging(settings.staging_bytes)
        self.peers: set[str] = set()
        self.reads: dict[int, PendingRead] = {}
        """Posted and not ended, also those that nobody waits for."""
        self.offers: dict[bytes, StagedRecord] = {}
        self._numbers = itertools.count(1)
        try:
            self.process, self.control = _spawn(settings, self.agent, self.staging)
        finally:
            self.staging.close_fd()
        try:
            self.pidfd = os.pidfd_open(self.process.pid)
        except OSError:
            self.process.kill()
            self.process.wait()
            self.control.close()
            raise

    # The socket.

    def send(self, order: Order) -> bool:
        """Send an order; False if the sidecar takes none: it is dead or frozen."""
        try:
            self.control.send(encode(order), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError:
            return False
        return True

    def ask(self, now_s: float) -> None:
        """Ask for a sign of life."""
        self.asked_s = now_s
        self.unanswered += 1
        self.send(Ping(next(self._numbers)))

    def handle(self, report: Report) -> None:
        """Take in what the sidecar says."""
        self.unanswered = 0
        if isinstance(report, Done):
            self._finish(report.number)
        elif isinstance(report, Failed):
            self._fail(report)
        elif isinstance(report, Ready):
            self.address = Address(
                self.node_id, self.epoch, self.generation, report.base, self.staging.num_bytes, report.metadata
            )
            self.progress_delay_us = report.progress_delay_us
            self.state = LifeState.READY
            log.info("nixl_agent_ready agent=%s library=%s", self.agent, report.library)
        elif isinstance(report, Unusable):
            self.unusable = report
        else:
            assert isinstance(report, Pong)

    # Reads.

    def add_peer(self, address: Address) -> bool:
        """Make a peer's agent known, once; False if the sidecar takes no orders."""
        if address.agent not in self.peers:
            if not self.send(AddPeer(address.agent, address.metadata)):
                return False
            self.peers.add(address.agent)
        return True

    def post(self, slot: LandingSlot, *, agent: str, remote_address: int, num_bytes: int) -> PendingRead | None:
        """Start a read into a slot that was taken; None, and the slot still taken, if the sidecar takes no orders."""
        pending = PendingRead(next(self._numbers), slot)
        if not self.send(Read(pending.number, agent, remote_address, slot.offset, num_bytes)):
            return None
        self.reads[pending.number] = pending
        return pending

    def abandon(self, pending: PendingRead) -> None:
        """Nobody waits for a read any more: its slot is not to be used before NIXL says that it has ended well."""
        if pending.has_landed:
            self.staging.done(pending.slot)
        elif pending.number in self.reads:
            pending.is_abandoned = True
            self.staging.quarantine(pending.slot)
            metrics.NIXL_QUARANTINES.labels("late").inc()
            log.warning("nixl_read_late agent=%s number=%d", self.agent, pending.number)

    def _finish(self, number: int) -> None:
        pending = self.reads.pop(number, None)
        if pending is None:
            return
        pending.has_landed = True
        if pending.is_abandoned:
            self.staging.done(pending.slot)
        pending.end(Outcome.DONE)

    def _fail(self, report: Failed) -> None:
        pending = self.reads.pop(report.number, None)
        if pending is None:
            return
        if not report.was_posted:
            self.staging.done(pending.slot)
        elif not pending.is_abandoned:
            self.staging.quarantine(pending.slot)
            metrics.NIXL_QUARANTINES.labels("failed").inc()
        log.warning("nixl_read_failed agent=%s posted=%s reason=%s", self.agent, report.was_posted, report.reason)
        pending.end(Outcome.FAILED, report.reason)

    # Offers.

    def stage(self, num_bytes: int, *, expires_s: float, now_s: float) -> StagedRecord | None:
        """Room for a record under a new token, to be filled and published; None if there is none now."""
        token = secrets.token_bytes(TOKEN_BYTES)
        return self.staging.stage(token, num_bytes, now_s=now_s, expires_s=expires_s)

    def publish(self, record: StagedRecord) -> None:
        """A staged record is filled: peers may read it until the offer ends."""
        self.offers[record.token] = record

    def end_offer(self, token: bytes, *, now_s: float) -> bool:
        """Wipe an offer's head; whether there was one."""
        record = self.offers.pop(token, None)
        if record is not None:
            self.staging.unstage(record, now_s=now_s)
        return record is not None

    def end_expired_offers(self, now_s: float) -> None:
        """End the offers whose time is over."""
        for token in [token for token, record in self.offers.items() if record.expires_s <= now_s]:
            self.end_offer(token, now_s=now_s)

    @property
    def next_expiry_s(self) -> float:
        """When the next offer ends by itself."""
        return min((record.expires_s for record in self.offers.values()), default=math.inf)

    @property
    def is_idle(self) -> bool:
        """Whether nobody would miss it: no read under way, no offer."""
        return not self.reads and not self.offers

    # The end.

    def kill(self) -> None:
        """SIGKILL: the only end, because deleting the agent can hang or crash. Frozen processes die of it too."""
        self.process.kill()

    def bury(self, status: int) -> None:
        """End everything that needed the process, which was reaped with `status`. Repeating it is harmless."""
        if self.control.fileno() < 0:
            return
        self.state = LifeState.DEAD
        for pending in self.reads.values():
            pending.end(Outcome.LOST, f"the NIXL sidecar {describe_exit(status)}")
        self.reads.clear()
        self.offers.clear()
        self.staging.unmap()
        self.control.close()
        os.close(self.pidfd)


def describe_exit(status: int) -> str:
    """An exit status in words.

    Example:
        >>> describe_exit(-11), describe_exit(0)
        ('died of signal 11', 'ended with status 0')
    """
    return f"died of signal {-status}" if status < 0 else f"ended with status {status}"


def sidecar_environment(
    settings: NixlSettings, *, environment: Mapping[str, str], path: Sequence[str]
) -> dict[str, str]:
    """What a sidecar knows of its store's environment: how to load libraries and how to set UCX. No secrets.

    Example:
        >>> settings = NixlSettings(net_devices="eth1")
        >>> of_store = {"LEARNONCE_CLUSTER_SECRET": "00", "AWS_SECRET_ACCESS_KEY": "x", "UCX_LOG_LEVEL": "warn"}
        >>> sorted(sidecar_environment(settings, environment=of_store, path=["/app"]).items())[:2]
        [('PYTHONPATH', '/app'), ('UCX_HANDLE_ERRORS', 'none')]
    """
    passed = {
        name: value for name, value in environment.items() if name in _PASSED_NAMES or name.startswith(_PASSED_PREFIXES)
    }
    devices = {"UCX_NET_DEVICES": settings.net_devices} if settings.net_devices else {}
    return {**UCX_DEFAULTS, **passed, **devices, "PYTHONPATH": os.pathsep.join(part for part in path if part)}


def _spawn(settings: NixlSettings, agent: str, staging: Staging) -> tuple["subprocess.Popen[bytes]", socket.socket]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    config = Config(
        agent=agent,
        parent_pid=os.getpid(),
        control_fd=theirs.fileno(),
        staging_fd=staging.fd,
        staging_bytes=staging.num_bytes,
        landing_bytes=staging.landing_bytes,
        progress_delay_us=settings.progress_delay_us,
    )
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", SIDECAR_MODULE, json.dumps(msgspec.to_builtins(config))],
            stdin=subprocess.DEVNULL,
            # UCX writes to standard output; the store's may be read by somebody.
            stdout=_STANDARD_ERROR,
            env=sidecar_environment(settings, environment=os.environ, path=[*sys.path, _ROOT]),
            pass_fds=(theirs.fileno(), staging.fd),
            cwd="/",
            start_new_session=True,
        )
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    return process, ours
