"""How near generation over stored KV comes to generation over exact KV, and for how many bytes.

Covers: the protocol: documents, contexts, continuations; one row per document, context and point; tables.
Does not cover: the numbers' meaning (`loadtest.bench_codec.measures`), figures (`loadtest.bench_codec.figures`).
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import torch

from cluster.errors import InvariantError
from loadtest.agreement import Agreement, agreement
from loadtest.bench_codec import CHUNK_TOKENS, CONTINUATION_TOKENS, CodecBenchSettings, Log
from loadtest.bench_codec.contenders import Contender, LmcacheContender, SchemeContender
from loadtest.bench_codec.exact import ExactModel, Tokenizer
from loadtest.bench_codec.figures import quality_detail, quality_figures
from loadtest.bench_codec.lmcache_reference import LmcacheUnusableError
from loadtest.bench_codec.measures import bits_per_element, stored_bits_per_element
from loadtest.bench_codec.profiles import read_schemes
from loadtest.bench_codec.schemes import CachegenScheme, rows_fingerprint
from loadtest.bench_codec.texts import Document, read_documents
from loadtest.bench_store import Measured
from loadtest.data import data_folder
from loadtest.work import Work, reference_name

Row = dict[str, Any]

_MAX_CONTROL_KL: Final = 1e-5
"""Of exact KV put back: more means that this harness is wrong, not a codec."""


def measure(settings: CodecBenchSettings, *, log: Log) -> Measured:
    """Rows of all documents, then figures and tables.

    Raises:
        DataMissingError: The texts are not here.
        TextTooShortError: A context is longer than the texts.
    """
    data_folder(settings.data)
    schemes, missing = read_schemes(settings, log=log)
    contenders: list[Contender] = [SchemeContender(scheme) for scheme in schemes]
    try:
        contenders.append(LmcacheContender(settings.model))
    except LmcacheUnusableError as error:
        missing["lmcache"] = str(error)
    for name, reason in missing.items():
        log(f"quality: no {name}: {reason}")
    num_tokens = max(settings.contexts) + CONTINUATION_TOKENS + 1
    documents = read_documents(
        settings.data, count=settings.num_documents, num_tokens=num_tokens, tokenize=Tokenizer(settings.model)
    )
    work = Work(settings.work, fingerprint=rows_fingerprint("quality", model=settings.model, schemes=schemes))
    run = QualityRun(ExactModel.load(settings.model), model_name=settings.model, work=work, contexts=settings.contexts)
    began_s = time.perf_counter()
    for index, document in enumerate(documents):
        run.measure_document(document, contenders=contenders, log=log)
        spent_s = time.perf_counter() - began_s
        left_s = spent_s / (index + 1) * (len(documents) - index - 1)
        log(f"quality: document {index + 1} of {len(documents)} done, {spent_s:.0f} s; about {left_s:.0f} s left")
    points = [point for contender in contenders for point in contender.points]
    names = [document.name for document in documents]
    rows = [
        row
        for row in work.rows(contexts=list(settings.contexts))
        if row["document"] in names and row["point"] in points
    ]
    baseline = next((scheme.default_point for scheme in schemes if isinstance(scheme, CachegenScheme)), "")
    detail = quality_detail(rows, points=points, names=names, contexts=settings.contexts, baseline=baseline)
    described = [{"name": each.name, "kind": each.kind, "tokens": len(each.ids)} for each in documents]
    return Measured(
        figures=quality_figures(rows, points=points, names=names, baseline=baseline),
        detail={
            "documents": described,
            "contexts": list(settings.contexts),
            "continuation_tokens": CONTINUATION_TOKENS,
            "chunk_tokens": CHUNK_TOKENS,
            "missing_schemes": missing,
            **detail,
            "rows": rows,
        },
    )


class QualityRun:
    """Measures documents one by one; rows that are there already are not measured again."""

    def __init__(self, exact: ExactModel, *, model_name: str, work: Work, contexts: Sequence[int]) -> None:
        """`contexts`: lengths in tokens, each a multiple of `CHUNK_TOKENS`."""
        self._exact = exact
        self._model_name = model_name
        self._work = work
        self._contexts = tuple(contexts)
        self._lossless: dict[tuple[str, int], Agreement] = {}

    def measure_document(self, document: Document, *, contenders: Sequence[Contender], log: Log) -> None:
        """Add the rows of one document: every context at every point of every contender.

        Raises:
            InvariantError: Exact KV does not give exact probabilities: nothing measured here would mean anything.
        """
        pending = [each for each in contenders if not self._is_done(document, each)]
        if not pending:
            return
        name = reference_name(self._model_name, document.ids, self._contexts)
        reference = self._work.load_reference(name)
        if reference is None:
            log(f"quality: exact KV of {document.name} ({len(document.ids)} tokens)")
            reference = self._read(document)
            self._work.save_reference(name, reference)
        for contender in pending:
            began_s = time.perf_counter()
            # Rows of a contender come together: half of them would look finished.
            for row in self._rows_of(document, contender, reference):
                self._work.add(row)
            log(f"quality: {document.name}: {', '.join(contender.points)} in {time.perf_counter() - began_s:.1f} s")
        self._work.drop_reference(name)

    def _is_done(self, document: Document, contender: Contender) -> bool:
        rows = self._work.rows(document=document.name, contexts=list(self._contexts))
        return {row["point"] for row in rows} >= set(contender.points)

    def _read(self, document: Document) -> dict[str, torch.Tensor]:
        """The document's KV as the store would get it, and the log probabilities behind every context."""
        keep = [at for context in self._contexts for at in range(context, context + CONTINUATION_TOKENS)]
        longest = max(self._contexts)
        kv_L2TNH, exact_SW = self._exact.read(document.ids[:-1], keep=keep, kv_tokens=longest)
        control = self._agreement(document, min(self._contexts), kv_L2TNH, {"exact": exact_SW})
        if control.kl > _MAX_CONTROL_KL:
            raise InvariantError(f"exact KV put back gives a KL of {control.kl:.2g} in {document.name}")
        return {"kv": kv_L2TNH.to(torch.bfloat16), "exact": exact_SW}

    def _rows_of(self, document: Document, contender: Contender, reference: Mapping[str, torch.Tensor]) -> list[Row]:
        kv_L2TNH = reference["kv"]
        found: list[Row] = []
        for returned in contender.run(kv_L2TNH, contexts=self._contexts):
            is_same = returned.kv_L2TNH.equal(kv_L2TNH)
            for context in self._contexts:
                num_elements = kv_L2TNH[:, :, :context].numel()
                kept = returned.chunk_bytes[: context // CHUNK_TOKENS]
                found.append(
                    {
                        "document": document.name,
                        "kind": document.kind,
                        "contexts": list(self._contexts),
                        "context": context,
                        "point": returned.point,
                        "bits": stored_bits_per_element(kept, num_elements=num_elements),
                        "payload_bits": bits_per_element(kept, num_elements=num_elements),
                        "whole_bits": returned.whole_bits,
                        **asdict(
                            self._lossless_agreement(document, context, reference)
                            if is_same
                            else self._agreement(document, context, returned.kv_L2TNH, reference)
                        ),
                    }
                )
        return found

    def _lossless_agreement(self, document: Document, context: int, reference: Mapping[str, torch.Tensor]) -> Agreement:
        """Of what came back bit for bit: computed once, for all codecs that do that."""
        place = (document.name, context)
        if place not in self._lossless:
            self._lossless[place] = self._agreement(document, context, reference["kv"], reference)
        return self._lossless[place]

    def _agreement(
        self, document: Document, context: int, kv_L2TNH: torch.Tensor, reference: Mapping[str, torch.Tensor]
    ) -> Agreement:
        at = CONTINUATION_TOKENS * self._contexts.index(context)
        exact_SW = reference["exact"][at : at + CONTINUATION_TOKENS]
        following = document.ids[context : context + CONTINUATION_TOKENS]
        other_SW = self._exact.go_on(kv_L2TNH[:, :, :context], following)
        targets = document.ids[context + 1 : context + CONTINUATION_TOKENS + 1]
        return agreement(exact_SW, other_SW, targets_T=torch.tensor(targets))
