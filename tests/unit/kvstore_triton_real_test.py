"""The GPU's decoder gives the CPU's KV to the bit on real KV and the shipped profile, in Triton's interpreter.

Covers: a text's first tokens in the embedded model, all levels, the first layers.
Does not cover: other layers (the same code), other models; random and damaged streams
(`kvstore_triton_decode_test.py`).
"""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from kvstore.codecs.profile import Profile
from kvstore.codecs.transform import TransformCodec
from kvstore.codecs.triton_decode import TritonDecoder
from kvstore.codecs.triton_places import Place
from kvstore.codecs.triton_staging import EncodedChunk
from kvstore.engine.profiles import shipped_profiles
from kvstore.testing.profiles import make_profile_meta
from loadtest.bench_codec.exact import ExactModel, Tokenizer, kv_shape

MODEL = Path(os.environ["LEARNONCE_MODEL_HOME"]) / "SmolLM2-135M-Instruct"
TEXT = "Whoever reads a book twice learns something new; a machine that reads it twice has only forgotten it."


@pytest.fixture(scope="module")
def profile() -> Profile:
    """The shipped one that fits the embedded model."""
    if not MODEL.is_dir():
        pytest.skip(f"no model in {MODEL}: make model")
    fitting = [
        one for one in shipped_profiles() if (one.num_layers, one.num_kv_heads, one.head_dim) == kv_shape(str(MODEL))
    ]
    if not fitting:
        pytest.skip("no shipped profile fits the embedded model")
    return fitting[0]


def test_real_kv_is_decoded_to_the_bit(profile: Profile) -> None:
    ids = Tokenizer(str(MODEL))(TEXT)[:9]
    kv_L2TNH, _ = ExactModel.load(str(MODEL)).read(ids, keep=[], kv_tokens=len(ids))
    meta = make_profile_meta(profile, num_tokens=len(ids))
    codec = TransformCodec(profile)
    out = memoryview(bytearray(codec.encoded_bytes(meta)))
    payload = out[: codec.encode(kv_L2TNH.to(torch.bfloat16), out=out, meta=meta)]
    expected_L2TNH = codec.decode(payload, meta=meta)
    # Together, because the interpreter takes as long for one section as for many.
    layers = range(2)
    place = Place.apart([meta], num_layers=len(layers), device=torch.device("cpu"))
    decoder = TritonDecoder(profile, device=torch.device("cpu"))
    decoder.start([EncodedChunk(payload=payload, meta=meta)], place=place, layers=layers).check()
    decoded_L2TNH = place.tensors[0]
    assert torch.equal(decoded_L2TNH.view(torch.int16), expected_L2TNH[:2].view(torch.int16))
    # And it is the KV, not anything that both decoders agree on.
    error_L2 = (decoded_L2TNH.float() - kv_L2TNH[:2]).square().mean(dim=(2, 3, 4))
    assert (error_L2 < 0.1 * kv_L2TNH[:2].var(dim=(2, 3, 4))).all()
