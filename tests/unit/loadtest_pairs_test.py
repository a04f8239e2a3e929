"""What the transfer benchmarks stand on: processes that move the right bytes, links that do not stay behind."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvstore.testing.poll import wait_until
from loadtest.bench_store import shaped
from loadtest.bench_store.pairs import Pair, PairUnavailableError
from loadtest.bench_store.shaped import LinkUnavailableError, ShapedLink

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
needs_root = pytest.mark.skipif(
    os.geteuid() != 0 or not all(map(shutil.which, ("ip", "tc"))), reason="network namespaces need root, ip and tc"
)


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("kind", ["tcp", "tcp_streamed", "socket"])
def test_pair_moves_records(kind: str) -> None:
    """The reader's process compares every record before it measures: wrong bytes would raise."""
    with Pair(kind) as pair:
        sample = pair.run(MIB, count=3, threads=2)
    assert sample.num_bytes == 6 * MIB
    assert sample.wall_s > 0
    assert sample.cpu_s > 0


def test_path_that_does_not_exist_says_so() -> None:
    with pytest.raises(PairUnavailableError, match="carrier_pigeon"):
        Pair("carrier_pigeon")


@pytest.mark.parametrize("missing", ["ip", "tc", "iperf3"])
def test_missing_tool_is_named(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    monkeypatch.setattr(shaped.shutil, "which", lambda tool: None if tool == missing else f"/usr/bin/{tool}")
    with pytest.raises(LinkUnavailableError, match=f"missing.*{missing}"):
        shaped.measure(repeats=1, log=print)


def test_link_needs_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shaped.shutil, "which", lambda tool: f"/usr/bin/{tool}")
    monkeypatch.setattr(shaped.os, "geteuid", lambda: 1000)
    with pytest.raises(LinkUnavailableError, match="root"):
        shaped.measure(repeats=1, log=print)


@needs_root
def test_link_is_removed() -> None:
    """With what still runs in it."""
    with ShapedLink() as link:
        name = link.holder_prefix[-1]
        assert name in namespaces()
        left_over = subprocess.Popen([*link.reader_prefix, "sleep", "1000"])
    assert name not in namespaces()
    left_over.wait(10.0)


@needs_root
def test_link_goes_with_a_process_that_is_killed() -> None:
    code = "import sys\nfrom loadtest.bench_store.shaped import ShapedLink\nlink = ShapedLink()\n"
    code += "print(link.holder_prefix[-1], flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        name = process.stdout.readline().strip()
        assert name
        assert name in namespaces()
        process.kill()
    wait_until(lambda: name not in namespaces(), what="the link to be removed")
