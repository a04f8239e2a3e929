"""How a worker codes: its settings, and what it remembers of speeds.

Covers: settings that cannot be carried out, whose weights a profile was made for, the names of codecs, measured rates.
Does not cover: chunks that are coded (`tests/unit/engine_coded_transfers_test.py`).
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import msgspec
import pytest
from support.layered_codec import TwoLevels, tiny_profile

from cluster.errors import SettingsError
from kvstore.codecs import codec_names
from kvstore.codecs.controller import Rate
from kvstore.codecs.profile import Profile
from kvstore.engine.coding import LAYERED, Coding
from kvstore.engine.profiles import MAX_KEPT, ProfileShelf, Weights
from kvstore.engine.scope import engine_weights
from kvstore.engine.settings import ConnectorSettings
from kvstore.engine.speeds import SpeedMeter
from kvstore.interfaces import ChunkMeta
from kvstore.model_digest import model_digest
from kvstore.testing import MemoryStoreClient

LAYERS, HEADS, DIM = 3, 1, 4
DIGEST = "the digest of tiny"
WEIGHTS = Weights("tiny", DIGEST)
PROFILE = tiny_profile(layers=LAYERS, heads=HEADS, dim=DIM, digest=DIGEST)
META = ChunkMeta(num_tokens=1, num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, dtype="float32", base_position=0)


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The only shipped profile is `PROFILE`."""
    monkeypatch.setattr("kvstore.engine.profiles.SHIPPED", tmp_path)
    (tmp_path / "tiny.lkp").write_bytes(PROFILE.to_bytes())
    return tmp_path


