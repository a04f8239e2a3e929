"""The quality protocol of `learnonce bench codec` on a tiny random model.

Covers: KV taken out and put back, prefixes, what coarser KV does, bytes that are counted, going on after a stop, the
look-up task, the texts, parts that cannot run, tables and pictures. Does not cover: real models, the project's lossy
codecs (`tests/contract`), the mathematics (`loadtest_codec_measures_test`).
"""

import csv
import gzip
import importlib.util
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from cluster.errors import InvariantError
from kvstore.codecs import codec_by_name
from kvstore.container import stored_bytes
from loadtest.agreement import agreement
from loadtest.bench_codec import CHUNK_TOKENS, CONTINUATION_TOKENS, CodecBenchSettings, contenders
from loadtest.bench_codec.contenders import SchemeContender, decode_chunks, encode_chunks
from loadtest.bench_codec.exact import ExactModel
from loadtest.bench_codec.lmcache_reference import LmcacheResult
from loadtest.bench_codec.parts import CodecBenchChoiceError, measure_parts, read_contexts
from loadtest.bench_codec.plots import draw
from loadtest.bench_codec.quality import QualityRun
from loadtest.bench_codec.retrieval import make_task, retrieval_table, score
from loadtest.bench_codec.schemes import CodecScheme, Encoded, chunk_meta
from loadtest.bench_codec.texts import Document, TextTooShortError, read_documents
from loadtest.cli import bench
from loadtest.data import DataMissingError, Lookup
from loadtest.work import Work

_WORDS = 96
_SHAPE = {"layers": 2, "kv_heads": 2, "dim": 16}
_CONTEXTS = (CHUNK_TOKENS, 2 * CHUNK_TOKENS)


@pytest.fixture(scope="module")
def exact() -> ExactModel:
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=_WORDS,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=_SHAPE["layers"],
        num_attention_heads=4,
        num_key_value_heads=_SHAPE["kv_heads"],
        head_dim=_SHAPE["dim"],
        max_position_embeddings=2048,
        initializer_range=0.3,
    )
    return ExactModel(LlamaForCausalLM(config))


@pytest.fixture
def ids() -> list[int]:
    return random.Random(3).choices(range(_WORDS), k=_CONTEXTS[-1] + CONTINUATION_TOKENS + 1)


