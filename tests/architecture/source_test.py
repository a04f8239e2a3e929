"""House rules that a linter does not know: what the text of every module must look like.

Covers: module docstrings, sizes, broad `except`, pickling, sleeping tests, the changelog, environment variables.
Does not cover: style that ruff checks, types, imports (`imports_test.py`).
"""

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("cluster", "router", "prefill_workers", "decode_workers", "kvstore", "loadtest")
MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 70

LARGER: dict[str, str] = {}
"""Files or `file:function` that may be larger, with the reason. Empty, and meant to stay so."""
DOCSTRING_SAYS_ALL = ("__init__.py", "errors.py", "metrics.py")
"""Modules whose whole content is one list: their docstring needs no list of what they cover."""
POLLING_HELPERS = ("wait", "until", "eventually", "poll")
"""How names of functions begin that may pause between two looks, in a loop under a deadline."""
PICKLES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}


def sources(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def calls(node: ast.AST) -> Iterator[ast.Call]:
    return (child for child in ast.walk(node) if isinstance(child, ast.Call))


@pytest.mark.parametrize("path", sources(*ROOMS), ids=relative)
def test_modules_say_what_they_cover(path: Path) -> None:
    text = ast.get_docstring(tree_of(path))
    assert text, "no module docstring"
    assert path.name in DOCSTRING_SAYS_ALL or "Covers" in text, "the docstring does not say what the module covers"


@pytest.mark.parametrize("path", sources(*ROOMS, "tests", "docs", "requirements"), ids=relative)
def test_files_and_functions_stay_small(path: Path) -> None:
    name = relative(path)
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_FILE_LINES or name in LARGER, f"{lines} lines: which second noun does this file hold?"
    long = {
        f"{name}:{function.name}": size
        for function in functions(path)
        if (size := (function.end_lineno or 0) - function.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert not set(long) - set(LARGER), long


def test_the_list_of_larger_things_is_empty() -> None:
    assert LARGER == {}


@pytest.mark.parametrize("path", sources(*ROOMS), ids=relative)
def test_a_broad_except_is_never_silent(path: Path) -> None:
    """`except Exception` raises again, logs the traceback, or says in a comment why every error is meant."""
    lines = path.read_text(encoding="utf-8").splitlines()
    silent = [
        f"{relative(path)}:{handler.lineno}"
        for handler in ast.walk(tree_of(path))
        if isinstance(handler, ast.ExceptHandler) and _is_broad(handler)
        if not _raises(handler) and not _logs(handler) and not _explains(handler, lines)
    ]
    assert not silent, silent


def _is_broad(handler: ast.ExceptHandler) -> bool:
    names = (
        [node.id for node in ast.walk(handler.type) if isinstance(node, ast.Name)] if handler.type else ["Exception"]
    )
    return bool({"Exception", "BaseException"} & set(names))


def _raises(handler: ast.ExceptHandler) -> bool:
    return isinstance(handler.body[-1], ast.Raise)


def _logs(handler: ast.ExceptHandler) -> bool:
    return any(ast.unparse(call.func).endswith(".exception") for call in calls(handler))


def _explains(handler: ast.ExceptHandler, lines: list[str]) -> bool:
    text = lines[handler.lineno - 1 : handler.body[-1].end_lineno]
    return any(re.search(r"#\s*(?!noqa)\w", line) for line in text)


@pytest.mark.parametrize("path", sources(*ROOMS), ids=relative)
def test_nothing_unpickles(path: Path) -> None:
    """Bytes from the network or from disk never become code."""
    imported = {
        alias.name.partition(".")[0]
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in ([ast.alias(node.module or "")] if isinstance(node, ast.ImportFrom) else node.names)
    }
    assert not imported & PICKLES
    loads = [call.lineno for call in calls(tree_of(path)) if ast.unparse(call.func).endswith("torch.load")]
    assert not loads, f"torch.load unpickles: lines {loads}"


@pytest.mark.parametrize("path", sources("tests"), ids=relative)
def test_tests_do_not_sleep(path: Path) -> None:
    """Tests move a `ManualClock`, or look again and again until a deadline, in a loop of a helper for that."""
    allowed = {
        call.lineno
        for function in functions(path)
        if function.name.strip("_").startswith(POLLING_HELPERS)
        for loop in ast.walk(function)
        if isinstance(loop, ast.While)
        for call in calls(loop)
    }
    sleeps = [
        call.lineno
        for call in calls(tree_of(path))
        if ast.unparse(call.func) in ("time.sleep", "asyncio.sleep", "sleep") and not _is_yield(call)
    ]
    assert not set(sleeps) - allowed, f"{relative(path)}: lines {sorted(set(sleeps) - allowed)}"


def _is_yield(call: ast.Call) -> bool:
    """`asyncio.sleep(0)` waits for nothing: it lets other tasks run."""
    return len(call.args) == 1 and isinstance(call.args[0], ast.Constant) and call.args[0].value == 0


def test_the_changelog_has_a_place_for_what_comes() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## .*$", text, flags=re.MULTILINE)
    assert headings
    assert headings[0] == "## [Unreleased]"


def test_every_environment_variable_is_documented() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    used = {
        name
        for path in sources(*ROOMS)
        for name in re.findall(r"LEARNONCE_(?!TEST_)[A-Z_]*[A-Z]", path.read_text(encoding="utf-8"))
    }
    assert used
    assert not {name for name in used if f"`{name}`" not in page}


def test_hooks_run_what_the_environment_has() -> None:
    """Commits need no network: every hook is a tool of the project's own environment."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    entries = [hook["entry"].split()[0] for hook in config["repos"][0]["hooks"]]
    assert all(entry.startswith(".venv/bin/") for entry in entries)
    missing = [entry for entry in entries if not Path(sys.executable).with_name(Path(entry).name).exists()]
    assert entries
    assert not missing


def test_decision_records_are_numbered_without_gaps() -> None:
    pages = sorted((ROOT / "docs" / "adr").glob("*.md"))
    assert [page.name[:4] for page in pages] == [f"{number:04d}" for number in range(1, len(pages) + 1)]
    mentioned = {
        name
        for path in sources(*ROOMS, "tests")
        for name in re.findall(r"docs/adr/(\d{4}-[a-z0-9-]+\.md)", path.read_text(encoding="utf-8"))
    }
    assert mentioned
    assert not mentioned - {page.name for page in pages}
