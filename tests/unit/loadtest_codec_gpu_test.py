"""What the decoder for GPUs is timed on: real symbols at another shape.

Covers: profiles and payloads of a wider model, made from a narrow one's. Does not cover: timing (it needs a GPU).
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.errors import UnavailableError
from kvstore.codecs.transform import OpenTransformChunk, TransformCodec
from kvstore.testing.profiles import make_profile, make_profile_kv, make_profile_meta
from loadtest.bench_codec import CodecBenchSettings
from loadtest.bench_codec.gpu import measure, widened, widened_payload


@pytest.fixture(scope="module")
def narrow() -> OpenTransformChunk:
    profile = make_profile(num_layers=2, num_kv_heads=3, head_dim=8, with_classes=True)
    meta = make_profile_meta(profile, num_tokens=37)
    codec = TransformCodec(profile)
    # Twice the spread of the profile: some symbols are not in its tables.
    kv = make_profile_kv(profile, meta) * 2
    out = memoryview(bytearray(codec.encoded_bytes(meta)))
    return codec.open(out[: codec.encode(kv, out=out, meta=meta)], meta=meta)


def test_the_wide_payload_holds_the_narrow_symbols(narrow: OpenTransformChunk) -> None:
    wide = widened(narrow.profile, num_layers=5, num_kv_heads=2, head_dim=32)
    payload, meta = widened_payload(narrow, wide)
    opened = TransformCodec(wide).open(payload, meta=meta)
    for layer, narrow_layer in ((0, 0), (2, 0), (3, 1), (4, 1)):
        ours = opened.symbols(layer, group=0, num_levels=wide.num_levels)
        theirs = narrow.symbols(narrow_layer, group=0, num_levels=wide.num_levels)
        for kv in range(2):
            live = wide.bands[layer][kv][0].rows_per_level[-1]
            rows = (np.arange(64) * 24 // 64)[:live]
            ours_RT, theirs_RT = (
                pair[kv][0].transpose(0, 2, 1).reshape(-1, pair[kv][0].shape[1]) for pair in (ours, theirs)
            )
            assert np.array_equal(ours_RT[:live], theirs_RT[rows])
            assert not ours_RT[live:].any()
            assert np.array_equal(ours[kv][1], theirs[kv][1])
    kv = TransformCodec(wide).decode(payload, meta=meta)
    assert kv.shape == (5, 2, 37, 2, 32)
    assert torch.isfinite(kv).all()


def test_a_wide_payload_takes_its_share_of_bytes(narrow: OpenTransformChunk) -> None:
    """As many bits for each value, but for headers and states."""
    wide = widened(narrow.profile, num_layers=2, num_kv_heads=3, head_dim=64)
    payload, _ = widened_payload(narrow, wide)
    assert len(payload) / len(narrow.payload) == pytest.approx(8, rel=0.25)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    settings = CodecBenchSettings(model="none", data=None, plots=None, work=tmp_path)
    with pytest.raises(UnavailableError, match="no CUDA device"):
        measure(settings, log=print)
