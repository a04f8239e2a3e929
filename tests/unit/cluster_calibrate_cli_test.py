"""`learnonce calibrate`, as a person calls it.

Covers: what is written, and what is said when something is wrong.
Does not cover: the profile (`kvstore_codecs_calibrate_test.py`).
"""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cluster.calibrate_cli import CalibrationTextError
from cluster.cli import app
from kvstore.codecs.profile import Profile
from kvstore.testing.profiles import make_profile


def calibrate(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["calibrate", *arguments])


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_writes_the_profile(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def make(path: Path, texts: list[str], *, settings: Any, name: str, on_progress: Any) -> Profile:
        seen.update(path=path, texts=texts, settings=settings, name=name)
        on_progress("reading", 0, 2)
        on_progress("reading", 2, 2)
        return make_profile()

    monkeypatch.setattr("kvstore.codecs.calibrate.calibrate", make)
    text, out = tmp_path / "a.txt", tmp_path / "made.lkp"
    text.write_text("höher")
    result = calibrate(
        "--model", str(model), "--text", str(text), "--out", str(out), "--target-kl", "0.02", "--groups", "2"
    )
    assert result.exit_code == 0, result.output
    assert Profile.from_bytes(out.read_bytes()).id == make_profile().id
    assert seen["path"] == model
    assert seen["texts"] == ["höher"]
    assert seen["name"] == "model"
    assert (seen["settings"].target_kl, seen["settings"].groups) == (0.02, 2)
    assert list(tmp_path.glob(".made*")) == []


def test_text_that_is_no_text_is_refused(tmp_path: Path, model: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_bytes(b"\xff\xfe\xff")
    result = calibrate("--model", str(model), "--text", str(text), "--out", str(tmp_path / "b.lkp"))
    assert isinstance(result.exception, CalibrationTextError)
    assert "a.txt cannot be read" in str(result.exception)


def test_a_missing_folder_is_noticed_before_the_work(tmp_path: Path, model: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("words")
    result = calibrate("--model", str(model), "--text", str(text), "--out", str(tmp_path / "no" / "b.lkp"))
    assert isinstance(result.exception, CalibrationTextError)
    assert "is no folder" in str(result.exception)


@pytest.mark.parametrize(
    "out", ["", "/proc/self/made.lkp", "x" * 250 + ".lkp"], ids=["a folder", "a folder of the kernel's", "a long name"]
)
def test_a_file_that_cannot_be_written_is_noticed_before_the_work(
    out: str, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvstore.codecs.calibrate.calibrate", lambda *_args, **_options: pytest.fail("it began"))
    text = tmp_path / "a.txt"
    text.write_text("words")
    result = calibrate("--model", str(model), "--text", str(text), "--out", str(tmp_path / out))
    assert isinstance(result.exception, CalibrationTextError)
    assert "--out" in str(result.exception)
    assert {each.name for each in tmp_path.iterdir()} == {"model", "a.txt"}
