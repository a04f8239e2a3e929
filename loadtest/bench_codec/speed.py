"""How fast codecs encode and decode on this machine's cores, beside what no codec could beat.

Covers: whole chunks at every point, on all cores; for `transform` also into a paged cache's layout, one layer alone,
and where the time goes. Does not cover: GPUs, links, engines (`loadtest.bench_codec.e2e`).

Rates are of the decoded side: bytes of bfloat16 KV per second. Rounds interleave everything that is compared, so that
another program on the machine slows all alike; medians are reported.
"""

import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import repeat
from typing import Any, Final

import torch

from kvstore.codecs.transform import OpenTransformChunk, TransformCodec
from loadtest.bench_codec import CodecBenchSettings, Log
from loadtest.bench_codec.figures import family
from loadtest.bench_codec.profiles import read_schemes
from loadtest.bench_codec.sample import Sample, read_sample
from loadtest.bench_codec.schemes import CachegenScheme, Encoded, Scheme, TransformScheme, transform_of
from loadtest.bench_codec.stages import decode_stages_s
from loadtest.bench_store import Measured

_ROUNDS: Final = 9
_QUICK_ROUNDS: Final = 3
_KL01_POINT: Final = "transform-1"
"""The level that is made for a mean KL of 0.01: decoding speed is quoted at it, unless another one was measured to be
that level (`loadtest.bench_codec.parts`)."""
_ONE_THREAD: Final = f"decode {_KL01_POINT}, one thread"
_ONE_LAYER: Final = f"decode one layer of {_KL01_POINT}, one thread"
_PAGE_TOKENS: Final = 32
"""Tokens of a block of the engine on the CPU."""

Job = Callable[[], object]


def measure(settings: CodecBenchSettings, *, log: Log) -> Measured:
    """Medians over rounds; figures of the transform codec where it can run."""
    num_cores = len(os.sched_getaffinity(0))
    schemes, missing = read_schemes(settings, log=log, num_threads=num_cores)
    sample = read_sample(settings, log=log)
    jobs = _floors(sample)
    for scheme in schemes:
        if isinstance(scheme, CachegenScheme) and scheme.points != (scheme.default_point,):
            continue  # its levels differ in bytes, not in speed
        jobs |= jobs_of(scheme, sample, num_cores=num_cores)
    rounds = _QUICK_ROUNDS if settings.is_quick else _ROUNDS
    log(f"speed: {len(jobs)} jobs, {rounds} rounds, {num_cores} cores")
    medians_s = time_jobs(jobs, rounds=rounds)
    kv_bytes = sum(chunk.numel() * chunk.element_size() for chunk in sample.chunks)
    # One layer's job does not give all bytes: its time stands with the shares.
    gb_per_s = {name: kv_bytes / seconds / 1e9 for name, seconds in medians_s.items() if name != _ONE_LAYER}
    detail: dict[str, Any] = {
        "text": sample.text,
        "kv_bytes": kv_bytes,
        "cores": num_cores,
        "rounds": rounds,
        "gb_per_s": gb_per_s,
        "missing_schemes": missing,
    }
    figures = {}
    transform = transform_of(schemes)
    if transform is not None:
        figures = {"decode_gb_per_s": gb_per_s[paged_job(_KL01_POINT)], "encode_gb_per_s": gb_per_s["encode transform"]}
        detail["transform"] = _shares(medians_s, transform)
        detail["transform_stages_s"] = _stages_s(transform, sample)
    for name, rate in gb_per_s.items():
        log(f"speed: {name}: {rate:.3f} GB/s")
    return Measured(figures=figures, detail=detail)


def _floors(sample: Sample) -> dict[str, Job]:
    """What decoding cannot beat: writing its output, and the product of its transform in float32."""
    sources = [chunk.clone() for chunk in sample.chunks]
    targets = [torch.zeros_like(chunk) for chunk in sample.chunks]
    layers, _, tokens, heads, dim = sources[0].shape
    x_TC, basis_CC = torch.randn(tokens, heads * dim), torch.randn(heads * dim, heads * dim)
    y_TC = torch.empty_like(x_TC)

    def copy() -> None:
        for source, target in zip(sources, targets, strict=True):
            target.copy_(source)

    def multiply() -> None:
        for _ in range(len(sources) * layers * 2):
            torch.mm(x_TC, basis_CC, out=y_TC)

    return {"floor: copy": copy, "floor: one float32 product": multiply}


def jobs_of(scheme: Scheme, sample: Sample, *, num_cores: int) -> dict[str, Job]:
    """What is timed of one scheme, by name."""
    name = family(scheme.points[-1]) if len(scheme.points) > 1 else scheme.points[0]
    chunks = _encode_all(scheme, sample)
    jobs: dict[str, Job] = {f"encode {name}": lambda: _encode_all(scheme, sample)}
    for index, point in enumerate(scheme.points):
        encoded = [chunk[index] for chunk in chunks]
        jobs[f"decode {point}"] = partial(_decode_all, scheme, encoded)
    if isinstance(scheme, TransformScheme):
        jobs |= _transform_jobs(scheme, {chunk[0].point: chunk for chunk in zip(*chunks, strict=True)}, num_cores)
    return jobs


