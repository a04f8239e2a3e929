"""The GPU's decoder gives the CPU's KV to the bit, and touches no memory that it was not given.

Covers: random and damaged streams of small profiles, many chunks at once, prefixes, layers, moved chunks, paged blocks;
in Triton's interpreter, where every address that a kernel reads or writes is compared with the tensors it was given.
Does not cover: compiled code (`kvstore_triton_compile_test.py`), a real GPU (marker `gpu`), calibrated profiles.
"""

import dataclasses
import itertools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from triton.runtime import interpreter

from kvstore.codecs import stream, triton_decode
from kvstore.codecs.profile import Profile
from kvstore.codecs.raw import CodecDataError
from kvstore.codecs.transform import TransformCodec
from kvstore.codecs.triton_decode import TritonDecoder
from kvstore.codecs.triton_places import Place, PlaceError
from kvstore.codecs.triton_staging import EncodedChunk
from kvstore.codecs.triton_tables import OddHeadError
from kvstore.testing.profiles import make_profile, make_profile_kv, make_profile_meta

CPU = torch.device("cpu")


class Memory:
    """Tensors that kernels may touch; an address outside of them fails the test."""

    def __init__(self) -> None:
        self.passed: list[torch.Tensor] = []
        self.reachable: list[torch.Tensor] = []
        """Tensors whose addresses kernels read from other tensors."""
        self.num_checked = 0

    def check(self, addresses: np.ndarray, mask: np.ndarray, item_bytes: int) -> None:
        addresses, mask = np.broadcast_arrays(addresses, mask.astype(bool))
        touched = addresses[mask]
        inside = np.zeros(touched.shape, bool)
        for tensor in (*self.passed, *self.reachable):
            storage = tensor.untyped_storage()
            first = storage.data_ptr()
            inside |= (touched >= first) & (touched <= first + storage.nbytes() - item_bytes)
        assert inside.all(), f"{(~inside).sum()} addresses outside of the kernel's tensors"
        self.num_checked += touched.size


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """Watches every access of every kernel, in each test."""
    memory, real, launch = Memory(), interpreter._interpreter, triton_decode.launch
    turns_of, prepare = TritonDecoder._turns_of, TritonDecoder.prepare

    def load(addresses: Any, mask: Any, other: Any, dtype: Any) -> Any:
        memory.check(addresses, mask, np.dtype(dtype).itemsize)
        return real.load(addresses, mask, other, dtype)

    def store(addresses: Any, value: Any, mask: Any) -> Any:
        memory.check(addresses, mask, value.itemsize)
        return real.store(addresses, value, mask)

    def watched_launch(kernel: Any, grid: Any, *args: Any, **options: Any) -> None:
        memory.passed = [arg for arg in args if isinstance(arg, torch.Tensor)]
        launch(kernel, grid, *args, **options)

    def watched_turns(self: TritonDecoder, chunk: Any) -> torch.Tensor:
        memory.reachable.append(turns_of(self, chunk))
        return memory.reachable[-1]

    def watched_prepare(self: TritonDecoder, chunks: Any, *, place: Place, **options: Any) -> Any:
        memory.reachable += place.tensors
        return prepare(self, chunks, place=place, **options)

    monkeypatch.setattr(interpreter, "_interpreter", SimpleNamespace(load=load, store=store))
    monkeypatch.setattr(triton_decode, "launch", watched_launch)
    monkeypatch.setattr(TritonDecoder, "_turns_of", watched_turns)
    monkeypatch.setattr(TritonDecoder, "prepare", watched_prepare)
    return memory


def encoded(profile: Profile, *, size: float = 1.0, seed: int = 0, **meta: Any) -> EncodedChunk:
    """A chunk of KV that is `size` times what the profile expects."""
    described = make_profile_meta(profile, **meta)
    kv = make_profile_kv(profile, described, seed=seed) * size
    codec = TransformCodec(profile)
    out = bytearray(codec.encoded_bytes(described) + (1 << 16))
    return EncodedChunk(
        payload=memoryview(bytes(out[: codec.encode(kv, out=memoryview(out), meta=described)])), meta=described
    )


def bits(kv: torch.Tensor) -> torch.Tensor:
    """What must be equal: a zero's sign, too."""
    return kv.contiguous().view(torch.int32 if kv.dtype == torch.float32 else torch.int16)


