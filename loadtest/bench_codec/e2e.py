"""What the codec is worth where it is used: time to first token from stored KV, in real engines.

Covers: two engines in processes of their own; shared memory, and two stores on a link of 300 Mbit/s between network
namespaces; raw, `transform`, and computing. Does not cover: HTTP, Ray, quality over many texts
(`loadtest.bench_codec.quality`).

Every figure is a first token of a prompt that another process has learned; its last chunk is a few tokens that are
always computed. What is compared is run in turn on the same text and machine. Beside every time stands how far the
first token's distribution is from the exact one, and how long the greedy answers agree.
"""

import math
import secrets
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from cluster.errors import UnavailableError
from kvstore.client import NodeStoreClient
from kvstore.engine.harness import Answered, EngineChild
from kvstore.engine.params import ChunkSpan, Handoff, build_transfer_params
from kvstore.engine.settings import ConnectorSettings, EngineSettings
from kvstore.keys import ChunkKey, chain_keys, root_key
from kvstore.settings import PeerSettings, StoreSettings
from kvstore.testing.poll import wait_until
from kvstore.testing.process import StoreProcess
from loadtest.bench_codec import CHUNK_TOKENS, CodecBenchSettings, Log
from loadtest.bench_codec.exact import Tokenizer
from loadtest.bench_codec.texts import read_documents
from loadtest.bench_store import Measured
from loadtest.bench_store.shaped import HOLDER_HOST, READER_HOST, LinkUnavailableError, ShapedLink

RATE: Final = "300mbit"
_RATE_BYTES_PER_S: Final = 300e6 / 8
CONTEXT_TOKENS: Final = 3072
QUICK_CONTEXT_TOKENS: Final = 1024
QUESTION_TOKENS: Final = 24
ANSWER_TOKENS: Final = 32
REPEATS: Final = 5
LEVEL: Final = 1
"""The level that the quality protocol holds against KL 0.01."""
_LOGPROBS: Final = 200
_DEADLINE_S: Final = 120.0
_SAVE_S: Final = 60.0
_HOST_BYTES: Final = 2 << 30


def measure(settings: CodecBenchSettings, *, log: Log) -> Measured:
    """Start stores and engines, measure, stop them.

    The link needs root and network namespaces; without them its figures are missing, and the reason is in the detail.

    Args:
        settings: Model, profile, text, and how much of it.
        log: Told what is being done.

    Raises:
        UnavailableError: No engine can be had here.
    """
    context = QUICK_CONTEXT_TOKENS if settings.is_quick else CONTEXT_TOKENS
    repeats = 3 if settings.is_quick else REPEATS
    tokenizer = Tokenizer(settings.model)
    document = read_documents(settings.data, count=1, num_tokens=context + QUESTION_TOKENS, tokenize=tokenizer)[0]
    with tempfile.TemporaryDirectory(prefix="learnonce-e2e-") as scratch, ExitStack() as stack:
        coder = ConnectorSettings(recompute_when_faster=False, codec="transform", level=LEVEL, profile=settings.profile)
        bench = _Bench(settings.model, document.ids, coder=coder, repeats=repeats, folder=Path(scratch), log=log)
        try:
            link: ShapedLink | None = stack.enter_context(ShapedLink(rate=RATE))
            reason = ""
        except LinkUnavailableError as error:
            link, reason = None, str(error)
            log(f"e2e: without the shaped link: {reason}")
        paths = bench.run(link)
    detail: dict[str, Any] = {
        "context_tokens": context,
        "document": document.name,
        "level": LEVEL,
        "rate": RATE,
        **paths,
    }
    if link is None:
        return Measured(figures=ttft_figures(paths), detail=detail | {"shaped": {"skipped": reason}})
    bars = slide_bars(paths)
    return Measured(figures=ttft_figures(paths), detail=detail | {"bars": bars, "link_floors": link_floors(paths)})


def ttft_figures(paths: Mapping[str, Any]) -> dict[str, float]:
    """The flat figures of what `_Bench.run` found; without a link only the one that needs none."""
    local, shaped = paths["shared_memory"], paths.get("shaped")
    figures = {"e2e_ttft_ratio_to_raw_shm": _ratio(local["transform"], local["raw"])}
    if shaped is not None:
        figures["shaped_ttft_raw_over_transform"] = _ratio(shaped["raw"], shaped["transform"])
        figures["shaped_ttft_recompute_over_transform"] = _ratio(local["recompute"], shaped["transform"])
    return figures


