"""From rows to figures: means, intervals, and codecs held against each other at equal KL or equal bytes.

Covers: the figures of the quality protocol, and the tables beside them. Does not cover: measuring.
Shape letters: D documents, X contexts.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from loadtest.agreement import Interval, bootstrap
from loadtest.bench_codec import INT8_BITS
from loadtest.bench_codec.measures import Curve, CurvePoint

OURS: Final = "transform"
BASELINE: Final = "cachegen"
_VALUES: Final = ("bits", "payload_bits", "kl", "first_token_kl", "top1_ratio", "dnll")
KL_BARS: Final = {"kl01": 0.01, "kl05": 0.05}
"""Mean KL that a level may have at most, by the name in a figure."""

Row = Mapping[str, Any]
Table = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PointTable:
    """One point's values by document and context."""

    values: Mapping[str, Table]
    """`[D, X]` by name: bits, kl, ..."""

    def mean(self, name: str, documents: NDArray[np.intp]) -> float:
        """Mean over contexts and these documents."""
        return float(self.values[name][documents].mean())

    def at(self, documents: NDArray[np.intp]) -> CurvePoint:
        """The point on a curve of quality against bits."""
        return CurvePoint(bits=self.mean("bits", documents), kl=self.mean("kl", documents))


def point_tables(rows: Iterable[Row], *, points: Sequence[str], names: Sequence[str]) -> dict[str, PointTable]:
    """Tables of the points that were measured on all documents and contexts; the others have none."""
    all_rows = list(rows)
    contexts = sorted({row["context"] for row in all_rows})
    tables = {}
    for point in points:
        by_place = {(row["document"], row["context"]): row for row in all_rows if row["point"] == point}
        places = [[(name, context) for context in contexts] for name in names]
        if places and all(place in by_place for line in places for place in line):
            tables[point] = PointTable(
                values={
                    value: np.array([[by_place[place][value] for place in line] for line in places])
                    for value in _VALUES
                }
            )
    return tables


def family(point: str) -> str:
    """The codec of a point.

    Example:
        >>> family("transform-1"), family("int8")
        ('transform', 'int8')
    """
    codec, dash, level = point.rpartition("-")
    return codec if dash and level.isdigit() else point


def quality_figures(
    rows: Iterable[Row], *, points: Sequence[str], names: Sequence[str], baseline: str
) -> dict[str, float]:
    """The flat figures; one that cannot be made from what was measured is left out."""
    found = comparisons(point_tables(rows, points=points, names=names), count=len(names), baseline=baseline)
    return {name: each["value"] for name, each in found.items() if math.isfinite(each["value"])}


def comparisons(tables: Mapping[str, PointTable], *, count: int, baseline: str) -> dict[str, dict[str, Any]]:
    """Figures with intervals, and which points they come from.

    `..._ratio_to_int8` is of a *measured* level, the smallest whose mean KL meets the bar. What stands between measured
    levels is interpolated: the two figures against the baseline, which is a point's name (its default level).
    """
    ours = {name: table for name, table in tables.items() if family(name) == OURS}
    everything = np.arange(count)
    found: dict[str, dict[str, Any]] = {}
    for bar, most_kl in KL_BARS.items():
        good = [name for name, table in ours.items() if table.mean("kl", everything) <= most_kl]
        if good:
            best = min(good, key=lambda name: ours[name].mean("bits", everything))
            ratio = bootstrap(lambda draw, best=best: INT8_BITS / ours[best].mean("bits", draw), count=count)  # type: ignore[misc]
            found[f"{OURS}_{bar}_ratio_to_int8"] = _with(
                ratio, point=best, bits=ours[best].mean("bits", everything), kl=ours[best].mean("kl", everything)
            )
    if ours and baseline in tables:
        found |= _against(tables[baseline], list(ours.values()), baseline=baseline, count=count)
    return found


def _against(base: PointTable, ours: Sequence[PointTable], *, baseline: str, count: int) -> dict[str, dict[str, Any]]:
    def bytes_ratio(draw: NDArray[np.intp]) -> float:
        at = base.at(draw)
        return at.bits / bits_for(Curve(table.at(draw) for table in ours), at.kl)

    def kl_ratio(draw: NDArray[np.intp]) -> float:
        at = base.at(draw)
        return kl_within(Curve(table.at(draw) for table in ours), at.bits) / at.kl

    at = base.at(np.arange(count))
    curve = Curve(table.at(np.arange(count)) for table in ours)
    facts = {
        "baseline": baseline,
        "baseline_bits": at.bits,
        "baseline_kl": at.kl,
        "is_within_curve": curve.finest.kl <= at.kl <= curve.coarsest.kl and at.bits <= curve.finest.bits,
    }
    return {
        f"{BASELINE}_over_{OURS}_bytes_at_equal_kl": _with(bootstrap(bytes_ratio, count=count), **facts),
        f"{OURS}_over_{BASELINE}_kl_at_equal_bytes": _with(bootstrap(kl_ratio, count=count), **facts),
    }


def bits_for(curve: Curve, kl: float) -> float:
    """Bits that are enough for this KL: where the curve's coarsest point is better still, that point's bits.

    Example:
        >>> curve = Curve([CurvePoint(bits=1.0, kl=0.1), CurvePoint(bits=3.0, kl=0.001)])
        >>> [round(bits_for(curve, kl), 3) for kl in (0.2, 0.01, 0.0001)]
        [1.0, 2.0, nan]
    """
    return curve.coarsest.bits if kl > curve.coarsest.kl else curve.bits_at(kl)


def kl_within(curve: Curve, bits: float) -> float:
    """KL that so many bits can give: beyond the curve's finest point, that point's KL.

    Example:
        >>> curve = Curve([CurvePoint(bits=1.0, kl=0.1), CurvePoint(bits=3.0, kl=0.001)])
        >>> [round(kl_within(curve, bits), 3) for bits in (4.0, 2.0, 0.5)]
        [0.001, 0.01, nan]
    """
    return curve.finest.kl if bits > curve.finest.bits else curve.kl_at(bits)


def quality_detail(
    rows: Sequence[Row], *, points: Sequence[str], names: Sequence[str], contexts: Sequence[int], baseline: str
) -> dict[str, Any]:
    """Tables by point, context and kind of text, with intervals; comparisons with theirs."""
    tables = point_tables(rows, points=points, names=names)
    kinds = {row["document"]: row["kind"] for row in rows}
    return {
        "comparisons": comparisons(tables, count=len(names), baseline=baseline),
        "points": {
            point: _described(table, [kinds[name] for name in names], contexts=sorted(contexts))
            | {"whole_bits": _mean([row["whole_bits"] for row in rows if row["point"] == point])}
            for point, table in tables.items()
        },
    }


def _described(table: PointTable, kinds: Sequence[str], *, contexts: Sequence[int]) -> dict[str, Any]:
    count = len(kinds)
    intervals = {
        name: bootstrap(lambda draw, name=name: table.mean(name, draw), count=count).as_json()  # type: ignore[misc]
        for name in _VALUES
    }
    by_kind = {
        kind: {
            name: table.mean(name, np.array([index for index, each in enumerate(kinds) if each == kind]))
            for name in _VALUES
        }
        for kind in dict.fromkeys(kinds)
    }
    by_context = {
        str(context): {name: float(table.values[name][:, at].mean()) for name in _VALUES}
        for at, context in enumerate(contexts)
    }
    return {**intervals, "by_context": by_context, "by_kind": by_kind}


def _with(interval: Interval, **facts: Any) -> dict[str, Any]:
    return {**interval.as_json(), **facts}


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return float(np.mean(there)) if there else None
