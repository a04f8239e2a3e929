"""Which chunks a stream of requests reads, in order: from public traces, or from seeded generators.

Covers: traces in the formats of RAGPulse, Mooncake and the Natural Questions mix, by the fields of their first row.
Does not cover: arrival times, outputs, texts; synthetic streams (`loadtest.workloads`).

Traces are never part of this project: a path names the file, JSON lines, gzip or plain.
"""

import gzip
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cluster.errors import CallerError
from kvstore.keys import ChunkKey

MOONCAKE_BLOCK_TOKENS: Final = 512
"""Tokens of one `hash_ids` block."""
_CHARACTERS_PER_TOKEN: Final = 4.4
"""Of English prose, for traces that have texts instead of counts; only sizes the chunks."""
_STORED_KINDS: Final = frozenset({"sys_prompt", "passage", "history", "web_search"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """A run of a request's tokens that is a chunk."""

    key: ChunkKey
    num_tokens: int
    position: int
    """Of its first token in this request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One request as a store sees it."""

    prefix: tuple[Span, ...] = ()
    """Chunks that are of use only if all before them are there."""
    passages: tuple[Span, ...] = ()
    """Chunks that are of use by themselves."""
    other_tokens: int = 0
    """Tokens that are never stored."""
    tenant: str = ""

    @property
    def num_tokens(self) -> int:
        """All tokens of the prompt."""
        return sum(span.num_tokens for span in (*self.prefix, *self.passages)) + self.other_tokens


class TraceFormatError(CallerError):
    """The file is none of the known traces."""


def read_trace(path: Path) -> list[Request]:
    """Read a whole trace.

    Raises:
        TraceFormatError: Its rows have none of the known shapes.
        OSError: It cannot be read.
    """
    rows = list(_rows(path))
    if not rows:
        raise TraceFormatError(f"{path} has no rows")
    fields = set(rows[0])
    if "segments" in fields:
        return [_ragpulse_request(row) for row in rows]
    if "hash_ids" in fields:
        return [_mooncake_request(row) for row in rows]
    if "chunk_ids" in fields:
        sizes = {row["chunk_id"]: _num_tokens(f"{row['title']} {row['text']}") for row in _rows(_passages_path(path))}
        return [_question_request(row, sizes) for row in rows]
    raise TraceFormatError(
        f"{path} has rows with the fields {', '.join(sorted(fields))}; expected segments (RAGPulse), hash_ids "
        "(Mooncake) or chunk_ids (questions over a pool of passages)"
    )


def trace_key(*parts: object) -> ChunkKey:
    """A key for a name in a trace."""
    return ChunkKey(hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=32).digest())


def _ragpulse_request(row: dict[str, Any]) -> Request:
    """System segments are a chain; passages, histories and results of a search count wherever they stand."""
    prefix: list[Span] = []
    passages: list[Span] = []
    position = 0
    seen: set[ChunkKey] = set()
    for kind, name, num_tokens in row["segments"]:
        chain = prefix[-1].key.hex() if prefix and kind == "sys_prompt" else ""
        span = Span(key=trace_key(kind, chain, name), num_tokens=num_tokens, position=position)
        if kind in _STORED_KINDS and num_tokens > 0 and span.key not in seen:
            (prefix if kind == "sys_prompt" else passages).append(span)
            seen.add(span.key)
        position += num_tokens
    stored_tokens = sum(span.num_tokens for span in (*prefix, *passages))
    return Request(
        prefix=tuple(prefix), passages=tuple(passages), other_tokens=max(0, row["input_tokens"] - stored_tokens)
    )


def _mooncake_request(row: dict[str, Any]) -> Request:
    """Blocks of a prompt; a name stands for everything up to its block."""
    left_tokens: int = row["input_length"]
    spans: list[Span] = []
    for index, name in enumerate(row["hash_ids"]):
        num_tokens = min(MOONCAKE_BLOCK_TOKENS, left_tokens)
        if num_tokens <= 0:
            break
        spans.append(Span(key=trace_key(name), num_tokens=num_tokens, position=index * MOONCAKE_BLOCK_TOKENS))
        left_tokens -= num_tokens
    return Request(prefix=tuple(spans), other_tokens=left_tokens)


def _question_request(row: dict[str, Any], sizes: dict[int, int]) -> Request:
    names = list(dict.fromkeys(row["chunk_ids"]))
    starts = itertools.accumulate((sizes[name] for name in names), initial=0)
    passages = [
        Span(key=trace_key(name), num_tokens=sizes[name], position=start)
        for name, start in zip(names, starts, strict=False)
    ]
    return Request(passages=tuple(passages), other_tokens=_num_tokens(row["question"]))


def _num_tokens(text: str) -> int:
    return max(1, round(len(text) / _CHARACTERS_PER_TOKEN))


def _passages_path(path: Path) -> Path:
    beside = path.with_name(path.name.replace("_requests", "_passages"))
    if beside == path:
        raise TraceFormatError(f"{path} names passages by number; expected …_requests…, with …_passages… beside it")
    return beside


def _rows(path: Path) -> Iterable[dict[str, Any]]:
    def lines() -> Iterator[dict[str, Any]]:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)

    return lines()
