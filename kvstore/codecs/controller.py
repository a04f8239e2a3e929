"""Load a chunk, at which level, or compute it again: decided from measured speeds.

Covers: speeds with priors, the choice for the rest of a load, when a silent source is given up, in which form a chunk
is handed over. Pure: no clock, no I/O, no randomness.
Does not cover: measuring (`kvstore.engine.speeds`), carrying the choice out (`kvstore.engine.loader`), which chunks a
request loads (`router.policy`).

A load is as fast as the slower of its link and its decoder, which work at the same time; computing again is as fast as
prefill, behind what the engine computes already. Quality comes first while there is time: the finest level that meets
the target is taken, and only where none does, the fastest. Whatever is slower than computing again is not loaded.
What was spent already does not count.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal

Path = Literal["local", "remote"]
"""local: the whole chunk is in the arena when it is asked for. remote: it arrives from a disk, a node or a bucket."""

_MEMORY_RATIO: Final = 3.0
"""What was known before weighs at most so many times as much as the news, however short the news is: a fast link that
was dead shows itself in a few milliseconds."""
_MIN_MEMORY_S: Final = 0.02
"""But never less than so much transfer: the arrival of single packets is no news."""
SILENCE_RATIO: Final = 0.05
"""Share of the time to compute again for which a source may be silent: what a dead one costs, once."""
MIN_SILENCE_S: Final = 0.05
"""A source may always be silent for so long: seeks, thread switches, round trips."""
_CALM: Final = 0.9
"""Loads are given up only for a recompute that is faster by so much: estimates are noisy, and looked at often."""


@dataclass(frozen=True, slots=True)
class Rate:
    """Units per second, and how sure that is.

    Example:
        >>> prior = Rate(100.0, weight_s=1.0)
        >>> prior.after(300.0, seconds=1.0)
        Rate(per_s=200.0, weight_s=2.0)
        >>> prior.after(0.0, seconds=3.0)  # silence is news, too
        Rate(per_s=25.0, weight_s=4.0)
    """

    per_s: float
    weight_s: float
    """Seconds of observation that stand behind it; those of a prior are a guess."""

    def after(self, units: float, *, seconds: float) -> "Rate":
        """The rate once `units` more have been seen in `seconds`."""
        if seconds <= 0:
            return self
        known_s = min(self.weight_s, max(_MEMORY_RATIO * seconds, _MIN_MEMORY_S))
        total_s = known_s + seconds
        return Rate((self.per_s * known_s + units) / total_s, total_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Speeds:
    """What is known about one worker's links and processors."""

    link: Mapping[Path, Rate]
    """Encoded bytes per second."""
    decode: Rate
    """Decoded bytes per second, of all decoding threads together."""
    encode: Rate
    """KV bytes per second that are encoded, of all encoding threads together."""
    prefill: Rate | None = None
    """Tokens per second; None until it was measured: then nothing is computed again by choice."""


