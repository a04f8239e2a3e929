"""Text to token ids, as the model's own tokenizer and chat template do it.

Covers: loading from a local folder, rendering the chat template, tokenising many texts at once without holding the
interpreter lock, an exact early "can not fit", a memory of token ids by content.
Does not cover: what is rendered and tokenised separately (`router.segments`), threads (`router.service`).
"""

import hashlib
import inspect
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from cluster.errors import SettingsError
from router.errors import RequestError

TokenIds = np.ndarray[Any, np.dtype[np.uint32]]
_PROBE: Final = "LEARNONCEPROBE"


class TokenCache:
    """Token ids by content digest, least recently used first out, bounded in tokens. Safe for several threads."""

    def __init__(self, capacity_tokens: int) -> None:
        self._capacity_tokens = capacity_tokens
        self._ids: OrderedDict[bytes, TokenIds] = OrderedDict()
        self._num_tokens = 0
        self._lock = threading.Lock()

    @property
    def num_tokens(self) -> int:
        """Tokens held."""
        return self._num_tokens

    def lookup(self, digest: bytes) -> TokenIds | None:
        """The ids stored under `digest`, or None."""
        with self._lock:
            ids = self._ids.get(digest)
            if ids is not None:
                self._ids.move_to_end(digest)
            return ids

    def put(self, digest: bytes, ids: TokenIds) -> None:
        """Remember `ids`; what is larger than the whole cache is not kept."""
        if len(ids) > self._capacity_tokens:
            return
        with self._lock:
            if digest in self._ids:
                return
            self._ids[digest] = ids
            self._num_tokens += len(ids)
            while self._num_tokens > self._capacity_tokens:
                _, dropped = self._ids.popitem(last=False)
                self._num_tokens -= len(dropped)


