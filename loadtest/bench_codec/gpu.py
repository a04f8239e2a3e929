"""How fast a GPU decodes `transform`, at the shape of a larger model.

Covers: real symbols of the embedded model, repeated to the shape of Llama-3-8B; kernels alone, and from payloads in the
host's memory to an engine's blocks; agreement with the CPU before anything is timed.
Does not cover: quality at that shape, and its bits: nobody calibrated a profile for it here.

Entropy decoding costs what its symbols cost, and they are real: every row of the embedded model's transform stands for
as many rows of the wide one as its share, with its own tables, classes and live levels. The inverse transform costs the
same whatever its matrix holds, so that is dense noise.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.errors import InvariantError, UnavailableError
from kvstore.codecs import stream
from kvstore.codecs.profile import NUM_CONTEXTS, Band, Profile
from kvstore.codecs.rans_vectors import LANES
from kvstore.codecs.transform import OpenTransformChunk, TransformCodec
from kvstore.codecs.transform_encode import _symbol_bounds, encode_base, encode_refinement
from kvstore.codecs.transform_plan import encoder_starts, padded, plan_of
from kvstore.interfaces import ChunkMeta
from loadtest.bench_codec import CodecBenchSettings, Log
from loadtest.bench_codec.profiles import transform_profile
from loadtest.bench_codec.sample import read_sample
from loadtest.bench_codec.schemes import TransformScheme
from loadtest.bench_store import Measured

NUM_LAYERS: Final = 32
NUM_KV_HEADS: Final = 8
HEAD_DIM: Final = 128
ROPE_BASE: Final = 500_000.0
"""Of Llama-3-8B, as the three above."""
_REPEATS: Final = 13
"""Of the sample's four chunks: 13,312 tokens, 1.7 GB of KV."""
_BLOCK_TOKENS: Final = 16
_ROUNDS: Final = 9
_KL01_LEVELS: Final = 2
"""Levels that are made for a mean KL of 0.01: speed is quoted with them."""


def measure(settings: CodecBenchSettings, *, log: Log) -> Measured:
    """Medians over rounds.

    Raises:
        UnavailableError: No GPU, or no Triton.
    """
    if not torch.cuda.is_available():
        raise UnavailableError("no CUDA device: the decoder for GPUs is not timed in an interpreter")
    scheme = TransformScheme(transform_profile(settings))
    sample = read_sample(settings, log=log)
    wide = widened(scheme.profile, num_layers=NUM_LAYERS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM)
    payloads, metas = [], []
    for index, chunk in enumerate(sample.chunks):
        narrow = scheme.encode(chunk, base_position=index * chunk.shape[2])[-1]
        log(f"gpu: chunk {index} of {sample.text}, repeated to {NUM_LAYERS} layers, {NUM_KV_HEADS} x {HEAD_DIM}")
        opened = scheme.codec.open(narrow.payload, meta=narrow.meta)
        payload, meta = widened_payload(opened, wide)
        payloads.append(payload)
        metas.append(meta)
    return _measure(wide, payloads * _REPEATS, metas * _REPEATS, text=sample.text, log=log)


