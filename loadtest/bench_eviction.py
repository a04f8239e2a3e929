"""What each eviction policy saves on a stream of requests, at several capacities of one tier.

Covers: `learnonce bench eviction`. Does not cover: the replay (`loadtest.sim_store`), several tiers or nodes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from cluster.errors import CallerError
from kvstore.policy import POLICIES
from loadtest.results import result
from loadtest.sim_store import BYTES_PER_TOKEN, Saved, StoreSimulator, belady, bound, footprint_bytes
from loadtest.traces import Request, read_trace
from loadtest.workloads import WORKLOADS

DEFAULT_CAPACITIES: Final = (0.02, 0.05, 0.1, 0.2, 0.4)
"""Over the bytes of all chunks of a stream."""


class StreamChoiceError(CallerError):
    """The command names no stream, two, or one that does not exist."""


def read_requests(trace: Path | None, workload: str | None, *, seed: int) -> tuple[str, list[Request]]:
    """The stream that the command names, and a name for it.

    Raises:
        StreamChoiceError: Not exactly one of a readable trace and a known workload.
        TraceFormatError: The file is no known trace.
    """
    if (trace is None) == (workload is None):
        raise StreamChoiceError("name one stream: --trace FILE or --workload NAME")
    if trace is not None:
        try:
            return trace.name, read_trace(trace)
        except OSError as error:
            raise StreamChoiceError(f"trace {trace} cannot be read: {error}") from error
    make = WORKLOADS.get(workload or "")
    if make is None:
        raise StreamChoiceError(f"no workload is called {workload!r}; there are {', '.join(WORKLOADS)}")
    return f"{workload}/{seed}", make(seed)


def measure(
    name: str, requests: Sequence[Request], *, capacities: Sequence[float], log: Callable[[str], None]
) -> dict[str, Any]:
    """The content of a result file.

    Raises:
        StreamChoiceError: A capacity is not positive.
    """
    if any(ratio <= 0 for ratio in capacities):
        raise StreamChoiceError(f"capacities are shares above 0; got {', '.join(f'{each:g}' for each in capacities)}")
    all_bytes = footprint_bytes(requests)
    figures: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for ratio in capacities:
        capacity_bytes = int(ratio * all_bytes)
        found: dict[str, Saved] = {
            policy: StoreSimulator(make(), capacity_bytes=capacity_bytes).run(requests)
            for policy, make in POLICIES.items()
        }
        found["belady"] = belady(requests, capacity_bytes=capacity_bytes)
        found["bound"] = bound(requests, capacity_bytes=capacity_bytes)
        for policy, saved in found.items():
            figures[f"{policy}_hit_ratio_at_{ratio:g}"] = saved.hit_ratio
            figures[f"{policy}_saved_ratio_at_{ratio:g}"] = saved.saved_ratio
            rows.append(_row(policy, ratio, saved))
        log(f"{name} at {ratio:g}: " + ", ".join(f"{key} {each.hit_ratio:.4f}" for key, each in found.items()))
    stream = {
        "name": name,
        "requests": len(requests),
        "prompt_tokens": sum(request.num_tokens for request in requests),
        "chunk_bytes": all_bytes,
        "bytes_per_token": BYTES_PER_TOKEN,
    }
    return result(figures, stream=stream, rows=rows)


def _row(policy: str, ratio: float, saved: Saved) -> dict[str, Any]:
    return {
        "policy": policy,
        "capacity_ratio": ratio,
        "hit_ratio": saved.hit_ratio,
        "recompute_s": saved.prompt_s,
        "saved_s": saved.saved_s,
        "stored_bytes": saved.stored_bytes,
    }
