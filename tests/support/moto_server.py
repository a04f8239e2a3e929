"""A moto server in a process of its own: a complete S3, slow, for what clients and servers must agree on."""

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from kvstore.testing.poll import wait_until
from kvstore.testing.s3 import unused_port

REGION = "us-east-1"


@contextmanager
def moto_server() -> Iterator[str]:
    """The endpoint of a running server, stopped at the end."""
    port = unused_port()
    # Its own credentials and no proxy: whatever the environment of the tests says.
    environment = {**os.environ, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    endpoint = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: process.poll() is not None or answers(endpoint), what="moto server answers")
        assert process.poll() is None, "the moto server ended"
        yield endpoint
    finally:
        process.kill()
        process.wait()


def answers(endpoint: str) -> bool:
    """Whether an HTTP server is there."""
    try:
        with urllib.request.urlopen(endpoint, timeout=5):
            return True
    except OSError:
        return False


def make_bucket(endpoint: str, name: str) -> None:
    """A bucket on a server that takes requests without a signature, as moto does."""
    request = urllib.request.Request(f"{endpoint}/{name}", method="PUT")
    with urllib.request.urlopen(request, timeout=10):
        pass
