"""Pictures and tables of a result: quality against bits, where the bits go, the three bars of loading.

Covers: CSV tables, always; PNG files where matplotlib is installed. Does not cover: measuring.
"""

import csv
import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from loadtest.bench_codec import INT8_BITS, Log
from loadtest.bench_codec.figures import family

_COLUMNS: Final = ("bits", "payload_bits", "kl", "first_token_kl", "top1_ratio", "dnll")
_MARKERS: Final = "osD^vPX*"
_DPI: Final = 150


def draw(folder: Path, *, figures: Mapping[str, float], details: Mapping[str, Any], log: Log) -> dict[str, str]:
    """Write what these parts allow; what could not be drawn, and why."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    skipped: dict[str, str] = {}
    if "quality" in details:
        written.append(write_quality_table(folder / "codec_quality.csv", details["quality"]))
    if "anatomy" in details:
        written.append(write_anatomy_table(folder / "codec_bits.csv", details["anatomy"]))
    if importlib.util.find_spec("matplotlib") is None:
        skipped["plots"] = "matplotlib is not installed"
    else:
        written += _draw_all(folder, figures=figures, details=details)
    for path in written:
        log(f"plots: {path}")
    return skipped


def write_quality_table(path: Path, quality: Mapping[str, Any]) -> Path:
    """One line per point: means, 95 % intervals, bits with the context as one payload."""
    header = ["point", *(f"{name}{end}" for name in _COLUMNS for end in ("", "_low", "_high")), "whole_bits"]
    lines = [
        [point, *(found[name][key] for name in _COLUMNS for key in ("value", "low", "high")), found["whole_bits"]]
        for point, found in quality["points"].items()
    ]
    return _write_csv(path, header, lines)


def write_anatomy_table(path: Path, anatomy: Mapping[str, Any]) -> Path:
    """One line per piece of the payload: layer, K or V, level, bits per element of the whole chunk."""
    lines = [[piece["layer"], piece["kv"], piece["level"], piece["bits"]] for piece in anatomy["sections"]]
    return _write_csv(path, ["layer", "kv", "level", "bits"], lines)


def _write_csv(path: Path, header: Sequence[str], lines: Iterable[Sequence[Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(lines)
    return path


def _draw_all(folder: Path, *, figures: Mapping[str, float], details: Mapping[str, Any]) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    written = []
    if "quality" in details:
        written.append(_draw_quality(folder / "codec_quality.png", details["quality"]))
    if "anatomy" in details:
        written.append(_draw_anatomy(folder / "codec_bits.png", details["anatomy"]))
    if "e2e" in details and details["e2e"].get("bars"):
        written.append(_draw_bars(folder / "codec_ttft.png", details["e2e"]["bars"]))
    return written


def _pyplot() -> Any:
    """Imported by name: type checkers and readers without matplotlib are no worse off."""
    return importlib.import_module("matplotlib.pyplot")


def _draw_quality(path: Path, quality: Mapping[str, Any]) -> Path:
    """KL and agreement of the first choice against stored bits, one line per codec, with intervals."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.5), constrained_layout=True)
    points = quality["points"]
    for index, codec in enumerate(dict.fromkeys(family(point) for point in points)):
        mine = sorted((each for name, each in points.items() if family(name) == codec), key=_bits)
        style = {"marker": _MARKERS[index % len(_MARKERS)], "label": codec, "capsize": 2}
        for axes, value in ((left, "kl"), (right, "top1_ratio")):
            shown = [each for each in mine if value != "kl" or each["kl"]["value"] > 0]
            axes.errorbar([_bits(each) for each in shown], [each[value]["value"] for each in shown],
                          yerr=_errors(shown, value), **style)  # fmt: skip
    left.set_yscale("log")
    left.axhline(0.01, color="grey", linewidth=0.7, linestyle=":")
    left.axhline(0.05, color="grey", linewidth=0.7, linestyle=":")
    left.set_ylabel("mean KL to exact KV, nats")
    right.set_ylabel("same first choice as with exact KV")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.axvline(INT8_BITS, color="grey", linewidth=0.7, linestyle=":")
        ticks = [0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("stored bits per KV element, everything included")
        axes.grid(visible=True, alpha=0.25)
    left.legend()
    contexts = ", ".join(str(context) for context in quality["contexts"])
    figure.suptitle(f"{len(quality['documents'])} documents, contexts of {contexts} tokens; bars: 95 % of other draws")
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
    return path


def _bits(point: Mapping[str, Any]) -> float:
    return float(point["bits"]["value"])


def _errors(points: Sequence[Mapping[str, Any]], value: str) -> list[list[float]]:
    """Lengths below and above each point."""
    below, above = [], []
    for point in points:
        middle, low, high = (point[value][key] for key in ("value", "low", "high"))
        below.append(0.0 if low is None else max(0.0, middle - low))
        above.append(0.0 if high is None else max(0.0, high - middle))
    return [below, above]


def _draw_anatomy(path: Path, anatomy: Mapping[str, Any]) -> Path:
    """Bits per layer, K and V apart, levels on top of each other; bits per component of the transform."""
    plt = _pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5), constrained_layout=True)
    sections = anatomy["sections"]
    num_layers = 1 + max(section["layer"] for section in sections)
    for kv, (name, offset, colours) in enumerate((("K", -0.2, "Blues"), ("V", 0.2, "Oranges"))):
        bottom = [0.0] * num_layers
        for level in range(anatomy["num_levels"]):
            height = [0.0] * num_layers
            for section in sections:
                if (section["kv"], section["level"]) == (name, level):
                    height[section["layer"]] += num_layers * 2 * section["bits"]
            colour = plt.get_cmap(colours)(0.85 - 0.25 * level)
            label = f"{name}, level {level}"
            places = [layer + offset for layer in range(num_layers)]
            left.bar(places, height, 0.4, bottom=bottom, color=colour, label=label)
            bottom = [low + high for low, high in zip(bottom, height, strict=True)]
        for level, bits in enumerate(anatomy["component_bits"][name]):
            right.plot(bits, color=plt.get_cmap(colours)(0.85 - 0.25 * level), label=f"{name}, level {level}")
        del kv
    left.set_xlabel("layer")
    left.set_ylabel("bits per element of this layer's K or V")
    left.legend()
    right.set_xlabel("component, by falling variance")
    right.set_ylabel("bits per symbol, mean over layers")
    right.legend()
    figure.suptitle(f"Where the bits go: {anatomy['point']}, {anatomy['tokens']} tokens of {anatomy['text']}")
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
    return path


def _draw_bars(path: Path, bars: Sequence[Mapping[str, Any]]) -> Path:
    """Time to first token of recompute, naive load and encoded load, with the quality beside each."""
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    drawn = axes.bar([bar["name"] for bar in bars], [bar["ttft_s"] for bar in bars], color=["#888", "#c63", "#37a"])
    axes.bar_label(drawn, [f"{bar['ttft_s']:.2f} s\n{bar['quality']}" for bar in bars], padding=3)
    axes.margins(y=0.2)
    axes.set_ylabel("time to first token, s")
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
    return path
