"""SIGKILL of the process that writes, before and after every system call of a write.

Each case is a process of its own that kills itself there. Asserted: what was there is there, the record under way is
right or missing, temporary files are gone after the next start, and the folder is free at once.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from kvstore.testing.samples import sample_key
from kvstore.testing.tier import record_of
from kvstore.tiers.file import FileTier

ROOT: Final = Path(__file__).resolve().parents[2]
PAYLOAD_BYTES: Final = 50_000
RECORD_BYTES: Final = len(record_of(0, PAYLOAD_BYTES))
CAPACITY_BYTES: Final = 4 * RECORD_BYTES
NUM_HELD: Final = 4
DIED: Final = -signal.SIGKILL

STEPS: Final = ["open", "pwrite", "close", "rename to the name"]
CASES: Final = [
    *((step, when, room) for step in STEPS for when in ("before", "after") for room in ("with room", "full")),
    *(("half of pwrite", "after", room) for room in ("with room", "full")),
    *(("rename of the evicted", when, "full") for when in ("before", "after")),
]

PROGRAM: Final = """
import os, signal, sys
from kvstore.testing.samples import sample_key
from kvstore.testing.tier import record_of
from kvstore.tiers.file import FileTier

folder, step, when, capacity_bytes, num_held, payload_bytes, direct = sys.argv[1:]
tier = FileTier(folder, capacity_bytes=int(capacity_bytes), direct=direct == "True")
assert tier.wait_scanned(10.0)
for index in range(int(num_held)):
    assert tier.put(sample_key(index), memoryview(record_of(index, int(payload_bytes))))
die = lambda: os.kill(os.getpid(), signal.SIGKILL)
real = {name: getattr(os, name) for name in ("open", "pwrite", "close", "rename")}

def dying(name, is_it=lambda *arguments: True):
    def call(*arguments, **more):
        if not is_it(*arguments):
            return real[name](*arguments, **more)
        if when == "before":
            die()
        real[name](*arguments, **more)
        die()
    setattr(os, name, call)

if step == "half of pwrite":
    os.pwrite = lambda fd, data, at: (real["pwrite"](fd, data[: 4096 * 5], at), die())
elif step == "rename to the name":
    dying("rename", lambda source, target: target.endswith(".rec"))
elif step == "rename of the evicted":
    dying("rename", lambda source, target: source.endswith(".rec"))
else:
    dying(step)
tier.put(sample_key(int(num_held)), memoryview(record_of(int(num_held), int(payload_bytes))))
print("the step never came")
"""


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
@pytest.mark.parametrize(("step", "when", "room"), CASES)
def test_kill_while_writing(tmp_path: Path, step: str, when: str, room: str, direct: bool) -> None:
    """Full: the new record is written over the file of an evicted one, whose bytes it may mix with its own."""
    num_held = NUM_HELD if room == "full" else NUM_HELD - 1
    arguments = [tmp_path, step, when, CAPACITY_BYTES, num_held, PAYLOAD_BYTES, direct]
    died = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert died.returncode == DIED, died.stdout + died.stderr
    tier = FileTier(tmp_path, capacity_bytes=CAPACITY_BYTES, direct=direct)
    assert tier.wait_scanned(10.0)
    held = set()
    for index in range(num_held + 1):
        record = tier.get(sample_key(index))
        assert record is None or record == record_of(index, PAYLOAD_BYTES)
        if record is not None:
            held.add(index)
    lost = set(range(num_held)) - held
    assert lost <= ({0} if room == "full" else set()), "only the evicted one may be gone"
    assert (num_held in held) == (step == "rename to the name" and when == "after")
    assert dict(tier.keys()).keys() == {sample_key(index) for index in held}
    assert not list(tmp_path.rglob("*.tmp"))
    assert tier.put(sample_key(9), memoryview(record_of(9, PAYLOAD_BYTES)))
    tier.close()
