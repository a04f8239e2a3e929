"""Settings of a store that cannot work, and what is said about them before anything is started.

Covers: bounds, contradictions, URLs of buckets, the preflight. Does not cover: how settings are read
(`tests/unit/cluster_settings_test.py`), every mistake in TLS files (`tests/unit/kvstore_tls_test.py`).
"""

import inspect
from pathlib import Path

import pytest

from cluster.errors import SettingsError
from cluster.settings_base import load_settings
from kvstore.events import DirectoryFeed
from kvstore.object_url import split_object_url
from kvstore.preflight import check_before_start
from kvstore.settings import MAX_HEARTBEAT_S, STORE_KEY_VARIABLE, ObjectSettings, StoreSettings, TlsSettings
from kvstore.testing.certificates import SampleAuthority

SECRET = "hush"


def wrong(values: dict[str, object]) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(StoreSettings, values, source="here")
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nvme": {"folders": []}}, "nvme.folders: Tuple should have at least 1 item"),
        ({"nvme": {"folders": ["/a", "/b", "/a/"]}}, "nvme.folders: named twice: /a; one folder per device"),
        ({"nvme": {"high_ratio": 0.5}}, "nvme: low_ratio 0.95 must not be above high_ratio 0.5: set both"),
        ({"peers": {"transports": []}}, "peers.transports: Tuple should have at least 1 item"),
        ({"peers": {"transports": ["tcp", "shm", "tcp"]}}, "peers.transports: each data path once"),
        ({"events_port": 7000, "peers": {"port": 7000}}, "events_port and peers.port are both 7000"),
        ({"snapshot_port": 7000, "peers": {"data_port": 7000}}, "snapshot_port and peers.data_port are both 7000"),
        ({"host_bytes": 1000}, "host_bytes: Input should be greater than or equal to 1048576 (given: 1000)"),
        ({"nixl": {"staging_bytes": 1 << 20}}, "nixl.staging_bytes: Input should be greater than or equal to 8388608"),
        ({"file": {"folder": "/a"}}, "file: renamed: use nvme"),
        ({"heartbeat_s": 3.0}, "heartbeat_s: Input should be less than or equal to 1 (given: 3.0)"),
        ({"peers": {"lease_s": 9.0}}, "end after lease_s 9: heartbeat_s must be at most half of it, is 5"),
    ],
)
def test_settings_that_cannot_work_are_named(values: dict[str, object], message: str) -> None:
    assert message in wrong(values)


def test_a_store_that_beats_as_rarely_as_it_may_is_not_taken_for_lost() -> None:
    """Two heartbeats may be late or lost."""
    silence_s = inspect.signature(DirectoryFeed).parameters["silence_s"].default
    assert silence_s >= 3 * MAX_HEARTBEAT_S


def test_different_ports_and_folders_are_fine() -> None:
    values = {
        "events_port": 7000,
        "snapshot_port": 7001,
        "peers": {"port": 7002, "data_port": 7003, "transports": ["tcp"]},
        "nvme": {"folders": ["/a", "/a/b"], "high_ratio": 0.9, "low_ratio": 0.9},
    }
    settings = load_settings(StoreSettings, values, source="here")
    assert sorted(settings.ports().values()) == [7000, 7001, 7002, 7003]
    without = load_settings(StoreSettings, {"events_port": 7000, "peers": None}, source="here")
    assert without.ports() == {"events_port": 7000}


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/folder", "'ftp' is not understood|ftp is not understood"),
        ("s3:bucket", "no bucket in it; for example s3://bucket/prefix"),
        ("bucket/prefix", "is not understood; obstore speaks s3://"),
        ("s3://[", "no URL; for example"),
        ("s3://bucket:9000/prefix", "a bucket has no port"),
        ("arrow+ftp://host/folder", r"pyarrow arrow\+file://"),
        ("arrow+s3:///prefix", r"no bucket in it; for example arrow\+s3://bucket"),
        ("file://chunks/here", r"three slashes and a name: file:///chunks/here \(it is absolute\)"),
        ("arrow+file://chunks", r"three slashes and a name: arrow\+file:///chunks"),
        ("file:chunks", "three slashes and a name: file:///chunks"),
        ("file:///", "three slashes and a name: file:///folder"),
        (f"s3://bucket/pre#{SECRET}", "there is a # in this one"),
        ("file:///folder#", "there is a # in this one"),
        ("arrow+hdfs:///folder#2", "there is a # in this one"),
        (f"s3://key:{SECRET}@bucket/prefix", "use the environment"),
        (f"arrow+s3://key:{SECRET}@bucket/prefix", "use the environment"),
        (f"az://container/prefix?sig={SECRET}", "use the environment"),
        (f"1key:{SECRET}@bucket/prefix", "without a scheme"),
    ],
)
def test_urls_that_no_client_understands(url: str, message: str) -> None:
    with pytest.raises(SettingsError, match=rf"url: .*({message})") as caught:
        load_settings(ObjectSettings, {"url": url}, source="here")
    assert SECRET not in str(caught.value)
    with pytest.raises(ValueError, match="validation error") as raw:
        ObjectSettings(url=url)
    assert SECRET not in str(raw.value)


