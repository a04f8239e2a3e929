"""The rooms import downwards: the contracts hold, and each of them notices what it is there for.

Covers: the contracts of `[tool.importlinter]` on the real tree and on copies with one planted import each; that the
packages are this checkout's; that the command line starts light. Does not cover: what modules do.
"""

import importlib
import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("cluster", "router", "prefill_workers", "decode_workers", "kvstore", "loadtest")
DEADLINE_S = 120.0

PLANTS = {
    "prefill sees decode": ("prefill_workers/settings.py", "import decode_workers", "rooms import downwards"),
    "router sees a worker": ("router/settings.py", "import decode_workers.settings", "rooms import downwards"),
    "store sees the cluster": ("kvstore/policy/cost.py", "import cluster.settings", "rooms import downwards"),
    "room sees loadtest": ("router/segments.py", "import loadtest.cli", "rooms import downwards"),
    "leaf sees a leaf above it": ("cluster/errors.py", "import cluster.telemetry", "rooms import downwards"),
    "new module of cluster": ("cluster/planted.py", "", "each module of cluster is root or leaf"),
    "vLLM in the store": ("kvstore/container.py", "import vllm", "vLLM stays in the engine files"),
    "vLLM in an actor": ("decode_workers/actor.py", "import vllm", "vLLM stays in the engine files"),
    "Ray in a decision": ("kvstore/policy/cost.py", "import ray", "vLLM stays in the engine files"),
    "Ray in the command": ("cluster/cli.py", "import ray", "vLLM stays in the engine files"),
    "torch inside a function": ("router/policy.py", "def planted() -> None:\n    import torch", "decisions know no"),
    "web framework in a plan": ("decode_workers/plan.py", "import aiohttp", "decisions know no framework"),
    "torch in the store's wire": ("kvstore/wire.py", "import torch", "decisions know no framework"),
}
"""What is planted: file, text added to its end, the contract that must name it."""


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=DEADLINE_S, check=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the contracts look at."""
    copy = tmp_path_factory.mktemp("planted")
    for room in (*ROOMS, "tests"):
        shutil.copytree(
            ROOT / room, copy / room, ignore=lambda folder, names: [n for n in names if _is_data(folder, n)]
        )
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def _is_data(folder: str, name: str) -> bool:
    path = Path(folder, name)
    return name == "__pycache__" or (path.is_file() and path.suffix != ".py")


def test_the_contracts_hold() -> None:
    answer = lint(ROOT)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_a_copy_of_the_tree_passes(tree: Path) -> None:
    answer = lint(tree)
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.mark.parametrize(("file", "text", "contract"), PLANTS.values(), ids=PLANTS.keys())
def test_a_planted_import_is_caught(tree: Path, file: str, text: str, contract: str) -> None:
    target = tree / file
    before = target.read_text(encoding="utf-8") if target.exists() else None
    target.write_text(f"{before or ''}\n{text}\n", encoding="utf-8")
    try:
        answer = lint(tree)
    finally:
        if before is None:
            target.unlink()
        else:
            target.write_text(before, encoding="utf-8")
    broken = answer.stdout.partition("Broken contracts")[2]
    assert answer.returncode == 1, answer.stdout + answer.stderr
    assert contract in broken, answer.stdout
    assert file.removesuffix(".py").replace("/", ".") in broken, answer.stdout


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_imported_from_this_checkout(room: str) -> None:
    found = importlib.import_module(room).__file__
    assert found is not None, f"{room} has no __init__.py"
    assert Path(found).is_relative_to(ROOT)


def test_no_installed_distribution_ships_a_name_of_ours() -> None:
    owners = importlib.metadata.packages_distributions()
    others = {room: set(owners.get(room, ())) - {"learnonce"} for room in ROOMS}
    assert not any(others.values()), others


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_typed_and_named_in_the_wheel(room: str) -> None:
    assert (ROOT / room / "py.typed").is_file()
    assert f'"{room}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("targets.wheel]")[2]


def test_tests_are_no_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_the_command_starts_without_heavy_imports() -> None:
    """`learnonce --help` and shell scripts around it must not wait for engines to import."""
    code = "import sys, cluster.cli; print(*sorted({'ray', 'torch', 'vllm', 'transformers'} & set(sys.modules)))"
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=True
    )
    assert answer.stdout.split() == []
