"""`learnonce bench codec` from the command line to the result file, on a tiny model and small texts.

Covers: which codecs run, with which profile; calibrating the baseline; figures, tables; going on after a stop;
what is missing, and why. Does not cover: real figures, engines (`--part e2e`).
"""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from kvstore.testing.profiles import make_profile
from loadtest.bench_codec import CodecBenchSettings
from loadtest.bench_codec import profiles as bench_profiles
from loadtest.bench_codec.profiles import NoProfileError, cachegen_profile, read_schemes, transform_profile
from loadtest.bench_codec.texts import calibration_documents, read_documents
from loadtest.cli import bench

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;-=_()[]{}'\"#\n?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(_LETTERS) + 1,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {letter: index for index, letter in enumerate(_LETTERS)} | {"<unk>": len(_LETTERS)}
    letters = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=letters, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(2)
    words = ["of", "the", "a", "river", "town", "old", "and", "in", "year", "which", "was", "built", "by", "king"]
    novel = "\n\n".join(f"Paragraph {n}. " + " ".join(draw.choices(words, k=30)) for n in range(1500))
    chunks = [{"title": f"Title {n}", "text": " ".join(draw.choices(words, k=100))} for n in range(200)]
    lookups = [[[f"{draw.getrandbits(32):08x}" for _ in range(2)] for _ in range(8)] for _ in range(6)]
    files: dict[str, list[dict[str, Any]]] = {
        "b_long_moby_dick": [{"text": novel}],
        "a_qa_nq_oracle_2655": [{"chunks": [chunk]} for chunk in chunks],
        "a_qa_xquad_en_1190": [{"chunks": chunks[n : n + 5]} for n in range(0, 200, 5)],
        "b_kv_retrieval_75_100": [{"ordered_kv_records": pairs} for pairs in lookups],
    }
    for name, rows in files.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "tiny.lkp"
    made = make_profile(num_layers=2, num_kv_heads=2, head_dim=16, finest_bin=1.0)
    path.write_bytes(made.to_bytes())
    return path


@pytest.fixture
def settings(model: Path, data: Path, profile: Path, tmp_path: Path) -> CodecBenchSettings:
    return CodecBenchSettings(model=str(model), data=data, plots=None, work=tmp_path, profile=str(profile))


def _silent(_: str) -> None:
    pass


def test_the_command_measures_every_codec(
    model: Path, data: Path, profile: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LEARNONCE_LMCACHE_PYTHON", raising=False)
    monkeypatch.setattr(bench_profiles, "_CALIBRATION_TOKENS", 600)
    command = ["codec", "--json", str(tmp_path / "out.json"), "--data", str(data), "--model", str(model), "--quick"]
    command += ["--profile", str(profile), "--plots", str(tmp_path / "plots"), "--work", str(tmp_path / "work")]
    command += ["--contexts", "256,512", "--docs", "2"]
    command += [word for part in ("quality", "retrieval", "anatomy", "speed") for word in ("--part", part)]
    answer = CliRunner().invoke(bench, command)
    assert answer.exit_code == 0, f"{answer.output}\n{answer.exception!r}"
    content = json.loads((tmp_path / "out.json").read_text())

    assert content["skipped"] == {}
    assert {"decode_gb_per_s", "encode_gb_per_s"} <= set(content["figures"])
    quality = content["parts"]["quality"]
    points = quality["points"]
    assert {"transform-0", "transform-2", "cachegen-0", "int4", "int8", "lossless", "raw"} <= set(points)
    assert points["lossless"]["kl"] == points["raw"]["kl"]
    assert points["int8"]["kl"]["value"] < points["int4"]["kl"]["value"]
    assert points["transform-0"]["bits"]["value"] < points["transform-1"]["bits"]["value"]
    assert set(points["raw"]["by_context"]) == {"256", "512"}
    assert "LEARNONCE_LMCACHE_PYTHON" in quality["missing_schemes"]["lmcache"]
    assert len(quality["rows"]) == 2 * 2 * len(points)
    # 4 answers of each of 4 tables: the first line is an example.
    retrieval = content["parts"]["retrieval"]
    assert (retrieval["tables"], retrieval["pairs"]) == (4, 5)
    assert set(retrieval["points"]) == {"exact", *points}
    totals = content["parts"]["anatomy"]["totals"]
    assert totals["sections"] + totals["header"] + totals["exact_tokens"] == pytest.approx(totals["payload"])
    assert (tmp_path / "plots" / "codec_quality.csv").is_file()

    rows = sorted((tmp_path / "work").glob("rows-*.jsonl"), key=lambda path: path.stat().st_size)
    before = rows[-1].read_text()
    assert CliRunner().invoke(bench, command).exit_code == 0
    assert rows[-1].read_text() == before


def test_a_model_without_a_profile_runs_without_the_transform(
    settings: CodecBenchSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from dataclasses import replace

    monkeypatch.setattr(bench_profiles, "_CALIBRATION_TOKENS", 600)
    monkeypatch.setattr(bench_profiles, "shipped_profiles", lambda: iter(()))
    schemes, missing = read_schemes(replace(settings, profile=None, data=None), log=_silent)
    assert [point for scheme in schemes for point in scheme.points] == ["int4", "int8", "lossless", "raw"]
    assert "learnonce calibrate" in missing["transform"]
    assert "--data" in missing["cachegen"]


def test_a_profile_of_another_model_is_refused(settings: CodecBenchSettings, tmp_path: Path) -> None:
    from dataclasses import replace

    other = tmp_path / "other.lkp"
    other.write_bytes(make_profile(num_layers=3, num_kv_heads=2, head_dim=16).to_bytes())
    with pytest.raises(NoProfileError, match="3 layers"):
        transform_profile(replace(settings, profile=str(other)))
    with pytest.raises(NoProfileError, match="in no file"):
        transform_profile(replace(settings, profile="0" * 64))


def test_the_baseline_is_calibrated_once_with_its_sinks_exact(
    settings: CodecBenchSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_profiles, "_CALIBRATION_TOKENS", 600)
    logged: list[str] = []
    first = cachegen_profile(settings, log=logged.append)
    second = cachegen_profile(settings, log=logged.append)
    assert first.id == second.id
    assert first.num_exact == 1
    assert len(logged) == 1


def test_no_document_is_made_of_calibration_text(data: Path) -> None:
    def letters(text: str) -> list[int]:
        return [ord(letter) for letter in text]

    learned = calibration_documents(data, num_tokens=3000, tokenize=letters)
    tested = read_documents(data, count=8, num_tokens=1500, tokenize=letters)
    for one in learned:
        known = {one.ids[at : at + 60] for at in range(0, len(one.ids) - 60)}
        for other in tested:
            assert not any(other.ids[at : at + 60] in known for at in range(0, len(other.ids) - 60)), (one, other)
