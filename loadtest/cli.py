"""`learnonce bench`: benchmarks that write result files.

Covers: the command line. Does not cover: the measuring (one module per benchmark).
"""

import asyncio
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from cluster.model import EMBEDDED_MODEL, provide_model
from cluster.settings import read_settings
from loadtest.bench_codec import (
    CODEC_PARTS,
    DATA_VARIABLE,
    DEFAULT_CONTEXTS,
    DEFAULT_DOCUMENTS,
    QUICK_CONTEXTS,
    QUICK_DOCUMENTS,
    CodecBenchSettings,
)
from loadtest.bench_store import STORE_PARTS
from loadtest.results import write_result
from loadtest.workloads import WORKLOADS

bench = typer.Typer(help="Measure, and write the figures to a JSON file.", no_args_is_help=True)
out = Console(highlight=False)


@bench.callback()
def _group() -> None:
    """Measure, and write the figures to a JSON file."""


@bench.command()
def ttft(
    json_file: Annotated[Path, typer.Option("--json", help="Where to write the result")],
    repeats: Annotated[int, typer.Option(min=1, help="Runs per figure; medians are reported")] = 3,
    tokens: Annotated[int, typer.Option(min=200, help="About how long the documents of a prompt are")] = 4000,
    port: Annotated[int, typer.Option(help="Port for the clusters that this starts")] = 8321,
    config_file: Annotated[str | None, typer.Option("--config", "-c", help="YAML file with settings")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="One setting; repeatable")] = None,
) -> None:
    """Time to first token through HTTP: cold, warm in the same process, learned by another process; the no-op path."""
    from loadtest.bench_ttft import measure

    settings = read_settings(config_file, overrides or ())
    content = asyncio.run(measure(settings, repeats=repeats, tokens=tokens, port=port, log=_note))
    _report(json_file, content)


@bench.command()
def store(
    json_file: Annotated[Path, typer.Option("--json", help="Where to write the result")],
    repeats: Annotated[int, typer.Option(min=1, help="Rounds per figure; medians are reported")] = 5,
    part: Annotated[
        list[str] | None, typer.Option("--part", help=f"Only this part, repeatable: {', '.join(STORE_PARTS)}")
    ] = None,
) -> None:
    """The store beside its floors: memory, sockets, disk, object store, index. Some parts need root, fio or iperf3."""
    from loadtest.bench_store.parts import measure_parts

    _report(json_file, measure_parts(part or STORE_PARTS, repeats=repeats, log=_note))


