"""Runs the parts of `learnonce bench codec` and puts their figures together.

Covers: choosing, running, merging, plots. Does not cover: measuring (one module per part).
"""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cluster.errors import CallerError, LearnonceError
from loadtest.bench_codec import CHUNK_TOKENS, CODEC_PARTS, CodecBenchSettings, Log
from loadtest.bench_store import Measured
from loadtest.results import result


class CodecBenchChoiceError(CallerError):
    """A part, context or count that `learnonce bench codec` does not have."""


def read_contexts(text: str) -> tuple[int, ...]:
    """Lengths of contexts from the command line.

    Raises:
        CodecBenchChoiceError: Not whole numbers of chunks, with commas between them.

    Example:
        >>> read_contexts("4096,1024")
        (1024, 4096)
    """
    try:
        contexts = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        contexts = ()
    if not contexts or any(context < CHUNK_TOKENS or context % CHUNK_TOKENS for context in contexts):
        raise CodecBenchChoiceError(f"contexts are multiples of {CHUNK_TOKENS} with commas between them; got {text!r}")
    return contexts


def speed_at_measured_level(details: Mapping[str, Any]) -> dict[str, float]:
    """Decoding speed at the level that the quality of the same run says meets a mean KL of 0.01; else nothing."""
    found = details.get("quality", {}).get("comparisons", {}).get("transform_kl01_ratio_to_int8")
    rates = details.get("speed", {}).get("gb_per_s", {})
    job = found and f"decode {found['point']} to pages"
    return {"decode_gb_per_s": rates[job]} if job in rates else {}


def measure_parts(parts: Sequence[str], settings: CodecBenchSettings, *, log: Log) -> dict[str, Any]:
    """A result file's content; a part that cannot run here is named under `skipped`, with the reason.

    Raises:
        CodecBenchChoiceError: A part that is none of `CODEC_PARTS`.
    """
    unknown = [part for part in parts if part not in CODEC_PARTS]
    if unknown:
        raise CodecBenchChoiceError(f"unknown part {unknown[0]!r}; there are {', '.join(CODEC_PARTS)}")
    figures: dict[str, float] = {}
    details: dict[str, Any] = {}
    skipped: dict[str, str] = {}
    for part in parts:
        try:
            module = importlib.import_module(f"loadtest.bench_codec.{part}")
            measured: Measured = module.measure(settings, log=log)
        except LearnonceError as error:
            skipped[part] = str(error)
            log(f"{part}: skipped: {error}")
            continue
        figures |= measured.figures
        details[part] = measured.detail
    figures |= speed_at_measured_level(details)
    if settings.plots is not None:
        from loadtest.bench_codec.plots import draw

        skipped |= draw(settings.plots, figures=figures, details=details, log=log)
    choices = {name: str(value) for name, value in asdict(settings).items()}
    return result(figures, settings=choices, parts=details, skipped=skipped)
