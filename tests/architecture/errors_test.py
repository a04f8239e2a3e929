"""Errors cross processes: every class of ours survives pickling with its message and attributes.

Covers: every subclass of `LearnonceError` in the packages (docs/adr/0005-errors-across-processes.md).
Does not cover: which error is raised when, or its HTTP status.
"""

import ast
import importlib
import inspect
import io
import pickle
import types
import typing
import warnings
from pathlib import Path

import pytest

from cluster.errors import CallerError, DataError, InvariantError, LearnonceError, UnavailableError

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("cluster", "router", "prefill_workers", "decode_workers", "kvstore", "loadtest")
KINDS = (CallerError, UnavailableError, DataError, InvariantError)


def declared() -> list[str]:
    """Dotted names of all error classes of the packages, without importing anything."""
    bases_by_name: dict[str, tuple[str, set[str]]] = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef):
                    bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
                    bases_by_name[f"{module}.{node.name}"] = (node.name, bases)
    ours = {"LearnonceError"}
    while more := {name for name, bases in bases_by_name.values() if bases & ours} - ours:
        ours |= more
    return sorted(path for path, (name, _) in bases_by_name.items() if name in ours)


def error_class(path: str) -> type[LearnonceError]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Ray and vLLM while they are imported
        found = getattr(importlib.import_module(path.rpartition(".")[0]), path.rpartition(".")[2])
    assert issubclass(found, LearnonceError)
    return found


def sample(annotation: object, name: str) -> object:
    """A value of a parameter's type that no default equals."""
    options = typing.get_args(annotation) if _is_union(annotation) else (annotation,)
    values = {str: f"a {name}", int: 423, float: 9.25, bytes: b"\x01" * 32, bool: True}
    for option in options:
        if option in values:
            return values[option]
    raise AssertionError(f"parameter {name} has type {annotation}: errors carry plain values")


def _is_union(annotation: object) -> bool:
    return typing.get_origin(annotation) in (typing.Union, types.UnionType)


def make(cls: type[LearnonceError]) -> LearnonceError:
    if cls.__init__ is Exception.__init__:
        return cls("a message")
    parameters = inspect.signature(cls).parameters.values()
    hints = typing.get_type_hints(cls.__init__)
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters), "errors take positional arguments only"
    return cls(*(sample(hints[p.name], p.name) for p in parameters))


def round_trip(error: LearnonceError) -> object:
    return pickle.Unpickler(io.BytesIO(pickle.dumps(error))).load()


@pytest.mark.parametrize("path", declared())
def test_an_error_survives_pickling(path: str) -> None:
    error = make(error_class(path))
    again = round_trip(error)
    assert type(again) is type(error)
    assert str(again) == str(error)
    assert again.args == error.args
    assert vars(again) == vars(error)


@pytest.mark.parametrize("path", declared())
def test_an_error_has_no_class_defaults_that_hide_attributes(path: str) -> None:
    """Ray copies attributes from the cause only where the class has none of that name."""
    error = make(error_class(path))
    assert not {name for name in vars(error) if hasattr(type(error), name)}


@pytest.mark.parametrize("path", declared())
def test_an_error_says_what_its_caller_does_next(path: str) -> None:
    cls = error_class(path)
    assert cls is LearnonceError or issubclass(cls, KINDS)
    assert cls.__name__.endswith("Error")


def test_pickling_loses_what_a_keyword_only_argument_carried() -> None:
    """Why the rule exists: the shape that it forbids does not come back."""

    class KeywordError(LearnonceError):
        def __init__(self, message: str, *, tier: str) -> None:
            super().__init__(message)
            self.tier = tier

    rebuild, args = KeywordError("gone", tier="host").__reduce__()[:2]
    with pytest.raises(TypeError, match="tier"):
        rebuild(*args)
