"""The TCP data path between two processes over loopback, beside plain sockets and what others offer.

Covers: speed relative to plain sockets, CPU seconds per GB of every path. Does not cover: links slower than memory
(`loadtest.bench_store.shaped`), the same node's shared memory (`loadtest.bench_store.shm`).

The figure is of the data plane only: records are offered once before the measuring, so there is no lease and no other
question to the control plane in it, and nobody computes a record's checksum. Plain sockets are the least that can be
done: a request, `sendall`, one blocking `recv_into`.
"""

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

from loadtest.bench_store import Measured
from loadtest.bench_store.pairs import Pair, PairUnavailableError, Sample
from loadtest.bench_store.ray_objects import RayPair, RayUnavailableError

MIB: Final = 1 << 20
COUNTS: Final = {1 * MIB: 64, 10 * MIB: 12}
"""Records per sample: about 30 ms of work, short enough that the floor beside it sees the same machine."""
_NAMES: Final = {1 * MIB: "1mb", 10 * MIB: "10mb"}
_OURS: Final = "tcp"
_FLOOR: Final = "socket"
_OTHERS: Final = ("tcp_streamed", "flight", "nixl")
_ROUNDS_PER_REPEAT: Final = 8


def measure(*, repeats: int, log: Callable[[str], None]) -> Measured:
    """Ratios to plain sockets, as medians over rounds in which both are measured right after each other.

    Args:
        repeats: Rounds for the other paths; eight times as many for ours and the floor.
        log: Told what is being done.
    """
    log("tcp: 1 MiB and 10 MiB records between two processes over loopback")
    figures: dict[str, float] = {}
    detail: dict[str, Any] = {"record_bytes": list(COUNTS), "paths": {}, "skipped": {}}
    with ExitStack() as stack:
        pairs = {kind: stack.enter_context(Pair(kind)) for kind in (_OURS, _FLOOR)}
        others = _open_others(stack, detail["skipped"], log)
        for size in COUNTS:
            samples = _rounds(pairs, size, repeats * _ROUNDS_PER_REPEAT)
            ratios = [ours.gb_per_s / floor.gb_per_s for ours, floor in zip(*samples.values(), strict=True)]
            figures[f"tcp_{_NAMES[size]}_ratio_to_socket"] = statistics.median(ratios)
            # The others come later, when the machine may have become another: the floor is measured beside them again.
            beside = _rounds({**others, _FLOOR: pairs[_FLOOR]}, size, repeats)
            samples["socket_beside_others"] = beside.pop(_FLOOR)
            samples |= beside
            detail["paths"][_NAMES[size]] = {kind: describe(found) for kind, found in samples.items()}
    detail["paths"].update(_ray(repeats, detail["skipped"], log))
    return Measured(figures=figures, detail=detail)


def _open_others(stack: ExitStack, skipped: dict[str, str], log: Callable[[str], None]) -> dict[str, Pair]:
    pairs = {}
    for kind in _OTHERS:
        try:
            pairs[kind] = stack.enter_context(Pair(kind))
            pairs[kind].run(1 * MIB, count=1)
        except PairUnavailableError as error:
            pairs.pop(kind, None)
            skipped[kind] = str(error)
            log(f"tcp: {kind} is left out: {error}")
    return pairs


def _rounds(pairs: dict[str, Pair], record_bytes: int, rounds: int) -> dict[str, list[Sample]]:
    """Samples per path, in rounds over all paths; each goes first equally often."""
    samples: dict[str, list[Sample]] = {kind: [] for kind in pairs}
    for pair in pairs.values():
        pair.run(record_bytes, count=COUNTS[record_bytes])
    for index in range(rounds):
        order = list(pairs) if index % 2 else list(reversed(pairs))
        for kind in order:
            samples[kind].append(pairs[kind].run(record_bytes, count=COUNTS[record_bytes]))
    return samples


def _ray(repeats: int, skipped: dict[str, str], log: Callable[[str], None]) -> dict[str, Any]:
    """Ray's object store, which copies through shared memory on one node: another path, for its CPU cost."""
    try:
        with RayPair() as pair:
            found = {
                name: describe([pair.run(size, count=COUNTS[size]) for _ in range(repeats)])
                for size, name in _NAMES.items()
            }
    except RayUnavailableError as error:
        skipped["ray"] = str(error)
        log(f"tcp: ray is left out: {error}")
        return {}
    return {"ray_put_get_same_node": found}


def describe(samples: list[Sample]) -> dict[str, float]:
    """Medians of one path."""
    return {
        "gb_per_s": statistics.median(sample.gb_per_s for sample in samples),
        "best_gb_per_s": max(sample.gb_per_s for sample in samples),
        "cpu_s_per_gb": statistics.median(sample.cpu_s_per_gb for sample in samples),
        "samples": len(samples),
    }
