"""Payloads of an earlier day are still read, and still written.

Covers: one small chunk per codec without a profile of `transform`'s kind: `lossless`, `int8`, `int4`, `cachegen`.
Does not cover: `transform`'s streams.

A codec may learn to write other bytes; then its old file stays, and only the last test changes.
"""

from hashlib import sha256
from pathlib import Path

import pytest
import torch

from kvstore.codecs import Codec, codec_by_name
from kvstore.codecs.cachegen import CachegenCodec
from kvstore.codecs.cachegen_profile import CachegenProfile
from kvstore.testing.codec_contract import make_meta

GOLDEN = Path(__file__).parent.parent / "golden"
SHAPE = (2, 23, 2, 8)
DECODED = {
    "lossless": "ce1e3965a531cc88b6eb1fb8e60612912b674cc31f27ba6f735ae947e568a5b1",
    "int8": "c038b65b80b9d380010f2cc398bd7657c52fb1af090ddc7bbcd389b04d81ce9b",
    "int4": "08f4098aa733b396af7efa76bec66d070d87e6013c988f2572c8644e7a7938d3",
    "cachegen": "b975d2f3875ee5848a96b093b04b0c54ad305de2ee0a1b31824f0ef3c1c418d1",
}
"""SHA-256 of the decoded values' bytes."""


def codec_of(name: str) -> Codec:
    if name != "cachegen":
        return codec_by_name(name)
    return CachegenCodec(CachegenProfile.from_bytes((GOLDEN / "kvstore_cachegen_profile_v1.bin").read_bytes()))


def golden_kv() -> torch.Tensor:
    """Made of integers, so that no library's random numbers matter."""
    layers, tokens, heads, dim = SHAPE
    index = torch.arange(layers * 2 * tokens * heads * dim, dtype=torch.float64)
    waves = torch.remainder(index * 37, 101) - 50 + torch.remainder(index, dim) * 20
    return (waves / 64).reshape(layers, 2, tokens, heads, dim).to(torch.bfloat16)


@pytest.mark.parametrize("name", sorted(DECODED))
def test_old_payloads_are_read(name: str) -> None:
    payload = (GOLDEN / f"kvstore_{name}_v1.bin").read_bytes()
    decoded = codec_of(name).decode(memoryview(payload), meta=make_meta(SHAPE, codec=name))
    assert sha256(decoded.view(torch.int16).numpy().tobytes()).hexdigest() == DECODED[name]
    if name == "lossless":
        assert torch.equal(decoded, golden_kv())


@pytest.mark.parametrize("name", sorted(DECODED))
def test_the_same_payloads_are_written(name: str) -> None:
    meta, codec = make_meta(SHAPE, codec=name), codec_of(name)
    out = memoryview(bytearray(codec.encoded_bytes(meta)))
    assert out[: codec.encode(golden_kv(), meta=meta, out=out)] == (GOLDEN / f"kvstore_{name}_v1.bin").read_bytes()
