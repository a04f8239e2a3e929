"""Real KV for the parts that measure bytes and speed, not quality.

Covers: one text and its KV, computed once per run. Does not cover: the protocol's documents.
"""

from dataclasses import dataclass
from typing import Final

import torch

from loadtest.bench_codec import CHUNK_TOKENS, CodecBenchSettings, Log
from loadtest.bench_codec.exact import ExactModel, Tokenizer
from loadtest.bench_codec.texts import Document, installed_document, read_documents
from loadtest.work import Work, reference_name

SAMPLE_CHUNKS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """KV of a text's first tokens in chunks: bfloat16 `[L, 2, T, N, H]`, from position 0 on."""

    text: str
    chunks: tuple[torch.Tensor, ...]

    @property
    def num_tokens(self) -> int:
        """Of all chunks."""
        return sum(chunk.shape[2] for chunk in self.chunks)


def read_sample(settings: CodecBenchSettings, *, log: Log) -> Sample:
    """A piece of the protocol's first document; without a folder of texts, of a module of the standard library."""
    num_tokens = SAMPLE_CHUNKS * CHUNK_TOKENS
    document = _document(settings, num_tokens=num_tokens)
    work = Work(settings.work, fingerprint="sample")
    name = reference_name(settings.model, document.ids, ())
    kept = work.load_reference(name)
    if kept is None:
        log(f"exact KV of {document.name} ({num_tokens} tokens)")
        kv_L2TNH, _ = ExactModel.load(settings.model).read(document.ids, keep=[], kv_tokens=num_tokens)
        kept = {"kv": kv_L2TNH.to(torch.bfloat16)}
        work.save_reference(name, kept)
    chunks = tuple(chunk.contiguous() for chunk in torch.split(kept["kv"], CHUNK_TOKENS, dim=2))
    return Sample(text=document.name, chunks=chunks)


def _document(settings: CodecBenchSettings, *, num_tokens: int) -> Document:
    tokenize = Tokenizer(settings.model)
    if settings.data is None:
        return installed_document(num_tokens=num_tokens, tokenize=tokenize)
    return read_documents(settings.data, count=1, num_tokens=num_tokens, tokenize=tokenize)[0]
