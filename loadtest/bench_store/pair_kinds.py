"""The data paths that are compared between two processes, each with a holder and a reader.

Covers: ours (`tcp`, and `tcp_streamed`, which tells `on_bytes`), plain sockets (the floor), Arrow Flight, NIXL.
Does not cover: running and timing them (`loadtest.bench_store.pairs`), Ray (`loadtest.bench_store.ray_objects`).
"""

import ctypes
import functools
import json
import mmap
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

import numpy as np

from cluster.errors import InvariantError
from kvstore.transport import Offer, PeerGoneError
from kvstore.transport.tcp import TcpServer, TcpTransport

ARENA_BYTES: Final = 160 << 20
RECORD_BYTES: Final = (1 << 20, 10 << 20)
_DEADLINE_S: Final = 60.0
_LIFETIME_S: Final = 3600.0
_NIXL_DELAY_US: Final = 1000
_NIXL_LOOK_S: Final = 100e-6


def new_arena() -> memoryview:
    """Bytes that both processes know."""
    arena = mmap.mmap(-1, ARENA_BYTES)
    np.frombuffer(arena, dtype=np.uint8)[:] = np.random.default_rng(7).integers(0, 256, ARENA_BYTES, dtype=np.uint8)
    return memoryview(arena)


class Holder(Protocol):
    """Serves parts of its arena."""

    @property
    def hello(self) -> Mapping[str, Any]:
        """Plain JSON that the reader needs."""
        ...

    def close(self) -> None:
        """Stop."""
        ...


class Reader(Protocol):
    """Brings parts of the holder's arena to the same place of its own."""

    def pull(self, start: int, num_bytes: int) -> None:
        """Return when the bytes are in place."""
        ...

    def close(self) -> None:
        """Disconnect."""
        ...


# Ours.


class TcpHolder:
    """Every record of every size, offered once for good: the control plane is not what is measured."""

    def __init__(self, host: str, arena: memoryview) -> None:
        self._server = TcpServer(
            bind_host=host, max_connections_per_peer=16, max_offered_bytes_per_peer=1 << 40, max_pulls_per_offer=1 << 30
        )
        offers: dict[str, str] = {}
        for size in RECORD_BYTES:
            for start in range(0, ARENA_BYTES - size + 1, size):
                offer = self._server.offer(arena[start : start + size], peer="reader", lifetime_s=_LIFETIME_S)
                if offer is None:
                    raise InvariantError("a new server has room for offers")
                offers[f"{start}/{size}"] = offer.handle.hex()
        self.hello = {"address": self._server.address.decode(), "offers": offers}

    def close(self) -> None:
        """See `Holder`."""
        self._server.close()


class TcpReader:
    """One transport, as the store has one per peer."""

    def __init__(self, hello: Mapping[str, Any], arena: memoryview, *, is_streamed: bool) -> None:
        self._transport = TcpTransport(hello["address"].encode(), peer="holder", max_connections=16)
        self._offers: dict[tuple[int, int], Offer] = {}
        for name, handle in hello["offers"].items():
            start, size = map(int, name.split("/"))
            self._offers[start, size] = Offer(transport="tcp", handle=bytes.fromhex(handle), stored_bytes=size)
        self._arena = arena
        self._on_bytes = (lambda in_place: None) if is_streamed else None

    def pull(self, start: int, num_bytes: int) -> None:
        """See `Reader`."""
        offer, into = self._offers[start, num_bytes], self._arena[start : start + num_bytes]
        self._transport.pull(offer, into, stop_s=time.monotonic() + _DEADLINE_S, on_bytes=self._on_bytes)

    def close(self) -> None:
        """See `Reader`."""
        self._transport.close()


# Plain sockets: the least that can be done, without deadlines, checks or limits.

_RANGE: Final = struct.Struct("<QQ")


class SocketHolder:
    """A thread per connection that answers ranges with `sendall`."""

    def __init__(self, host: str, arena: memoryview) -> None:
        self._arena = arena
        self._listener = socket.create_server((host, 0))
        self.hello = {"host": host, "port": self._listener.getsockname()[1]}
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: socket.socket) -> None:
        while request := sock.recv(_RANGE.size):
            start, size = _RANGE.unpack(request)
            sock.sendall(self._arena[start : start + size])

    def close(self) -> None:
        """See `Holder`; its daemon threads end with the process."""


class SocketReader:
    """One call that returns when all bytes are there; a socket per thread."""

    def __init__(self, hello: Mapping[str, Any], arena: memoryview) -> None:
        self._where = (hello["host"], hello["port"])
        self._arena = arena
        self._local = threading.local()

    def pull(self, start: int, num_bytes: int) -> None:
        """See `Reader`."""
        sock = getattr(self._local, "sock", None)
        if sock is None:
            sock = self._local.sock = socket.create_connection(self._where)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(_RANGE.pack(start, num_bytes))
        view, got = self._arena[start : start + num_bytes], 0
        while got < num_bytes:  # once, unless the kernel ends the call early
            part = sock.recv_into(view[got:], 0, socket.MSG_WAITALL)
            if not part:
                raise PeerGoneError("the holder closed the connection")
            got += part

    def close(self) -> None:
        """See `Reader`; sockets end with their threads."""


