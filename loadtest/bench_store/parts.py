"""Runs the parts of `learnonce bench store` and puts their figures together.

Covers: choosing, running, merging. Does not cover: measuring (one module per part).
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from cluster.errors import CallerError, LearnonceError
from loadtest.bench_store import STORE_PARTS, Measured
from loadtest.results import result


class UnknownPartError(CallerError):
    """A part that `learnonce bench store` does not have."""


def measure_parts(parts: Sequence[str], *, repeats: int, log: Callable[[str], None]) -> dict[str, Any]:
    """A result file's content; a part that cannot run here is named under `skipped`, with the reason.

    Raises:
        UnknownPartError: `parts` names something else than `STORE_PARTS`.
    """
    unknown = [part for part in parts if part not in STORE_PARTS]
    if unknown:
        raise UnknownPartError(f"unknown part {unknown[0]!r}; there are {', '.join(STORE_PARTS)}")
    figures: dict[str, float] = {}
    details: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for part in parts:
        try:
            measured: Measured = importlib.import_module(f"loadtest.bench_store.{part}").measure(
                repeats=repeats, log=log
            )
        except LearnonceError as error:
            skipped[part] = str(error)
            log(f"{part}: skipped: {error}")
            continue
        figures |= measured.figures
        details[part] = measured.detail
    return result(figures, parts=details, skipped=skipped)
