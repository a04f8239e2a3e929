"""Picture and table of a result: how good answers are against the time to their first token.

Covers: a CSV table, always; a PNG file where matplotlib is installed. Does not cover: measuring.
"""

import csv
import importlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from loadtest.bench_join import JOIN_POINTS, NOISE_FLOOR, Log

_COLUMNS: Final = ("kl", "first_token_kl", "top1_ratio", "dnll", "same_answer")
_DPI: Final = 150


def draw(folder: Path, *, detail: Mapping[str, Any], log: Log) -> dict[str, str]:
    """Write what can be written; what could not, and why."""
    folder.mkdir(parents=True, exist_ok=True)
    log(f"plots: {write_table(folder / 'join_quality.csv', detail)}")
    if importlib.util.find_spec("matplotlib") is None:
        return {"plots": "matplotlib is not installed"}
    import matplotlib

    matplotlib.use("Agg")
    log(f"plots: {_draw_curve(folder / 'join_quality.png', detail)}")
    return {}


def write_table(path: Path, detail: Mapping[str, Any]) -> Path:
    """One line per point: means with 95 % intervals, median seconds, exact match of the look-up task."""
    ends = ("value", "low", "high")
    header = ["point", *(f"{name}_{end}" for name in _COLUMNS for end in ends), "ttft_s", "cpu_s", "exact_match"]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for point, found in detail["points"].items():
            match = detail["retrieval"].get(point, {}).get("exact_match", {}).get("value")
            numbers = [found[name][end] for name in _COLUMNS for end in ends]
            writer.writerow([point, *numbers, found["ttft_s"], found["cpu_s"], match])
    return path


def _draw_curve(path: Path, detail: Mapping[str, Any]) -> Path:
    """Mean KL with its interval against the median time to first token, one mark per way to join."""
    # By name: type checkers and readers without matplotlib are no worse off.
    plt = importlib.import_module("matplotlib.pyplot")
    figure, axes = plt.subplots(figsize=(8, 5.5), constrained_layout=True)
    points = detail["points"]
    for join in JOIN_POINTS:
        found = points.get(join.name)
        if found is None or found["ttft_s"] is None or found["kl"]["value"] <= 0:
            continue
        middle, low, high = (found["kl"][key] for key in ("value", "low", "high"))
        spread = None if low is None else [[max(0.0, middle - low)], [max(0.0, high - middle)]]
        axes.errorbar([found["ttft_s"]], [middle], yerr=spread, marker="o", capsize=3, label=join.name)
        axes.annotate(f" {join.name}", (found["ttft_s"], middle))
    floor = points.get(NOISE_FLOOR)
    if floor is not None and floor["kl"]["value"] > 0:
        axes.axhline(floor["kl"]["value"], color="grey", linestyle=":", label="KV rounded to bfloat16")
    full = points["full"]["ttft_s"]
    if full is not None:
        axes.axvline(full, color="grey", linewidth=0.8, label="full prefill")
    axes.set_yscale("log")
    axes.set_xlabel("median time to first token, s")
    axes.set_ylabel("mean KL to full prefill, nats")
    axes.grid(visible=True, alpha=0.25)
    axes.legend(fontsize="small")
    figure.suptitle(f"{detail['contexts']} contexts of passages learned apart; bars: 95 % of other draws")
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
    return path
