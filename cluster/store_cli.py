"""`learnonce store`: what the node stores of this machine hold, and how sound it is.

Covers: finding the stores of a cluster on this machine, and printing. Does not cover: the work (`kvstore.client`,
`kvstore.catalog`); stores on other machines, where the same command shows them.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from cluster import local
from cluster.errors import CallerError, UnavailableError
from cluster.settings import read_settings
from kvstore.client import NodeStoreClient
from kvstore.handshake import StoreRefusedError
from kvstore.keys import ChunkKey, tenant_of
from kvstore.protocol import Verified
from kvstore.wire import SECRET_VARIABLE, cluster_secret

store = typer.Typer(help="What the node stores of this machine hold, and how sound it is.", no_args_is_help=True)
# Into a pipe or a file go whole rows, whatever the width of the terminal.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)

_QUICK_S: Final = 10.0
_LONG_S: Final = 600.0
"""For commands that look at every record."""
_PART_CHUNKS: Final = 1024
"""Read again within `_LONG_S`: all that a node holds, terabytes perhaps, takes as long as it takes."""
T = TypeVar("T")

ConfigOption = Annotated[
    str | None,
    typer.Option("--config", "-c", help="YAML file with settings (./learnonce.yaml if it is there)"),
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="One setting, for example --set cluster.name=two; repeatable")
]
SocketOption = Annotated[
    Path | None,
    typer.Option(
        "--socket", help=f"A store's socket, instead of those of the cluster; its secret in {SECRET_VARIABLE}"
    ),
]


@store.command("ls")
def list_chunks(
    parquet: Annotated[Path | None, typer.Option("--parquet", help="Write all of it to this file")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Rows to print; the file gets all")] = 40,
    socket: SocketOption = None,
    config_file: ConfigOption = None,
    overrides: SetOption = None,
) -> None:
    """Every chunk: where it is, how large, how old, how often reused. Most reused first."""
    from kvstore.catalog import catalog_table, write_parquet

    table = catalog_table(_ask_all(socket, config_file, overrides, lambda c: c.catalog(deadline_s=_LONG_S)))
    if parquet is not None:
        try:
            write_parquet(table, parquet)
        except OSError as error:
            raise CallerError(f"cannot write {parquet}: {error}") from error
    shown = Table("chunk", "node", "tiers", "tokens", "at", "codec", "tenant", "bytes", "age", "reads", "idle")
    for row in table.slice(0, limit).to_pylist():
        shown.add_row(*_cells(row))
    out.print(shown)
    more = f", {table.num_rows - limit} more are not shown" if table.num_rows > limit else ""
    written = f"; all written to {parquet}" if parquet else ""
    out.print(f"{table.num_rows} chunks{more}{written}")


@store.command()
def stat(socket: SocketOption = None, config_file: ConfigOption = None, overrides: SetOption = None) -> None:
    """Counts: bytes per tier, hits, leases, queues, other nodes."""
    for node, stats in _ask_all(socket, config_file, overrides, lambda c: c.stat(deadline_s=_QUICK_S)).items():
        tiers = Table("tier", "chunks", "bytes", "capacity", "pinned", "hits", title=f"node store {node}")
        for name, tier in stats.tiers.items():
            capacity = "-" if tier.capacity_bytes is None else decimal(tier.capacity_bytes)
            hits = str(stats.hits.get(name, 0))
            tiers.add_row(name, str(tier.chunks), decimal(tier.bytes), capacity, decimal(tier.pinned_bytes), hits)
        out.print(tiers)
        out.print(
            f"{stats.sessions} sessions, {stats.read_leases} read leases, {stats.reservations} reservations, "
            f"{stats.write_behind_chunks} chunks wait to be written"
        )
        for tenant, used in stats.host_bytes_by_tenant.items():
            quota = stats.quota_bytes_by_tenant.get(tenant, stats.default_quota_bytes)
            out.print(f"tenant {tenant}: {decimal(used)} of {decimal(quota) if quota else 'any'} in the arena")
        for peer, seen in stats.peers.items():
            state = "up" if seen.is_up else "down"
            out.print(
                f"peer {peer}: {state}, {seen.transport or 'no path'} ({seen.reason}), {seen.chunks} chunks, "
                f"{seen.transfers} transfers under way"
            )


@store.command()
def verify(socket: SocketOption = None, config_file: ConfigOption = None, overrides: SetOption = None) -> None:
    """Read every record below the arena again; what is damaged is dropped, and the exit status is 3."""
    bad = 0
    for node, done in _ask_all(socket, config_file, overrides, _verify_all).items():
        out.print(f"{node}: {done.good} sound, {done.bad} damaged and dropped, {done.unread} could not be read")
        bad += done.bad
    if bad:
        raise UnavailableError(f"{bad} damaged records were dropped: they will be computed again. Look at the device")


@store.command()
def gc(socket: SocketOption = None, config_file: ConfigOption = None, overrides: SetOption = None) -> None:
    """Drop what is too old or over quota, and what crashes left behind."""
    for node, done in _ask_all(socket, config_file, overrides, lambda c: c.gc(deadline_s=_LONG_S)).items():
        out.print(
            f"{node}: dropped {done.expired} expired, {done.over_quota} over quota, {done.leftovers} left by crashes"
        )


@store.command()
def tenant(
    salt: Annotated[
        str | None, typer.Argument(help="The `cache_salt` of its requests; better asked for, as it may be a secret")
    ] = None,
) -> None:
    """Print the tenant of a `cache_salt`: the name for store.quota_bytes_by_tenant, and in what `ls` shows."""
    if salt is None and sys.stdin.isatty():
        salt = typer.prompt("cache_salt", hide_input=True)
    name = tenant_of(sys.stdin.readline().rstrip("\r\n") if salt is None else salt)
    if not name:
        raise CallerError("requests without a salt belong to no tenant, whose name is empty")
    out.print(name)


def _verify_all(client: NodeStoreClient) -> Verified | None:
    entries = client.catalog(deadline_s=_LONG_S)
    if entries is None:
        return None
    sums = Counter[str]()
    for start in range(0, len(entries), _PART_CHUNKS):
        keys = [ChunkKey(entry.key) for entry in entries[start : start + _PART_CHUNKS]]
        done = client.verify(keys, deadline_s=_LONG_S)
        if done is None:
            return None
        sums.update(good=done.good, bad=done.bad, unread=done.unread)
    return Verified(0, good=sums["good"], bad=sums["bad"], unread=sums["unread"])


def _cells(row: dict[str, Any]) -> list[str]:
    learned = row["learned"]
    age_s = (datetime.now(UTC) - learned).total_seconds() if learned else None
    largest = max(row["host_bytes"], row["nvme_bytes"], row["object_bytes"])
    return [
        row["key"][:12],
        row["node"][:12],
        " ".join(row["tiers"]) + (" pinned" if row["is_pinned"] else ""),
        str(row["num_tokens"]),
        str(row["base_position"]),
        row["codec"],
        row["tenant"],
        decimal(largest),
        _duration(age_s),
        str(row["uses"]),
        _duration(row["idle_s"]),
    ]


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _ask_all(
    socket: Path | None,
    config_file: str | None,
    overrides: list[str] | None,
    question: Callable[[NodeStoreClient], T | None],
) -> dict[str, T]:
    """Every store's answer, by node.

    Raises:
        UnavailableError: No store, or one that does not answer.
    """
    answers: dict[str, T] = {}
    with _clients(socket, config_file, overrides) as clients:
        for name, client in clients:
            answer = question(client)
            if answer is None:
                raise UnavailableError(_why_silent(name, client))
            answers[name] = answer
    return answers


def _why_silent(name: str, client: NodeStoreClient) -> str:
    if isinstance(client.away, StoreRefusedError):
        return (
            f"the node store {name} refuses this command: {client.away}. Is the secret that of its cluster? It is in "
            f"`secret` in the state folder of `learnonce up`; with --socket it comes from {SECRET_VARIABLE}"
        )
    if client.away is not None:
        return f"the node store {name} cannot be reached: {client.away}. `learnonce status` tells what runs here"
    return f"the node store {name} runs, but does not answer in time: it is frozen, or busy. Try again"


@contextmanager
def _clients(
    socket: Path | None, config_file: str | None, overrides: list[str] | None
) -> Iterator[list[tuple[str, NodeStoreClient]]]:
    if socket is not None:
        paths, secret = [socket], cluster_secret()
    else:
        paths, secret = _stores_of_cluster(config_file, overrides)
    clients = [
        (
            path.stem.removeprefix("store-"),
            NodeStoreClient(os.fspath(path), secret=secret, client_name="learnonce store"),
        )
        for path in paths
    ]
    try:
        yield clients
    finally:
        for _, client in clients:
            client.close()


def _stores_of_cluster(config_file: str | None, overrides: list[str] | None) -> tuple[list[Path], bytes]:
    cluster = read_settings(config_file, overrides or ()).cluster
    folder = local.StateFolder(Path(cluster.state_dir), cluster.name)
    state = folder.read()
    paths = sorted(Path(state.runtime_dir).glob("store-*.sock")) if state else []
    if not paths:
        raise UnavailableError(
            f"cluster {cluster.name!r} has no node store on this machine: `learnonce up` starts one, "
            "or name it with --socket"
        )
    return paths, folder.cluster_secret()
