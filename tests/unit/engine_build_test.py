"""What follows from settings and the machine, and what is refused."""

import os
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from cluster.errors import SettingsError
from cluster.settings_base import load_settings
from cluster.telemetry import DEFINITIONS
from kvstore.engine.build import MachineFacts, engine_environment, machine_facts, resolve
from kvstore.engine.metrics import COUNTERS, LABELLED, SECONDS
from kvstore.engine.settings import OWNED_ARGUMENTS, EngineSettings
from kvstore.engine.tally import Series
from kvstore.model_digest import model_digest

FOUR = MachineFacts(cpu_vllm=True, native_bf16=True, allowed_cpus=(2, 3, 6, 7))


@pytest.mark.parametrize(
    ("chosen", "rank", "replicas", "expected"),
    [
        ((), 0, 1, (2, 3, 6, 7)),
        ((), 0, 2, (2, 3)),
        ((), 1, 2, (6, 7)),
        ((), 2, 3, (6,)),
        ((), 5, 8, (3,)),
        (("2-3,7", "6"), 0, 2, (2, 3, 7)),
        (("2-3,7", "6"), 1, 2, (6,)),
    ],
)
def test_cores(chosen: tuple[str, ...], rank: int, replicas: int, expected: tuple[int, ...]) -> None:
    settings = EngineSettings(cpus=chosen)
    assert resolve(settings, FOUR, replica_rank=rank, num_replicas=replicas).cpus == expected
    environment = engine_environment(settings, replica_rank=rank, num_replicas=replicas, facts=FOUR)
    cores = ",".join(map(str, expected))
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == cores
    assert environment["OMP_PLACES"] == f"{{{cores}}}"
    assert environment["OMP_NUM_THREADS"] == str(len(expected))
    # A key for another vLLM server must not shut the router out of ours.
    assert environment["VLLM_API_KEY"] == ""


@pytest.mark.parametrize(("chosen", "rank"), [(("2",), 1), (("4",), 0)])
def test_cores_that_are_not_there(chosen: tuple[str, ...], rank: int) -> None:
    with pytest.raises(SettingsError, match="cpus"):
        resolve(EngineSettings(cpus=chosen), FOUR, replica_rank=rank)


@pytest.mark.parametrize(
    ("native", "dtype", "expected"),
    [(True, "auto", "auto"), (False, "auto", "float32"), (False, "bfloat16", "bfloat16"), (True, "float16", "float16")],
)
def test_dtype(native: bool, dtype: Any, expected: str) -> None:
    facts = MachineFacts(cpu_vllm=True, native_bf16=native, allowed_cpus=(0,))
    assert resolve(EngineSettings(dtype=dtype), facts).dtype == expected


def test_gpu_machine_is_left_to_vllm() -> None:
    facts = MachineFacts(cpu_vllm=False, native_bf16=False, allowed_cpus=(0, 1))
    plan = resolve(EngineSettings(), facts)
    assert (plan.device, plan.dtype, plan.cpus, plan.block_size, plan.kv_cache_bytes, plan.enforce_eager) == (
        "cuda",
        "auto",
        (),
        None,
        None,
        False,
    )
    assert not [
        n for n in engine_environment(EngineSettings(), replica_rank=0, facts=facts) if "OMP" in n or "CPU" in n
    ]
    with pytest.raises(SettingsError, match="other lock"):
        resolve(EngineSettings(device="cpu"), facts)


def test_every_owned_argument_is_refused() -> None:
    for name in OWNED_ARGUMENTS:
        with pytest.raises(SettingsError, match=name):
            load_settings(EngineSettings, {"vllm_arguments": {name: 1}}, source="test")
    loaded = load_settings(EngineSettings, {"vllm_arguments": {"swap": 1}, "cpus": ["0"]}, source="test")
    assert loaded.vllm_arguments == {"swap": 1}


def test_facts_cost_no_import_of_torch() -> None:
    assert machine_facts().allowed_cpus == tuple(sorted(os.sched_getaffinity(0)))
    script = "import sys, kvstore.engine.build as b; b.machine_facts(); sys.exit('torch' in sys.modules)"
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", script]) == 0


def write_model(folder: Path, *, weights: bytes = b"w" * 3_000_000, config: str = "{}") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").write_bytes(weights)
    return model_digest(str(folder))


def test_digest_follows_the_content_not_the_place(tmp_path: Path) -> None:
    plain = write_model(tmp_path / "a")
    assert write_model(tmp_path / "b") == plain
    (tmp_path / "b" / "README.md").write_text("words")
    assert model_digest(str(tmp_path / "b")) == plain
    others = {
        write_model(tmp_path / "c", config='{"a": 1}'),
        write_model(tmp_path / "d", weights=b"w" * 2_999_999),
        write_model(tmp_path / "e", weights=b"x" + b"w" * 2_999_999),
        write_model(tmp_path / "f", weights=b"w" * 2_999_999 + b"x"),
        write_model(tmp_path / "g", weights=b"v" * 3_000_000),
        model_digest("owner/name"),
        model_digest("owner/name", revision="abc"),
        plain,
    }
    assert len(others) == 8


def test_every_tally_name_has_a_metric() -> None:
    """What the connector counts reaches Prometheus: names are closed sets, in one place."""
    counted = {"loaded_tokens", "loaded_bytes", "loads_complete", "loads_dropped", "load_failed_tokens"}
    counted |= {"saved_tokens", "saved_bytes", "saved_kv_bytes", "params_rejected"}
    counted |= {"loaded_encoded_bytes", "damaged_parts", "recompute_chosen", "prefill_tokens"}
    counted |= {"joined_tokens", "join_recomputed_tokens", "join_computed_tokens"}
    assert set(COUNTERS) == counted
    labelled = {"load_failures", "saves", "saved_chunks", "loaded_levels", "hook_errors", "joins", "join_failures"}
    assert set(LABELLED) == labelled
    assert set(SECONDS) == set(get_args(Series))
    metrics = [*COUNTERS.values(), *LABELLED.values(), *SECONDS.values()]
    assert all(DEFINITIONS[metric.name].when_it_moves for metric in metrics)


@pytest.mark.parametrize("at_byte", [70_000, 10_000_000, 33_333_333, 66_000_000])
def test_digest_sees_one_changed_tensor(tmp_path: Path, at_byte: int) -> None:
    """A fine-tune may change a few tensors only: here a five-hundredth of a file of 64 MiB."""
    size_bytes = 64 << 20

    def digest(name: str, changed: bytes) -> str:
        (tmp_path / name).mkdir()
        with (tmp_path / name / "model.safetensors").open("wb") as file:
            file.truncate(size_bytes)
            file.seek(at_byte)
            file.write(changed)
        return model_digest(str(tmp_path / name))

    assert digest("plain", b"") != digest("tuned", b"x" * (size_bytes // 500))
