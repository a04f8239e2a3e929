"""The disk benchmarks at toy sizes: which figures they give, and what they say where a tool is missing."""

import shutil
from pathlib import Path

import pytest

from cluster.errors import UnavailableError
from kvstore.container import stored_bytes
from loadtest.bench_store import index, nvme


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(nvme, "TOTAL_BYTES", 8 << 20)
    monkeypatch.setattr(nvme, "RECORD_MIB", (1,))
    monkeypatch.setattr(nvme, "FIGURE_MIB", 1)
    monkeypatch.setattr(nvme, "_FIO_S", 0.1)
    monkeypatch.setattr(index, "COUNTS", (50, 300))
    monkeypatch.setattr(index, "NUM_LOOKUPS", 20)
    monkeypatch.setattr(index, "_DROP_CACHES", tmp_path / "no such file")


@pytest.mark.skipif(shutil.which("fio") is None, reason="needs fio")
def test_ratios_are_those_of_the_medians(tmp_path: Path) -> None:
    measured = nvme.measure(repeats=1, log=lambda line: None)
    detail = measured.detail["1_mib"]
    assert measured.figures == {
        "nvme_read_ratio_to_fio": detail["get_gb_per_s"] / detail["floor_fio_read_gb_per_s"],
        "nvme_write_ratio_to_fio": detail["put_gb_per_s"] / detail["floor_fio_write_gb_per_s"],
    }
    assert not list(tmp_path.iterdir()), "everything is deleted"


def test_without_fio_there_are_no_ratios_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme.shutil, "which", lambda name: None)
    lines: list[str] = []
    measured = nvme.measure(repeats=1, log=lines.append)
    assert measured.figures == {}
    assert "fio is not installed" in measured.detail["left_out"]
    assert any("fio is not installed" in line for line in lines)
    assert measured.detail["1_mib"]["put_gb_per_s"] > 0


def test_without_direct_io_it_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvme, "supports_direct_io", lambda folder: False)
    with pytest.raises(UnavailableError, match=r"no direct I/O.*set TMPDIR"):
        nvme.measure(repeats=1, log=lambda line: None)


def test_index_figures(tmp_path: Path) -> None:
    lines: list[str] = []
    measured = index.measure(repeats=1, log=lines.append)
    assert set(measured.figures) == {"index_bytes_per_chunk", "lookup_1000_ms"}, "the page cache was not dropped"
    assert 150 < measured.figures["index_bytes_per_chunk"] < 10_000
    assert measured.detail["300"]["rescan_warm_s"] > 0
    assert any("without root" in line for line in lines)
    assert not list(tmp_path.iterdir()), "everything is deleted"
    assert stored_bytes(len(index._PAYLOAD)) == 8192


@pytest.mark.parametrize("num_dropped", [2, 3, 4])
def test_rescan_is_a_figure_only_where_the_page_cache_was_dropped_every_time(
    monkeypatch: pytest.MonkeyPatch, num_dropped: int
) -> None:
    answers = iter([True] * num_dropped)
    monkeypatch.setattr(index, "_drop_caches", lambda: next(answers, False))
    measured = index.measure(repeats=2, log=lambda line: None)
    assert measured.figures.get("rescan_100k_s") == measured.detail["300"].get("rescan_cold_s")
    assert ("rescan_100k_s" in measured.figures) == (num_dropped == 4)
