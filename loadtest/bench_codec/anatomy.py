"""Where the bits of the `transform` codec go: by layer, K or V, level, component; and what is no symbol at all.

Covers: sections as they are stored; ideal code lengths of single components.
Does not cover: other codecs (their totals are in `loadtest.bench_codec.quality`).
Shape letters: as in `kvstore.codecs`; R rows (components), G head groups, V levels.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from cluster.errors import DataError
from kvstore.codecs import stream
from kvstore.codecs.profile import FREQUENCY_BITS, Band, Profile
from kvstore.codecs.rans import coder_tables
from loadtest.bench_codec import CodecBenchSettings, Log
from loadtest.bench_codec.measures import bits_per_element
from loadtest.bench_codec.profiles import read_schemes
from loadtest.bench_codec.sample import read_sample
from loadtest.bench_codec.schemes import Encoded, TransformScheme, transform_of
from loadtest.bench_store import Measured

_NAMES: Final = ("K", "V")
_ESCAPE_BITS: Final = 48


class NoTransformError(DataError):
    """No profile of the transform codec for this model: there is nothing to take apart."""


def measure(settings: CodecBenchSettings, *, log: Log) -> Measured:
    """Take one text's chunks apart.

    Raises:
        NoTransformError: The codec has no profile for the model.
    """
    schemes, missing = read_schemes(settings, log=log)
    scheme = transform_of(schemes)
    if scheme is None:
        raise NoTransformError(missing.get("transform", "no transform codec"))
    sample = read_sample(settings, log=log)
    chunks = [scheme.encode(chunk, base_position=at * chunk.shape[2])[-1] for at, chunk in enumerate(sample.chunks)]
    num_elements = sum(chunk.numel() for chunk in sample.chunks)
    sections, rest = sections_of(chunks, profile=scheme.profile, num_elements=num_elements)
    totals = {
        "sections": sum(section["bits"] for section in sections),
        **rest,
        "payload": bits_per_element([len(each.payload) for each in chunks], num_elements=num_elements),
    }
    log("anatomy: " + ", ".join(f"{name} {bits:.4f}" for name, bits in totals.items()) + " bits per element")
    return Measured(
        figures={},
        detail={
            "point": scheme.points[-1],
            "text": sample.text,
            "tokens": sample.num_tokens,
            "num_levels": scheme.profile.num_levels,
            "totals": totals,
            "sections": sections,
            "component_bits": component_bits(chunks, scheme=scheme),
            "live_rows": live_rows(scheme.profile),
        },
    )


def sections_of(
    chunks: Sequence[Encoded], *, profile: Profile, num_elements: int
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Bits per element of the whole KV that each layer's K or V takes at each level; and headers, exact tokens."""
    bytes_VL2: NDArray[np.int64] = np.zeros((profile.num_levels, profile.num_layers, 2), np.int64)
    header_bytes = exact_bytes = 0
    for chunk in chunks:
        layout = stream.read_header(chunk.payload, meta=chunk.meta, profile=profile)
        bytes_VL2 += (layout.stop_VL2G - layout.start_VL2G).sum(axis=3)
        header_bytes += layout.exact_start
        exact_bytes += layout.exact_stop - layout.exact_start
    sections = [
        {
            "layer": layer,
            "kv": name,
            "level": level,
            "bits": bits_per_element([int(bytes_VL2[level, layer, kv])], num_elements=num_elements),
        }
        for level in range(profile.num_levels)
        for layer in range(profile.num_layers)
        for kv, name in enumerate(_NAMES)
    ]
    rest = {
        "header": bits_per_element([header_bytes], num_elements=num_elements),
        "exact_tokens": bits_per_element([exact_bytes], num_elements=num_elements),
    }
    return sections, rest


