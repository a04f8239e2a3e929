"""The `transform` codec's decoder on a GPU: many chunks at once, straight into an engine's blocks.

Covers: the order of the launches, room to work in, what was wrong afterwards.
Does not cover: the kernels (`kvstore.codecs.triton_kernels`), checks before (`kvstore.codecs.triton_staging`), when and
what to load.

The KV is that of the CPU's decoder to the bit. On a CPU device everything runs in Triton's interpreter, for
tests. Importing this module needs Triton, which CPU installations may lack.
Shape letters: V levels, L layers, 2 for K and V, T tokens, N KV heads, H head dimension.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.codecs.profile import Profile
from kvstore.codecs.raw import DTYPES, CodecDataError
from kvstore.codecs.transform_plan import rotary_tables
from kvstore.codecs.triton_kernels import decode_sections, place_escapes, place_exact, transform
from kvstore.codecs.triton_launch import launch
from kvstore.codecs.triton_places import KINDS, Place, PlaceError
from kvstore.codecs.triton_staging import EncodedChunk, Found, exact_bytes, find, stage
from kvstore.codecs.triton_tables import ROW_STEP, tables_of
from kvstore.interfaces import ChunkMeta

_WORDS: Final = {2: np.uint16, 4: np.uint32}
_CHUNK_FIELDS: Final = 5
_TILE_TOKENS: Final = 64
_MIN_PAIRS: Final = 16
"""Narrower products do not fill a matrix unit."""
_WARP_SECTIONS: Final = 2
"""Sections that share a warp: two times 16 lanes."""
_INTERPRETED_SECTIONS: Final = 64
"""The interpreter takes as long for one section as for many."""
_ESCAPES: Final = 32
_KEPT_TURNS: Final = 256


@dataclass(frozen=True, eq=False, kw_only=True)
class Prepared:
    """Chunks that have been checked and are on the device. May be launched more than once."""

    place: Place
    layers: range
    levels_CL: NDArray[np.int64]
    """How many levels each chunk's layers have."""
    num_symbols: int
    num_classes: int
    section_counts: tuple[int, ...]
    """Sections of each level, not counting those that stand in `sections` twice, because they have escapes."""
    words: torch.Tensor
    sections: tuple[torch.Tensor, ...]
    units: torch.Tensor
    chunks: torch.Tensor
    tiles: torch.Tensor
    exact: torch.Tensor
    turns: tuple[torch.Tensor, ...]

    @property
    def num_bands(self) -> int:
        """Bands of each chunk."""
        return len(self.units) // len(self.chunks)


@dataclass(frozen=True, eq=False, kw_only=True)
class Decoding:
    """Chunks whose decoding has been launched."""

    prepared: Prepared
    results: torch.Tensor
    """By level and unit; not 0: wrong."""

    def check(self) -> None:
        """Wait for the device, and say whether all symbols were decoded as they were encoded.

        Checksums are compared before the launch, so this finds encoders that were wrong, not bits that flipped.

        Raises:
            CodecDataError: Some were not; what is in their place means nothing.
        """
        wrong = torch.nonzero(self.results.cpu())
        if len(wrong):
            level, unit = wrong[0].tolist()
            chunk, band = divmod(unit, self.prepared.num_bands)
            where = f"chunk {chunk}, band {band}, level {level}"
            raise CodecDataError(f"{len(wrong)} sections do not hold what they say they hold, first: {where}")


