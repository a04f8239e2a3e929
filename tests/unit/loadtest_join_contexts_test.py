"""Contexts of `learnonce bench join` on a tokenizer of letters.

Covers: passages of each source, their lengths and order, what is learned, chunks, the look-up task.
Does not cover: real texts, rendering itself (`router_segments_test`).
"""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvstore.keys import KvScope
from kvstore.wire import SpanKind
from loadtest.bench_join.contexts import (
    PASSAGE_TOKENS,
    PASSAGES,
    RETRIEVAL,
    Context,
    cut,
    document_spans,
    read_contexts,
)
from loadtest.data import DataMissingError
from router.tokenizer import ModelTokenizer

_WORDS = ["of", "the", "river", "town", "old", "and", "year", "which", "was", "built", "by", "king", "in", "a"]
_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
_SCOPE = KvScope(
    model_digest="00", compute_dtype="float32", kv_dtype="float32", num_layers=1, num_kv_heads=1, head_dim=2, rope="{}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A token for every letter, and a chat template."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0} | {chr(at): at for at in range(1, 400)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", chat_template=_TEMPLATE).save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(4)

    def prose(num_words: int) -> str:
        return " ".join(draw.choices(_WORDS, k=num_words))

    # Every third passage is shorter than any context may have.
    pool = [{"chunk_id": at, "title": f"T{at}", "text": prose(5 if at % 3 == 0 else 60)} for at in range(60)]
    requests = [
        {"id": f"r{at}", "question": f"question {at % 20}", "chunk_ids": draw.sample(range(60), 10), "gold": at % 10}
        for at in range(40)
    ]
    articles = [
        {
            "id": f"x{article} {gold}",
            "question": f"what about {article} {gold}",
            "chunks": [{"title": f"Article_{article}", "text": f"a{article} p{at} {prose(40)}"} for at in range(5)],
            "gold": gold,
        }
        for article in range(12)
        for gold in range(5)
    ]
    lookups = [{"ordered_kv_records": [[f"k{r}-{n}", f"v{r}-{n}"] for n in range(40)]} for r in range(3)]
    files: dict[str, list[dict[str, Any]]] = {
        "a_qa_nq_zipf_passages": pool,
        "a_qa_nq_zipf_requests": requests,
        "a_qa_xquad_en_1190": articles,
        "b_long_moby_dick": [{"text": prose(20000)}],
        "b_kv_retrieval_75_100": lookups,
    }
    for name, rows in files.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


@pytest.fixture(scope="module")
def contexts(data: Path, model: str) -> list[Context]:
    return read_contexts(data, model=model, num_contexts=12, num_retrievals=3, seed=5)


def passages_of(context: Context) -> list[tuple[int, ...]]:
    return [tuple(map(int, each.ids)) for each in context.prompt.segments if each.kind is SpanKind.PASSAGE]


def test_every_source_has_its_turn(contexts: list[Context]) -> None:
    kinds = [context.kind for context in contexts]
    assert kinds == ["requests", "articles", "novel", "two questions"] * 3 + [RETRIEVAL] * 3
    assert len({context.name for context in contexts}) == len(contexts)


def test_contexts_have_few_passages_of_ragged_lengths(contexts: list[Context]) -> None:
    lengths = []
    for context in contexts[:12]:
        passages = passages_of(context)
        assert PASSAGES[0] <= len(passages) <= PASSAGES[1]
        assert len(set(passages)) == len(passages)
        lengths += [len(each) for each in passages]
    # Titles and line breaks come on top.
    assert PASSAGE_TOKENS[0] <= min(lengths)
    assert max(lengths) <= PASSAGE_TOKENS[1] + 40
    assert len(set(lengths)) > len(lengths) // 3


def test_generated_contexts_need_no_folder(model: str) -> None:
    found = read_contexts(None, model=model, num_contexts=2, num_retrievals=1, seed=5)
    assert [context.kind for context in found] == ["generated", "generated", RETRIEVAL]
    assert all(PASSAGES[0] <= len(passages_of(context)) <= PASSAGES[1] for context in found)
    assert set(passages_of(found[0])).isdisjoint(passages_of(found[1]))


def test_the_seed_decides(data: Path, model: str, contexts: list[Context]) -> None:
    again = read_contexts(data, model=model, num_contexts=12, num_retrievals=3, seed=5)
    other = read_contexts(data, model=model, num_contexts=12, num_retrievals=3, seed=6)
    assert [each.ids for each in again] == [each.ids for each in contexts]
    assert all(one.ids != another.ids for one, another in zip(contexts, other, strict=True))


def test_more_contexts_begin_with_the_same_ones(data: Path, model: str, contexts: list[Context]) -> None:
    fewer = read_contexts(data, model=model, num_contexts=5, num_retrievals=3, seed=5)
    assert [each.ids for each in fewer[:5]] == [each.ids for each in contexts[:5]]


def test_a_folder_without_the_texts_is_named(tmp_path: Path, model: str) -> None:
    with pytest.raises(DataMissingError, match=str(tmp_path)):
        read_contexts(tmp_path, model=model, num_contexts=1, num_retrievals=0, seed=1)


def test_passages_are_learned_alone_and_found_by_the_same_names(contexts: list[Context]) -> None:
    context = contexts[1]
    learned = {}
    for prompt in context.alone():
        anchor, passage = document_spans(prompt, scope=_SCOPE, salt="")
        assert (anchor.start, passage.start, passage.stop) == (0, anchor.stop, prompt.num_tokens)
        learned[passage.key] = passage
    joined = document_spans(context.prompt, scope=_SCOPE, salt="")[1:]
    assert [span.passage_key for span in joined] == list(learned)
    # Only the first stands where it was learned.
    assert [span.passage_key == span.key for span in joined] == [True] + [False] * (len(joined) - 1)
    assert {span.base for span in joined} == {joined[0].start}
    assert joined[-1].stop == context.tail_start


def test_the_lookup_task_asks_for_one_record_behind_another(contexts: list[Context], model: str) -> None:
    for index, context in enumerate(contexts[12:]):
        text = "".join(chr(token) for token in context.ids)
        answer = "".join(chr(token) for token in context.answer)
        prompt, _, asked = text.rpartition("\n")
        key = asked.removesuffix(" =")
        assert answer == f" v{index}-{key.rpartition('-')[2]}"
        example = prompt.rpartition("<assistant>")[2]
        assert f"{key} ={answer}" in prompt.partition("<assistant>")[0]
        assert example in prompt.partition("<user>")[0]
        assert example != f"{key} ={answer}"


def test_a_cut_text_ends_with_a_word_and_keeps_what_it_must(model: str) -> None:
    tokenizer = ModelTokenizer(model, cache_tokens=1000)
    assert cut("one two three", num_tokens=9, tokenizer=tokenizer) == "one two"
    assert cut("one two three", num_tokens=90, tokenizer=tokenizer) == "one two three"
    assert cut("one two three four", num_tokens=3, tokenizer=tokenizer, keep="one two three") == "one two three"
