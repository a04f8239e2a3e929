"""Fixtures of more than one file of fault tests.

Covers: nodes that share a bucket on our S3 server. Does not cover: what fails there (the tests).
"""

import logging
from collections.abc import Iterator

import pytest
from support.object_nodes import SECRET, Nodes

from kvstore.testing.s3 import S3Process


@pytest.fixture(scope="module")
def s3_process() -> Iterator[S3Process]:
    with S3Process() as server:
        yield server


@pytest.fixture
def server(s3_process: S3Process) -> Iterator[S3Process]:
    """Without faults at the start of each test."""
    s3_process.set_fault(None)
    yield s3_process
    s3_process.set_fault(None)


@pytest.fixture
def nodes(server: S3Process, caplog: pytest.LogCaptureFixture) -> Iterator[Nodes]:
    """Closed at the end, and looked through for what they left behind or told."""
    caplog.set_level(logging.DEBUG)
    nodes = Nodes(server)
    yield nodes
    server.set_fault(None)
    nodes.close()
    assert SECRET not in caplog.text