def slide_bars(paths: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Computing, loading raw and loading coded KV over the link: seconds, with the quality of each."""
    shown = {
        "recompute": paths["shared_memory"]["recompute"],
        "naive load": paths["shaped"]["raw"],
        "encoded load": paths["shaped"]["transform"],
    }
    return [{"name": name, "ttft_s": each["ttft_s"], "quality": each["quality"]} for name, each in shown.items()]


def link_floors(paths: Mapping[str, Any]) -> dict[str, float]:
    """What the link alone takes, and how raw KV of 16 bits would compare where the engine's has 32.

    The last figure is a bound from below: the bytes of half the width on the link, and nothing else, over the measured
    time with `transform`.
    """
    raw_s, own_s = (paths["stored_bytes"][form] / _RATE_BYTES_PER_S for form in ("raw", "transform"))
    raw_16_bit_s = raw_s / 2 if paths["kv_dtype"] == "float32" else raw_s
    return {
        "raw_s": raw_s,
        "transform_s": own_s,
        "raw_16_bit_s": raw_16_bit_s,
        "raw_16_bit_link_over_transform_ttft": raw_16_bit_s / paths["shaped"]["transform"]["ttft_s"],
    }


class _Bench:
    """One text, learned and asked for over one kind of path after the other."""

    def __init__(
        self, model: str, ids: Sequence[int], *, coder: ConnectorSettings, repeats: int, folder: Path, log: Log
    ) -> None:
        self._model, self._ids, self._coder = model, list(ids), coder
        self._repeats, self._folder, self._log = repeats, folder, log

    def run(self, link: ShapedLink | None) -> dict[str, Any]:
        """Learn with one engine, ask another: raw and coded, first across the link, then from its own store; computed.

        Returns:
            By path ("shared_memory", "shaped") and form ("raw", "transform", "recompute") what was found.
        """
        plain = ConnectorSettings(recompute_when_faster=False)
        with (
            self._stores(link) as (holder, reader, secret),
            self._engine(self._coder, holder, secret, "learning") as learning,
            self._engine(plain, reader, secret, "asking") as asking,
        ):
            self._log(f"e2e: learning {len(self._ids)} tokens")
            # What is handed over within a node is raw, whatever the codec is.
            forms: dict[str, Handoff] = {"raw": "local", "transform": "none"}
            learned = {form: self._learn(learning, holder, secret, form, handoff) for form, handoff in forms.items()}
            spans = {form: held for form, (held, _) in learned.items()}
            found: dict[str, Any] = {
                "kv_dtype": learning.scope.kv_dtype,
                "stored_bytes": {form: num_bytes for form, (_, num_bytes) in learned.items()},
            }
            samples: dict[str, dict[str, list[Answered]]] = {"shaped": {}, "shared_memory": {}}
            # The first round pays for first touches.
            for turn in range(-1, self._repeats):
                self._log(f"e2e: round {turn + 2} of {self._repeats + 1}")
                for form, held in spans.items():
                    if link is not None:
                        _forget(reader, secret, held)
                    for path in ("shaped", "shared_memory") if link is not None else ("shared_memory",):
                        answer = self._ask(asking, held, f"{form} {path} {turn}", is_whole=turn == 0)
                        samples[path].setdefault(form, []).extend([answer] if turn >= 0 else [])
                answer = self._ask(asking, None, f"recompute {turn}", is_whole=turn == 0)
                samples["shared_memory"].setdefault("recompute", []).extend([answer] if turn >= 0 else [])
            exact = samples["shared_memory"]["recompute"][0]
            found |= {
                path: {form: _summary(exact, answers) for form, answers in by_form.items()}
                for path, by_form in samples.items()
                if by_form
            }
            return found | {"counters": {"learning": learning.counters(), "asking": asking.counters()}}

    @contextmanager
    def _stores(self, link: ShapedLink | None) -> Iterator[tuple[StoreProcess, StoreProcess, bytes]]:
        secret = secrets.token_bytes(32)
        peers = PeerSettings(transports=("tcp",), transfer_s=60.0, min_bytes_per_s=1e6)
        settings = StoreSettings(host_bytes=_HOST_BYTES, nvme=None, peers=peers)

        def store(name: str, host: str, prefix: Sequence[str]) -> StoreProcess:
            path = str(self._folder / f"{name}-{secrets.token_hex(3)}.sock")
            return StoreProcess(settings, secret=secret, socket_path=path, node_id=name, bind_host=host, prefix=prefix)

        if link is None:
            with store("only", "127.0.0.1", ()) as only:
                yield only, only, secret
            return
        with (
            store("holder", HOLDER_HOST, link.holder_prefix) as holder,
            store("reader", READER_HOST, link.reader_prefix) as reader,
        ):
            for each in (holder, reader):
                each.set_peers([holder.endpoint, reader.endpoint])
            yield holder, reader, secret

    def _engine(self, connector: ConnectorSettings, store: StoreProcess, secret: bytes, name: str) -> EngineChild:
        settings = EngineSettings(
            model=self._model,
            max_model_len=len(self._ids) + 2 * ANSWER_TOKENS,
            connector=connector,
            vllm_arguments={"max_logprobs": _LOGPROBS},
        )
        log = self._folder / f"{name}.log"
        return EngineChild(settings, store_socket=store.socket_path, secret=secret, log=log)

    def _learn(
        self, engine: EngineChild, store: StoreProcess, secret: bytes, form: str, handoff: Handoff
    ) -> tuple[tuple[ChunkSpan, ...], int]:
        """The chunks, and the bytes that they take in the store."""
        spans = self._spans(root_key(engine.scope, salt=form))
        transfer = build_transfer_params(save=spans, load_deadline_s=1.0, handoff=handoff)
        engine.ask(self._ids, salt=f"learn {form}", transfer=transfer)
        client = NodeStoreClient(store.socket_path, secret=secret, client_name="bench")
        try:
            if not all(client.wait([span.key for span in spans], deadline_s=_SAVE_S)):
                raise UnavailableError(f"the engine did not save its chunks: {engine.counters()}")
            leases = client.read([span.key for span in spans], deadline_s=_SAVE_S)
            codecs = {lease.meta.codec for lease in leases if lease is not None}
            num_bytes = sum(len(lease.payload) for lease in leases if lease is not None)
            for lease in leases:
                if lease is not None:
                    lease.release()
            if codecs != {form}:
                raise UnavailableError(f"chunks were stored as {codecs}, not as {form}")
        finally:
            client.close()
        return spans, num_bytes

    def _spans(self, root: ChunkKey) -> tuple[ChunkSpan, ...]:
        edges = list(range(0, len(self._ids) - QUESTION_TOKENS + 1, CHUNK_TOKENS))
        parts = [self._ids[start:stop] for start, stop in pairwise(edges)]
        return tuple(
            ChunkSpan(key, start, stop)
            for key, (start, stop) in zip(chain_keys(root, parts), pairwise(edges), strict=True)
        )

    def _ask(self, engine: EngineChild, spans: Sequence[ChunkSpan] | None, salt: str, *, is_whole: bool) -> Answered:
        """Ask once; the whole answer, which says how good it is, or its first token only."""
        max_tokens = ANSWER_TOKENS if is_whole else 1
        transfer = None if spans is None else build_transfer_params(load=spans, load_deadline_s=_DEADLINE_S)
        answer = engine.ask(self._ids, salt=salt, transfer=transfer, max_tokens=max_tokens, logprobs=_LOGPROBS)
        expected = 0 if spans is None else spans[-1].stop
        if answer.cached_tokens != expected:
            raise UnavailableError(f"{salt}: {answer.cached_tokens} of {expected} tokens were loaded")
        return answer


def _ratio(one: Mapping[str, Any], other: Mapping[str, Any]) -> float:
    """Median over rounds: what a round finds was measured within seconds, on a machine that others may use.

    Example:
        >>> _ratio({"samples_s": [2.0, 30.0, 4.0]}, {"samples_s": [1.0, 10.0, 2.0]})
        2.0
    """
    return float(statistics.median(a / b for a, b in zip(one["samples_s"], other["samples_s"], strict=True)))


def _summary(exact: Answered, answers: Sequence[Answered]) -> dict[str, Any]:
    kl = _first_kl(exact.logprobs, answers[0].logprobs)
    same = _same_prefix(exact.tokens, answers[0].tokens)
    return {
        "ttft_s": statistics.median(answer.ttft_s for answer in answers),
        "samples_s": [answer.ttft_s for answer in answers],
        "first_token_kl": kl,
        "same_answer_tokens": same,
        "quality": "exact" if answers[0] is exact else f"KL {kl:.4f}, first {same} of {ANSWER_TOKENS} tokens same",
    }


def _forget(reader: StoreProcess, secret: bytes, spans: Sequence[ChunkSpan]) -> None:
    """Across the link, every request is the first on its node; the node that learned the chunks keeps them."""
    client = NodeStoreClient(reader.socket_path, secret=secret, client_name="bench")
    try:
        keys = [span.key for span in spans]
        client.drop(keys, deadline_s=10.0)
        # Held by the other node, as its events say.
        wait_until(lambda: all(client.lookup(keys, deadline_s=1.0)), what="the other node's chunks to be known")
    finally:
        client.close()


def _same_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _first_kl(exact: Mapping[str, float], other: Mapping[str, float]) -> float:
    """KL of the first token's distribution in nats, over the exact one's likeliest tokens.

    What is not among the other's likeliest counts as the least of them.

    Example:
        >>> _first_kl({"1": math.log(0.5), "2": math.log(0.5)}, {"1": math.log(0.5), "2": math.log(0.5)})
        0.0
    """
    least = min(other.values(), default=0.0)
    found = sum(math.exp(log_p) * (log_p - other.get(token, least)) for token, log_p in exact.items())
    # Without the tail, rounding alone can make it negative.
    return max(0.0, found)
