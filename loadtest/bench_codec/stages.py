"""Where the `transform` decoder's time goes, stage by stage, on one thread.

Covers: stages of one payload, and the floor of each: what the memory, the multiplier and the coder can do.
Does not cover: whole codecs against each other (`loadtest.bench_codec.speed`).
"""

import time
from collections.abc import Callable
from typing import Final

import numpy as np
import torch

from kvstore.codecs import stream
from kvstore.codecs.transform import TransformCodec
from kvstore.codecs.transform_plan import plan_of
from kvstore.codecs.transform_vectors import VECTOR, product
from kvstore.interfaces import ChunkMeta

_BLOCK: Final = 16


def decode_stages_s(
    codec: TransformCodec,
    payload: memoryview,
    *,
    meta: ChunkMeta,
    rounds: int = 5,
    now_s: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Seconds of every stage of decoding one payload, the least of some rounds.

    Args:
        codec: Of the payload's profile; it should have one thread.
        payload: A chunk, or a prefix of one with whole levels.
        meta: Of the chunk.
        rounds: How often.
        now_s: A clock: `time.perf_counter`, or `time.thread_time` where others use the machine too.

    Returns:
        `checksums`; `symbols`: entropy decoding, without them; `products`: the exact matrix products alone;
        `scale_rotate_round`: everything else of the inverse transform; `whole`; and the floor `copy`: writing as much
        KV as comes out.
    """
    chunk = codec.open(payload, meta=meta)
    num_levels = int(chunk.layout.levels_within(len(payload)).min())
    layers, groups = range(meta.num_layers), range(codec.profile.groups)
    out = torch.empty(meta.shape, dtype=torch.bfloat16 if meta.dtype == "bfloat16" else torch.float32)
    source = torch.zeros_like(out)
    spans = zip(chunk.layout.start_VL2G[:num_levels].flat, chunk.layout.stop_VL2G[:num_levels].flat, strict=True)
    places = [(int(start), int(stop)) for start, stop in spans]
    stages: dict[str, Callable[[], object]] = {
        "checksums": lambda: [stream.checksum(payload[start:stop]) for start, stop in places],
        "symbols": lambda: [chunk.symbols(i, group=g, num_levels=num_levels) for i in layers for g in groups],
        "products": _products(codec, meta, num_levels),
        "whole": lambda: codec.decode(payload, meta=meta),
        "copy": lambda: out.copy_(source),
    }
    seconds = dict.fromkeys(stages, float("inf"))
    for _ in range(rounds):
        for name, run in stages.items():
            began_s = now_s()
            run()
            seconds[name] = min(seconds[name], now_s() - began_s)
    seconds["scale_rotate_round"] = max(0.0, seconds["whole"] - seconds["symbols"] - seconds["products"])
    seconds["symbols"] = max(0.0, seconds["symbols"] - seconds["checksums"])
    return seconds


def _products(codec: TransformCodec, meta: ChunkMeta, num_levels: int) -> Callable[[], object]:
    """The matrix products of all bands, on bytes that are in the cache."""
    plan = plan_of(codec.profile)
    channels = plan.basis.shape[1] * VECTOR
    packed = np.zeros((_BLOCK, plan.basis.shape[2] * 4), np.uint8)
    sums = np.zeros((_BLOCK, channels), np.int32)
    blocks = -(-meta.num_tokens // _BLOCK)
    calls = []
    for band in range(len(plan.basis)):
        groups = int(plan.num_groups[band, num_levels - 1])
        if not groups:
            continue
        basis, start = plan.basis[band], plan.start[band, num_levels - 1]
        width = basis.shape[1] * basis.shape[2]
        calls.append(
            (True, packed.ctypes.data, packed.shape[1], basis.ctypes.data, width, start.ctypes.data, sums.ctypes.data,
             4 * channels, 4 * groups, _BLOCK, channels // VECTOR)
        )  # fmt: skip

    def run() -> int:
        for call in calls:
            for _ in range(blocks):
                product(*call)
        # The calls know only addresses: this keeps their memory.
        return packed.size + sums.size

    return run
