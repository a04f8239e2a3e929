"""A worker that leaves takes its children with it, and spares Python's resource tracker."""

import json
import subprocess
import sys

import psutil

LEAVES = """
import json, subprocess, sys
from multiprocessing import resource_tracker
from kvstore.engine.worker import leave_process
resource_tracker.ensure_running()
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
print(json.dumps({"child": child.pid, "tracker": resource_tracker._resource_tracker._pid}), flush=True)
leave_process()
"""


def test_leaving_ends_the_children():
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 70, done.stderr
    pids = json.loads(done.stdout)
    assert not psutil.pid_exists(pids["child"])
    # It was not killed, and ends once its pipe is closed.
    _, alive = psutil.wait_procs([psutil.Process(p) for p in [pids["tracker"]] if psutil.pid_exists(p)], timeout=10)
    assert alive == []
