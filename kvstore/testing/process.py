"""A node store in a process of its own, for tests that kill, freeze and restart it.

Covers: `StoreProcess`, and the program that it runs (`python -m kvstore.testing.process`).
Does not cover: Ray (`kvstore.actor`).
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from kvstore.keys import ChunkKey, parse_key
from kvstore.node import NodeStore
from kvstore.settings import StoreSettings
from kvstore.testing.poll import wait_until
from kvstore.wire import StoreEndpoint

_SECRET_NAME: Final = "LEARNONCE_CLUSTER_SECRET"
_ROOT: Final = Path(__file__).resolve().parents[2]


class StoreProcess:
    """Starts at once; `restart` starts another life on the same socket."""

    def __init__(self, settings: StoreSettings, *, secret: bytes, socket_path: str, node_id: str = "node") -> None:
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
        """Flip one byte of a chunk in the arena; whether it was there."""
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
        environment = {**os.environ, _SECRET_NAME: self.secret.hex(), "PYTHONPATH": str(_ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        arguments = {
            "settings": self.settings.model_dump_json(),
            "socket_path": self.socket_path,
            "node_id": self.node_id,
        }
        return self._process, msgspec.convert(self._ask(arguments), StoreEndpoint)

    def _reap(self) -> None:
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def main() -> None:
    """Serve until told to stop, or until whoever started this process is gone."""
    arguments = json.loads(sys.stdin.readline())
    store = NodeStore(
        StoreSettings.model_validate_json(arguments["settings"]),
        secret=bytes.fromhex(os.environ[_SECRET_NAME]),
        node_id=arguments["node_id"],
        socket_path=arguments["socket_path"],
        bind_host="127.0.0.1",
    )
    _say(msgspec.to_builtins(store.start()))
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "damage":
            _say(store.damage(parse_key(command["key"]), at_byte=command["at_byte"]))
        else:
            store.stop()
            _say(True)
            return
    store.stop()


def _say(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
