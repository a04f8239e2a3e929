"""The contexts that are joined: a system prompt, passages of different documents in a drawn order, a question.

Covers: choosing and cutting passages, rendering them as the router does. Does not cover: the texts themselves: they lie
beside the project (`--data`), or are generated.

Passages have 100 to 600 tokens, so no two are equally long; nothing is padded. Every context has passages of its own
choice, and an order that has nothing to do with how they were learned.
"""

import itertools
import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from kvstore.keys import KvScope
from kvstore.wire import SpanKind
from loadtest.bench_codec.german import german_text
from loadtest.data import ARTICLES, NOVEL, POOL, REQUESTS, Lookup, data_rows, read_lookups
from router.body import Document, Endpoint, ParsedRequest
from router.segments import Prompt, Segment, Segmenter, cut_spans
from router.settings import SpanSettings, TemplateSettings
from router.tokenizer import ModelTokenizer
from router.view import KeyedSpan

PASSAGES: Final = (6, 10)
"""Fewest and most in a context."""
PASSAGE_TOKENS: Final = (100, 600)
RECORDS_PER_PASSAGE: Final = 1
"""Of the look-up task. The embedded model failed among 14 records with exact KV too, so there are 6 to 10."""
RETRIEVAL: Final = "retrieval"
"""Kind of the look-up contexts; all others are questions about prose."""
_SYSTEM: Final = (
    "You are a helpful assistant. Answer from the documents below, and from nothing else. Write a few plain sentences, "
    "and name the people, places and numbers that matter. If the documents do not say it, say so."
)
_CACHE_TOKENS: Final = 1 << 20
_MAX_MODEL_LEN: Final = 1 << 20
_CHARS_PER_TOKEN: Final = 6
_ABOUT_NOVEL: Final = "What happens in these passages? Tell it in your own words."
_ABOUT_GERMAN: Final = "Wer tut etwas in diesen Texten, und wo?"


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """One prompt, in the order in which its passages are joined."""

    name: str
    kind: str
    prompt: Prompt
    answer: tuple[int, ...] = ()
    """The only right answer, of the look-up task; else the reference's own is taken."""

    @property
    def ids(self) -> list[int]:
        """The whole prompt."""
        return [int(token) for token in self.prompt.ids]

    @property
    def tail_start(self) -> int:
        """First token behind the passages."""
        return self.prompt.num_tokens - len(self.prompt.segments[-1].ids)

    def alone(self) -> list[Prompt]:
        """What is learned: the system prompt with one passage behind it, for every passage."""
        anchor, *passages = self.prompt.segments[:-1]
        return [Prompt(segments=(anchor, Segment(each.kind, each.ids, 0))) for each in passages]


def document_spans(prompt: Prompt, *, scope: KvScope, salt: str) -> list[KeyedSpan]:
    """Chunks of system prompt and passages, as the router cuts them."""
    spans = cut_spans(prompt, scope=scope, salt=salt, settings=SpanSettings())
    return [span for span in spans if span.kind is not SpanKind.TAIL]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Draft:
    """A context before it is rendered."""

    name: str
    kind: str
    documents: tuple[Document, ...]
    question: str
    primer: str = ""
    """How the answer begins, part of the prompt."""
    answer: str = ""


def read_contexts(data: Path | None, *, model: str, num_contexts: int, num_retrievals: int, seed: int) -> list[Context]:
    """Contexts of prose, kinds in turn, then those of the look-up task.

    Raises:
        DataMissingError: A file is missing in the folder.
    """
    tokenizer = ModelTokenizer(model, cache_tokens=_CACHE_TOKENS)
    draw = random.Random(seed)
    prose = _generated(draw, tokenizer) if data is None else _from_data(data, draw, tokenizer)
    if data is None:
        lookups = [_random_lookup(draw) for _ in range(num_retrievals)]
    else:
        lookups = read_lookups(data, count=num_retrievals, num_pairs=PASSAGES[1] * RECORDS_PER_PASSAGE)
    drafts = [
        *itertools.islice(prose, num_contexts),
        *(_retrieval(lookup, draw, index=index) for index, lookup in enumerate(lookups)),
    ]
    return [_render(draft, tokenizer) for draft in drafts]