def make(*, weights: Weights = WEIGHTS, client: MemoryStoreClient | None = None, **changes: Any) -> Coding:
    """Coding of an engine that stores with profiles."""
    settings = ConnectorSettings(codec="transform", **changes)
    shelf = ProfileShelf(store=lambda: client or MemoryStoreClient())
    return Coding(
        settings, shelf=shelf, meter=SpeedMeter(), model=META, weights=weights, layered={"transform": TwoLevels}
    )


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Events of warnings and errors so far."""
    return [record.getMessage().split()[0] for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


def test_settings_that_cannot_be_carried_out_say_what_to_do(shipped: Path, tmp_path: Path) -> None:
    make(), make(level=1), make(profile="tiny"), make(profile=PROFILE.id), make(profile="0" * 64)
    with pytest.raises(SettingsError, match=r"level is 2.*levels 0 to 1"):
        make(level=2)
    with pytest.raises(SettingsError, match=r"no file.*shipped: tiny.*learnonce calibrate"):
        make(profile="nothing")
    (tmp_path / "wrong.lkp").write_bytes(tiny_profile(layers=9, heads=HEADS, dim=DIM).to_bytes())
    with pytest.raises(SettingsError, match="9 layers"):
        make(profile=str(tmp_path / "wrong.lkp"))
    (tmp_path / "rotten.lkp").write_bytes(b"rotten")
    with pytest.raises(SettingsError, match="rotten"):
        make(profile=str(tmp_path / "rotten.lkp"))
    for path in shipped.glob("*.lkp"):
        path.unlink()
    with pytest.raises(SettingsError, match="no profile ships"):
        make()


@pytest.mark.parametrize("weights", [WEIGHTS, Weights("another name", DIGEST), Weights("tiny", None)])
def test_a_shipped_profile_is_taken_for_its_weights_or_name(
    shipped: Path, caplog: pytest.LogCaptureFixture, weights: Weights
) -> None:
    caplog.set_level("INFO")
    assert make(weights=weights).form_of(META).meta.profile == PROFILE.id
    assert "event=profile_chosen" in caplog.text
    assert warnings(caplog) == []


@pytest.mark.parametrize("weights", [Weights("tiny", "of a fine-tune"), Weights("another", None)])
def test_a_shipped_profile_of_other_weights_is_taken_only_by_name(
    shipped: Path, caplog: pytest.LogCaptureFixture, weights: Weights
) -> None:
    with pytest.raises(SettingsError, match=rf"other weights.*learnonce calibrate.*{PROFILE.id}"):
        make(weights=weights)
    coding = make(weights=weights, profile=PROFILE.id)
    assert [coding.form_of(META).meta.profile for _ in range(3)] == [PROFILE.id] * 3
    assert warnings(caplog) == ["event=profile_of_other_weights"]


def test_the_second_shipped_profile_of_a_shape_may_be_the_right_one(shipped: Path) -> None:
    other = tiny_profile(layers=LAYERS, heads=HEADS, dim=DIM, name="a fine-tune", digest="its digest")
    (shipped / "other.lkp").write_bytes(other.to_bytes())
    assert make().form_of(META).meta.profile == PROFILE.id
    assert make(weights=Weights("x", "its digest")).form_of(META).meta.profile == other.id


@pytest.mark.parametrize("weights", [Weights("tiny", ""), Weights("tiny", None)])
def test_a_profile_of_nobody_knows_what_is_one_of_others(
    shipped: Path, caplog: pytest.LogCaptureFixture, weights: Weights
) -> None:
    (shipped / "tiny.lkp").write_bytes(tiny_profile(layers=LAYERS, heads=HEADS, dim=DIM).to_bytes())
    with pytest.raises(SettingsError, match="other weights"):
        make(weights=weights)
    make(weights=weights, profile="tiny")
    assert warnings(caplog) == ["event=profile_of_other_weights"]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (PROFILE, []),
        (tiny_profile(layers=LAYERS, heads=HEADS, dim=DIM, name="other"), ["event=profile_of_other_weights"]),
        (tiny_profile(layers=9, heads=HEADS, dim=DIM), ["event=profile_misfit"]),
    ],
)
def test_a_profile_from_the_store_is_judged_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, found: Profile, said: list[str]
) -> None:
    monkeypatch.setattr("kvstore.engine.profiles.SHIPPED", tmp_path)
    client = MemoryStoreClient()
    coding = make(profile=found.id, client=client)
    assert ProfileShelf(store=lambda: client).publish(found, deadline_s=1.0)
    written_with = "" if "event=profile_misfit" in said else found.id
    assert [coding.form_of(META).meta.profile for _ in range(3)] == [written_with] * 3
    assert warnings(caplog) == said


def model_config(model: str, **changes: Any) -> SimpleNamespace:
    fields = {"model": model, "hf_overrides": {}, "quantization": None} | changes
    return SimpleNamespace(model_config=SimpleNamespace(**fields))


def test_an_engine_says_whose_weights_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "Tiny-1M"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert engine_weights(model_config(str(folder))) == Weights("Tiny-1M", model_digest(str(folder)))
    monkeypatch.chdir(folder)
    assert engine_weights(model_config(".")).name == "Tiny-1M"
    assert engine_weights(model_config("owner/Tiny-1M")) == Weights("Tiny-1M", None)
    assert engine_weights(model_config(str(folder), quantization="fp8")) == Weights("Tiny-1M", None)
    assert engine_weights(model_config(str(folder), hf_overrides={"rope_theta": 1.0})) == Weights("Tiny-1M", None)


def test_formats_of_strangers_are_not_kept_for_ever(shipped: Path) -> None:
    made: list[str] = []

    def note(profile: Profile) -> TwoLevels:
        made.append(profile.id)
        return TwoLevels(profile)

    shelf = ProfileShelf(store=MemoryStoreClient)
    coding = Coding(
        ConnectorSettings(), shelf=shelf, meter=SpeedMeter(), model=META, weights=WEIGHTS, layered={"transform": note}
    )
    others = [tiny_profile(layers=LAYERS, heads=HEADS, dim=DIM, name=f"model {n}") for n in range(MAX_KEPT + 2)]
    for profile in [*others, others[-1], others[0]]:
        shelf.add(profile)
        coding.format_of(msgspec.structs.replace(META, codec="transform", profile=profile.id), deadline_s=0.0)
    assert made == [profile.id for profile in [*others, others[0]]], "the last is kept, the first was given up"


def test_every_codec_that_can_be_set_exists() -> None:
    annotation = ConnectorSettings.model_fields["codec"].annotation
    assert set(get_args(annotation)) == {*codec_names(), *LAYERED}


def test_rates_remember_what_was_measured() -> None:
    meter = SpeedMeter()
    assert meter.speeds.prefill is None
    meter.note_prefill(10, seconds=1.0)
    assert meter.speeds.prefill is None, "decode steps are not prefill"
    meter.note_prefill(500, seconds=0.5)
    assert meter.speeds.prefill == Rate(1000.0, 0.5)
