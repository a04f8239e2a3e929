"""How a worker codes: its settings, and what it remembers of speeds.

Covers: settings that cannot be carried out, the names of codecs, measured rates.
Does not cover: chunks that are coded (`tests/unit/engine_coded_transfers_test.py`).
"""

from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from support.layered_codec import TwoLevels, tiny_profile

from cluster.errors import SettingsError
from kvstore.codecs import codec_names
from kvstore.codecs.controller import Rate
from kvstore.codecs.profile import Profile
from kvstore.engine.coding import LAYERED, Coding
from kvstore.engine.profiles import MAX_KEPT, ProfileShelf
from kvstore.engine.settings import ConnectorSettings
from kvstore.engine.speeds import SpeedMeter
from kvstore.interfaces import ChunkMeta
from kvstore.testing import MemoryStoreClient

LAYERS, HEADS, DIM = 3, 1, 4
PROFILE = tiny_profile(layers=LAYERS, heads=HEADS, dim=DIM)
META = ChunkMeta(num_tokens=1, num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, dtype="float32", base_position=0)


@pytest.fixture
def shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The only shipped profile is `PROFILE`."""
    monkeypatch.setattr("kvstore.engine.profiles.SHIPPED", tmp_path)
    (tmp_path / "tiny.lkp").write_bytes(PROFILE.to_bytes())
    return tmp_path


def test_settings_that_cannot_be_carried_out_say_what_to_do(shipped: Path, tmp_path: Path) -> None:
    def make(**changes: Any) -> Coding:
        settings = ConnectorSettings(codec="transform", **changes)
        shelf = ProfileShelf(store=MemoryStoreClient)
        layered = {"transform": TwoLevels}
        return Coding(settings, shelf=shelf, meter=SpeedMeter(), model=META, layered=layered)

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


def test_formats_of_strangers_are_not_kept_for_ever(shipped: Path) -> None:
    made: list[str] = []

    def make(profile: Profile) -> TwoLevels:
        made.append(profile.id)
        return TwoLevels(profile)

    shelf = ProfileShelf(store=MemoryStoreClient)
    coding = Coding(ConnectorSettings(), shelf=shelf, meter=SpeedMeter(), model=META, layered={"transform": make})
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
