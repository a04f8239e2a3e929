"""The `learnonce` command.

Covers: what a person types and sees. Does not cover: the work behind it (`cluster.local`, `cluster.lifecycle`,
`cluster.demo`, and command groups that other packages add through the entry point group `learnonce.commands`).

Exit status: 0 done, 1 a bug of ours, 2 fix what you asked for, 3 not possible now, 130 interrupted (Ctrl-C, SIGTERM,
or the terminal has gone).
"""

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any, Final

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cluster import client, local
from cluster.calibrate_cli import calibrate
from cluster.errors import CallerError, LearnonceError, UnavailableError
from cluster.settings import Settings, read_settings, to_json
from cluster.store_cli import store

EXIT_BUG: Final = 1
EXIT_CALLER: Final = 2
EXIT_UNAVAILABLE: Final = 3
EXIT_INTERRUPTED: Final = 130

app = typer.Typer(
    name="learnonce",
    help="A disaggregated prefill/decode cluster on vLLM and Ray in which every passage is learned once.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
config = typer.Typer(help="Show the settings, or their schema.", no_args_is_help=True)
app.add_typer(config, name="config")
app.add_typer(store, name="store")
app.command()(calibrate)
for _entry in entry_points(group="learnonce.commands"):
    app.add_typer(_entry.load(), name=_entry.name)

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

ConfigOption = Annotated[
    str | None,
    typer.Option("--config", "-c", help="YAML file with settings (./learnonce.yaml if it is there)"),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="One setting, for example --set cluster.port=8001; repeatable")
]
UrlOption = Annotated[str | None, typer.Option("--url", help="The API, if not the one in the settings")]
DocumentOption = Annotated[
    list[Path] | None, typer.Option("--document", "-d", help="A text file to answer from; repeatable, order kept")
]

QualityOption = Annotated[
    str | None,
    typer.Option("--quality", help="exact, high, fast, or the share of moved tokens that is computed again (0 to 1)"),
]


@app.command()
def up(config_file: ConfigOption = None, overrides: SetOption = None) -> None:
    """Start a cluster and leave it running."""
    settings = read_settings(config_file, overrides or ())
    with _undone_unless_it_ends(settings):
        url = start_cluster(settings)
        examples = usage_examples(url)
    out.print(examples)


@app.command()
def down(config_file: ConfigOption = None, overrides: SetOption = None) -> None:
    """Stop the cluster that `learnonce up` started, and nothing else."""
    settings = read_settings(config_file, overrides or ())
    stop_cluster(settings)


@app.command()
def status(config_file: ConfigOption = None, overrides: SetOption = None) -> None:
    """Show the cluster: its phase, its processes, its replicas. Exit status 3 if it is not ready."""
    settings = read_settings(config_file, overrides or ())
    state = _folder(settings).read()
    name = settings.cluster.name
    if state is None or state.phase == local.Phase.STOPPED:
        raise UnavailableError(f"cluster {name!r} is not running: `learnonce up` starts it")
    alive = local.processes_of(state.cluster_id) if state.supervisor_pid else []
    out.print(f"cluster   {state.name}: {state.phase}" + (f" ({state.message})" if state.message else ""))
    out.print(f"api       {state.url}/v1")
    if state.supervisor_pid:
        memory = sum(process.memory_info().rss for process in alive)
        out.print(f"processes {len(alive)}, {memory / (1 << 30):.1f} GiB resident, supervisor {state.supervisor_pid}")
    out.print(f"files     {_folder(settings).path}")
    if state.phase == local.Phase.READY:
        ready = client.get_json(f"{state.url}/ready")
        out.print(_replica_table(ready))
    if state.phase != local.Phase.READY or (state.supervisor_pid and not alive):
        raise UnavailableError(f"cluster {name!r} is {state.phase if alive else 'dead: its processes ended'}")


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask")],
    document: DocumentOption = None,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens")] = 128,
    quality: QualityOption = None,
    url: UrlOption = None,
    config_file: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Ask one question, streaming the answer; documents are learned once and reused."""
    settings = read_settings(config_file, overrides or ())
    answer = client.ask(
        _api(settings, url),
        question,
        documents=read_documents(document or []),
        max_tokens=max_tokens,
        quality=_number_or_name(quality),
        on_text=lambda text: out.print(escape(text), end=""),
    )
    out.print()
    err.print(
        f"[dim]{answer.prompt_tokens} prompt tokens, {answer.cached_tokens} reused; "
        f"first token after {answer.ttft_s:.2f} s, {answer.completion_tokens} tokens in {answer.total_s:.2f} s[/dim]"
    )


@app.command()
def explain(
    question: Annotated[str, typer.Argument(help="The question of the request")],
    document: DocumentOption = None,
    quality: QualityOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON")] = False,
    url: UrlOption = None,
    config_file: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Print the plan for a request and its reasons, without running it."""
    settings = read_settings(config_file, overrides or ())
    documents = read_documents(document or [])
    plan = client.explain(_api(settings, url), question, documents=documents, quality=_number_or_name(quality))
    if as_json:
        out.print_json(json.dumps(plan))
        return
    for line in plan_lines(plan):
        out.print(line)


