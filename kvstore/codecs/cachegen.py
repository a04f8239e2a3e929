"""CacheGen: KV of groups of tokens as differences to an anchor, with coarser bins in deeper layers.

Covers: the scheme of the paper, as the baseline for `kvstore.codecs.transform`; its levels; exact first tokens.
Does not cover: bins and tables (`kvstore.codecs.cachegen_profile`, `kvstore.codecs.cachegen_calibrate`), adaptation to
a link (`kvstore.codecs.controller`), what a product made of the same name stores (`loadtest.bench_codec`).
Shape letters: as in `kvstore.codecs`; C = N * H channels, A anchors, D other tokens.

Tokens are taken in groups of ten. The first, the anchor, is kept with eight bits per value and one scale per head; the
others are kept as differences to the anchor as it will be decoded, divided by the layer's bin and rounded. Both are
entropy-coded with one table per layer, K or V, and channel, which was measured once for the model. A value that its
table does not know is kept as it was. K is taken as the engine has it, with its rotation.

What the paper leaves open is done in the codec's favour: anchors within the loop, escapes instead of clipping. The
entropy coder is rANS in place of an arithmetic coder: the same rate, faster.

Source:
    CacheGen, arXiv:2310.07240, section 5.
"""

import math
import struct
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from kvstore.codecs.cachegen_profile import ESCAPE, SATURATED, CachegenProfile
from kvstore.codecs.layered import (
    Bytes,
    LayeredPayload,
    Reader,
    check_kv,
    check_layers,
    check_meta,
    float_rows,
    head_bytes,
    read_layered,
    unsigned,
    write_layered,
)
from kvstore.codecs.raw import CodecDataError
from kvstore.codecs.rows import Frequencies, decode_own_rows, encode_rows
from kvstore.compiled import compiled
from kvstore.interfaces import ChunkMeta

_VERSION: Final = 1
_HEAD: Final = struct.Struct("<BBHI")
"""Level, exact tokens, tokens of a group, tokens of the chunk."""
_LENGTH_BYTES: Final = 4
_CENTRE: Final = 128