def expected(profile: Profile, chunk: EncodedChunk, *, layers: range, level: int | None = None) -> torch.Tensor:
    """The CPU's KV."""
    out = torch.empty((len(layers), *chunk.meta.shape[1:]), dtype=getattr(torch, chunk.meta.dtype))
    options: dict[str, Any] = {"meta": chunk.meta, "layers": layers, "out": out, "level": level}
    TransformCodec(profile).decode_layers(chunk.payload, position=chunk.position, **options)
    return out


def escapes_of(profile: Profile, chunk: EncodedChunk) -> int:
    """How many symbols the tables did not know."""
    layout = stream.read_header(chunk.payload, meta=chunk.meta, profile=profile)
    return sum(int.from_bytes(chunk.payload[at : at + 4], "little") for at in layout.start_VL2G[0].ravel())


SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bfloat16": ({}, {"num_tokens": 9}),
    "float16 with classes in two groups": (
        {"with_classes": True, "groups": 2, "num_layers": 1},
        {"num_tokens": 18, "dtype": "float16", "base_position": 5},
    ),
    "float32, neighbours rotated, four levels, odd sizes": (
        {"is_neox": False, "num_layers": 1, "num_levels": 4, "num_kv_heads": 3, "head_dim": 10},
        {"num_tokens": 5, "dtype": "float32"},
    ),
    "one level, a late position": (
        {"num_levels": 1, "num_layers": 1, "num_exact": 4},
        {"num_tokens": 3, "base_position": 100_000},
    ),
    "exact tokens only": ({"num_exact": 4, "num_layers": 1}, {"num_tokens": 3}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_chunk_is_decoded_to_the_bit(name: str) -> None:
    shape, meta = SHAPES[name]
    profile = make_profile(**shape)
    chunk = encoded(profile, **meta)
    kv = TritonDecoder(profile, device=CPU).decode(chunk.payload, meta=chunk.meta)
    assert torch.equal(bits(kv), bits(expected(profile, chunk, layers=range(profile.num_layers))))


def test_symbols_that_no_table_knows_arrive() -> None:
    """Large ones take the second product, of high bytes."""
    profile = make_profile(num_layers=1)
    chunk = encoded(profile, num_tokens=6, dtype="float32", size=60.0)
    assert escapes_of(profile, chunk) > 40, "nothing was escaped"
    kv = TritonDecoder(profile, device=CPU).decode(chunk.payload, meta=chunk.meta)
    assert torch.equal(bits(kv), bits(expected(profile, chunk, layers=range(1))))
    # Escapes alone, without a refinement behind them.
    short = EncodedChunk(payload=stream.truncate(chunk.payload, level=0), meta=chunk.meta)
    kv = TritonDecoder(profile, device=CPU).decode(short.payload, meta=chunk.meta)
    assert torch.equal(bits(kv), bits(expected(profile, short, layers=range(1))))


def test_partial_rotation_leaves_the_rest_alone() -> None:
    whole = make_profile(num_layers=1, num_levels=1, head_dim=16)
    profile = dataclasses.replace(whole, inv_freq=whole.inv_freq[:3].copy())
    chunk = encoded(profile, num_tokens=5, base_position=70)
    kv = TritonDecoder(profile, device=CPU).decode(chunk.payload, meta=chunk.meta)
    assert torch.equal(bits(kv), bits(expected(profile, chunk, layers=range(1))))


def test_many_chunks_go_into_blocks_of_some_layers() -> None:
    """Chunks of several lengths, levels and places; what is not theirs stays as it was."""
    profile = make_profile(num_layers=3, num_levels=2, with_classes=True)
    layers = range(1, 3)
    first = encoded(profile, num_tokens=7)
    moved = dataclasses.replace(encoded(profile, num_tokens=5, seed=1), position=33)
    coarse = encoded(profile, num_tokens=4, base_position=9, seed=2)
    layout = stream.read_header(coarse.payload, meta=coarse.meta, profile=profile)
    # It ends within the fine level: layer 1 has it, layer 2 does not.
    ends = layout.stop_bytes(level=1, layer=1) + 3
    coarse = dataclasses.replace(coarse, payload=coarse.payload[:ends])
    chunks = [first, moved, coarse]
    slots = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:16].tolist()
    # Tokens that are not wanted: before the blocks, behind them, and where 32 bits would wrap to slot 0.
    slots[0], slots[8], slots[15] = -1, 24, 1 << 32
    by_chunk = [torch.tensor(slots[start:stop]) for start, stop in ((0, 7), (7, 12), (12, 16))]
    # Blocks and tokens lie apart, as in a cache that holds other things between them.
    memory = [torch.full((12, profile.num_kv_heads, 4, 24), 0.5, dtype=torch.bfloat16) for _ in layers]
    dim = profile.head_dim
    place = Place.in_blocks([whole[::2, ..., : 2 * dim] for whole in memory], slots=by_chunk)
    decoding = TritonDecoder(profile, device=CPU).start(chunks, place=place, layers=layers)
    decoding.check()
    assert decoding.prepared.levels_CL.tolist() == [[2, 2], [2, 2], [2, 1]]
    wanted = [torch.full_like(whole, 0.5) for whole in memory]
    for chunk, places in zip(chunks, by_chunk, strict=True):
        for layer, kv_2TNH in enumerate(expected(profile, chunk, layers=layers)):
            for token, slot in enumerate(places.tolist()):
                if 0 <= slot < 24:
                    cell = wanted[layer][2 * (slot // 4), :, slot % 4]
                    cell[:, :dim], cell[:, dim : 2 * dim] = kv_2TNH[0, token], kv_2TNH[1, token]
    for ours, theirs in zip(memory, wanted, strict=True):
        assert torch.equal(bits(ours), bits(theirs))


def test_coarser_than_what_is_there() -> None:
    profile = make_profile(num_layers=1, num_levels=3)
    chunk = encoded(profile, num_tokens=4)
    place = Place.apart([chunk.meta], num_layers=1, device=CPU)
    decoding = TritonDecoder(profile, device=CPU).start([chunk], place=place, layers=range(1), max_levels=1)
    decoding.check()
    assert torch.equal(bits(place.tensors[0]), bits(expected(profile, chunk, layers=range(1), level=0)))


def resealed(profile: Profile, chunk: EncodedChunk, *, change: Callable[[bytearray, int, int], None]) -> EncodedChunk:
    """The chunk with changed sections, whose checksums are right again: what only a wrong encoder writes."""
    layout = stream.read_header(chunk.payload, meta=chunk.meta, profile=profile)
    payload = bytearray(chunk.payload)
    checksums = layout.checksum_VL2G.copy()
    for at in np.ndindex(checksums.shape):
        start, stop = int(layout.start_VL2G[at]), int(layout.stop_VL2G[at])
        change(payload, start, stop)
        checksums[at] = stream.checksum(payload[start:stop])
    lengths = layout.stop_VL2G - layout.start_VL2G
    header = stream.write_header(
        chunk.meta, profile, lengths=lengths, checksums=checksums, exact_checksum=layout.exact_checksum
    )
    payload[: len(header)] = header
    return EncodedChunk(payload=memoryview(bytes(payload)), meta=chunk.meta)


def test_damage_is_found_before_anything_is_launched(memory: Memory) -> None:
    profile = make_profile(num_layers=1, num_levels=1)
    chunk = encoded(profile, num_tokens=4)
    decoder = TritonDecoder(profile, device=CPU)
    for at in range(0, len(chunk.payload), 7):
        payload = bytearray(chunk.payload)
        payload[at] ^= 0x10
        with pytest.raises(CodecDataError):
            decoder.decode(memoryview(payload), meta=chunk.meta)
    with pytest.raises(CodecDataError, match="holds nothing of layer 0"):
        decoder.decode(chunk.payload[:-1], meta=chunk.meta)
    assert memory.num_checked == 0


def test_escapes_of_one_place_are_refused_before_anything_is_launched(memory: Memory) -> None:
    """Two programs would write it, and the last one would win."""
    profile = make_profile(num_layers=1)
    chunk = encoded(profile, num_tokens=6, size=60.0)

    def change(payload: bytearray, start: int, stop: int) -> None:
        if stop - start > 80:  # At least two escapes.
            payload[start + 10 : start + 14] = payload[start + 4 : start + 8]

    with pytest.raises(CodecDataError, match="order"):
        TritonDecoder(profile, device=CPU).decode(resealed(profile, chunk, change=change).payload, meta=chunk.meta)
    assert memory.num_checked == 0


def test_heads_of_an_odd_number_of_channels_are_refused() -> None:
    with pytest.raises(OddHeadError, match="heads of 7 channels"):
        TritonDecoder(make_profile(head_dim=7), device=CPU)


@pytest.mark.parametrize("seed", range(6))
def test_sections_of_noise_are_refused_and_stay_in_their_memory(seed: int) -> None:
    """Six kinds of noise behind right checksums: the CPU refuses them, too."""
    profile = make_profile(num_layers=1, num_levels=2, with_classes=seed % 2 == 1)
    random = np.random.default_rng(seed)

    def change(payload: bytearray, start: int, stop: int) -> None:
        if seed < 2:
            # Everything, but not the count of escapes: nothing would be left to decode.
            payload[start + 4 : stop] = random.bytes(stop - start - 4)
        elif seed < 4:
            payload[stop - 8 : stop - 4] = random.bytes(4)
        else:
            payload[start + 4 : start + 68] = b"\xff" * 64

    chunk = resealed(profile, encoded(profile, num_tokens=6), change=change)
    with pytest.raises(CodecDataError):
        expected(profile, chunk, layers=range(1))
    with pytest.raises(CodecDataError, match="do not hold what they say"):
        TritonDecoder(profile, device=CPU).decode(chunk.payload, meta=chunk.meta)


@pytest.mark.parametrize("count", [1, 3, 7, 1 << 31, (1 << 32) - 1])
def test_escapes_that_do_not_fit_are_refused(count: int) -> None:
    profile = make_profile(num_layers=1, num_levels=1)

    def change(payload: bytearray, start: int, stop: int) -> None:
        payload[start : start + 4] = count.to_bytes(4, "little")
        payload[start + 4 : start + 10] = b"\xff" * 6

    chunk = resealed(profile, encoded(profile, num_tokens=6), change=change)
    with pytest.raises(CodecDataError):
        expected(profile, chunk, layers=range(1))
    with pytest.raises(CodecDataError):
        TritonDecoder(profile, device=CPU).decode(chunk.payload, meta=chunk.meta)


def test_a_section_of_odd_length_is_refused() -> None:
    profile = make_profile(num_layers=1, num_levels=1)
    chunk = encoded(profile, num_tokens=4)
    layout = stream.read_header(chunk.payload, meta=chunk.meta, profile=profile)
    lengths = layout.stop_VL2G - layout.start_VL2G
    lengths[0, 0, 0, 0] -= 1
    lengths[0, 0, 1, 0] += 1
    bounds = layout.exact_stop + np.concatenate([[0], np.cumsum(lengths.ravel())])
    sums = [stream.checksum(chunk.payload[a:b]) for a, b in itertools.pairwise(bounds.tolist())]
    header = stream.write_header(
        chunk.meta,
        profile,
        lengths=lengths,
        checksums=np.array(sums, np.uint32).reshape(lengths.shape),
        exact_checksum=layout.exact_checksum,
    )
    payload = memoryview(header + bytes(chunk.payload[len(header) :]))
    with pytest.raises(CodecDataError, match="odd number of bytes"):
        TritonDecoder(profile, device=CPU).decode(payload, meta=chunk.meta)


def test_places_that_do_not_fit_are_refused() -> None:
    profile = make_profile(num_layers=2, num_levels=1)
    chunk = encoded(profile, num_tokens=4)
    decoder = TritonDecoder(profile, device=CPU)
    shape, slots = (2, profile.num_kv_heads, 4, 2 * profile.head_dim), [torch.arange(4)]
    blocks = torch.zeros(shape, dtype=torch.bfloat16)
    with pytest.raises(PlaceError, match="layers"):
        decoder.start([chunk], place=Place.in_blocks([blocks], slots=slots), layers=range(2))
    with pytest.raises(PlaceError, match="its place is for"):
        decoder.start([chunk], place=Place.in_blocks([blocks] * 2, slots=[torch.arange(3)]), layers=range(2))
    with pytest.raises(PlaceError, match="its place is for"):
        decoder.start([chunk], place=Place.in_blocks([blocks.half()] * 2, slots=slots), layers=range(2))
    with pytest.raises(PlaceError, match="alike"):
        Place.in_blocks([blocks, blocks[:1]], slots=slots)
    with pytest.raises(PlaceError, match="alike"):
        Place.in_blocks([blocks.transpose(2, 3)], slots=slots)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_gpu_agrees_with_the_cpu(dtype: str) -> None:
    """Compiled code, at the size of a large model's heads."""
    profile = make_profile(num_layers=4, num_kv_heads=8, head_dim=128, groups=2, with_classes=True)
    chunks = [
        encoded(profile, num_tokens=count, dtype=dtype, base_position=base, seed=base, size=size)
        for count, base, size in ((256, 0, 1.0), (31, 300, 4.0), (1000, 7, 1.0))
    ]
    place = Place.apart([chunk.meta for chunk in chunks], num_layers=4, device=torch.device("cuda"))
    decoder = TritonDecoder(profile, device=torch.device("cuda"))
    decoder.start(chunks, place=place, layers=range(4)).check()
    for chunk, kv in zip(chunks, place.tensors, strict=True):
        assert torch.equal(bits(kv.cpu()), bits(expected(profile, chunk, layers=range(4))))
