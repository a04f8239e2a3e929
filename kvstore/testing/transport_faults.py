"""What every data path does when the peer dies, freezes or restarts: a suite to inherit, and the peer's program.

A subclass of `TransportFaultContract` names a *factory* as `module:function`. The peer runs it in a process of its own
(`python -m kvstore.testing.transport_faults`); it gets the subclass' options and the address of its former life (empty
at first), and returns a `Holder`: the server, and where its records may lie.

Covers: SIGKILL, SIGSTOP, SIGCONT and restarts of the peer, before and in the middle of a transfer. The middle is known
from `on_bytes`, which causes the fault itself: no test depends on luck.
Does not cover: peers that are well (`kvstore.testing.transport`), links that lose or delay (`loadtest.bench_store`).
"""

import importlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

import psutil
import pytest

from cluster.errors import LearnonceError
from kvstore.interfaces import OnBytes
from kvstore.testing.poll import wait_until
from kvstore.testing.samples import sample_payload
from kvstore.testing.transport import KIB, LATE_S, MIB, DataPathSuite, Things, soon
from kvstore.transport import Offer, OfferRefusedError, PeerGoneError, Transport, TransportServer
from kvstore.transport.tcp import TcpServer
from kvstore.transport.tcp_wire import parse_address

_ROOT: Final = Path(__file__).resolve().parents[2]
BIG_BYTES: Final = 96 * MIB
"""More than all buffers between two processes: in the middle of such a record most of it is still on the other side."""
DEADLINE_S: Final = 1.0
"""Of transfers that a fault ends."""
_MARK: Final = 0x5A


class Holder(Protocol):
    """What the peer's factory returns."""

    @property
    def server(self) -> TransportServer:
        """The holder's end."""
        ...

    def place(self, data: bytes) -> memoryview:
        """Memory with `data` that the server can offer; kept until the process ends."""
        ...


class PlainHolder:
    """A holder for servers that can offer any memory."""

    def __init__(self, server: TransportServer) -> None:
        self.server = server

    def place(self, data: bytes) -> memoryview:
        """See `Holder`."""
        return memoryview(bytearray(data))


