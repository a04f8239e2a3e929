"""Two processes that move the same bytes over one data path, told by a third when and how often.

Covers: `Pair`, and the program of both processes (`python -m loadtest.bench_store.pairs`).
Does not cover: the data paths (`loadtest.bench_store.pair_kinds`), which figures are made of it.

Both processes hold 160 MiB, more than any cache, and go through it from record to record: bytes are read from memory
and land in memory, as between two arenas. What arrives is compared with what was sent, outside the measured time.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from cluster.errors import InvariantError, UnavailableError
from loadtest.bench_store.pair_kinds import ARENA_BYTES, make_holder, make_reader, new_arena

_ROOT: Final = Path(__file__).resolve().parents[2]


class PairUnavailableError(UnavailableError):
    """A data path that this machine does not have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What some transfers took."""

    num_bytes: int
    wall_s: float
    cpu_s: float
    """User and system seconds of both processes."""

    @property
    def gb_per_s(self) -> float:
        """Speed."""
        return self.num_bytes / self.wall_s / 1e9

    @property
    def cpu_s_per_gb(self) -> float:
        """What it cost."""
        return self.cpu_s / self.num_bytes * 1e9


class Pair:
    """A holder and a reader of one kind. Use as a context manager.

    Args:
        kind: Of `loadtest.bench_store.pair_kinds`.
        host: Address that the holder listens on.
        holder_prefix: Put before the holder's command, to run it in a network namespace.
        reader_prefix: Likewise for the reader.

    Raises:
        PairUnavailableError: The kind does not work here; the message says why.
    """

    def __init__(
        self,
        kind: str,
        *,
        host: str = "127.0.0.1",
        holder_prefix: Sequence[str] = (),
        reader_prefix: Sequence[str] = (),
    ) -> None:
        self.kind = kind
        self._processes: list[subprocess.Popen[str]] = []
        try:
            self._holder = self._start(holder_prefix, {"role": "holder", "kind": kind, "host": host})
            hello = self._answer(self._holder)
            self._reader = self._start(reader_prefix, {"role": "reader", "kind": kind, "hello": hello})
            self._answer(self._reader)
        except BaseException:
            self.close()
            raise

    def run(self, record_bytes: int, *, count: int, threads: int = 1) -> Sample:
        """Move `count` records by each of `threads` threads."""
        before_s = self._ask(self._holder, {"do": "cpu"})
        question = {"do": "pull", "record_bytes": record_bytes, "count": count, "threads": threads}
        answer = self._ask(self._reader, question)
        cpu_s = answer["cpu_s"] + self._ask(self._holder, {"do": "cpu"}) - before_s
        return Sample(num_bytes=record_bytes * count * threads, wall_s=answer["wall_s"], cpu_s=cpu_s)

    def close(self) -> None:
        """End both processes."""
        for process in reversed(self._processes):
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
            try:
                process.wait(5.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, prefix: Sequence[str], start: Mapping[str, Any]) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(_ROOT)},
            text=True,
        )
        self._processes.append(process)
        _say(process.stdin, start)
        return process

    def _ask(self, process: "subprocess.Popen[str]", question: Mapping[str, Any]) -> Any:
        _say(process.stdin, question)
        return self._answer(process)

    def _answer(self, process: "subprocess.Popen[str]") -> Any:
        assert process.stdout is not None
        line = process.stdout.readline()
        answer = json.loads(line) if line else {"error": f"its process ended with {process.wait()}"}
        if isinstance(answer, dict) and "error" in answer:
            raise PairUnavailableError(f"{self.kind}: {answer['error']}")
        return answer


def _say(stream: Any, value: object) -> None:
    stream.write(json.dumps(value) + "\n")
    stream.flush()


class _Reading:
    """The reader's loop over its landing memory."""

    def __init__(self, kind: str, hello: Mapping[str, Any]) -> None:
        self._arena = memoryview(bytearray(ARENA_BYTES))
        self._reader = make_reader(kind, hello, self._arena)
        self._turn = 0
        self._lock = threading.Lock()
        self._checked: set[int] = set()

    def pull(self, record_bytes: int, *, count: int, threads: int) -> dict[str, float]:
        """Measured transfers, after one that is not: it opens connections and proves the bytes."""
        if record_bytes not in self._checked:
            self._check(record_bytes)
        workers = [threading.Thread(target=self._many, args=(record_bytes, count)) for _ in range(threads - 1)]
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        for worker in workers:
            worker.start()
        self._many(record_bytes, count)
        for worker in workers:
            worker.join()
        return {"wall_s": time.perf_counter() - wall_s, "cpu_s": time.process_time() - cpu_s}

    def _many(self, record_bytes: int, count: int) -> None:
        num_records = ARENA_BYTES // record_bytes
        for _ in range(count):
            with self._lock:
                self._turn += 1
                index = self._turn % num_records
            self._reader.pull(index * record_bytes, record_bytes)

    def _check(self, record_bytes: int) -> None:
        expected = new_arena()
        for start in range(0, ARENA_BYTES - record_bytes + 1, record_bytes):
            self._reader.pull(start, record_bytes)
            if self._arena[start : start + record_bytes] != expected[start : start + record_bytes]:
                raise InvariantError(f"wrong bytes arrived at {start}")
        self._checked.add(record_bytes)

    def close(self) -> None:
        """Disconnect."""
        self._reader.close()


def main() -> None:
    """Play one role until whoever started this process closes the pipe."""
    start = json.loads(sys.stdin.readline())
    # Libraries write to standard output as they like; from here on that is standard error, and answers go elsewhere.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        if start["role"] == "holder":
            role: Any = make_holder(start["kind"], start["host"], new_arena())
            _say(answers, role.hello)
        else:
            role = _Reading(start["kind"], start["hello"])
            _say(answers, True)
    except Exception as error:  # any reason is one to leave this kind out, and is shown as such
        _say(answers, {"error": f"{type(error).__name__}: {error}"})
        return
    try:
        for line in sys.stdin:
            command = json.loads(line)
            if command.pop("do") == "cpu":
                _say(answers, time.process_time())
            else:
                _say(answers, role.pull(command.pop("record_bytes"), **command))
    except Exception as error:  # as above
        _say(answers, {"error": f"{type(error).__name__}: {error}"})
    finally:
        role.close()


if __name__ == "__main__":
    main()
