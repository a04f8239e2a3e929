"""A node store in a process of its own, for tests that kill, freeze and restart it.

Covers: `StoreProcess`, and the program that it runs (`main`).
Does not cover: Ray (`kvstore.actor`).
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from kvstore import crash
from kvstore.container import ALIGN
from kvstore.keys import ChunkKey, parse_key
from kvstore.node import NodeStore
from kvstore.settings import StoreSettings
from kvstore.testing.poll import wait_until
from kvstore.wire import StoreEndpoint

_SECRET_NAME: Final = "LEARNONCE_CLUSTER_SECRET"
_ROOT: Final = Path(__file__).resolve().parents[2]


class StoreProcess:
    """Starts at once; `restart` starts another life on the same socket.

    Args:
        settings: The store's.
        secret: The cluster's.
        socket_path: For the unix socket.
        node_id: Names the node.
        bind_host: Interface of its ports.
        crash_at: A point of `kvstore.crash` at which the process kills itself; None: none.
        crash_hit: How often the point is reached until then.
        environment: Further environment variables.
        prefix: Command that runs the process, e.g. in a network namespace.
    """

    def __init__(
        self,
        settings: StoreSettings,
        *,
        secret: bytes,
        socket_path: str,
        node_id: str = "node",
        bind_host: str = "127.0.0.1",
        crash_at: str | None = None,
        crash_hit: int = 1,
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.prefix = list(prefix)
        self.bind_host = bind_host
        self.crash_at = crash_at
        self.crash_hit = crash_hit
        self.environment = dict(environment or {})
        self.settings = settings
        self.secret = secret
        self.socket_path = socket_path
        self.node_id = node_id
        self._process, self.endpoint = self._spawn()

    @property
    def pid(self) -> int:
        """Of the store process."""
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self._process.kill()
        self._reap()

    def wait_dead(self, *, deadline_s: float = 30.0) -> int:
        """Return the exit status (-9 after a crash point) once the process has ended by itself."""
        wait_until(lambda: self._process.poll() is not None, what="the store process to die", deadline_s=deadline_s)
        self._reap()
        return self._process.returncode

    def set_peers(self, endpoints: Sequence[StoreEndpoint]) -> None:
        """Tell the store which stores there are, itself among them or not."""
        self._ask({"do": "set_peers", "endpoints": [msgspec.to_builtins(endpoint) for endpoint in endpoints]})

    def arm(self, crash_at: str, *, hit: int = 1) -> None:
        """From now on, die when a point of `kvstore.crash` is reached for the `hit`-th time."""
        self._ask({"do": "arm", "crash_at": crash_at, "hit": hit})

    def restart(self) -> StoreEndpoint:
        """Another life, after `kill` or `stop`."""
        self._process, self.endpoint = self._spawn()
        return self.endpoint

    def freeze(self) -> None:
        """SIGSTOP."""
        os.kill(self.pid, signal.SIGSTOP)
        state = Path(f"/proc/{self.pid}/stat")
        wait_until(lambda: state.read_text().rsplit(")", 1)[1].split()[0] == "T", what="store process is stopped")

    def thaw(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    def damage(self, key: ChunkKey, *, at_byte: int = 0) -> bool:
        """Flip one payload byte of a chunk in the arena; whether it was there."""
        return bool(self._ask({"do": "damage", "key": key.hex(), "at_byte": at_byte}))

    def num_open_descriptors(self) -> int:
        """Of the store process."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def stop(self) -> None:
        """An orderly end. Repeating it is harmless."""
        if self._process.poll() is None:
            self._ask({"do": "stop"})
        self._reap()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def _ask(self, command: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the store process ended with {self._process.wait()}")
        return json.loads(answer)

    def _spawn(self) -> tuple["subprocess.Popen[str]", StoreEndpoint]:
        environment = {**os.environ, **self.environment, _SECRET_NAME: self.secret.hex(), "PYTHONPATH": str(_ROOT)}
        self._process = subprocess.Popen(
            [*self.prefix, sys.executable, "-c", f"from {StoreProcess.__module__} import main; main()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        arguments = {
            "settings": self.settings.model_dump_json(),
            "socket_path": self.socket_path,
            "node_id": self.node_id,
            "bind_host": self.bind_host,
            "crash_at": self.crash_at,
            "crash_hit": self.crash_hit,
        }
        try:
            endpoint = msgspec.convert(self._ask(arguments), StoreEndpoint)
        except BaseException:
            # It ended, or speaks another language: nothing of it stays.
            self.kill()
            raise
        return self._process, endpoint

    def _reap(self) -> None:
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def main() -> None:
    """Serve until told to stop, or until whoever started this process is gone."""
    arguments = json.loads(sys.stdin.readline())
    if arguments["crash_at"]:
        crash.arm(arguments["crash_at"], hit=arguments["crash_hit"])
    store = NodeStore(
        StoreSettings.model_validate_json(arguments["settings"]),
        secret=bytes.fromhex(os.environ[_SECRET_NAME]),
        node_id=arguments["node_id"],
        socket_path=arguments["socket_path"],
        bind_host=arguments["bind_host"],
    )
    _say(msgspec.to_builtins(store.start()))
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "damage":
            _say(_damage(store, parse_key(command["key"]), at_byte=command["at_byte"]))
        elif command["do"] == "set_peers":
            store.set_peers(msgspec.convert(command["endpoints"], list[StoreEndpoint]))
            _say(True)
        elif command["do"] == "arm":
            crash.arm(command["crash_at"], hit=command["hit"])
            _say(True)
        else:
            store.stop()
            _say(True)
            return
    store.stop()


def _damage(store: NodeStore, key: ChunkKey, *, at_byte: int) -> bool:
    """Beside the store, as broken memory would."""
    parts = store._parts
    slot = parts.host.find(key) if parts else None
    if parts is None or slot is None:
        return False
    parts.host.view(slot)[ALIGN + at_byte] ^= 0xFF
    return True


def _say(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()