class TritonDecoder:
    """Decoder of one profile on one device. One thread at a time.

    Args:
        profile: What the chunks were encoded with.
        device: A CUDA device; or the CPU, for Triton's interpreter.
    """

    def __init__(self, profile: Profile, *, device: torch.device) -> None:
        self._profile = profile
        self._device = device
        self._tables = tables_of(profile, device=device)
        self._turns: OrderedDict[tuple[int, int], torch.Tensor] = OrderedDict()

    def decode(self, payload: memoryview, *, meta: ChunkMeta) -> torch.Tensor:
        """One chunk's KV `[L, 2, T, N, H]`, on the device.

        Raises:
            CodecDataError: The payload is not what `meta` says.
        """
        layers = range(self._profile.num_layers)
        place = Place.apart([meta], num_layers=len(layers), device=self._device)
        self.start([EncodedChunk(payload=payload, meta=meta)], place=place, layers=layers).check()
        return place.tensors[0]

    def start(
        self, chunks: Sequence[EncodedChunk], *, place: Place, layers: range, max_levels: int | None = None
    ) -> Decoding:
        """`prepare` and `launch` in one."""
        return self.launch(self.prepare(chunks, place=place, layers=layers, max_levels=max_levels))

    def prepare(
        self, chunks: Sequence[EncodedChunk], *, place: Place, layers: range, max_levels: int | None = None
    ) -> Prepared:
        """Check chunks, and send to the device what the decoding of some of their layers needs.

        The payloads may be released when this returns.

        Args:
            chunks: At least one.
            place: Where the KV of these chunks and layers goes.
            layers: Consecutive layers.
            max_levels: Levels that are used, at most.

        Raises:
            CodecDataError: A payload is damaged, or holds no level of one of the layers.
            PlaceError: The place is not for these chunks and layers.
        """
        _check_place(chunks, place, num_layers=len(layers))
        limit = self._profile.num_levels if max_levels is None else max_levels
        found = [find(chunk, profile=self._profile, layers=layers, max_levels=limit) for chunk in chunks]
        staged = stage(found, profile=self._profile, layers=layers, row_pitch=self._tables.row_pitch)
        exact = [exact_bytes(chunk, profile=self._profile, layers=layers) for chunk in found]
        turns = tuple(self._turns_of(chunk) for chunk in found)
        # Sections that have escapes stand at the end once more.
        sections = [np.concatenate([fields, fields[fields[:, 10] > 0]]) for fields in staged.sections]
        return Prepared(
            place=place,
            layers=layers,
            levels_CL=np.stack([chunk.levels_L for chunk in found]),
            num_symbols=staged.num_symbols,
            num_classes=staged.num_classes,
            section_counts=tuple(len(fields) for fields in staged.sections),
            words=self._move(staged.words),
            sections=tuple(self._move(fields) for fields in sections),
            units=self._move(staged.units),
            chunks=self._move(_chunk_fields(found, exact, turns, place)),
            tiles=self._move(_tiles(found)),
            exact=self._move(np.concatenate(exact).view(_WORDS[place.dtype.itemsize])),
            turns=turns,
        )

    def launch(self, prepared: Prepared) -> Decoding:
        """Launch the decoding; the KV is there when the device has done what was launched.

        Cost:
            Room on the device, until the kernels are done: 2 bytes for each row (rounded up to 64) and token.
        """
        num_units = len(prepared.units)
        work = _Work(
            symbols=torch.empty(max(1, prepared.num_symbols), dtype=torch.int16, device=self._device),
            classes=torch.empty(max(1, prepared.num_classes), dtype=torch.uint8, device=self._device),
            peaks=torch.zeros(num_units, dtype=torch.int32, device=self._device),
            results=torch.zeros((len(prepared.sections), num_units), dtype=torch.int32, device=self._device),
        )
        for level in range(len(prepared.sections)):
            self._decode_level(level, prepared, work)
        self._place(prepared, work)
        return Decoding(prepared=prepared, results=work.results)

    def _decode_level(self, level: int, prepared: Prepared, work: "_Work") -> None:
        """Entropy decoding of one level, and escapes behind the base."""
        tables, results, num_sections = self._tables, work.results[level], prepared.section_counts[level]
        sections = prepared.sections[level]
        count = _WARP_SECTIONS if self._device.type == "cuda" else _INTERPRETED_SECTIONS
        launch(
            decode_sections,
            (-(-num_sections // count),),
            *(sections, num_sections, prepared.words, tables.table_ids, tables.lookup),
            *(work.symbols, work.classes, work.peaks, results, tables.row_pitch),
            num_warps=1,
            IS_BASE=level == 0,
            SECTIONS=count,
        )
        if len(sections) > num_sections:
            launch(
                place_escapes,
                (len(sections) - num_sections,),
                *(sections, num_sections, prepared.words, work.symbols, work.peaks, results, tables.row_pitch),
                num_warps=1,
                ESCAPES=_ESCAPES,
            )

    def _place(self, prepared: Prepared, work: "_Work") -> None:
        """The inverse transform, and the tokens that need none."""
        profile, tables, place = self._profile, self._tables, prepared.place
        num_chunks, num_bands = len(prepared.chunks), prepared.num_bands
        group_heads = profile.num_kv_heads // profile.groups
        chunk_targets = 2 * len(prepared.layers) if len(place.addresses) > 1 else 0
        geometry = (place.num_slots, place.block_slots, place.block_stride, place.head_stride, place.slot_stride)
        if len(prepared.tiles):
            launch(
                transform,
                (len(prepared.tiles) * group_heads, num_bands),
                *(prepared.tiles, prepared.chunks, prepared.units, work.symbols, work.peaks, work.classes),
                *(tables.basis, tables.channels, tables.token_scales, tables.pair_columns),
                *(place.addresses, place.slots, *geometry, chunk_targets),
                *(prepared.layers.start * 2 * profile.groups, profile.groups, group_heads),
                *(tables.row_pitch, profile.head_dim // 2, len(profile.inv_freq)),
                num_warps=4,
                KIND=KINDS[place.dtype],
                PAIRS=max(_MIN_PAIRS, _power_of_two(profile.head_dim // 2)),
                TOKENS=_TILE_TOKENS,
                ROWS=ROW_STEP,
            )
        if len(prepared.exact):
            launch(
                place_exact,
                (num_chunks, 2 * len(prepared.layers)),
                *(prepared.chunks, prepared.exact, place.addresses, place.slots, *geometry, chunk_targets),
                *(profile.num_kv_heads, profile.head_dim),
                num_warps=4,
                HEADS=_power_of_two(profile.num_kv_heads),
                DIM=_power_of_two(profile.head_dim),
                BYTES=place.dtype.itemsize,
            )

    def _turns_of(self, chunk: Found) -> torch.Tensor:
        """Cosines and sines `[coded tokens, 2, P]` of a chunk's positions."""
        at = chunk.position + chunk.layout.num_exact, chunk.num_coded
        turns = self._turns.pop(at, None)
        if turns is None:
            turns = self._move(np.stack(rotary_tables(self._profile, first=at[0], count=at[1]), axis=1))
        self._turns[at] = turns
        if len(self._turns) > _KEPT_TURNS:
            self._turns.popitem(last=False)
        return turns

    def _move(self, array: NDArray[Any]) -> torch.Tensor:
        """A copy on the device, on its way when this returns."""
        if self._device.type == "cpu":
            return torch.from_numpy(np.array(array))
        pinned = torch.empty(array.shape, dtype=torch.from_numpy(array[:0].copy()).dtype, pin_memory=True)
        pinned.numpy()[...] = array
        return pinned.to(self._device, non_blocking=True)


class _Work(NamedTuple):
    """What kernels write for each other."""

    symbols: torch.Tensor
    classes: torch.Tensor
    peaks: torch.Tensor
    results: torch.Tensor


def _check_place(chunks: Sequence[EncodedChunk], place: Place, *, num_layers: int) -> None:
    if len(chunks) != len(place.slot_counts) or place.addresses.shape[1] != num_layers:
        raise PlaceError(
            f"a place for {len(place.slot_counts)} chunks, {place.addresses.shape[1]} layers; "
            f"there are {len(chunks)} chunks, {num_layers} layers"
        )
    for index, (chunk, slots) in enumerate(zip(chunks, place.slot_counts, strict=True)):
        meta = chunk.meta
        ours = (place.dtype, place.num_heads, place.head_dim, slots)
        if ours != (DTYPES.get(meta.dtype), meta.num_kv_heads, meta.head_dim, meta.num_tokens):
            raise PlaceError(f"chunk {index} is {meta.shape} of {meta.dtype}; its place is for {ours}")


def _chunk_fields(
    found: list[Found], exact: list[NDArray[np.uint8]], turns: Sequence[torch.Tensor], place: Place
) -> NDArray[np.int64]:
    """`[chunks, 5]`: coded tokens, first slot, address of cosines and sines, first exact value, exact tokens."""
    fields = np.empty((len(found), _CHUNK_FIELDS), np.int64)
    fields[:, 0] = [chunk.num_coded for chunk in found]
    fields[:, 1] = np.cumsum([0, *place.slot_counts[:-1]])
    fields[:, 2] = [turn.data_ptr() for turn in turns]
    fields[:, 3] = np.cumsum([0, *(len(data) // place.dtype.itemsize for data in exact[:-1])])
    fields[:, 4] = [chunk.layout.num_exact for chunk in found]
    return fields


def _tiles(found: list[Found]) -> NDArray[np.int32]:
    """Chunk and first coded token of every tile."""
    tiles = [(at, first) for at, chunk in enumerate(found) for first in range(0, chunk.num_coded, _TILE_TOKENS)]
    return np.array(tiles, np.int32).reshape(-1, 2)


def _power_of_two(count: int) -> int:
    """The least power of two that is not below.

    Example:
        >>> [_power_of_two(count) for count in (1, 2, 3, 64)]
        [1, 2, 4, 64]
    """
    return 1 << (count - 1).bit_length()
