"""Reading recorded streams, and the command that replays them.

Covers: each known format by a small hand-made file, files that are none, the result file, the command's errors. Does
not cover: what policies save (`tests/sim`).
"""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from loadtest.bench_eviction import StreamChoiceError, measure, read_requests
from loadtest.cli import bench
from loadtest.sim_store import footprint_bytes
from loadtest.traces import Request, TraceFormatError, read_trace
from loadtest.workloads import WORKLOADS


def write(path: Path, *rows: dict[str, Any]) -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def ragpulse_row(*segments: tuple[str, int, int], extra_tokens: int = 0) -> dict[str, Any]:
    return {
        "timestamp_s": 0,
        "input_tokens": sum(tokens for _, _, tokens in segments) + extra_tokens,
        "output_tokens": 5,
        "session_id": "s",
        "segments": [list(segment) for segment in segments],
    }


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_ragpulse_prompts_are_chains_and_passages_are_not(tmp_path: Path, name: str) -> None:
    one = ragpulse_row(("sys_prompt", 1, 512), ("sys_prompt", 2, 100), ("passage", 7, 200), ("user_input", 9, 8))
    two = ragpulse_row(("sys_prompt", 3, 512), ("sys_prompt", 2, 100), ("passage", 8, 50), ("passage", 7, 200))
    first, second = read_trace(write(tmp_path / name, one, two))
    assert [(span.num_tokens, span.position) for span in first.prefix] == [(512, 0), (100, 512)]
    assert [(span.num_tokens, span.position) for span in second.passages] == [(50, 612), (200, 662)]
    assert first.prefix[1].key != second.prefix[1].key, "the same text behind another is another chunk"
    assert first.passages[0].key == second.passages[1].key
    assert (first.num_tokens, first.other_tokens) == (820, 8)


def test_a_passage_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    (request,) = read_trace(
        write(tmp_path / "t.jsonl", ragpulse_row(("passage", 7, 200), ("passage", 7, 200), extra_tokens=6))
    )
    assert [span.num_tokens for span in request.passages] == [200]
    assert (request.num_tokens, request.other_tokens) == (406, 206)


def test_mooncake_blocks_cover_the_prompt(tmp_path: Path) -> None:
    row = {"timestamp": 0, "input_length": 1100, "output_length": 1, "hash_ids": [0, 1, 2]}
    (request,) = read_trace(write(tmp_path / "t.jsonl", row))
    assert [(span.num_tokens, span.position) for span in request.prefix] == [(512, 0), (512, 512), (76, 1024)]
    assert request.num_tokens == 1100


def test_questions_take_their_passages_from_the_file_beside_them(tmp_path: Path) -> None:
    pool = [{"chunk_id": n, "title": "t" * 10, "text": "x" * (100 * n)} for n in range(3)]
    write(tmp_path / "some_passages.jsonl", *pool)
    requests = write(tmp_path / "some_requests.jsonl", {"question": "who?", "chunk_ids": [2, 1]})
    (request,) = read_trace(requests)
    assert [(span.num_tokens, span.position) for span in request.passages] == [(48, 0), (25, 48)]
    with pytest.raises(TraceFormatError, match="passages"):
        read_trace(write(tmp_path / "other.jsonl", {"question": "who?", "chunk_ids": [2, 1]}))


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceFormatError, match="expected segments"):
        read_trace(write(tmp_path / "t.jsonl", {"name": 1}))
    with pytest.raises(TraceFormatError, match="no rows"):
        read_trace(write(tmp_path / "empty.jsonl"))


@pytest.mark.parametrize("name", WORKLOADS)
def test_generated_streams_are_the_same_for_one_seed(name: str) -> None:
    assert WORKLOADS[name](4)[:200] == WORKLOADS[name](4)[:200]
    assert WORKLOADS[name](4)[:200] != WORKLOADS[name](5)[:200]


@pytest.mark.parametrize("name", WORKLOADS)
def test_generated_requests_hang_together(name: str) -> None:
    for request in WORKLOADS[name](4)[:500]:
        spans = (*request.prefix, *request.passages)
        assert len({span.key for span in spans}) == len(spans)
        position = 0
        for span in spans:
            assert span.position == position
            assert span.num_tokens > 0
            position += span.num_tokens


def few_requests() -> list[Request]:
    return WORKLOADS["passages"](4)[:150]


def test_figures_cover_every_policy_and_both_bounds() -> None:
    noted: list[str] = []
    content = measure("stream", few_requests(), capacities=(0.1, 2.0), log=noted.append)
    names = ("cost", "lru", "s3fifo", "arc", "belady", "bound")
    kinds = ("hit", "saved")
    assert set(content["figures"]) == {
        f"{n}_{kind}_ratio_at_{r}" for n in names for kind in kinds for r in ("0.1", "2")
    }
    assert content["stream"]["chunk_bytes"] == footprint_bytes(few_requests())
    figures = content["figures"]
    # A store that holds everything: all policies, and the bound, save the same.
    assert len({round(figures[f"{name}_hit_ratio_at_2"], 12) for name in names}) == 1
    assert all(figures[f"{name}_hit_ratio_at_0.1"] <= figures["bound_hit_ratio_at_0.1"] for name in names)
    assert len(noted) == 2


def test_the_command_writes_a_result_file(tmp_path: Path) -> None:
    rows = [ragpulse_row(("sys_prompt", 1, 512), ("passage", n % 3, 200 + n % 3)) for n in range(20)]
    trace = write(tmp_path / "t.jsonl.gz", *rows)
    target = tmp_path / "r.json"
    done = CliRunner().invoke(bench, ["eviction", "--trace", str(trace), "--json", str(target), "--capacity", "0.8"])
    assert done.exit_code == 0, done.output
    content = json.loads(target.read_text())
    assert content["figures"]["bound_hit_ratio_at_0.8"] > content["figures"]["lru_hit_ratio_at_0.8"] > 0
    assert {"hardware", "versions", "command", "commit"} <= set(content)
    assert (content["stream"]["name"], content["stream"]["requests"]) == ("t.jsonl.gz", 20)


@pytest.mark.parametrize(
    ("trace", "workload", "message"),
    [
        (None, None, "name one stream"),
        (Path("a"), "passages", "name one stream"),
        (None, "unheard", "no workload is called 'unheard'; there are passages"),
        (Path("/nowhere/t.jsonl"), None, "cannot be read"),
    ],
)
def test_one_stream_is_named(trace: Path | None, workload: str | None, message: str) -> None:
    with pytest.raises(StreamChoiceError, match=message):
        read_requests(trace, workload, seed=1)


def test_a_capacity_is_above_zero() -> None:
    with pytest.raises(StreamChoiceError, match=r"above 0; got 0\.1, 0"):
        measure("stream", few_requests(), capacities=(0.1, 0.0), log=lambda text: None)
