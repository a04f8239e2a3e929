"""A digest of a model that is fast for 140 GB of weights.

Covers: what names the weights in chunk keys (`kvstore.engine.scope`) and in profiles (`kvstore.codecs.profile`).
Does not cover: what else makes KV interchangeable. Imports neither torch nor vLLM.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_DIGEST_FORMAT: Final = b"learnonce model 1"
_WEIGHT_PATTERNS: Final = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_WINDOW_BYTES: Final = 4 << 10
_WINDOWS: Final = 1024
"""Per weight file: every run of more than a thousandth of the file is seen, so a tensor of 5 MB in a file of 5 GB. A
fine-tune may leave most tensors alone."""


def model_digest(model: str, *, revision: str | None = None) -> str:
    """A digest of a model, hex.

    Args:
        model: A local folder, or a hub id.
        revision: Commit, tag or branch of a hub id. A branch may move: two nodes that took it at different times then
            share keys though their weights differ, so callers pass the commit where they know it.

    Guarantees:
        Two folders with the same files have the same digest, wherever they are. For a folder, the configuration is
        hashed whole, and of each weight file its name, its size and 1,024 windows of 4 KiB: 4 MiB read per file.
        Two models that differ only between those windows have the same digest.
    """
    state = hashlib.blake2b(_DIGEST_FORMAT, digest_size=20)
    folder = Path(model)
    if not folder.is_dir():
        feed(state, b"hub", model.encode(), (revision or "main").encode())
        return state.hexdigest()
    config = folder / "config.json"
    feed(state, b"config", config.read_bytes() if config.is_file() else b"")
    for path in sorted({path for pattern in _WEIGHT_PATTERNS for path in folder.glob(pattern)}):
        feed(state, path.name.encode(), *_samples(path))
    return state.hexdigest()


def _samples(path: Path) -> Iterator[bytes]:
    size = path.stat().st_size
    yield size.to_bytes(8, "little")
    last_start = max(0, size - _WINDOW_BYTES)
    with path.open("rb") as file:
        for start in sorted({last_start * index // (_WINDOWS - 1) for index in range(_WINDOWS)}):
            file.seek(start)
            yield file.read(_WINDOW_BYTES)


def feed(state: "hashlib.blake2b", *parts: bytes) -> None:
    """Hash byte strings so that no two lists of them are the same to the digest."""
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
