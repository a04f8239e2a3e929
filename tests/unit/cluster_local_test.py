"""Local clusters as processes: only what carries the cluster's id is ever touched."""

import os
import socket
import subprocess
import sys
import time

import psutil
import pytest

from cluster import local

WAIT = "import sys; print('up', flush=True); sys.stdin.read()"


@pytest.fixture
def start():
    """Start a process that waits, with or without a cluster's id; all are ended afterwards."""
    started = []

    def _start(cluster_id=None, code=WAIT):
        environment = {**os.environ}
        environment.pop(local.CLUSTER_ID_VARIABLE, None)
        if cluster_id is not None:
            environment[local.CLUSTER_ID_VARIABLE] = cluster_id
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        process.stdout.readline()
        started.append(process)
        return process

    yield _start
    for process in started:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def ended(process):
    process.wait(5)
    return not psutil.pid_exists(process.pid)


def state_of(pid, cluster_id="aa", **changes):
    values = {
        "name": "t",
        "cluster_id": cluster_id,
        "supervisor_pid": pid,
        "url": "http://x",
        "runtime_dir": "/nonexistent",
    }
    return local.ClusterState(**{**values, **changes})


def test_sweep_ends_the_clusters_processes_and_no_others(start):
    mine, other, stranger = start("id-1"), start("id-2"), start()
    assert local.sweep("id-1") == 1
    assert ended(mine)
    assert other.poll() is None
    assert stranger.poll() is None
    assert local.processes_of("id-1") == []


def test_sweep_ends_what_ignores_sigterm(start, monkeypatch):
    monkeypatch.setattr(local, "_KILL_AFTER_S", 0.2)
    deaf = start("id-3", "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + WAIT)
    local.sweep("id-3")
    assert ended(deaf)


def test_sweep_ends_what_others_start_while_they_end(start):
    """A supervisor that is told to stop in the middle of its start may have one more process to start."""
    heir = "import signal, subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import signal; signal.pause()'])"
    code = f"import os, signal; signal.signal(signal.SIGTERM, lambda *_: exec({heir + '; os._exit(0)'!r}));"
    parent = start("id-4", code + WAIT)
    local.sweep("id-4")
    assert ended(parent)
    assert local.processes_of("id-4") == []


def test_supervisor_that_cannot_be_noted_is_ended(tmp_path, monkeypatch):
    """Nobody else would know of it: no state, no runtime folder."""
    folder, known = local.StateFolder(tmp_path, "t"), []

    def interrupted(state):
        known.append(state)
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        local.spawn_supervisor(folder, "{}", name="t", url="http://x")
    assert not psutil.pid_exists(known[0].supervisor_pid)
    assert not os.path.exists(known[0].runtime_dir)


def test_a_reused_pid_is_not_the_supervisor(start):
    stranger = start()
    assert not local.is_alive(state_of(stranger.pid))
    assert local.is_alive(state_of(start("aa").pid))


def test_stop_asks_the_supervisor_then_sweeps(tmp_path, start):
    folder = local.StateFolder(tmp_path, "t")
    folder.create()
    supervisor, child = start("aa"), start("aa")
    folder.write(state_of(supervisor.pid))
    assert local.stop(folder, deadline_s=5.0)
    assert ended(supervisor)
    assert ended(child)
    assert folder.read().phase == local.Phase.STOPPED
    assert not local.stop(folder, deadline_s=5.0)


def test_stop_does_not_touch_a_stranger_with_the_supervisors_pid(tmp_path, start):
    folder = local.StateFolder(tmp_path, "t")
    folder.create()
    stranger = start()
    folder.write(state_of(stranger.pid))
    assert not local.stop(folder, deadline_s=1.0)
    assert stranger.poll() is None


def test_second_start_of_a_running_cluster_is_refused(tmp_path, start):
    folder = local.StateFolder(tmp_path, "t")
    folder.create()
    folder.write(state_of(start("aa").pid, phase=local.Phase.READY))
    with pytest.raises(local.AlreadyRunningError, match="is ready at http://x"):
        local.spawn_supervisor(folder, "{}", name="t", url="http://x")


def test_follow_start_tells_why_it_failed(tmp_path, start):
    folder = local.StateFolder(tmp_path, "t")
    folder.create()
    folder.write(state_of(start("aa").pid, phase=local.Phase.FAILED, message="no such model"))
    with pytest.raises(local.StartFailedError, match="no such model"):
        list(local.follow_start(folder, deadline_s=5.0))


def test_follow_start_notices_a_dead_supervisor(tmp_path):
    folder = local.StateFolder(tmp_path, "t")
    folder.create()
    folder.write(state_of(2**22 - 1))
    with pytest.raises(local.StartFailedError, match="its supervisor ended"):
        list(local.follow_start(folder, deadline_s=5.0))


def test_follow_start_names_what_it_still_waits_for(tmp_path, start):
    folder = local.StateFolder(tmp_path, "t")
    folder.create()
    steps = [local.Step(name="Ray", state="done"), local.Step(name="decode replicas", state="working")]
    folder.write(state_of(start("aa").pid, steps=steps))
    with pytest.raises(local.StartFailedError, match="still waiting for: decode replicas"):
        list(local.follow_start(folder, deadline_s=0.3))


def test_secret_is_private_and_stays_the_same(tmp_path):
    folder = local.StateFolder(tmp_path, "t")
    folder.create()
    secret = folder.cluster_secret()
    assert len(secret) == 32
    assert folder.cluster_secret() == secret
    assert folder.secret.stat().st_mode & 0o777 == 0o600
    assert folder.path.stat().st_mode & 0o777 == 0o700


def test_taken_port_is_named_with_the_remedy():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(local.PortTakenError, match=rf"{port}.*--set cluster.port={port + 1}"):
            local.require_port("127.0.0.1", port)
    local.require_port("127.0.0.1", port)


def test_damaged_state_reads_as_none(tmp_path):
    folder = local.StateFolder(tmp_path, "t")
    folder.create()
    assert folder.read() is None
    folder.status.write_text("{not json")
    assert folder.read() is None


def test_zombies_do_not_count(start):
    process = start("id-9")
    process.kill()
    deadline_s = time.monotonic() + 5
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline_s:
        os.sched_yield()
    assert local.processes_of("id-9") == []


def test_logs_of_a_failed_start_are_kept(tmp_path):
    folder = local.StateFolder(tmp_path, "t")
    folder.create()
    logs = tmp_path / "run" / "session_2026" / "logs"
    logs.mkdir(parents=True)
    (logs / "worker.err").write_text("no such weights")
    folder.write(state_of(2**22 - 1, phase=local.Phase.FAILED, runtime_dir=str(tmp_path / "run")))
    local.stop(folder, deadline_s=1.0)
    assert not (tmp_path / "run").exists()
    assert (folder.failed_logs / "worker.err").read_text() == "no such weights"