def _render(draft: _Draft, tokenizer: ModelTokenizer) -> Context:
    request = ParsedRequest(
        endpoint=Endpoint.CHAT,
        messages=({"role": "system", "content": _SYSTEM}, {"role": "user", "content": draft.question}),
        documents=draft.documents,
    )
    prompt = Segmenter(tokenizer, template=TemplateSettings()).segment(request, max_model_len=_MAX_MODEL_LEN)
    if draft.primer:
        *before, tail = prompt.segments
        begun = tokenizer.encode_template(draft.primer, special_tokens=False)
        prompt = Prompt(segments=(*before, Segment(SpanKind.TAIL, np.concatenate([tail.ids, begun]))))
    answer = tokenizer.encode_template(draft.answer, special_tokens=False) if draft.answer else ()
    return Context(name=draft.name, kind=draft.kind, prompt=prompt, answer=tuple(int(token) for token in answer))


def _from_data(data: Path, draw: random.Random, tokenizer: ModelTokenizer) -> Iterator[_Draft]:
    texts = _Texts(data, draw, tokenizer)
    for index in itertools.count():
        for make in (texts.request, texts.articles, texts.novel, texts.two_questions):
            yield make(index)


class _Texts:
    """Drafts of each kind from the folder of texts."""

    def __init__(self, data: Path, draw: random.Random, tokenizer: ModelTokenizer) -> None:
        self._draw, self._tokenizer = draw, tokenizer
        pool = list(data_rows(data / POOL))
        lengths = map(len, tokenizer.encode_passages([row["text"] for row in pool]))
        self._pool = {
            row["chunk_id"]: Document(row["text"], row["title"])
            for row, length in zip(pool, lengths, strict=True)
            if length >= PASSAGE_TOKENS[0]
        }
        # One request per question: the file asks popular ones often.
        rows = data_rows(data / REQUESTS)
        requests = {row["question"]: row for row in rows if row["chunk_ids"][row["gold"]] in self._pool}
        self._requests = draw.sample(list(requests.values()), len(requests))
        self._questions = list(data_rows(data / ARTICLES))
        self._articles = {row["chunks"][0]["title"]: row["chunks"] for row in self._questions}
        novel = str(next(iter(data_rows(data / NOVEL)))["text"])
        # The first half is text that codecs were calibrated on.
        self._novel = novel[len(novel) // 2 :]

    def request(self, index: int) -> _Draft:
        """A question over passages as a search found them."""
        row = self._requests[index % len(self._requests)]
        documents = self._found(row, count=self._count())
        return _Draft(name=f"request {row['id']}", kind="requests", documents=documents, question=row["question"])

    def articles(self, index: int) -> _Draft:
        """A question over one of several articles."""
        del index
        row = self._draw.choice(self._questions)
        documents = self._parts(row, count=self._count())
        return _Draft(name=f"articles {row['id']}", kind="articles", documents=documents, question=row["question"])

    def novel(self, index: int) -> _Draft:
        """Pieces of a novel, cut anywhere between two words, not one behind the other."""
        count = self._count()
        slot = len(self._novel) // count
        starts = [at * slot + self._draw.randrange(slot // 2) for at in range(count)]
        # Half a slot is longer than any passage, so that none overlaps the next.
        pieces = [self._novel[self._novel.index(" ", at) + 1 :][: slot // 2] for at in starts]
        documents = [Document(self._cut(piece), f"Piece {at + 1}") for at, piece in enumerate(pieces)]
        self._draw.shuffle(documents)
        return _Draft(name=f"novel {index}", kind="novel", documents=tuple(documents), question=_ABOUT_NOVEL)

    def two_questions(self, index: int) -> _Draft:
        """One question that needs two passages of different sources."""
        request, article = self._requests[-1 - index % len(self._requests)], self._draw.choice(self._questions)
        count = self._count()
        documents = [*self._found(request, count=count // 2), *self._parts(article, count=count - count // 2)]
        self._draw.shuffle(documents)
        question = f"Answer two questions. First: {request['question']}? Second: {article['question']}"
        name = f"two questions {request['id']} {article['id']}"
        return _Draft(name=name, kind="two questions", documents=tuple(documents), question=question)

    def _count(self) -> int:
        return self._draw.randint(*PASSAGES)

    def _found(self, row: dict[str, Any], *, count: int) -> tuple[Document, ...]:
        gold = row["chunk_ids"][row["gold"]]
        others = [number for number in row["chunk_ids"] if number != gold and number in self._pool]
        others += self._draw.sample([number for number in self._pool if number not in row["chunk_ids"]], count)
        chosen = [gold, *others[: count - 1]]
        self._draw.shuffle(chosen)
        return tuple(self._pool[number] for number in chosen)

    def _parts(self, row: dict[str, Any], *, count: int) -> tuple[Document, ...]:
        """The passage that answers, filled up from its article, and parts of other articles."""
        title, paragraphs = row["chunks"][0]["title"], [each["text"] for each in row["chunks"]]
        gold = paragraphs.pop(row["gold"])
        others = self._draw.sample([name for name in self._articles if name != title], count - 1)
        found = [
            _article(title, self._cut("\n".join([gold, *paragraphs]), keep=gold)),
            *(_article(name, self._cut("\n".join(each["text"] for each in self._articles[name]))) for name in others),
        ]
        self._draw.shuffle(found)
        return tuple(found)

    def _cut(self, text: str, *, keep: str = "") -> str:
        return cut(text, num_tokens=self._draw.randint(*PASSAGE_TOKENS), tokenizer=self._tokenizer, keep=keep)


def _article(title: str, text: str) -> Document:
    return Document(text, title.replace("_", " "))


def cut(text: str, *, num_tokens: int, tokenizer: ModelTokenizer, keep: str = "") -> str:
    """The first words of a text, about `num_tokens` tokens of them; at least those that begin it with `keep`."""
    text = text[: _CHARS_PER_TOKEN * num_tokens + len(keep)]
    (ids,) = tokenizer.encode_passages([text])
    if len(ids) <= num_tokens:
        return text
    end = text.rfind(" ", 0, max(len(keep) + 1, len(text) * num_tokens // len(ids)))
    return text[: max(end, len(keep))] if end > 0 else text


def _generated(draw: random.Random, tokenizer: ModelTokenizer) -> Iterator[_Draft]:
    for index in itertools.count():
        documents = []
        for _ in range(draw.randint(*PASSAGES)):
            num_tokens = draw.randint(*PASSAGE_TOKENS)
            text = german_text(_CHARS_PER_TOKEN * num_tokens, seed=draw.getrandbits(32))
            documents.append(Document(cut(text, num_tokens=num_tokens, tokenizer=tokenizer)))
        name = f"generated {index}"
        yield _Draft(name=name, kind="generated", documents=tuple(documents), question=_ABOUT_GERMAN)


def _random_lookup(draw: random.Random) -> Lookup:
    def identifier() -> str:
        return str(uuid.UUID(int=draw.getrandbits(128), version=4))

    return Lookup(pairs=tuple((identifier(), identifier()) for _ in range(PASSAGES[1] * RECORDS_PER_PASSAGE)))


def _retrieval(lookup: Lookup, draw: random.Random, *, index: int) -> _Draft:
    """Records cut into passages; the answer begins with one of them as an example, and with the key of another."""
    count = draw.randint(*PASSAGES)
    pairs = lookup.pairs[: count * RECORDS_PER_PASSAGE]
    lines = [f"{key} = {value}" for key, value in pairs]
    documents = [
        Document("\n".join(lines[at : at + RECORDS_PER_PASSAGE])) for at in range(0, len(lines), RECORDS_PER_PASSAGE)
    ]
    draw.shuffle(documents)
    shown, wanted = draw.sample(range(len(pairs)), 2)
    key, value = pairs[wanted]
    return _Draft(
        name=f"look-up {index}",
        kind=RETRIEVAL,
        documents=tuple(documents),
        question="Copy two records: " + pairs[shown][0] + ", " + key,
        primer=f"{lines[shown]}\n{key} =",
        answer=f" {value}",
    )
