"""Today's profiles and payloads are read by every later version.

Covers: a profile and a payload of version 1, kept in `tests/golden`, never made again; what they decode to.
Does not cover: that today's encoder writes the same bytes: encoders may improve.
"""

import hashlib
from pathlib import Path

import pytest
import torch

from kvstore.codecs.profile import Profile
from kvstore.codecs.stream import truncate
from kvstore.codecs.transform import TransformCodec
from kvstore.testing.profiles import make_profile_meta
from kvstore.testing.transform_reference import decode_reference

GOLDEN = Path(__file__).parent.parent / "golden"
PROFILE_ID = "1ff73ac806732140147b6c3c267095b27a62bf44a5bc0d24075f6ca5cfb7f5b0"
SHA256_BY_LEVEL = (
    "df2c4f3cfdcd7fae3db08f04c5013071b3b618e45a8bf5d3f1ad5e68020d8282",
    "16bd77570eb474098d0c6391ad7819b8b9d8992a76a04feeb457b1616a32beaa",
    "cf6c41f0f04d23581d4ba3e3e89c0cc8a95f36e2b2ecba8a0eca5e3fb084326d",
)
"""Of the decoded bfloat16 KV."""


def test_profile_of_version_1_is_read() -> None:
    profile = Profile.from_bytes((GOLDEN / "codec_profile_v1.lkp").read_bytes())
    assert profile.id == PROFILE_ID
    assert (profile.num_layers, profile.num_kv_heads, profile.head_dim, profile.groups) == (2, 2, 10, 2)
    assert sorted(profile.encoder) == ["attention_factor", "attention_mean", "class_bounds"]


@pytest.mark.parametrize("level", range(3))
def test_payload_of_version_1_is_read(level: int) -> None:
    profile = Profile.from_bytes((GOLDEN / "codec_profile_v1.lkp").read_bytes())
    payload = (GOLDEN / "codec_transform_v1.bin").read_bytes()
    meta = make_profile_meta(profile, num_tokens=19)
    decoded = TransformCodec(profile).decode(truncate(memoryview(payload), level=level), meta=meta)
    assert hashlib.sha256(decoded.view(torch.uint8).numpy().tobytes()).hexdigest() == SHA256_BY_LEVEL[level]
    assert torch.equal(decoded, decode_reference(payload, meta=meta, profile=profile, num_levels=level + 1))