def _encode_all(scheme: Scheme, sample: Sample) -> list[list[Encoded]]:
    starts = range(0, sample.num_tokens, sample.chunks[0].shape[2])
    return [scheme.encode(chunk, base_position=start) for chunk, start in zip(sample.chunks, starts, strict=True)]


def _decode_all(scheme: Scheme, encoded: Sequence[Encoded]) -> None:
    for each in encoded:
        scheme.decode(each)


def _transform_jobs(
    scheme: TransformScheme, chunks_by_point: Mapping[str, Sequence[Encoded]], num_cores: int
) -> dict[str, Job]:
    opened = {
        point: [scheme.codec.open(each.payload, meta=each.meta) for each in encoded]
        for point, encoded in chunks_by_point.items()
    }
    chunks = opened[_KL01_POINT]
    num_layers, _, num_tokens, num_heads, head_dim = chunks[0].meta.shape
    pages = torch.zeros(num_layers, len(chunks) * num_tokens // _PAGE_TOKENS, num_heads, _PAGE_TOKENS, 2 * head_dim,
                        dtype=torch.bfloat16)  # fmt: skip
    threads = ThreadPoolExecutor(num_cores)
    one_2TNH = torch.empty(chunks[0].meta.shape[1:], dtype=torch.bfloat16)

    def to_pages(point: str) -> None:
        if len(chunks) % num_cores:
            # Chunks would not keep every core busy to the end: layers do.
            layers = _each(num_layers, len(chunks))
            list(threads.map(decode_layer_to_pages, opened[point] * num_layers, layers, repeat(pages)))
        else:
            list(threads.map(decode_chunk_to_pages, opened[point], repeat(pages)))

    def one_layer() -> None:
        for chunk in chunks:
            chunk.decode(num_layers // 2, out_2TNH=one_2TNH)

    def one_thread() -> None:
        for chunk in chunks:
            for layer in range(num_layers):
                chunk.decode(layer, out_2TNH=one_2TNH)

    paged: dict[str, Job] = {paged_job(point): partial(to_pages, point) for point in opened}
    return {**paged, _ONE_LAYER: one_layer, _ONE_THREAD: one_thread}


def paged_job(point: str) -> str:
    """Name of the job that decodes a point to an engine's pages."""
    return f"decode {point} to pages"


def _each(num_layers: int, num_chunks: int) -> list[int]:
    return [layer for layer in range(num_layers) for _ in range(num_chunks)]


def decode_layer_to_pages(chunk: OpenTransformChunk, layer: int, pages: torch.Tensor) -> None:
    """Decode one layer of a chunk to where an engine keeps it.

    Args:
        chunk: Of whole pages.
        layer: Which.
        pages: `[L, page, N, B, 2 * H]`, K and V of a token side by side; the chunk's page follows from its position.
    """
    _, _, num_tokens, num_heads, head_dim = chunk.meta.shape
    page_tokens = pages.shape[3]
    out_2TNH = torch.empty(chunk.meta.shape[1:], dtype=pages.dtype)
    chunk.decode(layer, out_2TNH=out_2TNH)
    first, count = chunk.meta.base_position // page_tokens, num_tokens // page_tokens
    part = pages[layer, first : first + count].view(count, num_heads, page_tokens, 2, head_dim)
    part.permute(3, 0, 2, 1, 4).copy_(out_2TNH.view(2, count, page_tokens, num_heads, head_dim))


def decode_chunk_to_pages(chunk: OpenTransformChunk, pages: torch.Tensor) -> None:
    """Decode all layers of a chunk; several threads take several chunks, as loads of several requests do."""
    for layer in range(chunk.meta.num_layers):
        decode_layer_to_pages(chunk, layer, pages)


def _shares(medians_s: Mapping[str, float], transform: TransformScheme) -> dict[str, float]:
    """What one thread takes, what a layer alone costs, and what cores gain."""
    whole_s = medians_s[_ONE_THREAD]
    return {
        "one_thread_s": whole_s,
        "one_layer_over_its_share_ratio": medians_s[_ONE_LAYER] * transform.profile.num_layers / whole_s,
        "cores_speedup": whole_s / medians_s[f"decode {_KL01_POINT}"],
        "copy_ratio": medians_s["floor: copy"] / medians_s[paged_job(_KL01_POINT)],
    }


def _stages_s(transform: TransformScheme, sample: Sample) -> dict[str, float]:
    """Where one thread's time goes in decoding the first chunk."""
    codec = TransformCodec(transform.profile)
    points = {each.point: each for each in transform.encode(sample.chunks[0], base_position=0)}
    chunk = points[_KL01_POINT]
    return decode_stages_s(codec, chunk.payload, meta=chunk.meta)


def time_jobs(jobs: Mapping[str, Job], *, rounds: int) -> dict[str, float]:
    """Median seconds of each job. Every job runs once before, so that tables are built and memory is touched."""
    for job in jobs.values():
        job()
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, job in jobs.items():
            began_s = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - began_s)
    return {name: statistics.median(found) for name, found in seconds.items()}
