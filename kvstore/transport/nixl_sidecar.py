"""The process that holds the NIXL agent: `python -m kvstore.transport.nixl_sidecar CONFIG`.

Covers: making the agent, metadata, peers, reads into the staging memory, dying with the store. Does not cover: which
memory is free, deadlines, quarantine, restarts (`kvstore.transport.nixl_service`).

A peer can crash this process, freeze it, or write into its staging memory late; that is why it holds nothing else:
no secret, no arena, no listener but NIXL's. It is replaced, never repaired. For the same reason it calls nothing in
NIXL that takes something away while the process lives: no deregistration, no removal of peers, no release of a read
that has not ended. Deleting an agent whose peer is frozen aborts the *peer* (measured, `docs/adr/0010-nixl-in-a-
sidecar.md`), and a released read may still land.

One thread: the library's calls are short (a read over shared memory is copied inside the call, piece by piece), its
own progress thread moves bytes over the network.
"""

import ctypes
import importlib
import mmap
import os
import resource
import select
import signal
import socket
import sys
import time
import traceback
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Final

import msgspec

from cluster.errors import LearnonceError, UnavailableError
from kvstore.transport.nixl_wire import (
    MAX_FRAME_BYTES,
    MAX_METADATA_BYTES,
    AddPeer,
    Config,
    Done,
    Failed,
    Order,
    Ping,
    Pong,
    Read,
    Ready,
    Report,
    SidecarFrameError,
    Unusable,
    decode_order,
    encode,
)

LIBRARIES: Final = ("nixl_cu12._bindings", "nixl_cu13._bindings", "nixl_rocm._bindings")
"""The same library built against different device runtimes; only host memory is used, so the first that loads does."""
_PR_SET_PDEATHSIG: Final = 1
_MIN_LOOK_S: Final = 200e-6
_MAX_LOOK_S: Final = 0.02
_LOOK_SHARE: Final = 16
"""A read of age t is looked at every t/16: late by 6 % at most, and a stuck one costs next to nothing."""
_MAX_REASON: Final = 500


class AgentError(UnavailableError):
    """NIXL refuses, with its words."""


class NoLibraryError(UnavailableError):
    """No build of NIXL can be loaded."""


class Agent:
    """What is used of NIXL: one agent with the UCX backend over one range of host memory.

    The bindings are used without the Python class above them, because that class sets the pause of the progress
    thread to zero, which burns a core (0.6 to 0.98 of one, measured; 0.01 with a pause of 1 ms).

    Args:
        name: Unique.
        progress_delay_us: Pause of the progress thread.
        base: Address of the memory.
        num_bytes: Its length.

    Raises:
        NoLibraryError: See there.
        AgentError: No UCX backend, or the memory cannot be registered.
    """

    def __init__(self, name: str, *, progress_delay_us: int, base: int, num_bytes: int) -> None:
        self._nixl: Any = load_library()
        self.library = self._nixl.__name__
        self._base = base
        self._names: dict[str, str] = {}
        """Peers: "" for a usable one, else why not."""
        try:
            config = self._nixl.nixlAgentConfig()
            config.useProgThread = True
            config.useListenThread = False
            config.pthrDelay = progress_delay_us
            self.progress_delay_us = int(config.pthrDelay)
            self._agent = self._nixl.nixlAgent(name, config)
            self._backends = [self._agent.createBackend("UCX", {})]
            ranges = self._nixl.nixlRegDList(self._nixl.DRAM_SEG, [(base, num_bytes, 0, "")])
            self._agent.registerMem(ranges, self._backends)
            self.metadata = bytes(self._agent.getLocalMD())
        except Exception as error:  # the bindings raise many kinds, and another build may lack a name
            raise AgentError(f"{self.library} has no usable UCX backend: {_words(error)}") from error
        if len(self.metadata) > MAX_METADATA_BYTES:
            raise AgentError(
                f"the agent's metadata has {len(self.metadata)} bytes, more than {MAX_METADATA_BYTES}: name fewer "
                "devices in nixl.net_devices"
            )

    def add_peer(self, agent: str, metadata: bytes) -> None:
        """Make a peer known; what is wrong with it comes out at the first read."""
        try:
            loaded = self._agent.loadRemoteMD(metadata)
        except Exception as error:  # see above
            self._names[agent] = f"NIXL refuses the metadata of {agent}: {_words(error)}"
            return
        name = loaded.decode(errors="replace") if isinstance(loaded, bytes) else str(loaded)
        self._names[agent] = "" if name == agent else f"the metadata of {agent} is that of {name}"

    def prepare(self, order: Read) -> Any:
        """A read that can be posted.

        Raises:
            AgentError: Unknown peer, or a range that it did not register.
        """
        why_not = self._names.get(order.agent, f"{order.agent} is no known peer")
        if why_not:
            raise AgentError(why_not)
        nixl = self._nixl
        local = nixl.nixlXferDList(nixl.DRAM_SEG, [(self._base + order.offset, order.num_bytes, 0)])
        remote = nixl.nixlXferDList(nixl.DRAM_SEG, [(order.remote_address, order.num_bytes, 0)])
        try:
            return self._agent.createXferReq(nixl.NIXL_READ, local, remote, order.agent, "", self._backends)
        except Exception as error:  # see above
            raise AgentError(_words(error)) from error

    def post(self, request: Any) -> bool:
        """Start a read; whether it is done already.

        Raises:
            AgentError: The peer is gone, or the backend failed; bytes may land nevertheless.
        """
        return self._outcome(lambda: self._agent.postXferReq(request))

    def is_done(self, request: Any) -> bool:
        """Whether all bytes of a posted read are in place.

        Raises:
            AgentError: As `post`.
        """
        return self._outcome(lambda: self._agent.getXferStatus(request))

    def release(self, request: Any) -> None:
        """Free what a read took that is done."""
        try:
            self._agent.releaseXferReq(request)
        except Exception:  # some memory of the library's is lost; the bytes are there all the same
            traceback.print_exc()

    def _outcome(self, call: Any) -> bool:
        try:
            status = call()
        except Exception as error:  # see above
            raise AgentError(_words(error)) from error
        if status == self._nixl.NIXL_SUCCESS:
            return True
        if status == self._nixl.NIXL_IN_PROG:
            return False
        raise AgentError(f"the transfer ended with {status}")