@pytest.mark.parametrize(
    "url",
    ["s3://bucket/prefix", "s3a://b", "gs://b/p", "az://c/p", "file:///folder", "file:///~/folder", "arrow+gs://b/p",
     "arrow+file:///mnt/nfs", "arrow+hdfs://host:8020/folder", "arrow+hdfs:///folder", "arrow+s3://b"],
)  # fmt: skip
def test_urls_that_some_client_understands(url: str) -> None:
    assert ObjectSettings(url=url).url == url
    assert split_object_url(url).scheme == url.removeprefix("arrow+").partition(":")[0]


def test_options_take_what_yaml_reads() -> None:
    """`allow_http: true` without quotes is what everybody writes first."""
    given = {"url": "s3://b", "options": {"allow_http": True, "http2_only": False, "pool_max_idle_per_host": 4}}
    settings = load_settings(ObjectSettings, given, source="here")
    assert settings.options == {"allow_http": "true", "http2_only": "false", "pool_max_idle_per_host": "4"}
    with pytest.raises(SettingsError, match=r"options\.region: Input should be a valid string"):
        load_settings(ObjectSettings, {"url": "s3://b", "options": {"region": ["eu"]}}, source="here")


# Before the start.


def test_key_is_looked_at_wherever_the_store_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = StoreSettings(encrypt_at_rest=True)
    for is_here in (True, False):
        monkeypatch.delenv(STORE_KEY_VARIABLE, raising=False)
        with pytest.raises(SettingsError, match=f"{STORE_KEY_VARIABLE} is not set"):
            check_before_start(settings, is_here=is_here)
        monkeypatch.setenv(STORE_KEY_VARIABLE, "abc")
        with pytest.raises(SettingsError, match="is not 32 bytes in hex"):
            check_before_start(settings, is_here=is_here)
        monkeypatch.setenv(STORE_KEY_VARIABLE, "ab" * 32)
        check_before_start(settings, is_here=is_here)


def test_tls_files_are_looked_at_where_they_are(tmp_path: Path) -> None:
    missing = TlsSettings(**{name: str(tmp_path / f"no-{name}") for name in ("certificate", "key", "authority")})
    with pytest.raises(SettingsError, match=r"certificate file .*no-certificate cannot be read: No such file"):
        check_before_start(StoreSettings(tls=missing), is_here=True)
    check_before_start(StoreSettings(tls=missing), is_here=False)
    check_before_start(StoreSettings(tls=missing, peers=None), is_here=True)
    check_before_start(StoreSettings(tls=SampleAuthority("ours").issue(tmp_path, "a")), is_here=True)


@pytest.mark.parametrize(
    ("url", "options", "message"),
    [
        ("s3://bucket/prefix", {"no_such_option": "x"}, "no_such_option"),
        ("arrow+file:///folder", {"region": "x"}, "region is not known for arrow"),
    ],
)
def test_bucket_is_looked_at_without_asking_it(url: str, options: dict[str, str], message: str) -> None:
    settings = StoreSettings(object=ObjectSettings(url=url, options=options))
    with pytest.raises(SettingsError, match=message):
        check_before_start(settings, is_here=True)
    check_before_start(settings, is_here=False)
    check_before_start(StoreSettings(object=ObjectSettings(url="s3://nobody-has-this/prefix")), is_here=True)
