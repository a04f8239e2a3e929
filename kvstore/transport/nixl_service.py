r"""NIXL for one store: keeps a sidecar alive, replaces it when it dies, hangs or is worn out, hands out its memory.

Covers: when sidecars start and end, the lock around them, waiting for reads. Does not cover: what one sidecar holds
(`kvstore.transport.nixl_life`), records and offers (`kvstore.transport.nixl`).

An agent is never repaired or deleted: its process is replaced by one of the next generation, with new memory.

    starting -- ready --> current -- worn: quarantine, too many peers --> retired (ends what it has) --> killed
        \----------------------\----- died, hung -----> buried; the next one starts after a pause that doubles

A worn one stays current until its successor is ready. A retired one is killed when its last read and its last offer
have ended, or after `_DRAIN_S`.
"""

import logging
import math
import os
import selectors
import threading
import time
from typing import Final

from cluster.errors import InvariantError, LearnonceError
from kvstore import metrics
from kvstore.settings import NixlSettings
from kvstore.transport import PeerGoneError
from kvstore.transport.nixl_life import LifeState, Outcome, PendingRead, SidecarLife, describe_exit
from kvstore.transport.nixl_staging import LandingSlot, StagedRecord
from kvstore.transport.nixl_wire import (
    MAX_FRAME_BYTES,
    Address,
    NixlUnavailableError,
    SidecarFrameError,
    decode_report,
    encode_address,
)

log = logging.getLogger(__name__)

_TICK_S: Final = 0.25
_STARTUP_S: Final = 60.0
"""Loading the library takes 0.7 s on an idle machine."""
_SIGNS: Final = 4
"""Signs of life that a sidecar is asked for before it is taken for hung."""
_DRAIN_S: Final = 30.0
"""Killing a sidecar while a peer is frozen aborts the peer's when it is thawed (measured): give it time to end well."""
_MAX_PEERS: Final = 256
"""Agents known to one sidecar; they are never removed, so a sidecar that knows more is worn out."""
_MIN_PAUSE_S: Final = 0.25
_MAX_PAUSE_S: Final = 30.0
_LONG_LIFE_S: Final = 60.0
"""A sidecar that lived this long did not die of its start."""