def widened(profile: Profile, *, num_layers: int, num_kv_heads: int, head_dim: int) -> Profile:
    """A profile of another shape whose rows code as those of `profile` do; its matrix is noise.

    Layers and rows stand for those at the same share of the depth, and of the rows.
    """
    channels = num_kv_heads * head_dim
    random = np.random.default_rng(0)
    basis_RC = random.integers(-127, 128, (channels, channels)).astype(np.int8)

    def band(layer: int, kv: int) -> Band:
        narrow = profile.bands[layer * profile.num_layers // num_layers][kv][0]
        rows_R = _narrow_rows(profile, channels)
        ids_VRX = np.zeros((profile.num_levels, channels, NUM_CONTEXTS), np.uint8)
        known = rows_R < narrow.table_ids_VRX.shape[1]
        ids_VRX[:, known] = narrow.table_ids_VRX[:, rows_R[known]]
        return Band(
            bias_C=np.zeros(channels, np.float32),
            basis_RC=basis_RC,
            scale_C=np.full(channels, 1e-4, np.float32),
            rows_per_level=tuple(int((rows_R < live).sum()) for live in narrow.rows_per_level),
            table_ids_VRX=ids_VRX,
            token_scales=narrow.token_scales,
            class_table=narrow.class_table,
        )

    half = head_dim // 2
    return Profile(
        model=f"{profile.model}, repeated",
        model_digest="",
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        groups=1,
        num_levels=profile.num_levels,
        num_exact=profile.num_exact,
        inv_freq=(ROPE_BASE ** (-np.arange(half) / half)).astype(np.float32),
        is_neox=True,
        bands=tuple(((band(layer, 0),), (band(layer, 1),)) for layer in range(num_layers)),
        frequencies_KS=profile.frequencies_KS,
    )


def _narrow_rows(profile: Profile, channels: int) -> NDArray[np.int64]:
    """Which row of the narrow profile each row of the wide one stands for."""
    return np.arange(channels) * profile.num_channels // channels


def widened_payload(narrow: OpenTransformChunk, wide: Profile) -> tuple[memoryview, ChunkMeta]:
    """A payload of the wide profile with the symbols of a narrow one, all of its levels; exact tokens are 0."""
    meta = ChunkMeta(
        num_tokens=narrow.meta.num_tokens,
        num_layers=wide.num_layers,
        num_kv_heads=wide.num_kv_heads,
        head_dim=wide.head_dim,
        dtype=narrow.meta.dtype,
        base_position=narrow.meta.base_position,
        codec="transform",
        profile=wide.id,
    )
    bands = [band for layer in range(wide.num_layers) for band in _widened_layer(narrow, wide, layer)]
    ordered = [band[level] for level in range(wide.num_levels) for band in bands]
    exact = bytes(stream.exact_bytes(meta, wide))
    shape = (wide.num_levels, wide.num_layers, 2, 1)
    header = stream.write_header(
        meta,
        wide,
        lengths=np.array([len(section) for section in ordered], np.int64).reshape(shape),
        checksums=np.array([stream.checksum(section) for section in ordered], np.uint32).reshape(shape),
        exact_checksum=stream.checksum(exact),
    )
    return memoryview(b"".join([header, exact, *ordered])), meta


def _widened_layer(narrow: OpenTransformChunk, wide: Profile, layer: int) -> list[list[bytes]]:
    """Sections of K and V of one layer, by level."""
    narrow_layer = layer * narrow.profile.num_layers // wide.num_layers
    pair = narrow.symbols(narrow_layer, group=0, num_levels=narrow.num_levels)
    rows_R = _narrow_rows(narrow.profile, wide.num_channels)
    bands = []
    for kv, (symbols, classes) in enumerate(pair):
        narrow_RT = symbols.transpose(0, 2, 1).reshape(-1, symbols.shape[1])
        live = wide.bands[layer][kv][0].rows_per_level[-1]
        wide_RT = np.zeros((max(LANES, padded(live)), narrow_RT.shape[1]), np.int16)
        wide_RT[:live] = narrow_RT[rows_R[:live]]
        values = np.ascontiguousarray(wide_RT.reshape(-1, LANES, wide_RT.shape[1]).transpose(0, 2, 1))
        bands.append(_sections_of(wide, layer * 2 + kv, values, classes))
    return bands


def _sections_of(wide: Profile, index: int, values: NDArray[np.int16], classes: NDArray[np.int16]) -> list[bytes]:
    """What the encoder writes for these symbols of one band."""
    plan = plan_of(wide)
    low, high = (bounds[index] for bounds in _symbol_bounds(plan))
    ids, class_ids = encoder_starts(plan.table_ids[index, 0]), encoder_starts(plan.class_ids[index])
    entries = plan.tables.encoder_KE
    sections = []
    for level in range(wide.num_levels):
        missing, count = wide.num_levels - 1 - level, plan.num_groups[index, level]
        out = np.empty(68 + 8 * values.size + 2 * len(classes), np.uint8)
        if level:
            size = encode_refinement(values, missing, count, plan.table_starts[index, level], out)
        else:
            size = encode_base(values, missing, count, ids, class_ids, classes, low, high, entries, out)
        sections.append(out[:size].tobytes())
    return sections


def _measure(
    profile: Profile, payloads: Sequence[memoryview], metas: Sequence[ChunkMeta], *, text: str, log: Log
) -> Measured:
    try:
        from kvstore.codecs.triton_decode import TritonDecoder
        from kvstore.codecs.triton_places import Place
        from kvstore.codecs.triton_staging import EncodedChunk
    except ImportError as error:
        raise UnavailableError(f"Triton cannot be imported: {error}") from error
    device = torch.device("cuda")
    chunks = [EncodedChunk(payload=payload, meta=meta) for payload, meta in zip(payloads, metas, strict=True)]
    num_tokens = sum(meta.num_tokens for meta in metas)
    num_blocks = -(-num_tokens // _BLOCK_TOKENS)
    shape = (num_blocks, profile.num_kv_heads, _BLOCK_TOKENS, 2 * profile.head_dim)
    caches = [torch.zeros(shape, dtype=torch.bfloat16, device=device) for _ in range(profile.num_layers)]
    slots = _scattered_slots(num_blocks)[:num_tokens]
    place = Place.in_blocks(caches, slots=torch.split(slots, [meta.num_tokens for meta in metas]))
    decoder, layers = TritonDecoder(profile, device=device), range(profile.num_layers)
    kv_bytes = num_tokens * profile.num_layers * 2 * profile.num_kv_heads * profile.head_dim * 2
    rates: dict[str, float] = {}
    for levels in range(1, profile.num_levels + 1):
        prepared = decoder.prepare(chunks, place=place, layers=layers, max_levels=levels)
        decoder.launch(prepared).check()
        rates[f"kernels, {levels} levels"] = kv_bytes / _kernel_s(lambda: decoder.launch(prepared)) / 1e9  # noqa: B023
    _compare(profile, chunks[0].payload, metas[0], caches, slots)
    limit = min(_KL01_LEVELS, profile.num_levels)
    whole = kv_bytes / _wall_s(lambda: decoder.start(chunks, place=place, layers=layers, max_levels=limit)) / 1e9
    copies = [torch.empty_like(cache) for cache in caches]
    rates |= {
        f"from the host's memory, {limit} levels": whole,
        "floor: copy on the device": kv_bytes / _kernel_s(lambda: torch._foreach_copy_(copies, caches)) / 1e9,
    }
    for name, rate in rates.items():
        log(f"gpu: {name}: {rate:.1f} GB/s")
    figures = {
        "gpu_decode_gb_per_s": rates[f"kernels, {limit} levels"],
        "gpu_decode_from_host_gb_per_s": whole,
    }
    encoded_bytes = {
        f"{levels} levels": sum(len(stream.truncate(payload, level=levels - 1)) for payload in payloads)
        for levels in range(1, profile.num_levels + 1)
    }
    detail: dict[str, Any] = {"text": text, "device": torch.cuda.get_device_name(device), "tokens": num_tokens}
    return Measured(
        figures=figures, detail=detail | {"kv_bytes": kv_bytes, "encoded_bytes": encoded_bytes, "gb_per_s": rates}
    )


def _scattered_slots(num_blocks: int) -> torch.Tensor:
    """Slots of consecutive tokens whose blocks lie anywhere, as after some hours of serving."""
    blocks = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0))
    return (blocks[:, None] * _BLOCK_TOKENS + torch.arange(_BLOCK_TOKENS)).flatten()


def _compare(
    profile: Profile, payload: memoryview, meta: ChunkMeta, caches: Sequence[torch.Tensor], slots: torch.Tensor
) -> None:
    """Speed is worth nothing where the KV is another one."""
    expected_L2TNH = TransformCodec(profile).decode(payload, meta=meta)
    mine = slots[: meta.num_tokens]
    for layer, cache in enumerate(caches):
        pairs = cache[(mine // _BLOCK_TOKENS).to(cache.device), :, (mine % _BLOCK_TOKENS).to(cache.device)].cpu()
        for kv, seen_TNH in enumerate(pairs.chunk(2, dim=-1)):
            if not torch.equal(seen_TNH.contiguous().view(torch.int16), expected_L2TNH[layer, kv].view(torch.int16)):
                raise InvariantError(f"layer {layer}, {'KV'[kv]}: the GPU's KV is not the CPU's")


def _kernel_s(job: Callable[[], object]) -> float:
    """Median seconds on the device."""
    seconds = []
    for _ in range(_ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        job()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return float(np.median(seconds))


def _wall_s(job: Callable[[], object]) -> float:
    """Median seconds until the device has finished."""
    seconds = []
    for _ in range(_ROUNDS):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        job()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began_s)
    return float(np.median(seconds))