class CachegenCodec:
    """The paper's scheme with one model's tables.

    Args:
        profile: Of the chunks' model.
        level: Which of the profile's bins to encode with; decoding follows the payload.
    """

    def __init__(self, profile: CachegenProfile, *, level: int | None = None) -> None:
        self.profile = profile
        self.level = profile.default_level if level is None else level
        if not 0 <= self.level < profile.num_levels:
            raise CodecDataError(f"level {self.level}, the profile has {profile.num_levels}")

    @property
    def name(self) -> str:
        """`cachegen`."""
        return "cachegen"

    def encoded_bytes(self, meta: ChunkMeta) -> int:
        """The KV's bytes and a few per layer: where differences do not help, a layer is kept as it is."""
        itemsize = check_meta(meta).itemsize
        self._check_shape(meta.num_layers, meta.num_kv_heads, meta.head_dim)
        layer_bytes = 1 + math.prod(meta.shape[1:]) * itemsize
        return head_bytes(meta.num_layers) + _HEAD.size + meta.num_layers * layer_bytes

    def encode(self, kv_L2TNH: torch.Tensor, *, out: memoryview, meta: ChunkMeta | None = None) -> int:
        """Write the chunk to the start of `out`.

        Args:
            kv_L2TNH: KV on the CPU, any strides.
            out: Room for the payload.
            meta: Says where the chunk begins; None: at position 0.

        Raises:
            CodecDataError: Also for a NaN or an infinity, and for KV of another model's shape.
        """
        check_kv(kv_L2TNH)
        num_layers, _, num_tokens, num_heads, head_dim = kv_L2TNH.shape
        self._check_shape(num_layers, num_heads, head_dim)
        num_exact = min(num_tokens, self.profile.num_exact) if meta is None or meta.base_position == 0 else 0
        layers = [self._encode_layer(kv_L2TNH[layer], layer, num_exact) for layer in range(num_layers)]
        return write_layered(
            layers,
            version=_VERSION,
            preamble=_HEAD.pack(self.level, num_exact, self.profile.group_tokens, num_tokens),
            decoded_bytes=kv_L2TNH.numel() * kv_L2TNH.element_size(),
            out=out,
        )

    def decode(self, payload: memoryview, *, meta: ChunkMeta) -> torch.Tensor:
        """The chunk's KV."""
        parts = read_layered(payload, version=_VERSION, meta=meta)
        level, num_exact = self._read_head(parts, meta)
        out = torch.empty(meta.shape, dtype=check_meta(meta))
        for layer in range(meta.num_layers):
            self._decode_layer(parts.layers[layer], layer, level, num_exact, out[layer])
        return out

    def decode_layers(self, payload: memoryview, *, meta: ChunkMeta, layers: range, out: torch.Tensor) -> None:
        """Some layers' KV into `out` `[layer, 2, T, N, H]`; the others are not looked at."""
        check_layers(layers, meta, out)
        parts = read_layered(payload, version=_VERSION, meta=meta)
        level, num_exact = self._read_head(parts, meta)
        for index, layer in enumerate(layers):
            self._decode_layer(parts.layers[layer], layer, level, num_exact, out[index])

    def _check_shape(self, *shape: int) -> None:
        known = (self.profile.num_layers, self.profile.num_kv_heads, self.profile.head_dim)
        if shape != known:
            raise CodecDataError(f"KV of {shape} layers, heads, dimension; the profile is for {known}")

    def _read_head(self, parts: LayeredPayload, meta: ChunkMeta) -> tuple[int, int]:
        """Level and exact tokens."""
        self._check_shape(meta.num_layers, meta.num_kv_heads, meta.head_dim)
        level, num_exact, group_tokens, num_tokens = _HEAD.unpack(Reader(parts.preamble).take(_HEAD.size).tobytes())
        if level >= self.profile.num_levels or group_tokens != self.profile.group_tokens:
            raise CodecDataError(f"payload of level {level} in groups of {group_tokens} does not fit the profile")
        if num_tokens != meta.num_tokens or num_exact > num_tokens:
            raise CodecDataError(f"payload of {num_tokens} tokens, {num_exact} exact; {meta.num_tokens} were expected")
        return level, num_exact

    def _encode_layer(self, kv_2TNH: torch.Tensor, layer: int, num_exact: int) -> Bytes:
        kv_2TNH = kv_2TNH.contiguous()
        rest_2TNH = kv_2TNH[:, num_exact:]
        values_2TC = float_rows(rest_2TNH).reshape(2, rest_2TNH.shape[1], kv_2TNH[0, 0].numel())
        if not np.isfinite(values_2TC).all():
            raise CodecDataError(f"KV of layer {layer} holds a NaN or an infinity")
        pieces = [np.zeros(1, dtype=np.uint8), unsigned(kv_2TNH[:, :num_exact]).view(np.uint8)]
        for kv in (0, 1):
            if len(values_2TC[kv]):
                pieces += self._encode_section(values_2TC[kv], unsigned(rest_2TNH[kv]), layer, kv)
        coded, kept = np.concatenate(pieces), unsigned(kv_2TNH).view(np.uint8)
        return coded if len(coded) <= len(kept) else np.concatenate([np.ones(1, dtype=np.uint8), kept])

    def _encode_section(self, values_TC: NDArray[np.float32], words: NDArray[Any], layer: int, kv: int) -> list[Bytes]:
        profile = self.profile
        symbols = _Symbols.empty(values_TC.shape, profile)
        tables_CS = profile.tables_VL2CS[self.level, layer, kv]
        width = profile.bins_VL2[self.level, layer, kv]
        _quantise(values_TC, profile.group_tokens, width, tables_CS, symbols.scales_AN, symbols.anchors_AC,
                  symbols.others_DC)  # fmt: skip
        anchor_tables_CS = profile.anchor_tables_L2CS[layer, kv]
        is_unknown_AC = anchor_tables_CS[np.arange(values_TC.shape[1]), symbols.anchors_AC] == 0
        escapes = symbols.anchors_AC[is_unknown_AC]
        symbols.anchors_AC[is_unknown_AC] = ESCAPE
        pieces = [symbols.scales_AN.reshape(-1).view(np.uint8), *_encode_symbols(symbols.anchors_AC, anchor_tables_CS)]
        pieces += [_number(len(escapes)), escapes]
        pieces += _encode_symbols(symbols.others_DC, tables_CS)
        kept = words[_escaped(symbols.others_DC, profile.group_tokens)]
        return [*pieces, _number(len(kept)), kept.view(np.uint8)]

    def _decode_layer(self, data: Bytes, layer: int, level: int, num_exact: int, out_2TNH: torch.Tensor) -> None:
        reader = Reader(data)
        if reader.number("u1"):
            unsigned(out_2TNH)[:] = reader.array("<u2" if out_2TNH.element_size() == 2 else "<u4", out_2TNH.numel())
            reader.end()
            return
        exact = out_2TNH[:, :num_exact]
        kind = "<u2" if out_2TNH.element_size() == 2 else "<u4"
        for kv in (0, 1):
            unsigned(exact[kv])[:] = reader.array(kind, exact[kv].numel())
        for kv in (0, 1):
            if num_exact < out_2TNH.shape[1]:
                self._decode_section(reader, layer, level, kv, out_2TNH[kv, num_exact:])
        reader.end()

    def _decode_section(self, reader: Reader, layer: int, level: int, kv: int, out_TNH: torch.Tensor) -> None:
        profile = self.profile
        values_TC = np.empty((len(out_TNH), out_TNH[0].numel()), dtype=np.float32)
        symbols = _Symbols.empty(values_TC.shape, profile)
        symbols.scales_AN[:] = reader.array("<u2", symbols.scales_AN.size).reshape(symbols.scales_AN.shape)
        _decode_symbols(reader, profile.anchor_tables_L2CS[layer, kv], symbols.anchors_AC)
        is_escaped_AC = symbols.anchors_AC == ESCAPE
        symbols.anchors_AC[is_escaped_AC] = reader.take(_expected(reader, int(is_escaped_AC.sum())))
        _decode_symbols(reader, profile.tables_VL2CS[level, layer, kv], symbols.others_DC)
        width = profile.bins_VL2[level, layer, kv]
        _restore(symbols.scales_AN, symbols.anchors_AC, symbols.others_DC, profile.group_tokens, width, values_TC)
        out_TNH.copy_(torch.from_numpy(values_TC).view(out_TNH.shape))
        places = _escaped(symbols.others_DC, profile.group_tokens)
        kind = "<u2" if out_TNH.element_size() == 2 else "<u4"
        unsigned(out_TNH)[places] = reader.array(kind, _expected(reader, len(places)))


