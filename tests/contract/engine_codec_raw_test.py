"""The raw codec keeps every promise of a codec, and keeps every bit."""

import pytest
import torch

from kvstore.codecs import Codec, UnknownCodecError, codec_by_name
from kvstore.codecs.raw import RawCodec
from kvstore.interfaces import ChunkMeta
from kvstore.testing.codec_contract import FixedLayoutContract, make_kv


class TestRawCodec(FixedLayoutContract):
    def make(self, meta: ChunkMeta) -> Codec:
        return RawCodec()

    def test_size_is_exact_and_memory_is_shared(self, meta: ChunkMeta) -> None:
        kv = make_kv(meta)
        buffer = self._encode(kv, meta)
        assert len(buffer) == kv.numel() * kv.element_size() == self.make(meta).encoded_bytes(meta)
        decoded = self.make(meta).decode(memoryview(buffer), meta=meta)
        buffer[:] = bytes(len(buffer))
        assert torch.count_nonzero(decoded) == 0, "the decoder copied"

    def test_every_bit_survives(self, meta: ChunkMeta) -> None:
        size = self.make(meta).encoded_bytes(meta)
        noise = memoryview(bytes(i * 37 % 256 for i in range(size)))
        decoded = self.make(meta).decode(noise, meta=meta)
        assert self._encode(decoded, meta) == noise


def test_unknown_codec_is_a_data_error() -> None:
    with pytest.raises(UnknownCodecError, match="raw"):
        codec_by_name("nothing-like-it")