PRIORS: Final = Speeds(
    link={"local": Rate(5e9, 0.02), "remote": Rate(2e9, 0.02)}, decode=Rate(1e9, 0.02), encode=Rate(2e8, 0.1)
)
"""Before anything was measured. Links and decoders are tried out, because trying is cheap and not trying is for ever;
a few hundredths of a second outweigh the prior."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """What is left of one load."""

    bytes_by_level: tuple[int, ...]
    """Encoded bytes that have not arrived, if all of the rest is read up to that level; coarsest level first."""
    output_bytes: int
    """KV bytes that are not decoded."""
    tokens: int
    """Tokens to compute if the load ends here."""
    target_s: float
    """Seconds from now until the rest should be there."""
    queue_s: float = 0.0
    """Seconds until the engine could begin to compute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What to do with the rest of a load, and why."""

    level: int | None
    """None: compute it."""
    load_s_by_level: tuple[float, ...]
    recompute_s: float | None
    """None where nobody knows how fast prefill is."""

    @property
    def seconds(self) -> float:
        """What the choice should take."""
        return self.load_s_by_level[self.level] if self.level is not None else self.recompute_s or 0.0


def choose(rest: Rest, *, speeds: Speeds, path: Path, may_recompute: bool = True) -> Choice:
    """Choose the level of the rest of a load, or to compute it.

    Example:
        >>> speeds = replace(PRIORS, link={"remote": Rate(1e8, 1.0)}, prefill=Rate(1000.0, 1.0))
        >>> rest = Rest(bytes_by_level=(10**7, 4 * 10**7), output_bytes=10**8, tokens=1000, target_s=2.0)
        >>> choose(rest, speeds=speeds, path="remote").level
        1
        >>> choose(replace(rest, target_s=0.3), speeds=speeds, path="remote").level
        0
        >>> choose(replace(rest, tokens=50), speeds=speeds, path="remote").level is None
        True
    """
    load_s = tuple(load_seconds(num, rest.output_bytes, speeds=speeds, path=path) for num in rest.bytes_by_level)
    recompute_s = None if speeds.prefill is None else rest.queue_s + rest.tokens / max(speeds.prefill.per_s, 1e-9)
    limit_s = rest.target_s if recompute_s is None else min(rest.target_s, recompute_s)
    meeting = [level for level, seconds in enumerate(load_s) if seconds <= limit_s]
    level = meeting[-1] if meeting else min(range(len(load_s)), key=load_s.__getitem__)
    is_slower = may_recompute and recompute_s is not None and recompute_s < _CALM * load_s[level]
    return Choice(level=None if is_slower else level, load_s_by_level=load_s, recompute_s=recompute_s)


def load_seconds(num_bytes: int, output_bytes: int, *, speeds: Speeds, path: Path) -> float:
    """How long it takes to fetch and decode, both at the same time."""
    transfer_s = num_bytes / max(speeds.link[path].per_s, 1e-9)
    return max(transfer_s, output_bytes / max(speeds.decode.per_s, 1e-9))


def patience_s(expected_s: float, *, recompute_s: float | None) -> float | None:
    """How long a source may be silent before it counts as dead; None where there is no other way.

    Args:
        expected_s: What the next bytes should take.
        recompute_s: What computing the rest would take.

    Example:
        >>> patience_s(0.01, recompute_s=10.0), patience_s(0.5, recompute_s=10.0), patience_s(1.0, recompute_s=None)
        (0.5, 1.5, None)
    """
    if recompute_s is None:
        return None
    return max(MIN_SILENCE_S, SILENCE_RATIO * recompute_s, 3.0 * expected_s)


def choose_form(raw_bytes: int, bytes_by_level: Sequence[int], *, speeds: Speeds, path: Path) -> int | None:
    """In which form KV that somebody waits for is handed over: a level, or None for raw.

    Coded is better only where the link is slower than encoding and decoding. Among the levels, the finest of those
    that are not slower than the link lets the coarsest be by more than a tenth.

    Example:
        >>> choose_form(10**8, (10**7, 2 * 10**7), speeds=PRIORS, path="local") is None
        True
        >>> slow = replace(PRIORS, link={"remote": Rate(4e7, 1.0)})
        >>> choose_form(10**8, (10**7, 2 * 10**7), speeds=slow, path="remote")
        0
    """
    link = max(speeds.link[path].per_s, 1e-9)
    encode_s = raw_bytes / max(speeds.encode.per_s, 1e-9)
    coded_s = [encode_s + load_seconds(num, raw_bytes, speeds=speeds, path=path) for num in bytes_by_level]
    if not coded_s or raw_bytes / link <= min(coded_s):
        return None
    limit_s = 1.1 * min(coded_s)
    return max(level for level, seconds in enumerate(coded_s) if seconds <= limit_s)


def with_link(speeds: Speeds, path: Path, num_bytes: float, *, seconds: float) -> Speeds:
    """Speeds once bytes have arrived, or have not, for some seconds."""
    return replace(speeds, link={**speeds.link, path: speeds.link[path].after(num_bytes, seconds=seconds)})
