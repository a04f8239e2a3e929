"""Curves of quality against bits, and bits of what is stored.

Covers: interpolation on a curve, bits per element. Does not cover: quality itself (`loadtest.agreement`), what is
compared (`loadtest.bench_codec.quality`).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cluster.errors import CallerError
from kvstore.container import stored_bytes


class CurveError(CallerError):
    """Points that make no curve."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """One level of a codec: mean bits per element, everything stored, and mean KL."""

    bits: float
    kl: float


class Curve:
    """Quality of one codec against its bits: straight lines in log KL between measured points.

    Raises:
        CurveError: No point, or a KL of zero: then there is nothing to interpolate.

    Example:
        >>> curve = Curve([CurvePoint(bits=1.0, kl=0.1), CurvePoint(bits=3.0, kl=0.001)])
        >>> round(curve.kl_at(2.0), 6), round(curve.bits_at(0.01), 6), math.isnan(curve.bits_at(0.2))
        (0.01, 2.0, True)
    """

    def __init__(self, points: Iterable[CurvePoint]) -> None:
        self._points = sorted(points, key=lambda point: point.bits)
        if not self._points or any(not (point.kl > 0 and point.bits > 0) for point in self._points):
            raise CurveError("a curve needs points, each with bits and KL above 0")

    @property
    def coarsest(self) -> CurvePoint:
        """The point with the fewest bits."""
        return self._points[0]

    @property
    def finest(self) -> CurvePoint:
        """The point with the most bits."""
        return self._points[-1]

    def kl_at(self, bits: float) -> float:
        """KL at so many bits; NaN outside what was measured."""
        for below, above in zip(self._points, self._points[1:], strict=False):
            if below.bits <= bits <= above.bits:
                share = _share(below.bits, bits, above.bits)
                return math.exp((1 - share) * math.log(below.kl) + share * math.log(above.kl))
        return self._points[0].kl if len(self._points) == 1 and bits == self._points[0].bits else math.nan

    def bits_at(self, kl: float) -> float:
        """Fewest bits that give this KL; NaN outside what was measured."""
        for below, above in zip(self._points, self._points[1:], strict=False):
            if above.kl <= kl <= below.kl:
                share = _share(math.log(below.kl), math.log(kl), math.log(above.kl))
                return (1 - share) * below.bits + share * above.bits
        return self._points[0].bits if len(self._points) == 1 and kl == self._points[0].kl else math.nan


def _share(start: float, at: float, stop: float) -> float:
    return 0.0 if start == stop else (at - start) / (stop - start)


def bits_per_element(payload_bytes: Sequence[int], *, num_elements: int) -> float:
    """Bits of the payloads per KV element.

    Example:
        >>> bits_per_element([100, 28], num_elements=512)
        2.0
    """
    return 8 * sum(payload_bytes) / num_elements


def stored_bits_per_element(payload_bytes: Sequence[int], *, num_elements: int) -> float:
    """As `bits_per_element`, of the store's whole records: their headers and padding too.

    Example:
        >>> stored_bits_per_element([4096, 1], num_elements=8192)
        16.0
    """
    return 8 * sum(map(stored_bytes, payload_bytes)) / num_elements