class PromptTokenizer(Protocol):
    """What segmentation needs from a tokenizer."""

    @property
    def content_as_parts(self) -> bool:
        """Whether the chat template wants message content as a list of parts (vLLM's format "openai")."""
        ...

    @property
    def knows_developer_role(self) -> bool:
        """Whether the chat template has a developer role; vLLM turns such messages into system messages if not."""
        ...

    @property
    def reserved_template_names(self) -> frozenset[str]:
        """Names that `chat_template_kwargs` may not set, because rendering itself uses them."""
        ...

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: list[dict[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        """The chat template's text."""
        ...

    def encode_template(self, text: str, *, special_tokens: bool) -> TokenIds:
        """Ids of text that may hold control tokens; `special_tokens` adds what the model expects (BOS)."""
        ...

    def encode_passages(self, texts: Sequence[str]) -> list[TokenIds]:
        """Ids of each text on its own. Control tokens written in a passage are read as plain text."""
        ...

    def too_long(self, texts: Sequence[str], *, max_tokens: int) -> int | None:
        """If all texts together provably have more than `max_tokens` tokens: a lower bound. Does not tokenise."""
        ...


class ModelTokenizer:
    """The tokenizer of one model folder. Safe for several threads.

    Guarantees:
        `encode_template` equals vLLM's tokenisation of the same text (a test compares them).
        A passage's ids depend on its text only.
        What `too_long` returns is never more than the tokens of the concatenated texts.
    """

    def __init__(self, model_folder: str, *, cache_tokens: int) -> None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(model_folder, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise SettingsError(f"no usable tokenizer in {model_folder}: {error}") from error
        if not getattr(tokenizer, "is_fast", False):
            raise SettingsError(f"the tokenizer in {model_folder} has no tokenizer.json; the router needs one")
        self._tokenizer: Any = tokenizer
        # Own copies: transformers changes truncation and padding of the shared one per call.
        serialized = tokenizer.backend_tokenizer.to_str()
        self._template_tokenizer = _fresh(serialized)
        self._passage_tokenizer = _fresh(serialized)
        self._passage_tokenizer.encode_special_tokens = True
        self._bound = _LengthBound(serialized, self._template_tokenizer)
        self._cache = TokenCache(cache_tokens)
        self._reserved = frozenset(inspect.signature(type(tokenizer).apply_chat_template).parameters)
        template = getattr(tokenizer, "chat_template", None)
        self._has_template = template is not None
        self._knows_developer = "'developer'" in str(template) or '"developer"' in str(template)
        self._as_parts = self._has_template and self._wants_parts()

    @property
    def content_as_parts(self) -> bool:
        """Whether the chat template wants message content as a list of parts."""
        return self._as_parts

    @property
    def knows_developer_role(self) -> bool:
        """Whether the chat template has a developer role."""
        return self._knows_developer

    @property
    def reserved_template_names(self) -> frozenset[str]:
        """Names that `chat_template_kwargs` may not set."""
        return self._reserved

    @property
    def cache(self) -> TokenCache:
        """The memory of token ids, for tests and metrics."""
        return self._cache

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: list[dict[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        """Render the model's chat template.

        Raises:
            RequestError: The model has no chat template, or the template refused the messages (its own reason).
        """
        if not self._has_template:
            raise RequestError("this model has no chat template: use /v1/completions", "messages", "no_chat_template")
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, **variables)
        except Exception as error:  # jinja runs the template's own code: any error is the request's
            raise RequestError(f"the chat template refused the messages: {error}", "messages") from error
        return str(text)

    def encode_template(self, text: str, *, special_tokens: bool) -> TokenIds:
        """Ids of template text; remembered by content."""
        (ids,) = self._encode(self._template_tokenizer, [text], special_tokens=special_tokens, kind=b"template")
        return ids

    def encode_passages(self, texts: Sequence[str]) -> list[TokenIds]:
        """Ids of each passage on its own; remembered by content."""
        return self._encode(self._passage_tokenizer, texts, special_tokens=False, kind=b"passage")

    def too_long(self, texts: Sequence[str], *, max_tokens: int) -> int | None:
        """A lower bound above `max_tokens`, or None if there is no cheap proof that the texts do not fit."""
        return self._bound.too_long(texts, max_tokens=max_tokens)

    def _encode(self, tokenizer: Any, texts: Sequence[str], *, special_tokens: bool, kind: bytes) -> list[TokenIds]:
        digests = [_digest(kind + (b"+" if special_tokens else b"-"), text) for text in texts]
        found = [self._cache.lookup(digest) for digest in digests]
        missing = [index for index, ids in enumerate(found) if ids is None]
        if missing:
            # The batch call gives the interpreter lock back while it works; the single call does not.
            encodings = tokenizer.encode_batch_fast(
                [texts[index] for index in missing], add_special_tokens=special_tokens
            )
            for index, encoding in zip(missing, encodings, strict=True):
                ids = np.asarray(encoding.ids, dtype=np.uint32)
                ids.setflags(write=False)
                found[index] = ids
                self._cache.put(digests[index], ids)
        return [ids for ids in found if ids is not None]

    def _wants_parts(self) -> bool:
        parts = [{"role": "user", "content": [{"type": "text", "text": _PROBE}]}]
        try:
            text = self.render_chat(parts, tools=None, variables={"add_generation_prompt": True})
        except RequestError:
            return False
        # A template that only prints the content shows the list itself.
        return _PROBE in text and "'type'" not in text and '"type"' not in text


class _LengthBound:
    """Proves that a text has at least so many tokens: no token covers more bytes than the longest entry."""

    def __init__(self, serialized: str, tokenizer: Any) -> None:
        model = json.loads(serialized)
        self._normalizer = tokenizer.normalizer
        byte_level = "ByteLevel" in json.dumps([model.get("pre_tokenizer"), model.get("normalizer")])
        is_bpe = model["model"].get("type") == "BPE"
        # Elsewhere one unknown token may stand for text of any length.
        self._sound = is_bpe and (byte_level or bool(model["model"].get("byte_fallback")))
        self._strips = any(token["lstrip"] or token["rstrip"] for token in model.get("added_tokens", ()))
        entries = tokenizer.get_vocab(with_added_tokens=True)
        added = {token["content"] for token in model.get("added_tokens", ())}
        # In a byte-level vocabulary one character stands for one byte; added tokens are written as they are.
        self._longest_bytes = max(
            len(entry) if byte_level and entry not in added else len(entry.encode()) for entry in entries
        )

    def too_long(self, texts: Sequence[str], *, max_tokens: int) -> int | None:
        if not self._sound:
            return None
        bound = self._bound(texts)
        if bound > max_tokens and self._normalizer is not None:
            # Normalisation may shorten a text, so the proof needs what it leaves.
            bound = self._bound([self._normalizer.normalize_str(text) for text in texts])
        return bound if bound > max_tokens else None

    def _bound(self, texts: Sequence[str]) -> int:
        return -(-sum(self._num_bytes(text) for text in texts) // self._longest_bytes)

    def _num_bytes(self, text: str) -> int:
        if self._strips:
            # A control token may swallow the white space around it.
            text = "".join(text.split())
        return len(text) if text.isascii() else len(text.encode())


def _fresh(serialized: str) -> Any:
    tokenizer = Tokenizer.from_str(serialized)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _digest(kind: bytes, text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=16, person=kind[:16]).digest()