# Arrow Flight.


class FlightHolder:
    """Ranges as record batches of one column over the arena's memory."""

    def __init__(self, host: str, arena: memoryview) -> None:
        import pyarrow as pa
        from pyarrow import flight

        schema = pa.schema([("bytes", pa.uint8())])

        class Server(flight.FlightServerBase):  # type: ignore[misc]  # the base has no types
            def do_get(self, context: Any, ticket: Any) -> Any:
                start, size = json.loads(ticket.ticket)
                column = pa.Array.from_buffers(pa.uint8(), size, [None, pa.py_buffer(arena[start : start + size])])
                return flight.RecordBatchStream(pa.RecordBatchReader.from_batches(schema, [_batch(pa, column, schema)]))

        self._server = Server(f"grpc://{host}:0")
        self.hello = {"address": f"grpc://{host}:{self._server.port}"}

    def close(self) -> None:
        """See `Holder`."""
        self._server.shutdown()


def _batch(pa: Any, column: Any, schema: Any) -> Any:
    return pa.RecordBatch.from_arrays([column], schema=schema)


class FlightReader:
    """Fetches a batch and copies it to its place: Arrow chooses itself where it lands."""

    def __init__(self, hello: Mapping[str, Any], arena: memoryview) -> None:
        from pyarrow import flight

        self._ticket = flight.Ticket
        self._client = flight.connect(hello["address"])
        self._arena = np.frombuffer(arena, dtype=np.uint8)

    def pull(self, start: int, num_bytes: int) -> None:
        """See `Reader`."""
        at = start
        for chunk in self._client.do_get(self._ticket(json.dumps([start, num_bytes]))):
            column = chunk.data.column(0).to_numpy(zero_copy_only=True)
            self._arena[at : at + len(column)] = column
            at += len(column)

    def close(self) -> None:
        """See `Reader`."""
        self._client.close()


# NIXL, kept off shared memory so that it uses sockets as the others do, and set as the store's sidecar is.


class NixlHolder:
    """A passive agent whose progress thread pauses, so that it does not burn a core."""

    def __init__(self, host: str, arena: memoryview) -> None:
        # Nobody else keeps it, and a peer that reads unmapped memory kills this process.
        self._arena = arena
        self._agent, base = _nixl_agent("holder", arena)
        self.hello = {"metadata": self._agent.metadata.hex(), "base": base}

    def close(self) -> None:
        """See `Holder`; the agent ends with the process."""


class NixlReader:
    """READ from the holder's arena into the same place."""

    def __init__(self, hello: Mapping[str, Any], arena: memoryview) -> None:
        from kvstore.transport.nixl_wire import Read

        self._arena = arena
        self._agent, _ = _nixl_agent("reader", arena)
        self._agent.add_peer("holder", bytes.fromhex(hello["metadata"]))
        self._order = functools.partial(Read, 0, "holder")
        self._base = hello["base"]

    def pull(self, start: int, num_bytes: int) -> None:
        """See `Reader`."""
        request = self._agent.prepare(self._order(self._base + start, start, num_bytes))
        is_done = self._agent.post(request)
        while not is_done:
            time.sleep(_NIXL_LOOK_S)
            is_done = self._agent.is_done(request)
        self._agent.release(request)

    def close(self) -> None:
        """See `Reader`; the agent ends with the process."""


def _nixl_agent(name: str, arena: memoryview) -> tuple[Any, int]:
    from kvstore.transport.nixl_life import UCX_DEFAULTS
    from kvstore.transport.nixl_sidecar import Agent

    # Before the library is loaded.
    os.environ |= {**UCX_DEFAULTS, **os.environ, "UCX_TLS": "tcp"}

    base = ctypes.addressof(ctypes.c_char.from_buffer(arena))
    return Agent(name, progress_delay_us=_NIXL_DELAY_US, base=base, num_bytes=ARENA_BYTES), base


_HOLDERS: Final[dict[str, Callable[[str, memoryview], Holder]]] = {
    "tcp": TcpHolder,
    "tcp_streamed": TcpHolder,
    "socket": SocketHolder,
    "flight": FlightHolder,
    "nixl": NixlHolder,
}
_READERS: Final[dict[str, Callable[[Mapping[str, Any], memoryview], Reader]]] = {
    "tcp": functools.partial(TcpReader, is_streamed=False),
    "tcp_streamed": functools.partial(TcpReader, is_streamed=True),
    "socket": SocketReader,
    "flight": FlightReader,
    "nixl": NixlReader,
}


def make_holder(kind: str, host: str, arena: memoryview) -> Holder:
    """The holder of a kind, listening on `host`."""
    return _HOLDERS[kind](host, arena)


def make_reader(kind: str, hello: Mapping[str, Any], arena: memoryview) -> Reader:
    """The reader of a kind, with what its holder said."""
    return _READERS[kind](hello, arena)