@app.command()
def demo(
    keep: Annotated[bool, typer.Option("--keep", help="Leave the cluster running afterwards")] = False,
    config_file: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Start a cluster, learn the documents that ship with it, ask about them, print the table, stop."""
    from cluster.demo import run_demo

    settings = read_settings(config_file, overrides or ())
    if not keep:
        # A cluster for two minutes must not fill the user's cache with chunks that nobody asks for again.
        settings = settings.model_copy(
            update={"store": settings.store.model_copy(update={"nvme": None, "object": None})}
        )
    run_demo(settings, keep=keep, console=out, start=start_cluster, stop=stop_cluster)


@config.command("show")
def config_show(config_file: ConfigOption = None, overrides: SetOption = None) -> None:
    """Print every setting with its value, as YAML."""
    import yaml

    settings = read_settings(config_file, overrides or ())
    sys.stdout.write(yaml.safe_dump(json.loads(to_json(settings)), sort_keys=False))


@config.command("schema")
def config_schema() -> None:
    """Print the JSON schema of the settings file."""
    sys.stdout.write(json.dumps(Settings.model_json_schema(), indent=2) + "\n")


def start_cluster(settings: Settings) -> str:
    """Start a cluster with a progress display; the API's URL (without /v1).

    Raises:
        CallerError: Port taken, too little memory, model missing, already running, a store that would not start.
        StartFailedError: It did not become ready.
    """
    from cluster.model import provide_model
    from cluster.resolve import facts, resolve
    from kvstore.preflight import check_before_start

    folder = _folder(settings)
    url = api_url(settings)
    check_before_start(settings.store, is_here=settings.cluster.address == "local")
    with err.status(f"providing the model {settings.engine.model}"):
        model = provide_model(settings.engine.model)
    resolved = resolve(settings, facts(), model_path=model)
    if settings.cluster.address != "local":
        from cluster.lifecycle import deploy_to_running_ray

        with err.status(f"deploying to the Ray cluster at {settings.cluster.address}"):
            deploy_to_running_ray(resolved, folder, url=url)
        return url
    running = folder.read()
    if running is None or not local.is_alive(running):
        local.require_port(settings.cluster.host, settings.cluster.port)
    with _undone_unless_it_ends(settings):
        local.spawn_supervisor(folder, to_json(resolved), name=settings.cluster.name, url=url)
        _show_start(folder, settings.cluster.start_deadline_s)
    return url


@contextmanager
def _undone_unless_it_ends(settings: Settings) -> Iterator[None]:
    """Stop the cluster that a `with` block has started when the block fails or is interrupted; no other one."""
    folder = _folder(settings)
    before = folder.read()
    try:
        yield
    except BaseException:
        started = folder.read()
        if started is not None and started.supervisor_pid and (not before or before.cluster_id != started.cluster_id):
            local.stop(folder, deadline_s=settings.cluster.drain_s)
        raise


def stop_cluster(settings: Settings) -> None:
    """Stop the cluster of these settings, with a line about it."""
    folder = _folder(settings)
    state = folder.read()
    with err.status(
        f"stopping cluster {settings.cluster.name!r}: running requests may take {settings.cluster.drain_s:.0f} s"
    ):
        if state is not None and not state.supervisor_pid and state.phase == local.Phase.READY:
            from cluster.lifecycle import remove_from_running_ray

            remove_from_running_ray(settings, folder)
            found = True
        else:
            found = local.stop(folder, deadline_s=settings.cluster.drain_s + 30.0)
    out.print(
        f"cluster {settings.cluster.name!r} stopped; nothing of it runs any more"
        if found
        else f"cluster {settings.cluster.name!r} was not running"
    )


def _show_start(folder: local.StateFolder, deadline_s: float) -> None:
    if not err.is_terminal:
        _print_start(folder, deadline_s)
        return
    with Live(console=err, refresh_per_second=8, transient=False) as live:
        for state in local.follow_start(folder, deadline_s=deadline_s):
            live.update(_progress_table(state))


def _print_start(folder: local.StateFolder, deadline_s: float) -> None:
    """Progress for logs: one line per change."""
    seen: dict[str, str] = {}
    for state in local.follow_start(folder, deadline_s=deadline_s):
        for step in state.steps:
            line = _step_line(step)
            if step.state != "waiting" and seen.get(step.name) != (step.state + step.detail):
                seen[step.name] = step.state + step.detail
                err.print(line)


def _progress_table(state: local.ClusterState) -> Table:
    table = Table.grid(padding=(0, 1))
    for step in state.steps:
        table.add_row(_step_line(step))
    return table


def _step_line(step: local.Step) -> Text:
    mark, style = {"done": ("✓", "green"), "failed": ("✗", "red"), "working": ("…", "cyan")}.get(
        step.state, ("·", "dim")
    )
    text = Text(f" {mark} {step.name}", style=style)
    if step.started_s is not None and step.finished_s is not None:
        text.append(f"  {step.finished_s - step.started_s:.1f} s", style="dim")
    elif step.detail:
        text.append(f"  {step.detail}", style="dim")
    return text


def _replica_table(ready: dict[str, Any]) -> Table:
    table = Table("role", "replica", "state", "running", "node store")
    for worker in ready.get("workers", ()):
        table.add_row(
            worker["role"],
            worker["replica_id"],
            worker["state"],
            str(worker["running_requests"]),
            worker["store_epoch"] or "away",
        )
    return table


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """A plan of `/v1/plan` as lines to read."""
    lines = [
        f"[bold]mode {plan['mode']}[/bold]: {plan['prompt_tokens']} prompt tokens, {plan['held_tokens']} held, "
        f"{plan['uncached_tokens']} to compute"
    ]
    if plan["join"]:
        lines.append(
            f"  joined by {plan['join']['method']}, {plan['join']['share']:.0%} of moved tokens computed again"
        )
    if plan["opaque"]:
        lines.append(f"  nothing can be reused: {escape(plan['opaque'])}")
    segments = plan["segments"]
    if segments["prefix"]:
        lines.append(_segment_line("prefix", segments["prefix"], _held_of(plan, "prefix")))
    lines += [
        _segment_line("passage", document["tokens"], document["state"], document["title"] or "")
        for document in plan["documents"]
    ]
    if segments["tail"]:
        lines.append(_segment_line("tail", segments["tail"], _held_of(plan, "tail")))
    return lines + [f"  - {escape(reason)}" for reason in plan["reasons"]]


def _segment_line(kind: str, tokens: int, state: str, title: str = "") -> str:
    return f"  {kind:<8}{tokens:>7} tokens  {state:<12}{escape(title)}".rstrip()


def _held_of(plan: dict[str, Any], segment: str) -> str:
    chunks = [chunk for chunk in plan["chunks"] if chunk["segment"] == segment]
    held = sum(chunk["tokens"] for chunk in chunks if chunk["held"])
    if chunks and held == sum(chunk["tokens"] for chunk in chunks):
        return "held"
    return f"{held} held" if held else "unknown"


def usage_examples(url: str) -> str:
    """What to paste next."""
    model = client.get_json(f"{url}/v1/models")["data"][0]["id"]
    return f"""
[bold]The cluster is up at {url}/v1[/bold]. Paste one of these:

curl {url}/v1/chat/completions -H 'Content-Type: application/json' -d '{{
  "model": "{model}",
  "documents": \\[{{"title": "Tide", "text": "The tide gauge is read at six in the morning."}}],
  "messages": \\[{{"role": "user", "content": "When is the tide gauge read?"}}]}}'

