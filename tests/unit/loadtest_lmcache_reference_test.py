"""Asking LMCache's CacheGen through files, with a stand-in for LMCache.

Covers: chunks, bytes, what comes back, and the reasons why it cannot run.
Does not cover: LMCache itself, which needs an environment of its own.
"""

import sys
from pathlib import Path

import pytest
import torch

from loadtest.bench_codec.lmcache_reference import PYTHON_VARIABLE, LmcacheUnusableError, find_python, round_trip

ENCODER = """
import struct
class CacheGenSerializer:
    def __init__(self, config, metadata):
        assert metadata.model_name.endswith("a-model")
        self.limit = config.chunk_size
    def to_bytes(self, kv):
        assert kv.is_contiguous() and kv.shape[2] <= self.limit
        return struct.pack("5i", *kv.shape) + kv.float().numpy().tobytes()
"""
DECODER = """
import struct, torch
class CacheGenDeserializer:
    def __init__(self, config, metadata, dtype):
        self.dtype = dtype
    def from_bytes(self, data):
        values = torch.frombuffer(bytearray(data[20:]), dtype=torch.float32)
        return (values.view(struct.unpack("5i", data[:20])) + 1).to(self.dtype)
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """An interpreter that finds a package called lmcache, whose CacheGen adds 1 to every value."""
    serde = tmp_path / "lmcache" / "storage_backend" / "serde"
    serde.mkdir(parents=True)
    for folder in (serde, serde.parent, serde.parent.parent):
        (folder / "__init__.py").touch()
    (serde / "cachegen_encoder.py").write_text(ENCODER)
    (serde / "cachegen_decoder.py").write_text(DECODER)
    facts = tmp_path / "lmcache-9.9.9.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: lmcache\nVersion: 9.9.9\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    return python


def test_chunks_are_coded_and_counted_one_by_one(stand_in: Path, tmp_path: Path) -> None:
    kv = torch.arange(2 * 2 * 10 * 1 * 4).reshape(2, 2, 10, 1, 4).to(torch.bfloat16)
    found = round_trip({"some": kv}, model=tmp_path / "a-model", chunk_tokens=4, python=stand_in)["some"]
    assert torch.equal(found.kv_L2TNH, kv + 1)
    assert found.num_bytes == 3 * 20 + 4 * kv.numel()
    assert found.lmcache_version == "9.9.9"
    assert min(found.encode_s, found.decode_s) > 0


def test_failure_says_why(tmp_path: Path) -> None:
    kv = torch.zeros(1, 2, 3, 1, 4)
    with pytest.raises(LmcacheUnusableError, match="No module named 'lmcache'"):
        round_trip({"some": kv}, model=tmp_path, python=Path(sys.executable))


def test_interpreter_must_be_named_and_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    with pytest.raises(LmcacheUnusableError, match=PYTHON_VARIABLE):
        find_python()
    monkeypatch.setenv(PYTHON_VARIABLE, str(tmp_path / "none"))
    with pytest.raises(LmcacheUnusableError, match="cannot be run"):
        find_python()
    monkeypatch.setenv(PYTHON_VARIABLE, sys.executable)
    assert find_python() == Path(sys.executable)
