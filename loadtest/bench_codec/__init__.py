"""`learnonce bench codec`: what every codec's bytes buy, and what they cost in time.

Covers: the parts, and what they share: `CodecBenchSettings`, `Scheme`. Does not cover: the measuring (one module per
part), the command line (`loadtest.cli`), LMCache's own CacheGen and the serving path (modules of their own here).

The reference is the embedded model in float32 with the exact KV of the same token ids. Every codec gets that KV rounded
to bfloat16, in chunks of 256 tokens as the store keeps them, and the model goes on over what comes back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

CODEC_PARTS: Final = ("quality", "retrieval", "anatomy", "speed", "gpu", "e2e")
"""In the order in which they run."""
CHUNK_TOKENS: Final = 256
CONTINUATION_TOKENS: Final = 256
INT8_BITS: Final = 8.5
"""Bits per element of the 8-bit reference: a code of 8 bits, and a 32-bit scale per token and head of 64 channels."""
DEFAULT_CONTEXTS: Final = (1024, 4096, 7168)
DEFAULT_DOCUMENTS: Final = 8
QUICK_CONTEXTS: Final = (512, 1024)
QUICK_DOCUMENTS: Final = 2
DATA_VARIABLE: Final = "LEARNONCE_DATA"
"""Environment variable with the folder of texts, for `--data`."""

Log = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecBenchSettings:
    """What the command line chose."""

    model: str
    """Folder of the model, as `cluster.model.provide_model` gives it."""
    data: Path | None
    """Folder of texts; parts that need it are skipped without."""
    plots: Path | None
    work: Path
    """References and finished rows; what is found there is not computed again."""
    contexts: tuple[int, ...] = DEFAULT_CONTEXTS
    num_documents: int = DEFAULT_DOCUMENTS
    num_retrievals: int = 16
    """Contexts of the look-up task."""
    profile: str | None = None
    """File or shipped name of the transform codec's profile; None: the shipped one that fits the model."""
    is_quick: bool = False
