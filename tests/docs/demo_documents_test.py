"""The demo's documents: questions can be answered by copying, and the set fits the embedded model.

Covers: `cluster/demo_documents/`. Does not cover: what the model answers (`learnonce demo`).
"""

import json
import re
from pathlib import Path

import pytest

from cluster.demo import load_documents, load_questions

FOLDER = Path(__file__).resolve().parents[2] / "cluster" / "demo_documents"
QUESTIONS = json.loads((FOLDER / "questions.json").read_text(encoding="utf-8"))
MODEL_POSITIONS = 8192
WORDS_TO_TOKENS = 1.4
"""At least as many tokens per word as the embedded model's tokenizer makes of these texts (measured: 1.31)."""


def test_there_are_four_documents_and_a_question_for_each() -> None:
    names = {path.name for path in FOLDER.glob("*.md")}
    assert len(names) == 4
    assert names <= {item["document"] for item in QUESTIONS}


@pytest.mark.parametrize("item", QUESTIONS, ids=lambda item: item["question"])
def test_the_answer_stands_in_the_document(item: dict[str, str]) -> None:
    assert set(item) == {"document", "question", "expects"}
    text = " ".join((FOLDER / item["document"]).read_text(encoding="utf-8").split())
    assert item["expects"] in text
    assert item["expects"] not in item["question"]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.md")), ids=lambda path: path.name)
def test_a_document_is_long_enough_to_show_something(path: Path) -> None:
    num_words = len(path.read_text(encoding="utf-8").split())
    assert 900 <= num_words <= 1400


def test_all_documents_together_fit_the_embedded_model() -> None:
    num_words = sum(len(document["text"].split()) for document in load_documents().values())
    assert num_words * WORDS_TO_TOKENS < MODEL_POSITIONS - 512


def test_documents_are_plain_text_that_no_template_trips_over() -> None:
    for path in FOLDER.glob("*.md"):
        text = path.read_text(encoding="utf-8")
        assert text.isascii()
        assert not re.search(r"<\|.*\|>", text)
        assert max(map(len, text.splitlines())) <= 120


def test_the_demo_reads_what_ships() -> None:
    questions = load_questions()
    assert [question.text for question in questions] == [item["question"] for item in QUESTIONS]
    assert all(question.document for question in questions)
    assert all(document["title"] and document["text"] for document in load_documents().values())
