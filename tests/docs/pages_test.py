"""The pages tell the truth: code runs, commands and settings exist, links lead somewhere, generated pages are fresh.

Covers: README, CONTRIBUTING, CHANGELOG, everything in docs/, and the examples in docstrings.
Does not cover: whether prose is right; that is what reviewers are for.

A fenced block that cannot be checked has its reason in a comment directly above: `<!-- not run: reason -->`.
"""

import doctest
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import yaml
from markdown_it import MarkdownIt
from typer.main import get_command

from cluster import cli
from cluster.settings import Settings
from cluster.settings_base import load_settings

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("cluster", "router", "prefill_workers", "decode_workers", "kvstore", "loadtest")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = {"sh", "bash", "shell", "console"}
PLAIN = {"", "text", "http", "json", "mermaid", "toml"}
PROGRAMS = {"make", "learnonce", "curl", "git", "python", "export", "tail", "kill", "pip", "cd", "jq", "cat", "ls"}
NOT_RUN = re.compile(r"<!-- not run: \w.{8,} -->")
DEADLINE_S = 120.0


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    reason: bool
    """A comment above says why it is not checked."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(*languages: str) -> list[Block]:
    return [block for page in PAGES if page.exists() for block in _blocks_of(page) if block.language in languages]


def _blocks_of(page: Path) -> Iterator[Block]:
    above = ""
    for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        if token.type == "fence" and token.map:
            language = token.info.split()[0] if token.info.split() else ""
            yield Block(page, token.map[0] + 1, language, token.content, bool(NOT_RUN.search(above)))
        if token.type in ("html_block", "fence", "inline"):
            above = token.content if token.type == "html_block" else ""


def test_every_page_of_the_readme_is_there() -> None:
    assert [relative(page) for page in PAGES if not page.exists()] == []


def test_every_fenced_block_has_a_language_that_is_checked() -> None:
    known = PLAIN | SHELL | {"python", "yaml"}
    found = [block for page in PAGES for block in _blocks_of(page)]
    assert found
    assert [f"{block}: {block.language}" for block in found if block.language not in known] == []


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_blocks_run(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if block.reason:
        compile(block.text, str(block), "exec")
        return
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    if ">>>" in block.text:
        test = doctest.DocTestParser().get_doctest(block.text, names, str(block), relative(block.page), block.line)
        assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0
    else:
        exec(compile(block.text, str(block), "exec"), names)


def _documented_modules() -> list[str]:
    paths = [path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))]
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in paths
        if ">>> " in path.read_text(encoding="utf-8")
    ]


@pytest.mark.parametrize("name", _documented_modules())
def test_examples_in_docstrings_run(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of foreign packages while they are imported
        if "triton" in name:
            pytest.importorskip("triton", reason="Triton is not in the CPU lock")
        module = importlib.import_module(name)
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize("block", blocks(*SHELL), ids=str)
def test_shell_blocks_name_commands_that_exist(block: Block) -> None:
    if block.reason:
        return
    commands = list(_commands(block.text))
    assert commands
    assert [f"{command}: {problem}" for command in commands if (problem := _problem(command))] == []


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_commands_in_the_text_exist(page: Path) -> None:
    """`make test` and `learnonce up` in running text are checked like those in blocks."""
    commands = [
        child.content
        for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))
        for child in token.children or ()
        if child.type == "code_inline" and re.match(r"(make|learnonce) [a-z]", child.content)
    ]
    assert [f"{command}: {problem}" for command in commands if (problem := _problem(command))] == []


def _commands(text: str) -> Iterator[str]:
    """Commands of a block: one per line, unless a quote or a backslash carries it on."""
    command = ""
    for line in text.replace("\\\n", " ").splitlines():
        command = f"{command}\n{line}" if command else line.removeprefix("$ ").strip()
        if not command or command.startswith("#"):
            command = ""
        elif _is_complete(command):
            yield command
            command = ""
    assert not command, f"a quote stays open: {command}"


def _is_complete(command: str) -> bool:
    try:
        shlex.split(command, comments=True)
    except ValueError:
        return False
    return True


def _problem(command: str) -> str | None:
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    program = words[0].rpartition("/")[2] if words else ""
    if program == "make":
        unknown = [word for word in words[1:] if "=" not in word and word not in _targets()]
        return f"no target {unknown}" if unknown else None
    if program == "learnonce":
        return _unknown_command(words[1:])
    if program == "python" and len(words) > 1 and words[1].endswith(".py"):
        return None if (ROOT / words[1]).exists() else f"no file {words[1]}"
    return None if program in PROGRAMS else f"unknown program {program!r}"


def _targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))


@cache
def _command_line() -> Any:
    """`learnonce` with the groups that pyproject.toml declares, installed or not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    command: Any = get_command(cli.app)
    for name, target in project["entry-points"]["learnonce.commands"].items():
        module, _, group = target.partition(":")
        command.commands[name] = get_command(getattr(importlib.import_module(module), group))
    return command


def _unknown_command(words: list[str]) -> str | None:
    command = _command_line()
    while words and hasattr(command, "commands") and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    if hasattr(command, "commands") and words and not words[0].startswith("-"):
        return f"no command {words[0]!r}"
    options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    unknown = [word for word in words if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in options]
    return f"no option {unknown}" if unknown else None


@pytest.mark.parametrize(
    ("command", "wrong"),
    [
        ("make test", False),
        ("make nothing-of-ours", True),
        ("learnonce up --set cluster.port=8010", False),
        ("learnonce config show", False),
        ("learnonce fly", True),
        ("learnonce up --wings", True),
        ("python docs/generate.py --check", False),
        ("python docs/nothing.py", True),
        ("rm -rf build", True),
    ],
)
def test_the_check_of_shell_blocks_notices(command: str, wrong: bool) -> None:
    assert (_problem(command) is not None) == wrong


@pytest.mark.parametrize("block", blocks("yaml"), ids=str)
def test_yaml_examples_are_settings(block: Block) -> None:
    values = yaml.safe_load(block.text)
    if not block.reason:
        load_settings(Settings, values, source=str(block))


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in _links(page):
        path, _, anchor = target.partition("#")
        file = (page.parent / unquote(path)).resolve() if path else page
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in _anchors(file)):
            broken.append(target)
    assert broken == []


def _links(page: Path) -> Iterator[str]:
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8")):
        for child in token.children or ():
            target = child.attrGet("href") or child.attrGet("src")
            if isinstance(target, str) and not re.match(r"[a-z]+:", target):
                yield target


def _anchors(page: Path) -> set[str]:
    """What GitHub makes of headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_paths_named_in_pages_exist() -> None:
    """`kvstore/keys.py` in a page is a file of this repository."""
    folders = "|".join((*ROOMS, "docs", "tests", "requirements"))
    missing = {
        f"{relative(page)}: {name}"
        for page in PAGES
        for name in re.findall(rf"`((?:{folders})/[\w./-]*\w)`", page.read_text(encoding="utf-8"))
        if not (ROOT / name).exists()
    }
    assert missing == set()


def test_generated_pages_are_fresh() -> None:
    command = [sys.executable, "docs/generate.py", "--check"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert answer.returncode == 0, answer.stderr


def test_the_readme_needs_no_other_set_up_than_its_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    first = next(block for block in _blocks_of(ROOT / "README.md") if block.language in SHELL)
    assert [line.split("#")[0].strip() for line in first.text.splitlines()] == ["make demo", "make test"]
    assert "Python 3.11" in text