class _Symbols(NamedTuple):
    """One layer's K or V."""

    scales_AN: NDArray[np.uint16]
    """Bits of bfloat16."""
    anchors_AC: Bytes
    others_DC: Bytes

    @staticmethod
    def empty(shape_TC: tuple[int, int], profile: CachegenProfile) -> "_Symbols":
        num_tokens, num_channels = shape_TC
        num_anchors = -(-num_tokens // profile.group_tokens)
        return _Symbols(
            np.empty((num_anchors, profile.num_kv_heads), dtype=np.uint16),
            np.empty((num_anchors, num_channels), dtype=np.uint8),
            np.empty((num_tokens - num_anchors, num_channels), dtype=np.uint8),
        )


def _number(value: int) -> Bytes:
    return np.frombuffer(value.to_bytes(_LENGTH_BYTES, "little"), dtype=np.uint8)


def _expected(reader: Reader, count: int) -> int:
    found = reader.number("<u4")
    if found != count:
        raise CodecDataError(f"{found} values kept as they were, the symbols say {count}")
    return count


def _encode_symbols(symbols_TC: Bytes, tables_CS: Frequencies) -> list[Bytes]:
    """A stream, or the symbols themselves where that is shorter; the length tells which."""
    if not symbols_TC.size:
        return [_number(0)]
    ids_C = np.arange(len(tables_CS), dtype=np.uint16)
    stream = encode_rows(symbols_TC, table_ids_C=ids_C, frequencies_KS=tables_CS)
    piece = stream if len(stream) < symbols_TC.size else symbols_TC.reshape(-1)
    return [_number(len(piece)), piece]


def _decode_symbols(reader: Reader, tables_CS: Frequencies, out_TC: Bytes) -> None:
    piece = reader.take(reader.number("<u4"))
    if len(piece) == out_TC.size:
        out_TC.reshape(-1)[:] = piece
    elif len(piece) < out_TC.size:
        decode_own_rows(piece, frequencies_CS=tables_CS, out_TC=out_TC)
    else:
        raise CodecDataError(f"{len(piece)} bytes for {out_TC.size} symbols")


def _escaped(others_DC: Bytes, group_tokens: int) -> NDArray[np.int64]:
    """Where the values of escaped differences lie among the values of all tokens."""
    escaped = np.flatnonzero(others_DC.reshape(-1) == ESCAPE) if _has_escape(others_DC) else np.empty(0, np.int64)
    others, channels = np.divmod(escaped, others_DC.shape[1])
    return (others + others // (group_tokens - 1) + 1) * others_DC.shape[1] + channels


_QUANTISE: Final = (
    "void(float32[:, ::1], intp, float32, Array(uint16, 2, 'C', readonly=True),"
    "uint16[:, ::1], uint8[:, ::1], uint8[:, ::1])"
)


@compiled(_QUANTISE)
def _quantise(
    values: NDArray[np.float32],
    group_tokens: int,
    width: float,
    tables: Frequencies,
    scales: NDArray[np.uint16],
    anchors: Bytes,
    others: Bytes,
) -> None:
    """Anchors' scales and symbols, and the differences' symbols."""
    num_tokens, num_channels = values.shape
    head_dim = num_channels // scales.shape[1]
    base = np.empty(num_channels, dtype=np.float32)
    one = np.float32(1.0)
    steps_per_unit = one / width
    for token in range(num_tokens):
        anchor = token // group_tokens
        row = values[token]
        if token % group_tokens == 0:
            for head in range(scales.shape[1]):
                part = row[head * head_dim : (head + 1) * head_dim]
                largest = np.float32(0.0)
                for column in range(head_dim):
                    largest = max(largest, abs(part[column]))
                # Cut off, not rounded: no decoded value is larger than the largest of its head.
                exact = np.float32(largest * np.float32(1.0 / 127)).view(np.uint32)
                scales[anchor, head] = np.uint16(exact >> np.uint32(16))
                scale = np.uint32(exact & np.uint32(0xFFFF0000)).view(np.float32)
                factor = one / scale if scale > np.float32(1.2e-38) else np.float32(0.0)
                for column in range(head_dim):
                    code = np.rint(min(max(part[column] * factor, np.float32(-127.0)), np.float32(127.0)))
                    anchors[anchor, head * head_dim + column] = np.uint8(np.int32(code) + _CENTRE)
                    base[head * head_dim + column] = code * scale
        else:
            other = others[token - anchor - 1]
            for channel in range(num_channels):
                # What lies out of range ends at the escape, or at the saturated symbol, which becomes one below.
                steps = np.rint((row[channel] - base[channel]) * steps_per_unit)
                other[channel] = np.uint8(np.int32(min(max(steps, np.float32(-128.0)), np.float32(127.0))) + _CENTRE)
            for channel in range(num_channels):
                if tables[channel, other[channel]] == 0 or other[channel] == SATURATED:
                    other[channel] = ESCAPE


@compiled("boolean(uint8[:, ::1])")
def _has_escape(symbols: Bytes) -> bool:
    """Mostly there is none, and one pass over bytes says so."""
    for row in range(symbols.shape[0]):
        least = np.uint8(255)
        for column in range(symbols.shape[1]):
            least = min(least, symbols[row, column])
        if least == ESCAPE:
            return True
    return False


@compiled("void(uint16[:, ::1], uint8[:, ::1], uint8[:, ::1], intp, float32, float32[:, ::1])")
def _restore(
    scales: NDArray[np.uint16],
    anchors: Bytes,
    others: Bytes,
    group_tokens: int,
    width: float,
    values: NDArray[np.float32],
) -> None:
    num_tokens, num_channels = values.shape
    head_dim = num_channels // scales.shape[1]
    base = np.empty(num_channels, dtype=np.float32)
    for token in range(num_tokens):
        anchor = token // group_tokens
        row = values[token]
        if token % group_tokens == 0:
            for channel in range(num_channels):
                scale = np.uint32(np.uint32(scales[anchor, channel // head_dim]) << np.uint32(16)).view(np.float32)
                row[channel] = np.float32(np.int32(anchors[anchor, channel]) - _CENTRE) * scale
                base[channel] = row[channel]
        else:
            other = others[token - anchor - 1]
            for channel in range(num_channels):
                row[channel] = base[channel] + np.float32(np.int32(other[channel]) - _CENTRE) * width
