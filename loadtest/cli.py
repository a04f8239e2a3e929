"""`learnonce bench`: benchmarks that write result files.

Covers: the command line. Does not cover: the measuring (one module per benchmark).
"""

import asyncio
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cluster.settings import read_settings
from loadtest.results import write_result

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
    write_result(json_file, content)
    table = Table("figure", "value")
    for name, value in content["figures"].items():
        table.add_row(name, f"{value:.4g}")
    out.print(table)
    out.print(f"written to {json_file}")


def _note(text: str) -> None:
    sys.stderr.write(f"{text}\n")