class NixlService:
    """NIXL for both ends of all transfers of one store. Safe for several threads.

    Args:
        settings: Sizes and bounds.
        secret: The cluster's: signs addresses and handles; the sidecar does not see it.
        node_id: Of the store.
        epoch: Of the store's life.
        patience_s: Seconds without a sign of life after which a sidecar is taken for hung.

    Guarantees:
        Nothing raises or blocks because a sidecar dies, hangs, or cannot be started; there is just no agent.
        Memory that a read may still write to is not used again before the read has ended, or the sidecar has.
    """

    def __init__(
        self, settings: NixlSettings, *, secret: bytes, node_id: str, epoch: str, patience_s: float = 5.0
    ) -> None:
        self.secret = secret
        self._settings = settings
        self._node_id = node_id
        self._epoch = epoch
        self._patience_s = patience_s
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        """A sidecar is ready or dead, a slot is free, or the service is closed."""
        self._lives: list[SidecarLife] = []
        """All processes; oldest first."""
        self._generation = 0
        self._cause = "first"
        self._pause_s = _MIN_PAUSE_S
        self._next_start_s = 0.0
        self._tick_s = 0.0
        """When the thread is to look next at what happens by time alone."""
        self._shown_bytes = 0
        self._reason = "the NIXL sidecar has not been started"
        self._is_final = False
        self._is_closed = False
        self._selector: selectors.BaseSelector
        self._wake_fd = -1
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the first sidecar, in the background."""
        if self._thread is not None:
            raise InvariantError("a NIXL service is started once")
        self._reason = "the NIXL sidecar is starting"
        self._selector = selectors.DefaultSelector()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector.register(self._wake_fd, selectors.EVENT_READ)
        # Sidecars die with the thread that started them, which is this one for all of them.
        self._thread = threading.Thread(target=self._run, name="kvstore-nixl", daemon=True)
        self._thread.start()

    def wait_ready(self, timeout_s: float) -> bool:
        """Wait for an agent; False if there is none in time, or never will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._current() or self._is_final or self._is_closed, timeout_s)
            return self._current() is not None

    @property
    def unavailable_reason(self) -> str | None:
        """Why there is no agent now, in words; None if there is one."""
        with self._lock:
            return None if self._current() else self._reason

    @property
    def address(self) -> bytes:
        """The signed address of the agent; empty while there is none."""
        with self._lock:
            life = self._current()
            return encode_address(life.address, secret=self.secret) if life and life.address else b""

    def close(self) -> None:
        """Kill the sidecars; reads under way raise. Repeating it is harmless."""
        with self._changed:
            self._is_closed = True
            self._reason = "the NIXL service is closed"
            self._changed.notify_all()
            self._wake()
        if self._thread is not None:
            self._thread.join()

    # For the two ends.

    @property
    def lock(self) -> threading.Lock:
        """Guards every `SidecarLife`."""
        return self._lock

    def current(self) -> SidecarLife:
        """The sidecar for new work.

        Raises:
            NixlUnavailableError: There is none; the message says why.
        """
        with self._lock:
            life = self._current()
            if life is None:
                raise NixlUnavailableError(f"NIXL cannot be used on this node now: {self._reason}")
            return life

    def current_or_none(self) -> SidecarLife | None:
        """As `current`."""
        with self._lock:
            return self._current()

    def publish(self, life: SidecarLife, record: StagedRecord) -> None:
        """A staged record is filled: start its offer."""
        with self._lock:
            life.publish(record)
            if record.expires_s < self._tick_s:
                self._tick_s = record.expires_s
                self._wake()

    def end_offer(self, token: bytes) -> None:
        """End an offer, if there is such."""
        now_s = time.monotonic()
        with self._lock:
            for life in self._lives:
                life.end_offer(token, now_s=now_s)

    def end_offers(self) -> None:
        """End all offers."""
        now_s = time.monotonic()
        with self._lock:
            for life in self._lives:
                for token in list(life.offers):
                    life.end_offer(token, now_s=now_s)

    def take_slot(self, life: SidecarLife, *, stop_s: float) -> LandingSlot:
        """A landing slot, waited for until monotonic time `stop_s`.

        Whoever holds a slot uses `try_slot`: pulls that wait with slots in their hands may wait for each other.

        Raises:
            NixlUnavailableError: None became free in time, or the sidecar died.
        """
        with self._changed:
            while True:
                if life.state is LifeState.DEAD:
                    raise NixlUnavailableError(f"NIXL cannot be used on this node now: {self._reason}")
                left_s = stop_s - time.monotonic()
                slot = life.staging.take() if left_s > 0 else None
                if slot is not None:
                    return slot
                if left_s <= 0:
                    quarantined = life.staging.quarantined_bytes
                    raise NixlUnavailableError(f"no landing slot in time; {quarantined} bytes are in quarantine")
                self._changed.wait(left_s)

    def try_slot(self, life: SidecarLife) -> LandingSlot | None:
        """A landing slot if one is free now."""
        with self._lock:
            return None if life.state is LifeState.DEAD else life.staging.take()

    def post(
        self, life: SidecarLife, slot: LandingSlot, *, source: Address, remote_address: int, num_bytes: int
    ) -> PendingRead:
        """Start a read into a slot that was taken; the slot is the service's again if it raises.

        Raises:
            NixlUnavailableError: The sidecar takes no orders.
        """
        with self._changed:
            pending = None
            try:
                if life.state is not LifeState.DEAD and life.add_peer(source):
                    pending = life.post(slot, agent=source.agent, remote_address=remote_address, num_bytes=num_bytes)
            finally:
                if pending is None:
                    life.staging.done(slot)
                    self._changed.notify_all()
            if pending is None:
                raise NixlUnavailableError("the NIXL sidecar takes no orders: dead or frozen")
            return pending

    def wait(self, pending: PendingRead, *, stop_s: float) -> None:
        """Return when a read has ended well; its slot is to be given back by `free_slot`.

        Raises:
            PeerGoneError: It failed, or had not ended at monotonic time `stop_s`.
            NixlUnavailableError: The sidecar died.
        """
        left_s = stop_s - time.monotonic()
        if left_s <= 0 or not pending.done.wait(left_s):
            raise PeerGoneError("the peer did not send within the time for the transfer")
        if pending.outcome is Outcome.FAILED:
            raise PeerGoneError(f"NIXL could not read from the peer: {pending.reason}")
        if pending.outcome is Outcome.LOST:
            raise NixlUnavailableError(f"the read was given up: {pending.reason}")

    def free_slot(self, life: SidecarLife, slot: LandingSlot) -> None:
        """Give back the slot of a read that ended well."""
        with self._changed:
            life.staging.done(slot)
            self._changed.notify_all()

    def give_up(self, life: SidecarLife, pending: PendingRead) -> None:
        """Nobody waits for a read any more, however it stands."""
        with self._changed:
            life.abandon(pending)
            self._changed.notify_all()
            self._note_wear(life)

    # The thread.

    def _run(self) -> None:
        try:
            while not self._is_closed:
                try:
                    self._turn()
                except Exception:
                    # A store without NIXL is better than a store that thinks it has one.
                    log.exception("nixl_service_failed")
                    self._end_all("hung")
                    with self._changed:
                        self._changed.wait_for(lambda: self._is_closed, _MAX_PAUSE_S)
        finally:
            with self._changed:
                self._is_closed = True
            self._end_all("closed")
            with self._lock:
                self._selector.close()
                os.close(self._wake_fd)
                self._wake_fd = -1

    def _turn(self) -> None:
        self._start_if_due()
        for key, _ in self._selector.select(self._wait_s()):
            life = key.data
            if life is None:
                os.eventfd_read(self._wake_fd)
            elif life.state is not LifeState.DEAD:
                if key.fd == life.pidfd:
                    self._bury(life, "died")
                else:
                    self._receive(life)
        self._tick()

    def _wait_s(self) -> float:
        return max(0.0, self._tick_s - time.monotonic())

    def _start_if_due(self) -> None:
        now_s = time.monotonic()
        with self._lock:
            current = self._current()
            is_due = (current is None or current.is_worn) and not self._is_final and now_s >= self._next_start_s
            if self._is_closed or not is_due or any(life.state is LifeState.STARTING for life in self._lives):
                return
            self._generation += 1
            self._next_start_s = now_s + self._pause_s
        try:
            life = SidecarLife(
                self._settings, node_id=self._node_id, epoch=self._epoch, generation=self._generation, now_s=now_s
            )
        except (OSError, LearnonceError) as error:
            with self._changed:
                self._reason = f"the NIXL sidecar cannot be started: {error}"
                self._is_final = isinstance(error, LearnonceError)
                self._lengthen_pause(now_s)
                self._changed.notify_all()
            log.error("nixl_sidecar_not_started error=%s", error)  # noqa: TRY400 the message is the cause
            return
        metrics.NIXL_SIDECARS.labels(self._cause).inc()
        log.info("nixl_sidecar_started agent=%s pid=%d cause=%s", life.agent, life.process.pid, self._cause)
        with self._lock:
            self._lives.append(life)
        self._selector.register(life.control, selectors.EVENT_READ, life)
        self._selector.register(life.pidfd, selectors.EVENT_READ, life)

    def _receive(self, life: SidecarLife) -> None:
        try:
            frame = life.control.recv(MAX_FRAME_BYTES)
            if not frame:
                # Its end is closed: it is ending, or it closed what it must not close.
                life.kill()
                self._bury(life, "died")
                return
            report = decode_report(frame)
        except (OSError, SidecarFrameError) as error:
            log.warning("nixl_sidecar_broken agent=%s error=%s", life.agent, error)
            life.kill()
            self._bury(life, "died")
            return
        with self._changed:
            was_starting = life.state is LifeState.STARTING
            life.handle(report)
            if was_starting and life.state is LifeState.READY:
                self._retire_others(life)
            self._note_wear(life)
            self._changed.notify_all()

    def _retire_others(self, successor: SidecarLife) -> None:
        """The successor is ready: its predecessors end what they have."""
        for life in self._lives:
            if life is not successor and life.state is LifeState.READY:
                life.state = LifeState.RETIRED
                life.retired_s = time.monotonic()

    def _note_wear(self, life: SidecarLife) -> None:
        """Ask for a successor of a sidecar that has too much in quarantine; under the lock."""
        self._show_quarantine()
        if life.state is not LifeState.READY or life.is_worn:
            return
        if life.staging.quarantined_ratio > self._settings.quarantine_ratio:
            self._cause = "quarantine"
        elif len(life.peers) > _MAX_PEERS:
            self._cause = "peers"
        else:
            return
        life.is_worn = True
        log.warning("nixl_agent_worn agent=%s cause=%s", life.agent, self._cause)
        self._wake()

    def _show_quarantine(self) -> None:
        now_bytes = sum(life.staging.quarantined_bytes for life in self._lives)
        if now_bytes != self._shown_bytes:
            self._shown_bytes = now_bytes
            metrics.NIXL_QUARANTINED_BYTES.set(now_bytes)

    def _tick(self) -> None:
        """What happens by time alone."""
        now_s = time.monotonic()
        if now_s < self._tick_s:
            return
        hung: list[SidecarLife] = []
        over: list[SidecarLife] = []
        with self._lock:
            for life in self._lives:
                life.end_expired_offers(now_s)
                is_starting = life.state is LifeState.STARTING
                if life.state is LifeState.RETIRED and (life.is_idle or now_s - life.retired_s > _DRAIN_S):
                    over.append(life)
                elif now_s - life.started_s > _STARTUP_S if is_starting else life.unanswered > _SIGNS:
                    hung.append(life)
                elif not is_starting and now_s - life.asked_s > self._patience_s / _SIGNS:
                    life.ask(now_s)
            next_s = min((life.next_expiry_s for life in self._lives), default=math.inf)
            self._tick_s = min(now_s + _TICK_S, next_s)
            # Two sidecars' memory is enough: a peer that stays frozen does not collect more.
            over.extend([life for life in self._lives if life.state is LifeState.RETIRED and life not in over][:-1])
        for life, cause in [*((life, "hung") for life in hung), *((life, "retired") for life in over)]:
            life.kill()
            self._bury(life, cause)

    def _bury(self, life: SidecarLife, cause: str) -> None:
        """End a sidecar that is dead or about to be."""
        self._selector.unregister(life.control)
        self._selector.unregister(life.pidfd)
        with self._changed:
            was_current = life.state in (LifeState.STARTING, LifeState.READY)
            life.state = LifeState.DEAD
        # Not under the lock: a process may take its time to die.
        status = life.process.wait()
        with self._changed:
            life.bury(status)
            cause = "unusable" if life.unusable else cause
            self._lives.remove(life)
            if was_current and not self._is_closed:
                self._reason = f"the NIXL sidecar {describe_exit(status)} and is being replaced"
                self._cause = cause
                if life.unusable is not None:
                    self._reason, self._is_final = life.unusable.reason, life.unusable.is_final
                self._lengthen_pause(life.started_s)
            self._show_quarantine()
            self._changed.notify_all()
        level = logging.WARNING if was_current and cause != "closed" else logging.INFO
        reason = life.unusable.reason if life.unusable else describe_exit(status)
        log.log(level, "nixl_sidecar_ended agent=%s cause=%s reason=%s", life.agent, cause, reason)

    def _lengthen_pause(self, started_s: float) -> None:
        now_s = time.monotonic()
        if now_s - started_s > _LONG_LIFE_S:
            self._pause_s = _MIN_PAUSE_S
        self._next_start_s = now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, _MAX_PAUSE_S)

    def _end_all(self, cause: str) -> None:
        for life in list(self._lives):
            life.kill()
            self._bury(life, cause)

    def _wake(self) -> None:
        """End the thread's pause; under the lock."""
        if self._wake_fd >= 0:
            os.eventfd_write(self._wake_fd, 1)

    def _current(self) -> SidecarLife | None:
        """Under the lock."""
        return next((life for life in reversed(self._lives) if life.state is LifeState.READY), None)
