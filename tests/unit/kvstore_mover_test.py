"""Copies between the tiers end when they are told to, also while clients go on."""

import asyncio
import itertools
from pathlib import Path

from kvstore.container import parse_header
from kvstore.keys import ChunkKey
from kvstore.mover import Mover
from kvstore.testing.samples import sample_key
from kvstore.testing.tier import record_of
from kvstore.tiers.file import FileTier
from kvstore.tiers.host import HostTier

DEADLINE_S = 30.0


def commit(host: HostTier, index: int) -> ChunkKey:
    record = record_of(index, 1000)
    slot = host.reserve(sample_key(index), len(record))
    assert slot is not None
    host.view(slot)[:] = record
    assert host.commit(slot, parse_header(record))
    return slot.key


async def test_stop_ends_though_chunks_keep_coming(tmp_path: Path) -> None:
    host, file = HostTier(4 << 20), FileTier(tmp_path, capacity_bytes=1 << 30)
    indexes = itertools.count()
    settled: list[ChunkKey] = []

    def on_moved(_: ChunkKey) -> None:
        # Clients who commit another chunk for each that was written.
        mover.write_behind(commit(host, next(indexes)))

    mover = Mover(host, file, io_threads=2, max_queued=100, on_moved=on_moved, on_settled=settled.append)
    mover.write_behind(commit(host, next(indexes)))
    async with asyncio.timeout(DEADLINE_S):
        while not file.stat().chunks:
            await asyncio.sleep(0)
        await mover.stop(drain_s=0.0)
    assert mover.is_idle
    assert host.stat().pinned_bytes == 0
    # A read that comes now learns at once that the file stays where it is.
    held, _ = next(file.keys())
    host.drop(held)
    mover.promote(held)
    await asyncio.sleep(0)
    assert settled == [held]
    assert host.stat().pinned_bytes == 0
    host.close()
    file.close()