def load_library() -> ModuleType:
    """The first build of NIXL that loads.

    Raises:
        NoLibraryError: None does; the message has every reason.
    """
    reasons = []
    for name in LIBRARIES:
        try:
            return importlib.import_module(name)
        except Exception as error:  # a broken wheel raises anything, not only ImportError
            reasons.append(f"{name}: {_words(error)}")
    raise NoLibraryError("no NIXL library can be loaded; install nixl-cu12. " + "; ".join(reasons))


@dataclass(slots=True)
class _Flight:
    """One read under way."""

    request: Any
    posted_s: float
    look_s: float
    """When to look next."""


class Sidecar:
    """Carries out the orders of the store.

    Args:
        control: Our end of the socket pair.
        agent: The agent.
        landing_bytes: Reads may land in the first bytes of the staging memory only.
    """

    def __init__(self, control: socket.socket, agent: Agent, *, landing_bytes: int) -> None:
        self._control = control
        self._agent = agent
        self._landing_bytes = landing_bytes
        self._flights: dict[int, _Flight] = {}

    def run(self) -> None:
        """Until the store closes its end."""
        while True:
            readable, _, _ = select.select([self._control], [], [], self._pause_s())
            if readable:
                frame = self._control.recv(MAX_FRAME_BYTES)
                if not frame:
                    return
                self._obey(decode_order(frame))
            self._look()

    def _obey(self, order: Order) -> None:
        if isinstance(order, Read):
            self._start(order)
        elif isinstance(order, AddPeer):
            self._agent.add_peer(order.agent, order.metadata)
        elif isinstance(order, Ping):
            self._say(Pong(order.number))

    def _start(self, order: Read) -> None:
        is_posted = False
        try:
            if not 0 <= order.offset <= order.offset + order.num_bytes <= self._landing_bytes:
                raise SidecarFrameError(f"a read of {order.num_bytes} bytes at {order.offset} leaves the landing part")
            request = self._agent.prepare(order)
            is_posted = True
            if self._agent.post(request):
                self._end(order.number, request)
                return
        except LearnonceError as error:
            self._say(Failed(order.number, str(error), is_posted))
            return
        now_s = time.monotonic()
        self._flights[order.number] = _Flight(request, now_s, now_s + _MIN_LOOK_S)

    def _look(self) -> None:
        now_s = time.monotonic()
        for number, flight in list(self._flights.items()):
            if flight.look_s > now_s:
                continue
            try:
                if self._agent.is_done(flight.request):
                    del self._flights[number]
                    self._end(number, flight.request)
                    continue
            except AgentError as error:
                del self._flights[number]
                self._say(Failed(number, str(error), was_posted=True))
                continue
            age_s = now_s - flight.posted_s
            flight.look_s = now_s + min(max(age_s / _LOOK_SHARE, _MIN_LOOK_S), _MAX_LOOK_S)

    def _end(self, number: int, request: Any) -> None:
        self._say(Done(number))
        self._agent.release(request)

    def _pause_s(self) -> float | None:
        if not self._flights:
            return None
        return max(0.0, min(flight.look_s for flight in self._flights.values()) - time.monotonic())

    def _say(self, report: Report) -> None:
        self._control.send(encode(report))


def main() -> None:
    """Serve until the store closes the control socket or dies."""
    config = msgspec.json.decode(sys.argv[1], type=Config)
    _die_with(config.parent_pid)
    # What lies in the staging memory are users' passages: they do not go to core files.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    control = socket.socket(fileno=config.control_fd)
    staging = mmap.mmap(config.staging_fd, config.staging_bytes)
    base = ctypes.addressof(ctypes.c_char.from_buffer(staging))
    try:
        agent = Agent(
            config.agent, progress_delay_us=config.progress_delay_us, base=base, num_bytes=config.staging_bytes
        )
        ready = Ready(base, agent.metadata, agent.progress_delay_us, agent.library)
        control.send(encode(ready))
        Sidecar(control, agent, landing_bytes=config.landing_bytes).run()
    except (NoLibraryError, AgentError) as error:
        control.send(encode(Unusable(str(error), isinstance(error, NoLibraryError))))
    except (ConnectionError, BrokenPipeError):
        # The store is gone, and its end is ours.
        pass
    except Exception:  # the store reports the exit; the reason is in its log, where our errors go
        traceback.print_exc()
    finally:
        # The library's destructors can hang or crash, and there is nothing left that needs them.
        sys.stderr.flush()
        os._exit(0)


def _die_with(parent_pid: int) -> None:
    """SIGKILL when the thread that started us ends, however the store ended."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:_MAX_REASON]


if __name__ == "__main__":
    main()
