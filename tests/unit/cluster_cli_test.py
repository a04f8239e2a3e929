"""What the `learnonce` command does when it is interrupted.

Covers: signals and their exit status, what an interrupted or failed start leaves. Does not cover: a start on a real Ray
(`tests/ray/cluster_lifecycle_test.py`).
"""

import os
import signal

import pytest

from cluster import cli, local
from cluster.errors import UnavailableError
from cluster.settings import ClusterSettings, Settings


@pytest.fixture(autouse=True)
def handlers():
    """Signal handlers are the process's: put back."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def settings(tmp_path):
    return Settings(cluster=ClusterSettings(name="t", state_dir=str(tmp_path)))


@pytest.fixture
def stopped(monkeypatch):
    """Cluster ids that were stopped."""
    seen = []
    monkeypatch.setattr(local, "stop", lambda folder, deadline_s: seen.append(folder.read().cluster_id))
    return seen


def write_state(settings, cluster_id):
    folder = cli._folder(settings)
    folder.create()
    folder.write(
        local.ClusterState(
            name="t", cluster_id=cluster_id, supervisor_pid=1, url="http://x", runtime_dir="/nonexistent"
        )
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_the_command_as_interrupted(monkeypatch, capsys, number):
    undone = []

    def command():
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            undone.append(number)

    monkeypatch.setattr(cli, "app", command)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == cli.EXIT_INTERRUPTED
    assert undone == [number]
    assert "interrupted" in capsys.readouterr().err


def test_what_is_ignored_stays_ignored(monkeypatch):
    """`nohup learnonce up` goes on when its terminal has gone."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(cli, "app", lambda: os.kill(os.getpid(), signal.SIGHUP))
    cli.main()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, UnavailableError])
def test_start_that_does_not_end_is_undone(settings, stopped, kind):
    def start():
        with cli._undone_unless_it_ends(settings):
            write_state(settings, "new")
            raise kind("in the middle")

    write_state(settings, "former")
    with pytest.raises(kind):
        start()
    assert stopped == ["new"]


def test_cluster_that_ran_before_is_left_alone(settings, stopped):
    write_state(settings, "former")
    with pytest.raises(local.AlreadyRunningError), cli._undone_unless_it_ends(settings):
        raise local.AlreadyRunningError("cluster 't' runs")
    assert stopped == []


def test_start_that_ends_stays(settings, stopped):
    with cli._undone_unless_it_ends(settings):
        write_state(settings, "new")
    assert stopped == []


def test_interrupt_while_the_examples_are_made_undoes_the_start(settings, stopped, monkeypatch):
    """What ends as interrupted leaves nothing, also at the last moment."""

    def interrupted(url):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "read_settings", lambda config_file, overrides: settings)
    monkeypatch.setattr(cli, "start_cluster", lambda settings: write_state(settings, "new"))
    monkeypatch.setattr(cli, "usage_examples", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cli.up()
    assert stopped == ["new"]