class PeerProcess:
    """A holder in a process of its own; `restart` starts another life under the same address."""

    def __init__(self, factory: str, options: Mapping[str, Any]) -> None:
        self._factory = factory
        self._options = dict(options)
        self.address = b""
        self._spawn()

    def offer(self, seed: int, num_bytes: int, *, lifetime_s: float = 120.0) -> Offer:
        """Offer a record of seeded bytes (`sample_payload`)."""
        answer = self._ask({"do": "offer", "seed": seed, "bytes": num_bytes, "lifetime_s": lifetime_s})
        return Offer(
            transport=answer["transport"], handle=bytes.fromhex(answer["handle"]), stored_bytes=answer["stored_bytes"]
        )

    def revoke(self, offer: Offer) -> None:
        """End an offer."""
        self._ask({"do": "revoke", "handle": offer.handle.hex()})

    def things(self) -> Things:
        """What the process holds open; it answers, so it runs."""
        return Things(*self._ask({"do": "things"}))

    def kill(self) -> None:
        """SIGKILL for the process and those that it started, and wait for the end."""
        for process in self._tree():
            process.kill()
        self._reap()

    def freeze(self) -> None:
        """SIGSTOP, likewise."""
        stopped = self._tree()
        for process in stopped:
            process.suspend()
        wait_until(lambda: all(p.status() == psutil.STATUS_STOPPED for p in stopped), what="the peer to be stopped")

    def thaw(self) -> None:
        """SIGCONT, likewise; returns when the peer answers."""
        for process in self._tree():
            process.resume()
        self.things()

    def restart(self) -> None:
        """Another life, after `kill`."""
        self._spawn()

    def stop(self) -> None:
        """End in good order, or by force if it was killed or frozen before."""
        if self._process.poll() is None:
            for process in self._tree():
                process.resume()
            self._ask({"do": "stop"})
        self._reap()

    def _tree(self) -> list[psutil.Process]:
        """The process, then its descendants: whoever starts others is stopped first."""
        process = psutil.Process(self._process.pid)
        return [process, *process.children(recursive=True)]

    def _spawn(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(_ROOT)},
            text=True,
        )
        start = {"factory": self._factory, "options": self._options, "address": self.address.hex()}
        self.address = bytes.fromhex(self._ask(start))

    def _ask(self, question: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._reap()
            raise RuntimeError(f"the peer's process ended with {self._process.returncode}")
        return json.loads(line)

    def _reap(self) -> None:
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class TransportFaultContract(DataPathSuite):
    """Subclass this; pytest collects the subclass."""

    # What a subclass provides.

    factory: str
    """`module:function` that makes the peer's `Holder` from its options and the address of its former life."""
    options: Mapping[str, Any] = {}
    """Plain JSON, passed to the factory."""
    big_bytes: int = BIG_BYTES
    """Record in whose middle faults happen."""
    deadline_s: float = DEADLINE_S
    """For transfers that a fault ends."""
    bytes_outlive_peer: bool = False
    """Whether a puller that has the peer's memory mapped may finish without it: right bytes are then as good as an
    error. Never wrong ones."""

    def make_client(self, address: bytes) -> Transport:
        """A puller's end in this process."""
        raise NotImplementedError

    # The suite.

    @pytest.fixture
    def peer(self, _nothing_is_left: None) -> Iterator[PeerProcess]:
        """The peer; what its transfers opened is closed again when its pullers have gone."""
        peer = PeerProcess(self.factory, self.options)
        yield peer
        peer.stop()

    @pytest.fixture
    def client(self, peer: PeerProcess) -> Iterator[Transport]:
        """The puller, with one good transfer behind it."""
        client = self.make_client(peer.address)
        self.assert_works(peer, client)
        yield client
        client.close()

    def test_peer_killed_before_a_pull(self, peer: PeerProcess, client: Transport) -> None:
        """An error at once, not at the deadline of a patient caller."""
        offer = peer.offer(1, MIB)
        peer.kill()
        start_s = time.monotonic()
        self.assert_fails(client, offer, self.room(client, MIB), stop_s=soon())
        assert time.monotonic() - start_s < self.deadline_s + LATE_S

    def test_peer_killed_in_the_middle(self, peer: PeerProcess, client: Transport) -> None:
        """An error in time; what is in the buffer is the caller's affair from then on."""
        into = self.room(client, self.big_bytes)
        self.assert_ends(peer, client, into, peer.kill)
        self.assert_untouched_by(into, peer.restart)

    def test_peer_frozen_before_a_pull(self, peer: PeerProcess, client: Transport) -> None:
        """An error at the deadline; thawed, the peer answers into nowhere."""
        offer = peer.offer(1, self.big_bytes)
        into = self.room(client, self.big_bytes)
        peer.freeze()
        stop_s = time.monotonic() + self.deadline_s
        self.assert_fails(client, offer, into, stop_s=stop_s)
        assert time.monotonic() - stop_s < LATE_S
        self.assert_untouched_by(into, peer.thaw)
        self.assert_works(peer, client)

    def test_peer_frozen_in_the_middle(self, peer: PeerProcess, client: Transport) -> None:
        """An error at the deadline; after the thaw the same buffer serves another chunk, and keeps it."""
        into = self.room(client, self.big_bytes)
        self.assert_ends(peer, client, into, peer.freeze)
        self.assert_untouched_by(into, peer.thaw)
        offer = peer.offer(7, 8 * MIB)
        client.pull(offer, into[: 8 * MIB], stop_s=soon())
        assert into[: 8 * MIB] == sample_payload(7, 8 * MIB)
        self.assert_works(peer, client)
        assert into[: 8 * MIB] == sample_payload(7, 8 * MIB)
        assert into[8 * MIB :] == bytes([_MARK]) * (self.big_bytes - 8 * MIB)

    def test_peer_thawed_within_the_deadline(self, peer: PeerProcess, client: Transport) -> None:
        """A pause is no failure: the record arrives, whole and right."""
        offer = peer.offer(1, self.big_bytes)
        into = self.room(client, self.big_bytes)
        thaws: list[threading.Timer] = []

        def pause() -> None:
            peer.freeze()
            thaws.append(threading.Timer(0.2, peer.thaw))
            thaws[0].start()

        client.pull(offer, into, stop_s=soon(), on_bytes=once_in_the_middle(self.big_bytes, pause))
        thaws[0].join()
        assert into == sample_payload(1, self.big_bytes)

    def test_peer_restarted_before_a_pull(self, peer: PeerProcess, client: Transport) -> None:
        """The former life's handle brings nothing; the new life's brings the new bytes, without a word in between."""
        old = peer.offer(1, MIB)
        peer.kill()
        address = peer.address
        peer.restart()
        assert peer.address == address
        into = self.room(client, MIB)
        with pytest.raises((OfferRefusedError, PeerGoneError)):
            client.pull(old, into, stop_s=soon())
        self.assert_works_again(peer, client)

    def test_peer_restarted_in_the_middle(self, peer: PeerProcess, client: Transport) -> None:
        """An error for the transfer under way, and the next one works."""

        def restart() -> None:
            peer.kill()
            peer.restart()

        into = self.room(client, self.big_bytes)
        self.assert_ends(peer, client, into, restart)
        self.assert_untouched_by(into, lambda: self.assert_works_again(peer, client))

    def test_puller_closed_while_the_peer_is_frozen(self, peer: PeerProcess, client: Transport) -> None:
        """`close` does not wait for it, and the peer survives the thaw."""
        offer = peer.offer(1, self.big_bytes)
        into = self.room(client, self.big_bytes)
        is_frozen = threading.Event()
        errors: list[LearnonceError] = []

        def freeze() -> None:
            peer.freeze()
            is_frozen.set()

        def pull() -> None:
            on_bytes = once_in_the_middle(self.big_bytes, freeze)
            try:
                client.pull(offer, into, stop_s=soon(), on_bytes=on_bytes)
            except LearnonceError as error:
                errors.append(error)

        thread = threading.Thread(target=pull)
        thread.start()
        assert is_frozen.wait(LATE_S * 5)
        start_s = time.monotonic()
        client.close()
        thread.join()
        assert time.monotonic() - start_s < LATE_S
        assert self.bytes_outlive_peer or isinstance(errors[0], PeerGoneError)
        self.assert_untouched_by(into, peer.thaw)
        other = self.make_client(peer.address)
        self.assert_works(peer, other)
        other.close()

    def test_peer_leaks_nothing_when_pullers_give_up(self, peer: PeerProcess, client: Transport) -> None:
        """Threads and descriptors of the peer are back to what they were once the pullers have gone."""
        client.close()
        with_nobody = self.settled(peer)
        for _ in range(3):
            other = self.make_client(peer.address)
            offer = peer.offer(1, self.big_bytes)
            into = self.room(other, self.big_bytes)
            with pytest.raises(_StopError):
                other.pull(offer, into, stop_s=soon(), on_bytes=once_in_the_middle(self.big_bytes, _stop))
            other.close()
            peer.revoke(offer)
        wait_until(lambda: peer.things().is_within(with_nobody), what=f"the peer to hold no more than {with_nobody}")

    # Steps of the tests above.

    def settled(self, peer: PeerProcess) -> Things:
        """What the peer holds when it has noticed that its pullers are gone."""
        seen = [peer.things()]

        def is_steady() -> bool:
            seen.append(peer.things())
            return len(seen) > 20 and len(set(seen[-20:])) == 1

        wait_until(is_steady, what="the peer's descriptors to settle")
        return seen[-1]

    def assert_works(self, peer: PeerProcess, client: Transport) -> None:
        """One good transfer."""
        offer = peer.offer(99, 68 * KIB)
        into = self.room(client, 68 * KIB)
        client.pull(offer, into, stop_s=soon())
        assert into == sample_payload(99, 68 * KIB)
        peer.revoke(offer)

    def assert_works_again(self, peer: PeerProcess, client: Transport) -> None:
        """One good transfer after a restart, by a puller's end of the new life (`Transport` is for one life)."""
        other = self.make_client(peer.address)
        self.assert_works(peer, other)
        other.close()

    def assert_ends(self, peer: PeerProcess, client: Transport, into: memoryview, fault: Callable[[], object]) -> None:
        """A pull with `fault` in its middle raises, and in time."""
        offer = peer.offer(1, len(into))
        stop_s = time.monotonic() + self.deadline_s
        fault_s: list[float] = []

        def timed_fault() -> None:
            before_s = time.monotonic()
            fault()
            fault_s.append(time.monotonic() - before_s)

        self.assert_fails(client, offer, into, stop_s=stop_s, on_bytes=once_in_the_middle(len(into), timed_fault))
        assert time.monotonic() - stop_s < LATE_S + fault_s[0]

    def assert_fails(
        self, client: Transport, offer: Offer, into: memoryview, *, stop_s: float, on_bytes: OnBytes | None = None
    ) -> None:
        """A pull of seed 1 raises `PeerGoneError`, or brings the right bytes where the data path may."""
        try:
            client.pull(offer, into, stop_s=stop_s, on_bytes=on_bytes)
        except PeerGoneError:
            return
        assert self.bytes_outlive_peer, "the pull succeeded without a peer"
        assert into == sample_payload(1, len(into))

    def assert_untouched_by(self, into: memoryview, act: Callable[[], object]) -> None:
        """Nothing writes to the buffer of an ended pull, whatever the peer does then."""
        into[:] = bytes([_MARK]) * len(into)
        act()
        assert into == bytes([_MARK]) * len(into)


class _StopError(Exception):
    """Raised by a consumer that has enough."""


def _stop() -> None:
    raise _StopError


def once_in_the_middle(num_bytes: int, fault: Callable[[], object]) -> OnBytes:
    """An `on_bytes` that causes `fault` at its first call, which must not be the last."""
    calls: list[int] = []

    def on_bytes(in_place: int) -> None:
        calls.append(in_place)
        if len(calls) == 1:
            assert 0 < in_place <= num_bytes // 2, f"{in_place} of {num_bytes} bytes is not in the middle"
            fault()

    return on_bytes


def tcp_holder(options: Mapping[str, Any], address: bytes) -> Holder:
    """The factory for `kvstore.transport.tcp`; its former address is its port."""
    port = parse_address(address)[1] if address else None
    return PlainHolder(TcpServer(bind_host="127.0.0.1", port=port, **options))


def main() -> None:
    """Serve offers until told to stop, or until whoever started this process is gone."""
    start = json.loads(sys.stdin.readline())
    module, _, function = start["factory"].partition(":")
    factory = getattr(importlib.import_module(module), function)
    holder: Holder = factory(start["options"], bytes.fromhex(start["address"]))
    records: dict[tuple[int, int], memoryview] = {}
    _say(holder.server.address.hex())
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "offer":
            what = (command["seed"], command["bytes"])
            if what not in records:
                records[what] = holder.place(sample_payload(*what))
            offer = holder.server.offer(records[what], peer="puller", lifetime_s=command["lifetime_s"])
            if offer is None:
                raise RuntimeError(f"no room to offer {what}")
            _say({"transport": offer.transport, "handle": offer.handle.hex(), "stored_bytes": offer.stored_bytes})
        elif command["do"] == "revoke":
            holder.server.revoke(bytes.fromhex(command["handle"]))
            _say(True)
        elif command["do"] == "things":
            _say((len(os.listdir("/proc/self/fd")), threading.active_count()))
        else:
            break
    holder.server.close()
    _say(True)


def _say(value: object) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
