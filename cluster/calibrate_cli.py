"""`learnonce calibrate`: make a profile for the `transform` codec.

Covers: reading text, showing progress, writing the file. Does not cover: the work (`kvstore.codecs.calibrate`).
"""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from cluster.errors import CallerError
from cluster.model import EMBEDDED_MODEL, provide_model

_PARTS = {
    "queries": "reading queries",
    "reading": "reading KV",
    "transforms": "fitting transforms",
    "trials": "choosing the step",
    "tables": "counting symbols",
}


class CalibrationTextError(CallerError):
    """A file that is no text to calibrate on, or a place where the profile cannot be written."""


def calibrate(
    text: Annotated[list[Path], typer.Option("--text", help="A text file, of a kind the model will be asked about")],
    out: Annotated[Path, typer.Option("--out", help="Where to write the profile, for example model.lkp")],
    model: Annotated[str, typer.Option(help="The model: a folder, or the embedded one by name")] = EMBEDDED_MODEL,
    pieces: Annotated[int, typer.Option(min=6, help="Pieces of 1,920 tokens to read, of all texts in turn")] = 24,
    target_kl: Annotated[float, typer.Option(min=1e-5, help="KL divergence that the middle level may cause")] = 0.008,
    groups: Annotated[int, typer.Option(min=1, help="Head groups: the largest tensor-parallel size in use")] = 1,
    name: Annotated[str | None, typer.Option(help="The model's name in the profile")] = None,
) -> None:
    """Measure a model's KV on some texts, and write a profile with which the codec `transform` stores it small.

    Name texts of every kind that is to be served (--text is repeatable): a profile is as good as they are alike.
    Minutes for the embedded model; memory for the KV of all pieces.
    """
    texts = [_read(path) for path in text]
    _check_writable(out)
    # It imports torch and transformers: seconds that no other command has to wait.
    from kvstore.codecs.calibrate import CalibrationSettings
    from kvstore.codecs.calibrate import calibrate as make

    settings = CalibrationSettings(num_pieces=pieces, target_kl=target_kl, groups=groups)
    folder = Path(provide_model(model))
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description:20}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        tasks = {part: progress.add_task(words, total=None, start=False) for part, words in _PARTS.items()}

        def show(part: str, done: int, total: int) -> None:
            if done == 0:
                progress.start_task(tasks[part])
            progress.update(tasks[part], completed=done, total=total)

        profile = make(folder, texts, settings=settings, name=name or folder.name, on_progress=show)
    _write(out, profile.to_bytes())
    console.print(f"{out}: profile {profile.id[:12]}, {len(profile.to_bytes()) / 1e6:.1f} MB")
    for what, value in sorted(profile.notes.items()):
        console.print(f"{what}: {value}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationTextError(f"{path} cannot be read as UTF-8 text: {error}") from error


def _check_writable(path: Path) -> None:
    """Before minutes of work."""
    if not path.parent.is_dir():
        raise CalibrationTextError(f"{path.parent} is no folder: make it, or name another file with --out")
    if path.is_dir():
        raise CalibrationTextError(f"{path} is a folder: name a file in it with --out")
    temporary = _temporary(path)
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise CalibrationTextError(f"{path} cannot be written, name another file with --out: {error}") from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    temporary = _temporary(path)
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CalibrationTextError(f"{path} cannot be written: {error}") from error
