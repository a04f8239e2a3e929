"""Documents for the quality protocol: long, of several kinds, none of them used in calibration.

Covers: reading, cutting and joining; which document is which. Does not cover: the texts themselves, except generated
German (`loadtest.bench_codec.german`); they lie beside the project (`--data`), or are installed with Python.

Calibration takes its text from elsewhere: a novel's first half, other passages. Here stand second halves only.
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cluster.errors import CallerError
from loadtest.bench_codec.german import german_text
from loadtest.data import ARTICLES, NOVEL, PASSAGES, data_folder, data_rows

_KINDS: Final = ("novel", "code", "passages", "german", "articles", "novel", "code", "novel")
"""One round of documents; more are further pieces in the same order."""
_MODULES: Final = ("tarfile", "typing", "doctest", "smtplib", "pdb", "mailbox", "turtle", "optparse")
"""Modules of the standard library: code that is installed everywhere."""
_CALIBRATION_MODULE: Final = "argparse"
_CHARS_PER_TOKEN: Final = 6
"""More than any of these texts has, so that every cut holds enough tokens."""

Tokenize = Callable[[str], list[int]]


class TextTooShortError(CallerError):
    """A text has fewer tokens than the longest context needs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """One text as token ids."""

    name: str
    kind: str
    ids: tuple[int, ...]


def read_documents(data: Path | None, *, count: int, num_tokens: int, tokenize: Tokenize) -> list[Document]:
    """`count` documents of exactly `num_tokens` tokens.

    Raises:
        DataMissingError: There is no data folder, or a file is missing in it.
        TextTooShortError: A text does not have so many tokens.
    """
    folder = data_folder(data)
    num_chars = _CHARS_PER_TOKEN * num_tokens
    makers: dict[str, Iterator[tuple[str, str]]] = {
        "novel": _novel(folder, num_chars),
        "code": _code(num_chars),
        "passages": _joined(_texts_of(folder / PASSAGES, first_half=False), "nq passages", num_chars),
        "german": ((f"generated german {seed}", german_text(num_chars, seed=seed)) for seed in itertools.count(1)),
        "articles": _joined(_texts_of(folder / ARTICLES, first_half=False), "xquad articles", num_chars),
    }
    documents = []
    for kind in itertools.islice(itertools.cycle(_KINDS), count):
        name, text = next(makers[kind], ("", ""))
        ids = tokenize(text)[:num_tokens]
        if len(ids) < num_tokens:
            raise TextTooShortError(f"{kind} {name!r} has {len(ids)} tokens, {num_tokens} are needed: ask for fewer")
        documents.append(Document(name=name, kind=kind, ids=tuple(ids)))
    return documents


def calibration_documents(data: Path | None, *, num_tokens: int, tokenize: Tokenize) -> list[Document]:
    """Text for calibrating a baseline: the same kinds, from first halves and modules that no document is made of.

    Raises:
        DataMissingError: There is no data folder, or a file is missing in it.
        TextTooShortError: A text does not have so many tokens.
    """
    folder = data_folder(data)
    num_chars = _CHARS_PER_TOKEN * num_tokens
    novel = str(next(data_rows(folder / NOVEL))["text"])
    texts = {
        "novel": novel[len(novel) // 8 :][:num_chars],
        "code": _module_text(_CALIBRATION_MODULE) or "",
        "passages": "\n\n".join(_texts_of(folder / PASSAGES, first_half=True))[:num_chars],
        "articles": "\n\n".join(_texts_of(folder / ARTICLES, first_half=True))[:num_chars],
    }
    documents = []
    for kind, text in texts.items():
        ids = tokenize(text[:num_chars])[:num_tokens]
        if len(ids) < num_tokens:
            raise TextTooShortError(f"{kind} for calibration has {len(ids)} tokens, {num_tokens} are needed")
        documents.append(Document(name=f"{kind}, first half", kind=kind, ids=tuple(ids)))
    return documents


def installed_document(*, num_tokens: int, tokenize: Tokenize) -> Document:
    """A document that needs no folder of texts: Python's own code.

    Raises:
        TextTooShortError: No module of the standard library is so long.
    """
    name, text = next(_code(_CHARS_PER_TOKEN * num_tokens), ("", ""))
    ids = tokenize(text)[:num_tokens]
    if len(ids) < num_tokens:
        raise TextTooShortError(f"{name!r} has {len(ids)} tokens, {num_tokens} are needed")
    return Document(name=name, kind="code", ids=tuple(ids))


def _novel(folder: Path, num_chars: int) -> Iterator[tuple[str, str]]:
    """Pieces of the second half, each from the start of a paragraph, spread so that few documents do not overlap."""
    text = str(next(data_rows(folder / NOVEL))["text"])
    half = len(text) // 2
    slots = max(1, half // num_chars)
    # Far pieces first: 0, slots/2, slots/4, ...
    for slot in sorted(range(slots), key=lambda index: (_reversed_bits(index), index)):
        start = text.find("\n\n", half + slot * num_chars)
        yield f"novel at {start}", text[start:].lstrip()[:num_chars]


def _reversed_bits(index: int) -> int:
    return int(f"{index:016b}"[::-1], 2)


def _code(num_chars: int) -> Iterator[tuple[str, str]]:
    for module in _MODULES:
        text = _module_text(module)
        if text is not None and len(text) >= num_chars // 2:
            yield f"python module {module}", text


def _module_text(module: str) -> str | None:
    """Source of a module of the standard library, if it is installed as such."""
    found = importlib.util.find_spec(module)
    return None if found is None or found.origin is None else Path(found.origin).read_text(encoding="utf-8")


def _texts_of(path: Path, *, first_half: bool) -> list[str]:
    """Distinct passages of one half of a file's rows; those that both halves have belong to the first."""
    rows = list(data_rows(path))
    half = len(rows) // 2
    first, second = (
        [f"{each['title']}\n{each['text']}" for row in part for each in row["chunks"]]
        for part in (rows[:half], rows[half:])
    )
    known = set(first)
    return _unique(first if first_half else [text for text in second if text not in known])


def _unique(texts: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _joined(texts: Sequence[str], name: str, num_chars: int) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(texts):
        first, have = at, 0
        while at < len(texts) and have < num_chars:
            have += len(texts[at]) + 2
            at += 1
        yield f"{name} {first} to {at - 1}", "\n\n".join(texts[first:at])
