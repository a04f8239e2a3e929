"""What settings mean on a machine."""

from pathlib import Path

import pytest

from cluster.errors import SettingsError
from cluster.resolve import Facts, needed_bytes, resolve, role_engines
from cluster.settings import Settings, settings_from_json

GIB = 1 << 30


def settings(**groups):
    import json

    return settings_from_json(json.dumps(groups))


def machine(available_gib=64):
    return Facts(cores=(0, 1), available_bytes=available_gib * GIB, total_bytes=64 * GIB)


def test_model_is_found_and_keeps_its_name_in_the_api():
    resolved = resolve(settings(engine={"model": "org/Name-7B"}), machine(), model_path="/models/abc")
    assert (resolved.engine.model, resolved.engine.served_model_name) == ("/models/abc", "Name-7B")


def test_given_name_is_kept():
    chosen = settings(engine={"model": "org/Name-7B", "served_model_name": "mine"})
    assert resolve(chosen, machine(), model_path="/m").engine.served_model_name == "mine"


def test_too_little_memory_names_parts_and_remedy():
    chosen = settings(store={"host_bytes": 2 * GIB}, cluster={"decode_replicas": 2})
    with pytest.raises(
        SettingsError, match=r"3 engines 9\.0, node store 2\.0.*8\.0 GiB are available.*store\.host_bytes"
    ):
        resolve(chosen, machine(8), model_path="/m")


def test_memory_of_another_machines_cluster_is_not_checked():
    chosen = settings(cluster={"address": "auto", "host": "0.0.0.0"})
    assert resolve(chosen, machine(0), model_path="/m").engine.model == "/m"


def test_store_takes_its_share_of_all_memory():
    chosen = settings(store={"host_bytes": None, "host_ram_share": 0.25})
    assert needed_bytes(chosen, machine())["node store"] == 16 * GIB


@pytest.mark.parametrize(
    ("cores", "replicas", "prefill", "decode"),
    [
        ((0, 1), (1, 1), ("0",), ("1",)),
        ((0, 1, 2, 3, 4), (1, 1), ("0,1",), ("2,3",)),
        ((3, 5), (2, 1), ("3", "5"), ("3",)),
        ((7,), (1, 1), ("7",), ("7",)),
        ((0, 1), (0, 1), (), ("0,1",)),
    ],
)
def test_every_engine_has_cores_of_its_own(cores, replicas, prefill, decode):
    chosen = settings(cluster={"prefill_replicas": replicas[0], "decode_replicas": replicas[1]})
    engines = role_engines(chosen, cores)
    assert (engines[0].cpus, engines[1].cpus) == (prefill, decode)


def test_given_cores_are_kept():
    chosen = settings(engine={"cpus": ["0-3"]})
    assert [e.cpus for e in role_engines(chosen, (0, 1))] == [("0-3",), ("0-3",)]
    assert [e.cpus for e in role_engines(settings(cluster={"address": "auto"}), (0, 1))] == [(), ()]


def test_defaults_are_a_cluster_for_a_laptop():
    assert sum(needed_bytes(Settings(), machine()).values()) < 24 * GIB


def test_two_clusters_on_one_machine_share_no_folder():
    folders = [
        resolve(
            settings(cluster={"name": name}, store={"nvme": {"folders": ["/disk0", "/disk1"]}}),
            machine(),
            model_path="/m",
        )
        for name in ("one", "two")
    ]
    found = [resolved.store.nvme.folders for resolved in folders if resolved.store.nvme]
    assert found == [("/disk0/one", "/disk1/one"), ("/disk0/two", "/disk1/two")]


def test_no_disks_stay_none():
    assert resolve(settings(store={"nvme": None}), machine(), model_path="/m").store.nvme is None


def test_tls_files_are_found_from_another_folder(tmp_path, monkeypatch):
    """Paths on other nodes are theirs."""
    monkeypatch.chdir(tmp_path)
    tls = {"certificate": "node.pem", "key": "~/node.key", "authority": "/etc/a.pem"}
    found = resolve(settings(store={"tls": tls}), machine(), model_path="/m").store.tls
    assert (found.certificate, found.authority) == (str(tmp_path / "node.pem"), "/etc/a.pem")
    assert found.key == str(Path("~/node.key").expanduser())
    elsewhere = settings(store={"tls": tls}, cluster={"address": "auto", "host": "0.0.0.0"})
    assert resolve(elsewhere, machine(), model_path="/m").store.tls.certificate == "node.pem"


def test_loopback_on_a_cluster_of_machines_is_refused():
    with pytest.raises(SettingsError, match=r"cluster\.host=0\.0\.0\.0"):
        resolve(settings(cluster={"address": "auto"}), machine(), model_path="/m")


@pytest.mark.parametrize(("gpus", "fits"), [(2, True), (1, False)])
def test_a_gpu_per_engine_or_a_message(gpus, fits):
    chosen = settings(store={"host_bytes": GIB})
    gpu_machine = Facts(cores=(0,), available_bytes=64 * GIB, total_bytes=64 * GIB, num_gpus=gpus, cpu_vllm=False)
    if fits:
        assert resolve(chosen, gpu_machine, model_path="/m")
        return
    with pytest.raises(SettingsError, match=r"take 2, this machine has 1.*cluster\.prefill_replicas=0"):
        resolve(chosen, gpu_machine, model_path="/m")
