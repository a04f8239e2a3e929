"""The demonstration: what learning a passage once is worth, on this machine, with a real model.

Covers: `learnonce demo`. Does not cover: figures to quote (`learnonce bench ttft` repeats and takes medians).
"""

import json
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster import client
from cluster.settings import Settings

_MAX_ANSWER_TOKENS: Final = 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question and the document it is asked about."""

    document: client.Document
    text: str
    expects: str
    """A short string that a right answer contains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One question asked twice: with nothing learned, and after learning."""

    question: Question
    cold: client.Answer
    warm: client.Answer


def run_demo(
    settings: Settings,
    *,
    keep: bool,
    console: Console,
    start: Callable[[Settings], str],
    stop: Callable[[Settings], None],
) -> list[Row]:
    """Start a cluster, learn, ask, print, stop; every question with its two answers.

    Args:
        settings: Of the cluster to start.
        keep: Leave the cluster running.
        console: Where to print.
        start: Starts the cluster and returns its URL.
        stop: Stops it.
    """
    url = start(settings)
    try:
        questions = load_questions()
        _learn_all(url, console)
        rows = [_ask_twice(url, question, console) for question in questions]
        console.print(result_table(rows))
        console.print(
            "Cold: nothing learned, the prefill replica computes the prompt. Warm: its documents were learned by the "
            "prefill replica,\nthe decode replica loads their KV from the node store. Same model, same cores, same "
            "answers up to the engine's rounding."
        )
    finally:
        if not keep:
            stop(settings)
    if keep:
        console.print(f"The cluster is still up at {url}/v1; `learnonce down` stops it.")
    else:
        console.print(
            "To keep a cluster up: `.venv/bin/learnonce up` (or `learnonce demo --keep`); `learnonce down` stops it."
        )
    return rows


def load_documents() -> dict[str, client.Document]:
    """The documents that ship with the project, by file name."""
    folder = files("cluster") / "demo_documents"
    pages = sorted((page for page in folder.iterdir() if page.name.endswith(".md")), key=lambda page: page.name)
    return {page.name: _as_document(page.read_text(encoding="utf-8")) for page in pages}


def load_questions() -> list[Question]:
    """The questions that ship with the documents."""
    documents = load_documents()
    text = (files("cluster") / "demo_documents" / "questions.json").read_text(encoding="utf-8")
    return [
        Question(
            document=documents[item["document"]],
            text=item["question"],
            expects=item["expects"],
        )
        for item in json.loads(text)
    ]


def _as_document(page: str) -> client.Document:
    """A Markdown page: its first heading is the title."""
    heading, _, text = page.partition("\n")
    return {"title": heading.lstrip("# ").strip(), "text": text.strip()}


def _learn_all(url: str, console: Console) -> None:
    console.print("\n[bold]Learning[/bold]: each document is prefilled once and its KV put into the node store")
    for document in load_documents().values():
        with console.status(f"learning {document['title']}"):
            (learned,) = client.learn(url, [document])
        console.print(
            f"  {escape(document['title'])}: {learned['tokens']} tokens, {learned['state'].replace('_', ' ')}, "
            f"{learned['seconds']:.1f} s"
        )


def _ask_twice(url: str, question: Question, console: Console) -> Row:
    console.print(f"\n[bold]{escape(question.text)}[/bold]")
    # A salt of its own shares no KV with anything: this is what the request costs without learning.
    with console.status("asking with nothing learned"):
        cold = client.ask(
            url,
            question.text,
            documents=[question.document],
            max_tokens=_MAX_ANSWER_TOKENS,
            cache_salt=secrets.token_hex(8),
        )
    warm = client.ask(
        url,
        question.text,
        documents=[question.document],
        max_tokens=_MAX_ANSWER_TOKENS,
        on_text=lambda text: console.print(escape(text), end=""),
    )
    console.print()
    return Row(question=question, cold=cold, warm=warm)


def result_table(rows: Sequence[Row]) -> Table:
    """The table that the demo ends with."""
    table = Table(title="\nTime to first token (TTFT) through the HTTP API", title_justify="left", box=SIMPLE_HEAD)
    table.add_column("question and answer", overflow="fold", ratio=1)
    for name in ("prompt\ntokens", "tokens\nreused", "TTFT\ncold", "TTFT\nwarm", "speed-up"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{escape(row.question.text)}\n[italic]{escape(' '.join(row.warm.text.split()))}[/italic]",
            f"{row.warm.prompt_tokens:,}",
            f"{row.warm.cached_tokens:,}",
            f"{row.cold.ttft_s:.2f} s",
            f"{row.warm.ttft_s:.3f} s",
            f"{row.cold.ttft_s / row.warm.ttft_s:.0f} x",
        )
    return table
