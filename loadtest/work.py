"""What a run of the benchmark has finished already: a later run in the same folder goes on from there.

Covers: rows of results, exact KV and log probabilities of documents. Does not cover: computing them.

Rows count only for the code, the profiles and the choices that made them: other code starts anew. References depend
on model and token ids alone.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from safetensors.torch import load_file, save_file

_SOURCES: Final = (".py", ".lkp")


class Work:
    """A folder of finished work. One process at a time; what a killed run left half written is computed again."""

    def __init__(self, folder: Path, *, fingerprint: str) -> None:
        """`fingerprint`: of all that rows depend on, see `code_fingerprint`."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._path = folder / f"rows-{fingerprint[:16]}.jsonl"
        self._rows = list(_read_rows(self._path))
        # Without what a killed run left of a line: the next row must stand on a line of its own.
        self._path.write_text("".join(map(_line, self._rows)), encoding="utf-8")

    def rows(self, **wanted: Any) -> list[dict[str, Any]]:
        """Finished rows with these values."""
        return [row for row in self._rows if all(row.get(name) == value for name, value in wanted.items())]

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep one finished row."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line(row))
        self._rows.append(dict(row))

    def load_reference(self, name: str) -> dict[str, torch.Tensor] | None:
        """Tensors kept under a name (`reference_name`), or None."""
        path = self._folder / f"{name}.safetensors"
        return load_file(path) if path.is_file() else None

    def save_reference(self, name: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Keep tensors; all of them or none."""
        path = self._folder / f"{name}.safetensors"
        unfinished = path.with_suffix(".unfinished")
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, unfinished)
        unfinished.replace(path)

    @staticmethod
    def write_whole(path: Path, data: bytes) -> None:
        """Write a file that is there whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_bytes(data)
        unfinished.replace(path)

    def drop_reference(self, name: str) -> None:
        """Forget tensors: hundreds of megabytes per document."""
        (self._folder / f"{name}.safetensors").unlink(missing_ok=True)


def _read_rows(path: Path) -> Iterable[dict[str, Any]]:
    if not path.is_file():
        return
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return  # the last line of a killed run


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(dict(row)) + "\n"


def code_fingerprint(*choices: Any, packages: Sequence[ModuleType]) -> str:
    """SHA-256 over packages (code and profiles), torch's version, and choices that change rows."""
    digest = hashlib.sha256(repr((version("torch"), version("transformers"), choices)).encode())
    for package in packages:
        for path in sorted(Path(str(package.__file__)).parent.rglob("*")):
            if path.suffix in _SOURCES:
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def reference_name(model: str, ids: Iterable[int], contexts: Iterable[int]) -> str:
    """Name of one text's exact KV and log probabilities."""
    config = (Path(model) / "config.json").read_bytes() if Path(model).is_dir() else model.encode()
    words = repr((tuple(ids), tuple(contexts), version("torch"), version("transformers")))
    return "reference-" + hashlib.sha256(config + words.encode()).hexdigest()[:16]
