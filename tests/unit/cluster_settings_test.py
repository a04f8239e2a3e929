"""Settings: where they come from, and what a wrong one is answered with."""

import pytest

from cluster.errors import SettingsError
from cluster.settings import Settings, read_settings, settings_from_json, to_json
from cluster.settings_base import load_settings


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LEARNONCE_CONFIG", raising=False)


def test_defaults_need_no_file():
    assert read_settings() == Settings()


def test_file_then_override(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("cluster:\n  port: 9000\n  name: mine\n")
    settings = read_settings(str(file), ["cluster.port=9100"])
    assert (settings.cluster.name, settings.cluster.port) == ("mine", 9100)


def test_file_in_this_folder_is_found(tmp_path):
    (tmp_path / "learnonce.yaml").write_text("log: {level: DEBUG}\n")
    assert read_settings().log.level == "DEBUG"


def test_file_named_by_the_environment_is_found(tmp_path, monkeypatch):
    (tmp_path / "other.yaml").write_text("cluster: {port: 9200}\n")
    monkeypatch.setenv("LEARNONCE_CONFIG", str(tmp_path / "other.yaml"))
    assert read_settings().cluster.port == 9200


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cluster: {prot: 1}", "cluster.prot: unknown setting; did you mean 'port'?"),
        ("closter: {port: 1}", "closter: unknown setting; did you mean 'cluster'?"),
        ("cluster: {port: eighty}", "cluster.port: Input should be a valid integer"),
        ("cluster: {port: 70000}", "cluster.port: Input should be less than or equal to 65535"),
        ("- a\n- b", "expected names and values at the top, found list"),
        ("cluster: [", "is not YAML"),
    ],
)
def test_wrong_file_names_setting_and_remedy(tmp_path, text, expected):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        read_settings(str(file))
    assert expected in str(caught.value)
    assert "wrong.yaml" in str(caught.value)


def test_every_wrong_setting_is_named_at_once(tmp_path):
    file = tmp_path / "wrong.yaml"
    file.write_text("cluster: {port: 0, host: 5}\nlog: {level: LOUD}\n")
    with pytest.raises(SettingsError) as caught:
        read_settings(str(file))
    for name in ("cluster.port", "cluster.host", "log.level"):
        assert name in str(caught.value)


def test_missing_file():
    with pytest.raises(SettingsError, match=r"cannot read settings file nowhere\.yaml: No such file"):
        read_settings("nowhere.yaml")


@pytest.mark.parametrize("override", ["cluster.port", "=5", "cluster.port.deep=1", "cluster.port=[", "cluster.nope=1"])
def test_wrong_override(override):
    with pytest.raises(SettingsError):
        read_settings(None, ["cluster.port=8000", override])


def test_settings_survive_the_way_to_another_process():
    settings = read_settings(None, ["cluster.port=8123", "log.json_lines=true"])
    assert settings_from_json(to_json(settings)) == settings


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "store: {file: {folder: /a}}",
            "store.file: renamed: use nvme, whose `folders` is a list, one folder per device",
        ),
        ("store: {snapshot_port: 8000}", "store.snapshot_port and cluster.port are both 8000"),
        ("store: {nvme: {low_ratio: 0.8, high_ratio: 0.7}}", "store.nvme: low_ratio 0.8 must not be above high_ratio"),
        ("store: {object: {url: 's3://u:hush@b/p'}}", "store.object.url: credentials and queries do not belong"),
    ],
)
def test_settings_that_contradict_each_other_are_named(tmp_path, text, expected):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        read_settings(str(file))
    assert expected in str(caught.value)
    assert "hush" not in str(caught.value)


def test_hint_sees_groups_that_may_be_null() -> None:
    with pytest.raises(SettingsError, match=r"store\.nvme\.folder: unknown setting; did you mean 'folders'\?"):
        load_settings(Settings, {"store": {"nvme": {"folder": "/a"}}}, source="here")
