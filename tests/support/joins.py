"""What tests of joins in real engines share: passages learned in one order, prompts that have them in another.

Covers: cases, learning, asking, comparing answers.
Does not cover: engines and their processes (`support.engine_harness`), what is expected (each test).
"""

import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.engine_harness import Answer, EngineProcess

from kvstore.client import NodeStoreClient
from kvstore.engine.params import ChunkSpan, JoinMethod, JoinParams, build_transfer_params
from kvstore.engine.settings import EngineSettings
from kvstore.keys import child_key, root_key
from kvstore.settings import StoreSettings
from kvstore.testing.process import StoreProcess

ANCHOR_TOKENS = 45
LENGTHS = (50, 37, 64, 41)
TAIL_TOKENS = 23
JOINED_TOKENS = sum(LENGTHS)
ANSWER_TOKENS = 24
PREFIX = "learnonce_kvstore_engine_"
NOISE = 1e-3
"""Bound on what the order of sums changes in a float32 log probability."""


class Case:
    """Passages that were learned behind an anchor, and a prompt that has them in another order."""

    def __init__(self, number: int, engine: EngineProcess, *, vocabulary: int) -> None:
        draw = random.Random(number)

        def tokens(count: int) -> list[int]:
            return [draw.randrange(100, vocabulary) for _ in range(count)]

        self.anchor, tail = tokens(ANCHOR_TOKENS), tokens(TAIL_TOKENS)
        passages = [tokens(length) for length in LENGTHS]
        anchor_key = child_key(root_key(engine.scope, salt=str(number)), self.anchor)
        self.lead = ChunkSpan(anchor_key, 0, ANCHOR_TOKENS)
        self.learning = [
            (
                [*self.anchor, *passage],
                ChunkSpan(child_key(anchor_key, passage), ANCHOR_TOKENS, ANCHOR_TOKENS + len(passage)),
            )
            for passage in passages
        ]
        self.prompt, self.spans = list(self.anchor), [self.lead]
        for index in (2, 0, 3, 1):
            start = len(self.prompt)
            self.prompt += passages[index]
            self.spans.append(ChunkSpan(self.learning[index][1].key, start, len(self.prompt), ANCHOR_TOKENS))
        self.tail_start = len(self.prompt)
        self.prompt += tail

    def load(
        self,
        share: float,
        *,
        method: JoinMethod = "first_k",
        without: int | None = None,
        save: Sequence[ChunkSpan] = (),
    ) -> dict[str, object]:
        """Transfer parameters of the prompt's join."""
        spans = [span for index, span in enumerate(self.spans) if index != without]
        join = JoinParams(method=method, share=share, tail_start=self.tail_start)
        return build_transfer_params(load=spans, save=save, load_deadline_s=5.0, join=join)


class World:
    """One engine and its store.

    Args:
        engine: It runs.
        store: Its store.
        vocabulary: Prompts are made of tokens below this.
    """

    def __init__(self, engine: EngineProcess, store: StoreProcess, *, vocabulary: int = 40000) -> None:
        self.engine, self.store = engine, store
        self._vocabulary = vocabulary
        self.client = NodeStoreClient(store.socket_path, secret=store.secret, client_name="test")
        self._next = 0
        self._shared: tuple[Case, Answer] | None = None

    def learned(self) -> tuple[Case, Answer]:
        """A case whose chunks are in the store, and what a full prefill of its prompt answers."""
        self._next += 1
        case = Case(self._next, self.engine, vocabulary=self._vocabulary)
        for index, (prompt, span) in enumerate(case.learning):
            save = [*([case.lead] if index == 0 else []), span]
            self.engine.ask(prompt, transfer=build_transfer_params(save=save, load_deadline_s=5.0), max_tokens=1)
        keys = [case.lead.key, *(span.key for _, span in case.learning)]
        assert all(self.client.wait(keys, deadline_s=20.0)), "chunks were not saved"
        return case, self.engine.ask(case.prompt, max_tokens=ANSWER_TOKENS)

    def shared(self) -> tuple[Case, Answer]:
        """A case for every test that leaves its chunks and its spans as they are: learning takes the longest."""
        self._shared = self._shared or self.learned()
        return self._shared

    def joined(self, case: Case, transfer: dict[str, object], **options: object) -> Answer:
        """What the engine answers with these parameters."""
        return self.engine.ask(case.prompt, transfer=transfer, max_tokens=ANSWER_TOKENS, **options)

    def grown(self, before: dict[str, float], name: str) -> float:
        """By how much one of our metrics has grown."""
        return self.engine.metrics().get(PREFIX + name, 0.0) - before.get(PREFIX + name, 0.0)


@contextmanager
def run_world(folder: Path, settings: EngineSettings, *, vocabulary: int = 40000) -> Iterator[World]:
    """An engine and its store, until the context ends; then the end of the engine's log is printed."""
    secret, path, log = os.urandom(32), str(folder / "store.sock"), folder / "engine.log"
    with (
        StoreProcess(StoreSettings(host_bytes=1 << 30, nvme=None), secret=secret, socket_path=path) as store,
        EngineProcess(settings, log=log, store_socket=path, secret=secret) as engine,
    ):
        try:
            assert engine.scope is not None
            world = World(engine, store, vocabulary=vocabulary)
            yield world
            world.client.close()
        finally:
            print(f"--- {log.name}\n{log.read_text(errors='replace')[-6000:]}")


def idle(engine: EngineProcess) -> bool:
    """No load, no join, no staged memory."""
    state = engine.state()
    return not (state["open_loads"] or state["staged_bytes"] or state["loading_bytes"])


def assert_same(answer: Answer, expected: Answer) -> None:
    """The same tokens, and log probabilities that differ by noise."""
    assert answer.tokens == expected.tokens
    assert answer.logprobs == pytest.approx(expected.logprobs, abs=NOISE)