class CoarseScheme:
    """Two points of one encoding: mantissas cut off. Only its bytes' number and its errors matter here."""

    points = ("coarse-0", "coarse-1")
    takes_whole = True

    def __init__(self) -> None:
        self.num_encoded = 0

    def encode(self, kv_L2TNH: torch.Tensor, *, base_position: int) -> list[Encoded]:
        self.num_encoded += 1
        meta = chunk_meta(kv_L2TNH, codec="coarse", base_position=base_position)
        words = kv_L2TNH.contiguous().view(torch.int16) & -0x8
        payload = memoryview(bytearray(words.numpy().tobytes()))
        half = payload[: len(payload) // 2]
        return [
            Encoded(point=point, payload=part, meta=meta)
            for point, part in zip(self.points, (half, payload), strict=True)
        ]

    def decode(self, encoded: Encoded) -> torch.Tensor:
        if encoded.point == "coarse-0":
            return torch.zeros(encoded.meta.shape, dtype=torch.bfloat16)
        return torch.frombuffer(encoded.payload, dtype=torch.bfloat16).view(encoded.meta.shape)


def test_exact_kv_put_back_gives_the_same_probabilities(exact: ExactModel, ids: list[int]) -> None:
    keep = range(300, 400)
    kv_L2TNH, whole_SW = exact.read(ids, keep=keep, kv_tokens=300)
    assert tuple(kv_L2TNH.shape) == (_SHAPE["layers"], 2, 300, _SHAPE["kv_heads"], _SHAPE["dim"])
    other_SW = exact.go_on(kv_L2TNH, ids[300:400])
    found = agreement(whole_SW, other_SW, targets_T=torch.tensor(ids[301:401]))
    assert found.kl < 1e-6
    assert found.top1_ratio > 0.98


def test_the_kv_of_a_prefix_is_a_prefix_of_the_kv(exact: ExactModel, ids: list[int]) -> None:
    long, _ = exact.read(ids, keep=[0], kv_tokens=500)
    short, _ = exact.read(ids[:200], keep=[0], kv_tokens=200)
    torch.testing.assert_close(long[:, :, :200], short, rtol=1e-4, atol=1e-4)


def test_keys_and_values_are_not_exchanged_and_heads_stay_in_order(exact: ExactModel, ids: list[int]) -> None:
    kv_L2TNH, whole_SW = exact.read(ids, keep=range(256, 300), kv_tokens=256)
    shifted_L2TNH = torch.stack([kv_L2TNH[:, 0].roll(1, dims=1), kv_L2TNH[:, 1]], dim=1)
    for wrong in (kv_L2TNH.flip(1), kv_L2TNH.flip(3), kv_L2TNH.flip(0), shifted_L2TNH):
        other_SW = exact.go_on(wrong, ids[256:300])
        assert agreement(whole_SW, other_SW, targets_T=torch.tensor(ids[257:301])).kl > 1e-3


def test_answers_do_not_see_each_other(exact: ExactModel, ids: list[int]) -> None:
    kv_L2TNH, _ = exact.read(ids[:100], keep=[0], kv_tokens=100)
    one, two = exact.answer(kv_L2TNH, [ids[100:120], ids[200:230]])
    torch.testing.assert_close(two, exact.go_on(kv_L2TNH, ids[200:230]))
    torch.testing.assert_close(one, exact.go_on(kv_L2TNH, ids[100:120]))


def test_chunks_of_a_context_start_where_they_stand() -> None:
    kv = torch.randn(2, 2, 600, 2, 4, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    scheme = CodecScheme(codec_by_name("raw"))
    chunks = encode_chunks(scheme, kv)
    assert [(chunk[0].meta.base_position, chunk[0].meta.num_tokens) for chunk in chunks] == [
        (0, 256),
        (256, 256),
        (512, 88),
    ]
    assert decode_chunks(scheme, [chunk[0] for chunk in chunks]).equal(kv)


def test_a_document_gives_a_row_per_context_and_point(exact: ExactModel, ids: list[int], tmp_path: Path) -> None:
    work = Work(tmp_path, fingerprint="f" * 64)
    run = QualityRun(exact, model_name="tiny", work=work, contexts=_CONTEXTS)
    both = [SchemeContender(CoarseScheme()), SchemeContender(CodecScheme(codec_by_name("raw")))]
    run.measure_document(_document(ids), contenders=both, log=_silent)

    rows = {(row["point"], row["context"]): row for row in work.rows(document="d")}
    assert len(rows) == 6
    for context in _CONTEXTS:
        nothing, cut, raw = (rows[(point, context)] for point in ("coarse-0", "coarse-1", "raw"))
        assert raw["kl"] < cut["kl"] < nothing["kl"]
        assert raw["kl"] < 1e-3
        assert raw["payload_bits"] == 16.0
        assert cut["payload_bits"] == 2 * nothing["payload_bits"] == 16.0
        chunk_values = _SHAPE["layers"] * 2 * CHUNK_TOKENS * _SHAPE["kv_heads"] * _SHAPE["dim"]
        assert raw["bits"] == 8 * stored_bytes(2 * chunk_values) / chunk_values
        assert raw["bits"] > raw["payload_bits"]
    assert not list(tmp_path.glob("reference-*"))


def test_lmcache_is_asked_for_the_pieces_between_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, torch.Tensor] = {}

    def answer(tensors: dict[str, torch.Tensor], **_: Any) -> dict[str, LmcacheResult]:
        asked.update(tensors)
        return {
            name: LmcacheResult(
                kv_L2TNH=piece.float() + 1, num_bytes=piece.shape[2] * 10, encode_s=1, decode_s=1, lmcache_version="0"
            )
            for name, piece in tensors.items()
        }

    monkeypatch.setattr(contenders, "find_python", lambda: Path("python"))
    monkeypatch.setattr(contenders, "round_trip", answer)
    kv = torch.randn(1, 2, 1024, 1, 4, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    returned = next(iter(contenders.LmcacheContender("m").run(kv, contexts=(256, 1024))))
    assert [piece.shape[2] for piece in asked.values()] == [256, 768]
    assert returned.kv_L2TNH.equal((kv.float() + 1).to(torch.bfloat16))
    assert returned.chunk_bytes == (2560,) * 4


def test_what_a_stopped_run_finished_is_not_measured_again(exact: ExactModel, ids: list[int], tmp_path: Path) -> None:
    first, second, third = CoarseScheme(), CoarseScheme(), CoarseScheme()
    for scheme, fingerprint in ((first, "a" * 64), (second, "a" * 64), (third, "b" * 64)):
        work = Work(tmp_path, fingerprint=fingerprint)
        run = QualityRun(exact, model_name="tiny", work=work, contexts=_CONTEXTS)
        run.measure_document(_document(ids), contenders=[SchemeContender(scheme)], log=_silent)
    assert first.num_encoded > 0
    assert second.num_encoded == 0
    assert third.num_encoded == first.num_encoded


def test_a_half_written_row_is_measured_again(tmp_path: Path) -> None:
    work = Work(tmp_path, fingerprint="a" * 64)
    work.add({"point": "raw", "kl": 0.5})
    path = next(tmp_path.glob("rows-*"))
    path.write_text(path.read_text() + '{"point": "ra')
    again = Work(tmp_path, fingerprint="a" * 64)
    assert again.rows() == [{"point": "raw", "kl": 0.5}]


def test_a_row_after_a_half_written_one_is_kept(tmp_path: Path) -> None:
    work = Work(tmp_path, fingerprint="a" * 64)
    work.add({"point": "raw"})
    path = next(tmp_path.glob("rows-*"))
    path.write_text(path.read_text() + '{"point": "ra')
    Work(tmp_path, fingerprint="a" * 64).add({"point": "int8"})
    assert [row["point"] for row in Work(tmp_path, fingerprint="a" * 64).rows()] == ["raw", "int8"]


def test_a_harness_that_changes_exact_kv_does_not_go_on(ids: list[int], exact: ExactModel, tmp_path: Path) -> None:
    class Broken(ExactModel):
        def __init__(self) -> None:
            super().__init__(exact._network)

        def go_on(self, kv_L2TNH: torch.Tensor, following: Sequence[int]) -> torch.Tensor:
            return super().go_on(kv_L2TNH.flip(1), following)

    run = QualityRun(Broken(), model_name="tiny", work=Work(tmp_path, fingerprint="a"), contexts=_CONTEXTS)
    with pytest.raises(InvariantError, match="exact KV put back"):
        run.measure_document(_document(ids), contenders=[SchemeContender(CoarseScheme())], log=_silent)


def test_a_value_counts_only_if_every_token_of_it_is_the_first_choice() -> None:
    lookup = Lookup(pairs=(("k1", "v1"), ("k2", "v2"), ("k3", "v3"), ("k4", "v4")))
    task = make_task(lookup, seed=1, tokenize=lambda text: [ord(char) % _WORDS for char in text])
    right_SW = torch.zeros(len(task.answer), _WORDS)
    for at, word in enumerate(task.answer[1:]):
        right_SW[at, word] = 1.0
    assert score(task, right_SW) == [True, True, True]
    wrong_SW = right_SW.clone()
    wrong_SW[task.values[1][1] - 1] = 0.0
    assert score(task, wrong_SW) == [True, False, True]
    unseen_SW = right_SW.clone()
    unseen_SW[task.values[0][0] - 2] = 0.0
    assert score(task, unseen_SW) == [True, True, True]


def test_retrieval_is_told_beside_exact_kv_on_the_same_tables() -> None:
    rows = [
        {"task": task, "point": point, "right": [True, right]}
        for task in range(6)
        for point, right in (("exact", task > 0), ("int4", False))
    ]
    table = retrieval_table(rows, points=["exact", "int4"])
    assert table["exact"]["exact_match"]["value"] == pytest.approx(11 / 12)
    assert table["int4"]["change_to_exact_kv"]["value"] == pytest.approx(-5 / 12)
    assert table["exact"]["change_to_exact_kv"] == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_documents_are_of_all_kinds_and_do_not_overlap(tmp_path: Path) -> None:
    _write_data(tmp_path)
    documents = read_documents(tmp_path, count=8, num_tokens=500, tokenize=_letters)
    assert {document.kind for document in documents} == {"novel", "code", "passages", "german", "articles"}
    assert all(len(document.ids) == 500 for document in documents)
    assert len({document.ids for document in documents}) == len({document.name for document in documents}) == 8
    novel = "".join(map(chr, (i for document in documents if document.kind == "novel" for i in document.ids)))
    assert "first half" not in novel
    assert "second half" in novel
    numbers = [word for word in novel.split() if word.isdigit() and len(word) == 6]
    assert len(numbers) > 20
    assert len(set(numbers)) == len(numbers)


def test_missing_and_short_texts_say_so(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match="--data"):
        read_documents(None, count=1, num_tokens=10, tokenize=_letters)
    with pytest.raises(DataMissingError, match="cannot be read"):
        read_documents(tmp_path, count=1, num_tokens=10, tokenize=_letters)
    _write_data(tmp_path)
    with pytest.raises(TextTooShortError, match="ask for fewer"):
        read_documents(tmp_path, count=1, num_tokens=10**7, tokenize=_letters)


def test_parts_that_need_texts_are_skipped_without(tmp_path: Path) -> None:
    settings = CodecBenchSettings(model=str(tmp_path), data=None, plots=None, work=tmp_path)
    content = measure_parts(["quality", "retrieval"], replace(settings), log=_silent)
    assert set(content["skipped"]) == {"quality", "retrieval"}
    assert all("--data" in reason for reason in content["skipped"].values())
    with pytest.raises(CodecBenchChoiceError, match="unknown part"):
        measure_parts(["velocity"], settings, log=_silent)


@pytest.mark.parametrize("text", ["", "100", "1024,1000", "0", "a", "1024;4096"])
def test_contexts_are_whole_chunks(text: str) -> None:
    with pytest.raises(CodecBenchChoiceError, match="multiples of 256"):
        read_contexts(text)


def test_the_command_writes_a_result_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEARNONCE_DATA", raising=False)
    (tmp_path / "config.json").write_text("{}")
    command = ["codec", "--json", str(tmp_path / "out.json"), "--part", "retrieval", "--model", str(tmp_path)]
    answer = CliRunner().invoke(bench, command)
    assert answer.exit_code == 0, answer.output
    content = json.loads((tmp_path / "out.json").read_text())
    assert {"hardware", "versions", "command", "commit", "figures", "skipped"} <= set(content)
    assert "--data" in content["skipped"]["retrieval"]


def test_tables_and_pictures_of_a_result(exact: ExactModel, ids: list[int], tmp_path: Path) -> None:
    work = Work(tmp_path / "work", fingerprint="f")
    run = QualityRun(exact, model_name="tiny", work=work, contexts=_CONTEXTS)
    for name in ("d", "e"):
        run.measure_document(_document(ids, name), contenders=[SchemeContender(CoarseScheme())], log=_silent)
    details = {"quality": _quality_detail(work.rows()), "anatomy": _anatomy()}
    skipped = draw(tmp_path / "plots", figures={}, details=details, log=_silent)
    with (tmp_path / "plots" / "codec_quality.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["point"] for line in lines] == ["coarse-0", "coarse-1"]
    assert float(lines[1]["payload_bits"]) == 16.0
    with (tmp_path / "plots" / "codec_bits.csv").open() as file:
        assert sum(float(line["bits"]) for line in csv.DictReader(file)) == pytest.approx(1.2)
    if importlib.util.find_spec("matplotlib") is None:
        assert "matplotlib" in skipped["plots"]
    else:
        for name in ("codec_quality.png", "codec_bits.png"):
            assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


def _quality_detail(rows: list[dict[str, Any]]) -> dict[str, Any]:
    from loadtest.bench_codec.figures import quality_detail

    detail = quality_detail(rows, points=CoarseScheme.points, names=["d", "e"], contexts=_CONTEXTS, baseline="")
    return {"contexts": _CONTEXTS, "documents": ["d", "e"], **detail}


def _anatomy() -> dict[str, Any]:
    sections = [
        {"layer": layer, "kv": kv, "level": level, "bits": 0.1}
        for layer in range(3)
        for kv in "KV"
        for level in range(2)
    ]
    return {
        "point": "transform-1",
        "tokens": 256,
        "text": "a text",
        "num_levels": 2,
        "sections": sections,
        "component_bits": {"K": [[2.0, 1.0], [0.5, 0.4]], "V": [[2.0, 1.0], [0.5, 0.4]]},
    }


def _document(ids: list[int], name: str = "d") -> Document:
    return Document(name=name, kind="random", ids=tuple(ids))


def _letters(text: str) -> list[int]:
    return [ord(char) for char in text]


def _silent(_: str) -> None:
    pass


def _write_data(folder: Path) -> None:
    """Small files of the same form as the real ones."""
    novel = "\n\n".join(
        f"{'first' if number < 1000 else 'second'} half, paragraph {100000 + number} of a long novel by nobody"
        for number in range(2000)
    )
    words = ["of", "the", "a", "river", "town", "old", "and", "in", "year", "which", "was", "built", "by", "king"]
    draw_words = random.Random(2)
    chunks = [{"title": f"Title {n}", "text": " ".join(draw_words.choices(words, k=120))} for n in range(80)]
    files: dict[str, list[dict[str, Any]]] = {
        "b_long_moby_dick": [{"text": novel}],
        "a_qa_nq_oracle_2655": [{"chunks": [chunk]} for chunk in reversed(chunks)],
        "a_qa_xquad_en_1190": [{"chunks": chunks[n : n + 5]} for n in range(0, 80, 5)],
    }
    for name, rows in files.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
