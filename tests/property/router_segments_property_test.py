"""What must hold for every request: concatenation, stable keys, passages that do not depend on their place.

Covers: `router.segments` and `router.tokenizer` under generated requests.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.router_fakes import SCOPE, make_tokenizer

from kvstore.wire import SpanKind
from router.body import Endpoint, parse_request
from router.segments import Prompt, Segmenter, cut_spans
from router.settings import SpanSettings, TemplateSettings
from router.tokenizer import ModelTokenizer, TokenCache

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(lambda t: bool(t.strip()))
DOCUMENT = st.builds(
    lambda text, title: {"text": text} | ({"title": title} if title else {}),
    TEXT,
    st.none() | st.text("ab {}", max_size=8),
)
SPANS = SpanSettings(exact_chunk_tokens=8, max_chunk_tokens=40)
FEW = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ModelTokenizer:
    return make_tokenizer(Path(tmp_path_factory.mktemp("tokenizer")))


def segment(tokenizer: ModelTokenizer, documents: list[dict[str, str]], *, system: str, question: str) -> Prompt:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    body: dict[str, Any] = {"messages": messages, "documents": documents}
    request = parse_request(body, endpoint=Endpoint.CHAT, served_model="m", max_documents=99)
    return Segmenter(tokenizer, template=TemplateSettings()).segment(request, max_model_len=1 << 20)


@FEW
@given(documents=st.lists(DOCUMENT, min_size=1, max_size=5), system=TEXT, question=TEXT)
def test_the_prompt_is_the_concatenation_of_its_segments(
    tokenizer: ModelTokenizer, documents: list[dict[str, str]], system: str, question: str
) -> None:
    prompt = segment(tokenizer, documents, system=system, question=question)
    assert prompt.ids.tolist() == [i for s in prompt.segments for i in s.ids.tolist()]
    spans = cut_spans(prompt, scope=SCOPE, salt="", settings=SPANS)
    assert [s.start for s in spans] == [0, *(s.stop for s in spans[:-1])]
    assert spans[-1].stop == prompt.num_tokens
    text = tokenizer._tokenizer.decode(prompt.ids)
    passages = [Segmenter(tokenizer, template=TemplateSettings()).passage_text(d) for d in _documents(documents)]
    assert text == (
        f"<|im_start|>system\n{system}{''.join(passages)}<|im_end|>\n"
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )


def _documents(entries: list[dict[str, str]]) -> Any:
    body = {"messages": [{"role": "user", "content": "x"}], "documents": entries}
    return parse_request(body, endpoint=Endpoint.CHAT, served_model="m", max_documents=99).documents


@FEW
@given(documents=st.lists(DOCUMENT, min_size=2, max_size=5), data=st.data())
def test_a_passages_tokens_do_not_depend_on_its_place(
    tokenizer: ModelTokenizer, documents: list[dict[str, str]], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(documents))))
    there = segment(tokenizer, documents, system="s", question="q")
    here = segment(tokenizer, [documents[i] for i in order], system="another system", question="another question")
    ids = [s.ids for s in there.segments if s.kind is SpanKind.PASSAGE]
    moved = [s.ids for s in here.segments if s.kind is SpanKind.PASSAGE]
    assert all(np.array_equal(ids[i], got) for i, got in zip(order, moved, strict=True))


@FEW
@given(documents=st.lists(DOCUMENT, min_size=1, max_size=4), questions=st.tuples(TEXT, TEXT))
def test_keys_up_to_the_documents_end_do_not_depend_on_the_question(
    tokenizer: ModelTokenizer, documents: list[dict[str, str]], questions: tuple[str, str]
) -> None:
    keys = []
    for question in questions:
        prompt = segment(tokenizer, documents, system="s", question=question)
        spans = cut_spans(prompt, scope=SCOPE, salt="", settings=SPANS)
        keys.append([s.key for s in spans if s.kind is not SpanKind.TAIL])
    assert keys[0] == keys[1]


@FEW
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=80), min_size=1, max_size=3))
def test_the_early_bound_is_never_above_the_truth(tokenizer: ModelTokenizer, texts: list[str]) -> None:
    tokens = len(tokenizer.encode_template("".join(texts), special_tokens=False))
    bound = tokenizer.too_long(texts, max_tokens=0)
    assert (bound or 0) <= tokens
    assert tokenizer.too_long(texts, max_tokens=tokens) is None


@FEW
@given(sizes=st.lists(st.integers(0, 12), max_size=30), capacity=st.integers(0, 30))
def test_the_token_cache_is_bounded_and_returns_what_was_put(sizes: list[int], capacity: int) -> None:
    cache = TokenCache(capacity)
    for index, size in enumerate(sizes):
        key = bytes([index])
        cache.put(key, np.full(size, index, dtype=np.uint32))
        assert cache.num_tokens <= capacity
        found = cache.lookup(key)
        assert (found is None) == (size > capacity)
        assert found is None or found.tolist() == [index] * size
