"""A codec of two levels for tests of the engine's side: bfloat16, and the exact values beside them.

Covers: the protocol `kvstore.engine.coding.ChunkFormat` with checksums per layer and level; profiles of a tiny shape;
streams that arrive as the test says.
Does not cover: compression, profiles that mean anything (`kvstore.codecs.transform`).
"""

import threading
import time
import zlib
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from kvstore.codecs.profile import FREQUENCY_SUM, NUM_CLASSES, NUM_CONTEXTS, Band, Profile
from kvstore.codecs.raw import CodecDataError
from kvstore.interfaces import ChunkMeta, StreamLease
from kvstore.testing import MemoryStore, MemoryStoreClient

HEAD_BYTES = 8
NUM_LEVELS = 2


def tiny_profile(
    *, layers: int, heads: int, dim: int, levels: int = NUM_LEVELS, name: str = "tiny", digest: str = ""
) -> Profile:
    """A valid profile that codes nothing sensible; `name` and the model's `digest` make its id."""
    channels = heads * dim
    half = FREQUENCY_SUM // 2
    signs, bits = (half // 2, half, half // 2), (0, half, half)
    table_ids = np.zeros((levels, channels, NUM_CONTEXTS), np.uint8)
    table_ids[1:, :, 1:] = 1
    scales = np.ones(NUM_CLASSES, np.float32)

    def band() -> Band:
        return Band(
            bias_C=np.zeros(channels, np.float32),
            basis_RC=np.eye(channels, dtype=np.int8),
            scale_C=np.ones(channels, np.float32),
            rows_per_level=(channels,) * levels,
            table_ids_VRX=table_ids,
            token_scales=scales,
        )

    return Profile(
        model=name,
        model_digest=digest,
        num_layers=layers,
        num_kv_heads=heads,
        head_dim=dim,
        groups=1,
        num_levels=levels,
        num_exact=0,
        inv_freq=np.zeros(0, np.float32),
        is_neox=True,
        bands=tuple(((band(),), (band(),)) for _ in range(layers)),
        frequencies_KS=np.array([signs, bits], np.uint16),
    )


class TwoLevels:
    """Level 0: bfloat16, every layer with a checksum; level 1: float32."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.decoded: list[tuple[int, int]] = []
        """Layers and levels, in the order in which they were decoded."""

    def encoded_bytes(self, meta: ChunkMeta) -> int:
        return self._stop(meta, NUM_LEVELS - 1, meta.num_layers - 1)

    def encode(self, kv_L2TNH: torch.Tensor, *, meta: ChunkMeta, level: int | None, out: memoryview) -> int:
        parts = [b"2levels\0"]
        for dtype in (torch.bfloat16, torch.float32)[: NUM_LEVELS if level is None else level + 1]:
            for layer in kv_L2TNH:
                data = layer.contiguous().to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
                parts += [data, zlib.crc32(data).to_bytes(4, "little")]
        data = b"".join(parts)
        out[: len(data)] = data
        return len(data)

    def head_bytes(self, payload: memoryview, *, meta: ChunkMeta) -> int:
        return HEAD_BYTES

    def open(self, payload: memoryview, *, meta: ChunkMeta) -> "TwoLevelChunk":
        if bytes(payload[:HEAD_BYTES]) != b"2levels\0":
            raise CodecDataError("not a payload of two levels")
        return TwoLevelChunk(self, payload, meta)

    @staticmethod
    def layer_bytes(meta: ChunkMeta, level: int) -> int:
        return 2 * meta.num_tokens * meta.num_kv_heads * meta.head_dim * (2, 4)[level] + 4

    def _stop(self, meta: ChunkMeta, level: int, layer: int) -> int:
        before = sum(self.layer_bytes(meta, coarser) * meta.num_layers for coarser in range(level))
        return HEAD_BYTES + before + (layer + 1) * self.layer_bytes(meta, level)


class TwoLevelChunk:
    def __init__(self, owner: TwoLevels, payload: memoryview, meta: ChunkMeta) -> None:
        self._owner, self._payload, self._meta = owner, payload, meta

    @property
    def num_levels(self) -> int:
        last = self._meta.num_layers - 1
        return sum(self._owner._stop(self._meta, v, last) <= len(self._payload) for v in range(NUM_LEVELS))

    def stop_bytes(self, *, level: int, layer: int) -> int:
        return self._owner._stop(self._meta, level, layer)

    def decode(self, layer: int, *, level: int, out_2TNH: torch.Tensor) -> None:
        stop = self._owner._stop(self._meta, level, layer)
        data = bytes(self._payload[stop - self._owner.layer_bytes(self._meta, level) : stop])
        if zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
            raise CodecDataError(f"layer {layer} of level {level} is damaged")
        values = torch.frombuffer(bytearray(data[:-4]), dtype=(torch.bfloat16, torch.float32)[level])
        out_2TNH.copy_(values.view(out_2TNH.shape))
        self._owner.decoded.append((layer, level))


class TrickleClient(MemoryStoreClient):
    """A store whose chunks arrive when the test says so: `arrived[key]` bytes of each are in place."""

    def __init__(self, store: MemoryStore) -> None:
        super().__init__(store)
        self.changed = threading.Condition()
        self.arrived: dict[Any, int] = {}

    def arrive(self, key: Any, num_bytes: int) -> None:
        with self.changed:
            self.arrived[key] = num_bytes
            self.changed.notify_all()

    def stream(self, key: Any, *, deadline_s: float) -> StreamLease | None:
        lease = super().stream(key, deadline_s=deadline_s)
        return None if lease is None or key not in self.arrived else TrickleLease(self, lease)


class TrickleLease:
    def __init__(self, client: TrickleClient, inner: StreamLease) -> None:
        self._client, self._inner = client, inner

    @property
    def key(self) -> Any:
        return self._inner.key

    @property
    def meta(self) -> ChunkMeta | None:
        return self._inner.meta if self._client.arrived[self.key] > 0 else None

    @property
    def payload(self) -> memoryview:
        return self._inner.payload

    def wait_bytes(self, num_bytes: int, *, deadline_s: float) -> int:
        with self._client.changed:
            self._client.changed.wait_for(lambda: self._client.arrived[self.key] >= num_bytes, timeout=deadline_s)
            return min(self._client.arrived[self.key], len(self.payload))

    def finish(self, *, deadline_s: float) -> bool:
        stop_s = time.monotonic() + deadline_s
        return self.wait_bytes(len(self.payload), deadline_s=stop_s - time.monotonic()) == len(self.payload)

    def release(self) -> None:
        self._inner.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