from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="unused")
answer = client.chat.completions.create(
    model="{model}",
    messages=\\[{{"role": "user", "content": "When is the tide gauge read?"}}],
    extra_body={{"documents": \\[{{"title": "Tide", "text": "The tide gauge is read at six in the morning."}}]}},
)
print(answer.choices\\[0].message.content, answer.usage.prompt_tokens_details)

learnonce ask "When is the tide gauge read?" --document FILE
learnonce status          learnonce down
"""


def read_documents(paths: list[Path]) -> list[dict[str, str]]:
    """Text files as `documents` of a request: the file's name is the title.

    Raises:
        CallerError: A file that cannot be read, is not UTF-8 text, or is empty.
    """
    documents = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise CallerError(f"cannot read {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise CallerError(f"{path} is not UTF-8 text: convert it first") from error
        if not text.strip():
            raise CallerError(f"{path} is empty")
        documents.append({"title": path.stem, "text": text})
    return documents


def _number_or_name(quality: str | None) -> str | float | None:
    try:
        return quality and float(quality)
    except ValueError:
        return quality


def api_url(settings: Settings) -> str:
    """The API's address without /v1, as a client on this machine reaches it."""
    host = settings.cluster.host
    reachable = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return f"http://{f'[{reachable}]' if ':' in reachable else reachable}:{settings.cluster.port}"


def _api(settings: Settings, url: str | None) -> str:
    return (url or api_url(settings)).rstrip("/").removesuffix("/v1")


def _interrupt(*_: object) -> None:
    """Signal handler: end as with Ctrl-C, so that a start in its middle is undone."""
    raise KeyboardInterrupt


def _folder(settings: Settings) -> local.StateFolder:
    return local.StateFolder(Path(settings.cluster.state_dir), settings.cluster.name)


def main() -> None:
    """Run the command; errors become one message and an exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        # Whoever ignores a signal (`nohup`) goes on ignoring it.
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _interrupt)
    try:
        app()
    except CallerError as error:
        err.print(f"[red]error:[/red] {escape(str(error))}")
        sys.exit(EXIT_CALLER)
    except UnavailableError as error:
        err.print(f"[red]error:[/red] {escape(str(error))}")
        sys.exit(EXIT_UNAVAILABLE)
    except LearnonceError as error:
        err.print(f"[red]bug:[/red] {type(error).__name__}: {escape(str(error))}")
        sys.exit(EXIT_BUG)
    except KeyboardInterrupt:
        err.print("interrupted")
        sys.exit(EXIT_INTERRUPTED)
