"""Nothing that arrives becomes code: no module unpickles, whatever the library calls it.

Covers: imports and calls of all packages, and that each rule notices what it is there for. Does not cover: what
libraries do inside (the engine loads its weights from safetensors by its own settings).
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("cluster", "router", "prefill_workers", "decode_workers", "kvstore", "loadtest")
MODULES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "jsonpickle", "joblib"}
RECEIVERS = {"Client", "JoinableQueue", "Listener", "Manager", "Pipe", "Pool", "Queue", "SimpleQueue"}
"""Of `multiprocessing`: they unpickle what they receive."""
CALLS = {
    "torch.load": "unpickles",
    "pandas.read_pickle": "unpickles",
    "pd.read_pickle": "unpickles",
    "recv_pyobj": "ZMQ unpickles",
    "send_pyobj": "ZMQ pickles, so somebody unpickles",
    "deserialize_descs": "NIXL unpickles descriptors",
    "eval": "runs text",
    "exec": "runs text",
    "yaml.unsafe_load": "makes any object",
    "yaml.full_load": "makes many objects",
}


def wrongs(source: str) -> list[str]:
    """What a module's text does that could turn bytes into code, by line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            names = []
        found += [f"{node.lineno}: imports {name}" for name in names if _unpickles(name)]
        if isinstance(node, ast.Call):
            found += [f"{node.lineno}: {reason}" for reason in _of_call(node)]
    return found


def _unpickles(name: str) -> bool:
    parts = name.split(".")
    return bool(MODULES & {*parts}) or (parts[0] == "multiprocessing" and parts[-1] in RECEIVERS)


def _of_call(call: ast.Call) -> list[str]:
    name = ast.unparse(call.func)
    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    # `model.eval()` and the like are methods of some object, not the builtin.
    dotted = {rule: reason for rule, reason in CALLS.items() if rule not in ("eval", "exec")}
    found = [f"{name} {reason}" for rule, reason in dotted.items() if name == rule or name.endswith(f".{rule}")]
    if name in ("eval", "exec"):
        found.append(f"{name} {CALLS[name]}")
    if name.startswith("multiprocessing.") and _unpickles(name):
        found.append(f"{name} unpickles what it receives")
    if name in ("np.load", "numpy.load") and keywords.get("allow_pickle", "False") != "False":
        found.append(f"{name} with allow_pickle unpickles")
    if name == "yaml.load" and "SafeLoader" not in ast.unparse(call):
        found.append("yaml.load without SafeLoader makes any object")
    return found


@pytest.mark.parametrize(
    "path",
    [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_no_module_unpickles(path: Path) -> None:
    assert wrongs(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "import os, pickle as p",
        "from pickle import loads",
        "from ray import cloudpickle",
        "import ray.cloudpickle",
        "def f():\n    import marshal",
        "from multiprocessing.connection import Listener",
        "from multiprocessing import Queue",
        "multiprocessing.Pipe()",
        "import shelve",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "self.socket.recv_pyobj()",
        "agent.deserialize_descs(data)",
        "numpy.load(file, allow_pickle=True)",
        "np.load(file, allow_pickle=flag)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "eval(text)",
        "exec(code)",
    ],
)
def test_each_rule_notices_what_it_is_there_for(text: str) -> None:
    assert len(wrongs(text)) == 1


@pytest.mark.parametrize(
    "text",
    [
        "from multiprocessing import shared_memory",
        "import multiprocessing.connection",
        "multiprocessing.connection.wait([sentinel])",
        "np.load(file)",
        "np.load(file, allow_pickle=False)",
        "yaml.safe_load(text)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "model.eval()",
        "cursor.exec(query)",
        "msgspec.msgpack.decode(data, type=Header)",
    ],
)
def test_the_rules_leave_the_rest_alone(text: str) -> None:
    assert wrongs(text) == []
