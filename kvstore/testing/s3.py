"""A small S3 server in a process of its own, fast enough to measure against and able to fail in named ways.

Covers: starting, stopping and asking it; ports where nobody answers. Does not cover: what it serves and how it fails
(`kvstore.testing.s3_server`).
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from kvstore.testing.poll import wait_until
from kvstore.testing.s3_server import BUCKET, Fault

__all__ = ["BUCKET", "Fault", "S3Process", "unanswered_port", "unused_port"]

_ROOT: Final = Path(__file__).resolve().parents[2]


class S3Process:
    """Starts at once; the process ends with `stop` or with this one.

    Example:
        with S3Process() as server:
            server.options, server.url   # what `ObjectSettings` needs
    """

    def __init__(self, *, port: int = 0, page_size: int = 1000) -> None:
        self._page_size = page_size
        self.port = self._spawn(port)

    @property
    def endpoint(self) -> str:
        """Its address, with the scheme."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        """Of its only bucket."""
        return f"s3://{BUCKET}/pool"

    @property
    def options(self) -> dict[str, str]:
        """Options of obstore's S3 client for it."""
        return {
            "endpoint": self.endpoint,
            "region": "us-east-1",
            "allow_http": "true",
            "access_key_id": "test",
            "secret_access_key": "test",
        }

    @property
    def pid(self) -> int:
        """Of the server process."""
        return self._process.pid

    def set_fault(self, fault: Fault | None) -> None:
        """From now on."""
        self._ask({"do": "fault", "fault": msgspec.to_builtins(fault)})

    def requests(self) -> dict[str, int]:
        """Requests so far, by method; "LIST" for listings."""
        return dict(self._ask({"do": "requests"}))

    def bytes_sent(self) -> int:
        """Bytes of bodies sent since the last call."""
        return int(self._ask({"do": "bytes_sent"}))

    def num_connections(self) -> int:
        """Open connections."""
        return int(self._ask({"do": "connections"}))

    def names(self) -> list[str]:
        """Names of all objects, sorted."""
        return list(self._ask({"do": "names"}))

    def stop(self) -> None:
        """End the process and forget all objects; repeating it is harmless."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()

    def restart(self) -> None:
        """Another, empty server at the same port, after `stop`."""
        self._spawn(self.port)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _spawn(self, port: int) -> int:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "kvstore.testing.s3_server", str(port), str(self._page_size)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(_ROOT)},
            text=True,
        )
        return int(self._answer())

    def _ask(self, command: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the S3 server ended with {self._process.wait()}")
        return json.loads(line)


@contextmanager
def unanswered_port() -> Iterator[int]:
    """A port of this machine whose connections are never made, nor refused: its queue is full."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = int(listener.getsockname()[1])
        waiting: list[socket.socket] = []

        def is_full() -> bool:
            connection = socket.socket()
            waiting.append(connection)
            connection.settimeout(0.1)
            try:
                connection.connect(("127.0.0.1", port))
            except TimeoutError:
                return True
            return False

        try:
            wait_until(is_full, what="the queue of a listener is full")
            yield port
        finally:
            for connection in waiting:
                connection.close()


def unused_port() -> int:
    """A port on which nobody listens now: connections are refused."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
