"""The `transform` codec: a calibrated transform, levels, entropy coding.

Covers: whole chunks, single layers, prefixes; threads.
Does not cover: the payload's layout (`kvstore.codecs.stream`), the arithmetic of one band
(`kvstore.codecs.transform_decode`, `kvstore.codecs.transform_encode`), calibration (`kvstore.codecs.calibrate`).
Shape letters: as in `kvstore.codecs`; V levels, G head groups, C channels of a band.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from cluster.errors import CallerError
from kvstore.codecs import stream
from kvstore.codecs.importance import token_classes
from kvstore.codecs.profile import Profile
from kvstore.codecs.rans_vectors import LANES
from kvstore.codecs.raw import DTYPES, CodecDataError, unexported_bytes
from kvstore.codecs.transform_decode import ERRORS, OK, rotate_row
from kvstore.codecs.transform_encode import (
    TOO_LONG,
    encode_base,
    encode_refinement,
    forward_band,
    forward_of,
    is_finite,
    unrotate,
    widen,
)
from kvstore.codecs.transform_layer import decode_bands, decode_levels
from kvstore.codecs.transform_plan import padded, plan_of, rotary_tables
from kvstore.interfaces import ChunkMeta

_SECTION_BYTES: Final = 68
"""States and count of escapes."""
_ESCAPE_BYTES: Final = 6
_NO_CLASSES: Final = np.empty(0, np.int16)

Symbols = tuple[NDArray[np.int16], NDArray[np.int16]]
"""Values and classes of one band."""


class TransformCodec:
    """Chunks of one profile.

    Guarantees:
        Decoded KV is the same to the bit on every machine and backend, for a profile, a payload and a position.
        Encoding gives the same bytes for the same KV on the same kind of machine.
        Safe for several threads. The interpreter lock is free while bands are coded.

    Args:
        profile: The profile of all chunks of this codec.
        level: Finest level that is written; None: all of the profile.
        num_threads: Layers of one chunk that are coded at once.
    """

    def __init__(self, profile: Profile, *, level: int | None = None, num_threads: int = 1) -> None:
        if num_threads < 1:
            raise CallerError(f"{num_threads} threads; at least 1 is needed")
        self._profile = profile
        self._level = self._checked(profile.num_levels - 1 if level is None else level)
        self._num_threads = num_threads

    @property
    def name(self) -> str:
        """`transform`."""
        return "transform"

    @property
    def profile(self) -> Profile:
        """The profile of all chunks of this codec."""
        return self._profile

    def encoded_bytes(self, meta: ChunkMeta) -> int:
        """Bytes to reserve: two per value, and what every chunk has.

        KV that the profile was made for takes an eighth of that. KV that does not fit at all is refused by `encode`.
        """
        stream.check_meta(meta, self._profile)
        sections = (self._level + 1) * meta.num_layers * 2 * self._profile.groups
        values = meta.num_layers * 2 * meta.num_tokens * meta.num_kv_heads * meta.head_dim
        head = stream.header_bytes(levels=self._level + 1, layers=meta.num_layers, groups=self._profile.groups)
        return head + stream.exact_bytes(meta, self._profile) + sections * _SECTION_BYTES + 2 * values

    def encode(
        self, kv_L2TNH: torch.Tensor, *, out: memoryview, meta: ChunkMeta | None = None, level: int | None = None
    ) -> int:
        """Write one chunk's KV to the start of `out`.

        Args:
            kv_L2TNH: KV on the CPU, any strides; K is rotated for `meta.base_position`.
            out: Room for the payload.
            meta: What the reader will know; None: KV of a sequence's start.
            level: Finest level to write; None: the codec's.

        Raises:
            CallerError: The profile has no such level.
            CodecDataError: Not KV of the profile's model, not finite, or longer than `out`.
        """
        meta = self._meta(kv_L2TNH) if meta is None else meta
        stream.check_meta(meta, self._profile)
        if tuple(kv_L2TNH.shape) != meta.shape or kv_L2TNH.dtype != DTYPES[meta.dtype]:
            raise CodecDataError(
                f"KV {tuple(kv_L2TNH.shape)} of {kv_L2TNH.dtype}; {meta.shape} of {meta.dtype} expected"
            )
        num_levels = (self._level if level is None else self._checked(level)) + 1
        exact_tokens = stream.num_exact(meta, self._profile)
        exact = _bytes_of(kv_L2TNH[:, :, :exact_tokens])
        room = len(out)

        def of_layer(layer: int) -> list[list[bytes]]:
            return _encode_layer(self._profile, kv_L2TNH[layer], meta, layer=layer, num_levels=num_levels, room=room)

        layers = self._map(of_layer, range(meta.num_layers))
        sections = [section for level in range(num_levels) for layer in layers for section in layer[level]]
        shape = (num_levels, meta.num_layers, 2, self._profile.groups)
        header = stream.write_header(
            meta,
            self._profile,
            lengths=np.array([len(section) for section in sections], np.int64).reshape(shape),
            checksums=np.array([stream.checksum(section) for section in sections], np.uint32).reshape(shape),
            exact_checksum=stream.checksum(exact),
        )
        return _join([header, exact, *sections], out)

    def decode(self, payload: memoryview, *, meta: ChunkMeta) -> torch.Tensor:
        """One chunk's KV as `[L, 2, T, N, H]`, every layer at the finest level that the payload holds.

        Raises:
            CodecDataError: The payload is not what `meta` says, or ends within its coarsest level.
        """
        layout = stream.read_header(payload, meta=meta, profile=self._profile)
        if not layout.levels_within(len(payload)).all():
            raise CodecDataError(f"payload of {len(payload)} bytes ends within its coarsest level")
        out = torch.empty(meta.shape, dtype=DTYPES[meta.dtype])
        self.decode_layers(payload, meta=meta, layers=range(meta.num_layers), out=out)
        return out

    def decode_layers(
        self,
        payload: memoryview,
        *,
        meta: ChunkMeta,
        layers: range,
        out: torch.Tensor,
        level: int | None = None,
        position: int | None = None,
    ) -> None:
        """Some layers' KV; the others are not looked at.

        Args:
            payload: The payload, or a prefix of it that holds these layers.
            meta: What the payload is.
            layers: Which layers.
            out: Where to, `[layer, 2, T, N, H]` of the chunk's dtype; only its last dimension must be contiguous.
            level: Finest level to use; None: the finest that the payload holds for a layer.
            position: Where the first token is to be; None: where it was.

        Raises:
            CodecDataError: The payload is damaged, does not hold them, or `out` does not fit.
        """
        chunk = self.open(payload, meta=meta)
        if tuple(out.shape) != (len(layers), *meta.shape[1:]) or out.dtype != DTYPES[meta.dtype]:
            raise CodecDataError(f"room for {tuple(out.shape)} of {out.dtype}, {len(layers)} layers of {meta} expected")
        if layers.step != 1 or not 0 <= layers.start <= layers.stop <= meta.num_layers:
            raise CodecDataError(f"layers {layers} of a chunk with {meta.num_layers}")

        def one(index: int) -> None:
            chunk.decode(layers[index], level=level, out_2TNH=out[index], position=position)

        self._map(one, range(len(layers)))

    def head_bytes(self, payload: memoryview, *, meta: ChunkMeta) -> int:
        """Bytes that must be in place for `open`."""
        return stream.head_bytes(payload, meta=meta, profile=self._profile)

    def open(self, payload: memoryview, *, meta: ChunkMeta) -> "OpenTransformChunk":
        """Read the table of contents. The payload may still be arriving behind its first `head_bytes` bytes.

        Raises:
            CodecDataError: It is damaged, of another profile, or not what `meta` says.
        """
        layout = stream.read_header(payload, meta=meta, profile=self._profile)
        return OpenTransformChunk(profile=self._profile, meta=meta, layout=layout, payload=payload)

    def _checked(self, level: int) -> int:
        if not 0 <= level < self._profile.num_levels:
            raise CallerError(f"level {level} of a profile with levels 0 to {self._profile.num_levels - 1}")
        return level

    def _meta(self, kv_L2TNH: torch.Tensor) -> ChunkMeta:
        names = [name for name, dtype in DTYPES.items() if dtype is kv_L2TNH.dtype]
        if kv_L2TNH.ndim != 5 or kv_L2TNH.shape[1] != 2 or not names:
            raise CodecDataError(f"not KV [L, 2, T, N, H]: shape {tuple(kv_L2TNH.shape)}, dtype {kv_L2TNH.dtype}")
        num_layers, _, num_tokens, num_kv_heads, head_dim = kv_L2TNH.shape
        return ChunkMeta(
            num_tokens=num_tokens,
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            dtype=names[0],
            base_position=0,
        )

    def _map(self, one: Callable[[int], Any], items: Iterable[int]) -> list[Any]:
        if self._num_threads == 1:
            return [one(item) for item in items]
        # Made for this call: it ends, also with an error, when no thread works on the caller's memory any more.
        with ThreadPoolExecutor(self._num_threads, "learnonce-codec") as threads:
            return list(threads.map(one, items))


@dataclass(frozen=True, eq=False, kw_only=True)
class OpenTransformChunk:
    """A chunk whose table of contents has been read. Safe for several threads that decode different layers."""

    profile: Profile
    meta: ChunkMeta
    layout: stream.Layout
    payload: memoryview

    @property
    def num_levels(self) -> int:
        """Levels that the payload holds when it is whole; at least 1."""
        return self.layout.num_levels

    def stop_bytes(self, *, level: int, layer: int) -> int:
        """Bytes of the payload, from its start, that a layer needs at that level and all coarser ones."""
        return self.layout.stop_bytes(level=level, layer=layer)

    def decode(
        self, layer: int, *, level: int | None = None, out_2TNH: torch.Tensor, position: int | None = None
    ) -> None:
        """Decode one layer's K and V.

        Args:
            layer: Which.
            level: Finest level to use; its bytes must be in place. None: the finest within the payload's length.
            out_2TNH: Where to; only the last dimension must be contiguous.
            position: Where the chunk's first token is to be; None: where it was.

        Raises:
            CodecDataError: Its bytes are damaged, or not there; what `out_2TNH` then holds means nothing.
        """
        held = sum(stop <= len(self.payload) for stop in self._places[0][layer, -1, :, 1, 1].tolist())
        num_levels = held if level is None else level + 1
        if not 1 <= num_levels <= held:
            raise CodecDataError(f"layer {layer} at level {level}: the payload holds {held} of its levels")
        meta = self.meta
        if tuple(out_2TNH.shape) != meta.shape[1:] or out_2TNH.dtype != DTYPES[meta.dtype]:
            raise CodecDataError(f"room for {tuple(out_2TNH.shape)} of {out_2TNH.dtype}, {meta} expected")
        if out_2TNH.dtype == torch.float16 or out_2TNH.stride(-1) != 1 or not out_2TNH.is_cpu:
            wide = torch.empty(meta.shape[1:], dtype=torch.float32)
            self._decode(layer, num_levels, wide, position)
            out_2TNH.copy_(wide)
        else:
            self._decode(layer, num_levels, out_2TNH, position)
        self._place_exact(layer, out_2TNH, position)

    def _decode(self, layer: int, num_levels: int, out_2TNH: torch.Tensor, position: int | None) -> None:
        meta, profile, exact = self.meta, self.profile, self.layout.num_exact
        if meta.num_tokens == exact:
            return
        first = (meta.base_position if position is None else position) + exact
        cosine, sine = rotary_tables(profile, first=first, count=meta.num_tokens - exact)
        heads, item = profile.num_kv_heads // profile.groups, out_2TNH.element_size()
        kv_bytes, token_bytes, head_bytes = (item * stride for stride in out_2TNH.stride()[:3])
        at, plan = out_2TNH.data_ptr() + exact * token_bytes, plan_of(profile)
        for group in range(profile.groups):
            data, spans, lut, tables, ids, groups, rows, bands = self._sections(layer, group, num_levels)
            code = decode_bands(
                data,
                spans,
                lut,
                tables,
                ids,
                groups,
                rows,
                bands,
                plan.has_classes,
                plan.basis,
                plan.start,
                plan.scale,
                plan.bias,
                plan.token_scales,
                plan.num_channels,
                profile.head_dim,
                cosine,
                sine,
                profile.is_neox,
                (at + group * heads * head_bytes, token_bytes, head_bytes),
                kv_bytes,
                item == 2,
            )
            _raise_for(code, layer)

    def symbols(self, layer: int, *, group: int, num_levels: int) -> tuple[Symbols, Symbols]:
        """What K's and V's components of one head group were quantised to, at a level.

        Returns:
            For each: magnitudes with sign i16 `[row group, token, 16 rows]`, exact tokens left out; and the tokens'
            classes, padded to whole steps of 16, or none where all are of class 0.

        Raises:
            CodecDataError: The sections are damaged, or not there.
        """
        plan = plan_of(self.profile)
        tokens = self.meta.num_tokens - self.layout.num_exact
        found = self._sections(layer, group, num_levels if tokens else 0)
        data, spans, lut, tables, ids, groups, rows, bands = found
        shapes = [(max(1, int(plan.num_groups[band, num_levels - 1])), tokens, LANES) for band in bands]
        values = (np.zeros(shapes[0], np.int16), np.zeros(shapes[1], np.int16))
        some = [np.empty(padded(tokens), np.int16) if plan.has_classes[band] else _NO_CLASSES for band in bands]
        classes = (some[0], some[1])
        code = decode_levels(data, spans, lut, tables, ids, groups, rows, bands, values, classes)
        _raise_for(code, layer)
        return (values[0], some[0]), (values[1], some[1])

    def _sections(self, layer: int, group: int, num_levels: int) -> Any:
        """The first arguments of the compiled loops, for sections that are what their checksums say."""
        payload, plan, profile = self.payload, plan_of(self.profile), self.profile
        places, checksums = self._places
        spans = places[layer, group, :num_levels]
        of_layer = zip(spans.tolist(), checksums[layer][group], strict=False)
        for level, (pair, expected) in enumerate(of_layer):
            for kv, (start, stop) in enumerate(pair):
                if stop > len(payload):
                    raise CodecDataError(f"layer {layer}, {'KV'[kv]}, level {level}: section behind the payload's end")
                if stream.checksum(payload[start:stop]) != expected[kv]:
                    raise CodecDataError(
                        f"layer {layer}, {'KV'[kv]}, level {level}: section does not match its checksum"
                    )
        key = layer * 2 * profile.groups + group
        bands = (key, key + profile.groups)
        tables = (
            plan.tables.lut_KF,
            plan.table_starts,
            plan.class_starts,
            plan.num_groups,
            plan.num_rows,
        )
        return (self._data, spans, *tables, bands)

    @cached_property
    def _places(self) -> tuple[NDArray[np.int64], list[Any]]:
        """Starts and stops `[L, G, V, 2, 2]` and checksums `[L][G][V][2]` of all sections."""
        layout = self.layout
        spans_VL2GS = np.stack([layout.start_VL2G, layout.stop_VL2G], axis=-1)
        spans = np.ascontiguousarray(spans_VL2GS.transpose(1, 3, 0, 2, 4))
        return spans, layout.checksum_VL2G.transpose(1, 3, 0, 2).tolist()

    @cached_property
    def _data(self) -> NDArray[np.uint8]:
        # Whoever uses it has sliced the payload before: that fails once its owner has released it.
        return unexported_bytes(self.payload)

    @cached_property
    def _exact(self) -> memoryview:
        """The exact tokens of all layers, compared with their checksum once.

        Raises:
            CodecDataError: They do not match.
        """
        layout = self.layout
        part = bytes(self.payload[layout.exact_start : layout.exact_stop])
        if stream.checksum(part) != layout.exact_checksum:
            raise CodecDataError("exact tokens do not match their checksum")
        return memoryview(part)

    def _place_exact(self, layer: int, out_2TNH: torch.Tensor, position: int | None) -> None:
        layout, meta = self.layout, self.meta
        if not layout.num_exact:
            return
        part = self._exact
        size = len(part) // meta.num_layers
        stored = np.frombuffer(part[layer * size : (layer + 1) * size], np.uint8).copy()
        shape = (2, layout.num_exact, meta.num_kv_heads, meta.head_dim)
        exact = torch.from_numpy(stored).view(DTYPES[meta.dtype]).view(shape)
        if position:
            # They begin at position 0, so this is the whole rotation.
            keys = exact[0].float().numpy()
            cosine, sine = rotary_tables(self.profile, first=position, count=layout.num_exact)
            for token, row in enumerate(keys.reshape(layout.num_exact, -1)):
                rotate_row(row, row.size, meta.head_dim, cosine[token], sine[token], self.profile.is_neox)
            exact[0] = torch.from_numpy(keys).to(exact.dtype)
        out_2TNH[:, : layout.num_exact] = exact


def _raise_for(code: int, layer: int) -> None:
    if code != OK:
        level, error = divmod(code, 8)
        raise CodecDataError(f"layer {layer}, level {level}: {ERRORS[error]}")


def _bytes_of(kv: torch.Tensor) -> bytes:
    packed = torch.empty(kv.shape, dtype=kv.dtype).copy_(kv)
    return packed.view(-1).view(torch.uint8).numpy().tobytes()


def _join(parts: list[bytes], out: memoryview) -> int:
    num_bytes = sum(map(len, parts))
    if num_bytes > len(out):
        raise CodecDataError(f"payload of {num_bytes} bytes, {len(out)} were reserved")
    at = 0
    for part in parts:
        out[at : at + len(part)] = part
        at += len(part)
    return num_bytes


def _encode_layer(
    profile: Profile, kv_2TNH: torch.Tensor, meta: ChunkMeta, *, layer: int, num_levels: int, room: int
) -> list[list[bytes]]:
    """Sections of one layer, by level, K and V, head group."""
    exact = stream.num_exact(meta, profile)
    tokens = meta.num_tokens - exact
    # A copy in any case: keys are turned back in place.
    x_2TNH = np.empty((2, tokens, *kv_2TNH.shape[2:]), np.float32)
    # Also what is stored exactly: a NaN there would reach every token that attends to it, in each request.
    if kv_2TNH.dtype == torch.bfloat16:
        all_finite = widen(kv_2TNH.contiguous().view(torch.int16).numpy(), exact, x_2TNH.view(np.int32))
    else:
        torch.from_numpy(x_2TNH).copy_(kv_2TNH[:, exact:])
        all_finite = is_finite(x_2TNH.reshape(-1).view(np.int32)) and bool(torch.isfinite(kv_2TNH[:, :exact]).all())
    if not all_finite:
        raise CodecDataError(f"KV of layer {layer} is not finite")
    if not tokens:
        return [[b""] * (2 * profile.groups)] * num_levels
    cosine, sine = rotary_tables(profile, first=meta.base_position + exact, count=tokens)
    unrotate(x_2TNH[0], cosine, sine, profile.is_neox)
    classes_2GT = token_classes(profile, x_2TNH[0], layer=layer)
    sections: list[list[bytes]] = [[] for _ in range(num_levels)]
    for kv in range(2):
        for group in range(profile.groups):
            heads = profile.num_kv_heads // profile.groups
            x_TC = x_2TNH[kv, :, group * heads : (group + 1) * heads].reshape(tokens, -1)
            classes = None if classes_2GT is None else classes_2GT[kv, group]
            index = (layer * 2 + kv) * profile.groups + group
            for level, section in enumerate(_encode_band(profile, x_TC, classes, index, num_levels, room)):
                sections[level].append(section)
    return sections


def _encode_band(
    profile: Profile,
    x_TC: NDArray[np.float32],
    token_classes_T: NDArray[np.int16] | None,
    index: int,
    num_levels: int,
    room: int,
) -> list[bytes]:
    forward = forward_of(profile)
    plan, tokens = forward.plan, len(x_TC)
    classes = _NO_CLASSES
    if plan.has_classes[index]:
        classes = np.zeros(padded(tokens), np.int16)
        if token_classes_T is not None:
            classes[:tokens] = token_classes_T
    # Rows that no level needs are not even computed.
    live = int(plan.num_groups[index, num_levels - 1])
    values = np.empty((live, tokens, LANES), np.int16)
    forward_band(
        np.ascontiguousarray(x_TC),
        forward.matrix[index, :live],
        forward.start[index, : live * LANES],
        forward.limit[index, : live * LANES],
        forward.rounding[index],
        forward.dead_zone[index],
        classes,
        plan.token_scales[index],
        values,
    )
    entries = plan.tables.encoder_KE
    sections = []
    for level in range(num_levels):
        missing, count = profile.num_levels - 1 - level, plan.num_groups[index, level]
        most = _SECTION_BYTES + (2 + _ESCAPE_BYTES) * LANES * tokens * count + 2 * len(classes)
        out = np.empty(min(most, room), np.uint8)
        if level:
            size = encode_refinement(values, missing, count, plan.table_starts[index, level], out)
        else:
            tables = forward.table_starts[index]
            ids, low, high = forward.class_starts[index], forward.low[index], forward.high[index]
            size = encode_base(values, missing, count, tables, ids, classes, low, high, entries, out)
        if size == TOO_LONG:
            raise CodecDataError(f"KV that does not fit its profile: a section needs more than {room} bytes")
        sections.append(out[:size].tobytes())
    return sections