def component_bits(chunks: Sequence[Encoded], *, scheme: TransformScheme) -> dict[str, list[list[float]]]:
    """Ideal bits per symbol of every component, mean over layers and groups: by K or V, level (what it adds), row.

    What the tables say a symbol costs, escapes included; the coder's own loss is in the sections only.
    """
    profile = scheme.profile
    costs = Costs.of(profile)
    sums: dict[tuple[int, int], list[NDArray[np.float64]]] = defaultdict(list)
    for chunk in chunks:
        for layer in range(profile.num_layers):
            for kv in range(2):
                for group in range(profile.groups):
                    band = profile.bands[layer][kv][group]
                    values_RT = scheme.symbols(chunk, layer=layer, kv=kv, group=group)
                    for level in range(profile.num_levels):
                        bits_R = level_bits(values_RT, band, costs, level=level, num_levels=profile.num_levels)
                        sums[kv, level].append(bits_R)
    num_rows = max(len(bits_R) for found in sums.values() for bits_R in found)

    def mean(found: Sequence[NDArray[np.float64]]) -> list[float]:
        wide = [np.pad(bits_R, (0, num_rows - len(bits_R))) for bits_R in found]
        return [round(float(value), 5) for value in np.mean(wide, axis=0)]

    return {name: [mean(sums[kv, level]) for level in range(profile.num_levels)] for kv, name in enumerate(_NAMES)}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Costs:
    """What a profile's tables charge."""

    bits_KS: NDArray[np.float64]
    low_K: NDArray[np.int64]
    """Least and greatest value that a table knows; beyond them, a value is cut and escapes."""
    high_K: NDArray[np.int64]

    @staticmethod
    def of(profile: Profile) -> "Costs":
        """Of all tables of a profile."""
        with np.errstate(divide="ignore"):
            bits_KS = FREQUENCY_BITS - np.log2(profile.frequencies_KS.astype(np.float64))
        tables = coder_tables(profile.frequencies_KS)
        return Costs(bits_KS=bits_KS, low_K=tables.low_K.astype(np.int64), high_K=tables.high_K.astype(np.int64))


def level_bits(
    values_RT: NDArray[np.int64], band: Band, costs: Costs, *, level: int, num_levels: int
) -> NDArray[np.float64]:
    """Mean bits per token that each row of one band costs at a level.

    Args:
        values_RT: Symbols at the finest level.
        band: Whose tables code them.
        costs: Of the profile's tables.
        level: 0 the coarsest.
        num_levels: Of the profile.
    """
    live = band.rows_per_level[level]
    bits_R = np.zeros(len(values_RT))
    if not live:
        return bits_R
    ids_RX = band.table_ids_VRX[level, :live].astype(np.int64)
    sign_RT, size_RT = np.sign(values_RT[:live]), np.abs(values_RT[:live])
    missing, escapes_RT = num_levels - 1 - level, np.zeros(size_RT.shape)
    if level == 0:
        # Cut as the encoder does: to what the tables of all contexts know.
        low_R1, high_R1 = costs.low_K[ids_RX].max(axis=1)[:, None], costs.high_K[ids_RX].min(axis=1)[:, None]
        whole_RT = sign_RT * (size_RT >> missing)
        symbols_RT = np.clip(whole_RT, low_R1, high_R1)
        escapes_RT = _ESCAPE_BITS * (symbols_RT != whole_RT)
        before_RT = np.abs(np.pad(symbols_RT, ((0, 0), (1, 0)))[:, :-1])
    else:
        before_RT = size_RT >> (missing + 1)
        bit_RT = (size_RT >> missing) & 1
        symbols_RT = np.where(before_RT == 0, sign_RT * bit_RT, bit_RT)
    tables_RT = np.take_along_axis(ids_RX, np.minimum(before_RT, 2), axis=1)
    zero = costs.bits_KS.shape[1] // 2
    bits_R[:live] = (costs.bits_KS[tables_RT, symbols_RT + zero] + escapes_RT).mean(axis=1)
    return bits_R


def live_rows(profile: Profile) -> dict[str, list[list[int]]]:
    """Rows that are coded, by K or V, level, layer; summed over head groups."""
    return {
        name: [
            [sum(band.rows_per_level[level] for band in pair[kv]) for pair in profile.bands]
            for level in range(profile.num_levels)
        ]
        for kv, name in enumerate(_NAMES)
    }