@bench.command()
def eviction(
    json_file: Annotated[Path, typer.Option("--json", help="Where to write the result")],
    trace: Annotated[
        Path | None, typer.Option(help="JSON lines of RAGPulse, Mooncake or questions over passages; .gz or plain")
    ] = None,
    workload: Annotated[
        str | None, typer.Option(help=f"A generated stream instead of a trace: {', '.join(WORKLOADS)}")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the generated stream")] = 1,
    capacity: Annotated[
        list[float] | None, typer.Option(help="Capacity over the bytes of all chunks of the stream; repeatable")
    ] = None,
) -> None:
    """What each eviction policy saves on a stream of requests, beside what no store could exceed."""
    from loadtest.bench_eviction import DEFAULT_CAPACITIES, measure, read_requests

    name, requests = read_requests(trace, workload, seed=seed)
    _report(json_file, measure(name, requests, capacities=capacity or DEFAULT_CAPACITIES, log=_note))


@bench.command()
def codec(
    json_file: Annotated[Path, typer.Option("--json", help="Where to write the result")],
    data: Annotated[
        Path | None, typer.Option(envvar=DATA_VARIABLE, help="Folder of texts; parts that need it are skipped without")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for pictures and tables")] = None,
    part: Annotated[
        list[str] | None, typer.Option("--part", help=f"Only this part, repeatable: {', '.join(CODEC_PARTS)}")
    ] = None,
    contexts: Annotated[
        str | None, typer.Option(help="Tokens that are stored and loaded: lengths with commas between them")
    ] = None,
    docs: Annotated[int | None, typer.Option(min=1, help="How many documents")] = None,
    model: Annotated[str, typer.Option(help="Model: embedded, or a folder")] = EMBEDDED_MODEL,
    profile: Annotated[
        str | None, typer.Option(help="Profile of the transform codec: a file, or the name of a shipped one")
    ] = None,
    work: Annotated[
        Path | None, typer.Option(help="Folder for finished work, kept: a run that was stopped goes on from there")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Minutes: fewer documents, short contexts")] = False,
) -> None:
    """Quality of every codec against its bytes, where the bytes go, speed beside its floors, the serving path."""
    from loadtest.bench_codec.parts import measure_parts as measure_codec
    from loadtest.bench_codec.parts import read_contexts

    with tempfile.TemporaryDirectory(prefix="learnonce-bench-codec-") as scratch:
        settings = CodecBenchSettings(
            model=provide_model(model),
            data=data,
            plots=plots,
            work=work or Path(scratch),
            contexts=read_contexts(contexts) if contexts else QUICK_CONTEXTS if quick else DEFAULT_CONTEXTS,
            num_documents=docs or (QUICK_DOCUMENTS if quick else DEFAULT_DOCUMENTS),
            num_retrievals=4 if quick else 16,
            profile=profile,
            is_quick=quick,
        )
        content = measure_codec(part or CODEC_PARTS, settings, log=_note)
    _report(json_file, content)


@bench.command()
def join(
    json_file: Annotated[Path, typer.Option("--json", help="Where to write the result")],
    data: Annotated[
        Path | None, typer.Option(envvar=DATA_VARIABLE, help="Folder of texts; without one they are generated")
    ] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for the picture and the table")] = None,
    contexts: Annotated[int | None, typer.Option(min=1, help="How many contexts of prose")] = None,
    retrievals: Annotated[int | None, typer.Option(min=0, help="How many contexts of the look-up task")] = None,
    model: Annotated[str, typer.Option(help="Model: embedded, or a folder")] = EMBEDDED_MODEL,
    seed: Annotated[int, typer.Option(help="Of the choice of passages and of their order")] = 1,
    work: Annotated[
        Path | None, typer.Option(help="Folder for finished contexts, kept: a run that was stopped goes on from there")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Minutes: a few contexts")] = False,
) -> None:
    """Quality and time of answers over passages that were learned apart and joined, beside a full prefill."""
    from loadtest import bench_join
    from loadtest.bench_join.measure import measure

    few = (bench_join.QUICK_CONTEXTS, bench_join.QUICK_RETRIEVALS)
    many = (bench_join.DEFAULT_CONTEXTS, bench_join.DEFAULT_RETRIEVALS)
    num_contexts, num_retrievals = few if quick else many
    with tempfile.TemporaryDirectory(prefix="learnonce-bench-join-") as scratch:
        settings = bench_join.JoinBenchSettings(
            model=provide_model(model),
            data=data,
            plots=plots,
            work=work or Path(scratch),
            num_contexts=num_contexts if contexts is None else contexts,
            num_retrievals=num_retrievals if retrievals is None else retrievals,
            seed=seed,
        )
        content = measure(settings, log=_note)
    _report(json_file, content)


@bench.command()
def soak(
    json_file: Annotated[Path, typer.Option("--json", help="Where to write the result")],
    minutes: Annotated[float, typer.Option(min=0.05, help="How long")] = 30.0,
) -> None:
    """A mixed load over every tier of two stores at their capacity: nothing may be wrong, grow or be left."""
    from loadtest.results import result
    from loadtest.soak_store import soak as run_soak

    report = run_soak(seconds=60.0 * minutes, log=_note)
    detail = {
        "operations": dict(sorted(report.operations.items())),
        "problems": [*report.mismatches, *report.errors][:100],
        "tiers": report.tiers,
    }
    _report(json_file, result(report.figures(), **detail))
    if report.mismatches or report.errors:
        raise typer.Exit(1)


def _report(json_file: Path, content: dict[str, Any]) -> None:
    write_result(json_file, content)
    table = Table("figure", "value")
    for name, value in content["figures"].items():
        table.add_row(name, f"{value:.4g}")
    out.print(table)
    out.print(f"written to {json_file}")


def _note(text: str) -> None:
    sys.stderr.write(f"{text}\n")
