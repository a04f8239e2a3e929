"""A request's prompt as segments that are tokenised on their own, and the spans that become chunks.

Covers: prefix, passages and tail of chat and completion requests, the documented template, cutting and chaining.
Does not cover: which spans are held or saved (`router.policy`), parsing of bodies (`router.body`).

The prompt *is* the concatenation of its segments' ids:

    prefix      everything up to the place of the documents (chat: up to the end of the system message)
    passages    one segment per document; its ids depend on nothing but its own title and text
    tail        the rest: end of the system message, history, question, generation prompt

Without documents there is one prefix-less tail, and its ids equal vLLM's own rendering. The place of the documents is
found by rendering the chat template with a marker at the end of the system message and cutting there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np

from kvstore.keys import KvScope, child_key, root_key
from kvstore.wire import SpanKind
from router.body import Document, Endpoint, OpaqueReason, ParsedRequest, part_text
from router.errors import PromptTooLongError, RequestError
from router.settings import SpanSettings, TemplateSettings
from router.tokenizer import PromptTokenizer, TokenIds
from router.view import KeyedSpan


@dataclass(frozen=True, slots=True)
class Segment:
    """One part of the prompt, tokenised on its own."""

    kind: SpanKind
    ids: TokenIds
    document: int | None = None
    """Index into the request's documents, for passages."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A segmented prompt; `opaque` says why there are no segments."""

    segments: tuple[Segment, ...] = ()
    opaque: OpaqueReason | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens in the whole prompt."""
        return sum(len(segment.ids) for segment in self.segments)

    @property
    def ids(self) -> TokenIds:
        """The whole prompt."""
        parts = [segment.ids for segment in self.segments]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint32)


class Segmenter:
    """Turns requests into prompts with one tokenizer and one template. Safe for several threads."""

    def __init__(self, tokenizer: PromptTokenizer, *, template: TemplateSettings) -> None:
        self._tokenizer = tokenizer
        self._template = template

    def segment(self, request: ParsedRequest, *, max_model_len: int) -> Prompt:
        """Render and tokenise one request.

        Raises:
            PromptTooLongError: Prompt and requested answer do not fit `max_model_len`; found without tokenising
                where the text alone proves it.
            RequestError: The chat template refused the messages, or has no place for documents.
        """
        if request.opaque is not None:
            return Prompt(opaque=request.opaque)
        variables = request.template_variables or {}
        if set(variables) & self._tokenizer.reserved_template_names:
            _refuse_opaque_documents(request, OpaqueReason.TEMPLATE_KWARGS)
            return Prompt(opaque=OpaqueReason.TEMPLATE_KWARGS)
        self._check_can_fit(request, max_model_len=max_model_len)
        passages = [self.passage_text(document) for document in request.documents]
        before, after = self._frame(request)
        segments = self._tokenise(request, before, passages, after)
        prompt = Prompt(segments=segments)
        _check_fits(prompt.num_tokens, request, max_model_len=max_model_len, proof="")
        return prompt

    def passage_text(self, document: Document) -> str:
        """A document as it stands in the prompt."""
        if document.title is None:
            head, tail = self._template.untitled_passage.split("{text}")
            return head + document.text + tail
        # Cut first, so that braces in titles and texts stay what they are.
        fields = {"{title}": document.title, "{text}": document.text}
        first, second = sorted(fields, key=self._template.titled_passage.index)
        head, rest = self._template.titled_passage.split(first)
        middle, tail = rest.split(second)
        return head + fields[first] + middle + fields[second] + tail

    def _tokenise(
        self, request: ParsedRequest, before: str, passages: Sequence[str], after: str
    ) -> tuple[Segment, ...]:
        special = request.add_special_tokens
        if not passages:
            ids = self._tokenizer.encode_template(before + after, special_tokens=special)
            return _drop_empty([Segment(SpanKind.TAIL, ids)])
        prefix = Segment(SpanKind.PREFIX, self._tokenizer.encode_template(before, special_tokens=special))
        learned = [
            Segment(SpanKind.PASSAGE, ids, index) for index, ids in enumerate(self._tokenizer.encode_passages(passages))
        ]
        tail = Segment(SpanKind.TAIL, self._tokenizer.encode_template(after, special_tokens=False))
        return _drop_empty([prefix, *learned, tail])

    def _frame(self, request: ParsedRequest) -> tuple[str, str]:
        """The rendered text before and after the place of the documents."""
        if request.endpoint is Endpoint.COMPLETION:
            return "", request.prompt
        messages = normalise_messages(
            request.messages,
            as_parts=self._tokenizer.content_as_parts,
            knows_developer=self._tokenizer.knows_developer_role,
        )
        if not request.documents:
            return "", self._render(request, messages)
        marker = _marker(messages)
        try:
            text = self._render(request, self._mark_system(messages, marker))
        except RequestError:
            if _system_index(messages) is not None:
                raise
            # The template refuses the system role: the documents open the first user message.
            text = self._render(request, self._mark_user(messages, marker))
        if text.count(marker) != 1:
            raise RequestError("this model's chat template has no place for `documents`", "documents")
        before, after = text.split(marker)
        return before, after

    def _render(self, request: ParsedRequest, messages: Sequence[Mapping[str, Any]]) -> str:
        tools = [dict(tool) for tool in request.tools] if request.tools is not None else None
        variables = dict(request.template_variables or {}) | {"add_generation_prompt": request.add_generation_prompt}
        return self._tokenizer.render_chat(messages, tools=tools, variables=variables)

    def _mark_system(self, messages: list[dict[str, Any]], marker: str) -> list[dict[str, Any]]:
        index = _system_index(messages)
        if index is None:
            system = _message("system", self._template.default_system, as_parts=self._tokenizer.content_as_parts)
            return [_appended(system, marker), *messages]
        return [*messages[:index], _appended(messages[index], marker), *messages[index + 1 :]]

    def _mark_user(self, messages: list[dict[str, Any]], marker: str) -> list[dict[str, Any]]:
        for index, message in enumerate(messages):
            if message["role"] == "user":
                return [*messages[:index], _prepended(message, marker), *messages[index + 1 :]]
        raise RequestError("`documents` need a system or a user message", "documents")

    def _check_can_fit(self, request: ParsedRequest, *, max_model_len: int) -> None:
        texts = [document.text for document in request.documents]
        texts += [request.prompt] if request.endpoint is Endpoint.COMPLETION else _message_texts(request.messages)
        bound = self._tokenizer.too_long(texts, max_tokens=max_model_len)
        if bound is not None:
            _check_fits(bound, request, max_model_len=max_model_len, proof="at least ")


def cut_spans(prompt: Prompt, *, scope: KvScope, salt: str, settings: SpanSettings) -> tuple[KeyedSpan, ...]:
    """Cut a prompt into spans and chain their keys.

    A passage is one span unless it is longer than `max_chunk_tokens`; prefix and tail are cut every
    `exact_chunk_tokens` from their own start, so a growing history keeps its earlier spans. Passages get a second key,
    chained from the anchor's (all before the first passage) through their own spans.
    """
    spans: list[KeyedSpan] = []
    key = anchor_key = root_key(scope, salt=salt)
    position = anchor_stop = 0
    for segment in prompt.segments:
        is_passage = segment.kind is SpanKind.PASSAGE
        step = settings.max_chunk_tokens if is_passage else settings.exact_chunk_tokens
        passage_key, learned_at = anchor_key, anchor_stop
        for first in range(0, len(segment.ids), step):
            ids = segment.ids[first : first + step]
            stop = position + len(ids)
            key = child_key(key, ids)
            passage_key = child_key(passage_key, ids)
            alone = passage_key if is_passage else None
            spans.append(KeyedSpan(key, position, stop, segment.kind, segment.document, alone, learned_at))
            position, learned_at = stop, learned_at + len(ids)
        if segment.kind is SpanKind.PREFIX:
            anchor_key, anchor_stop = key, position
    return tuple(spans)


def normalise_messages(
    messages: Sequence[Mapping[str, Any]], *, as_parts: bool, knows_developer: bool
) -> list[dict[str, Any]]:
    """Messages in the form that vLLM hands to chat templates.

    Text parts are joined by newlines (or wrapped as parts, if the template wants them), tool call arguments are
    parsed, `reasoning` stands under both of its names, developer messages become one leading system message if the
    template has no such role.
    """
    normal = [_normalise(message, as_parts=as_parts) for message in messages]
    if knows_developer or all(message["role"] != "developer" for message in normal):
        return normal
    return _with_one_system(normal)


def _with_one_system(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for message in messages:
        if message["role"] == "developer":
            message["role"] = "system"
            message.pop("tools", None)
    systems = [message for message in messages if message["role"] == "system"]
    if len(systems) == 1 and messages[0]["role"] == "system":
        return messages
    joined = "\n\n".join(text for text in ("\n".join(_texts(message)) for message in systems) if text)
    return [{"role": "system", "content": joined}, *(m for m in messages if m["role"] != "system")]


def _normalise(message: Mapping[str, Any], *, as_parts: bool) -> dict[str, Any]:
    role = message["role"]
    texts = _texts(message)
    if role == "system":
        texts = _without_billing_header(texts)
    result = _message(role, texts, as_parts=as_parts and role != "tool")
    if role == "assistant":
        calls = [_tool_call(call) for call in message.get("tool_calls") or ()]
        if calls:
            result["tool_calls"] = calls
        reasoning = message.get("reasoning", message.get("reasoning_content"))
        if reasoning is not None:
            result["reasoning"] = result["reasoning_content"] = reasoning
    if role == "tool" and "tool_call_id" in message:
        result["tool_call_id"] = message["tool_call_id"]
    if role == "developer":
        result["tools"] = message.get("tools")
    for name in ("name", "task"):
        if isinstance(message.get(name), str):
            result[name] = message[name]
    return result


def _message(role: str, texts: str | list[str], *, as_parts: bool) -> dict[str, Any]:
    texts = [texts] if isinstance(texts, str) else texts
    if as_parts:
        return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}
    return {"role": role, "content": "\n".join(texts)}


def _texts(message: Mapping[str, Any]) -> list[str]:
    content = message.get("content")
    if content is None:
        return []
    parts = [content] if isinstance(content, str) else content
    texts = (part if isinstance(part, str) else part_text(part) for part in parts)
    return [text for text in texts if text]


def _message_texts(messages: Sequence[Mapping[str, Any]]) -> list[str]:
    return [text for message in messages for text in _texts(message)]


_BILLING_HEADER: Final = "x-anthropic-billing-header"
"""vLLM drops this line from system texts, because it changes with every request."""


def _without_billing_header(texts: list[str]) -> list[str]:
    kept = (text.partition("\n")[2] if text.startswith(_BILLING_HEADER) else text for text in texts)
    return [text for text in kept if text]


def _tool_call(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise RequestError("assistant `tool_calls` must be objects with a `function`", "messages")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = msgspec.json.decode(arguments)
        except msgspec.DecodeError:
            arguments = {}
    return {**call, "function": {**function, "arguments": arguments if isinstance(arguments, dict) else {}}}


def _system_index(messages: Sequence[Mapping[str, Any]]) -> int | None:
    return next((i for i, message in enumerate(messages) if message["role"] in ("system", "developer")), None)


def _appended(message: dict[str, Any], text: str) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": content + text}
    if not content:
        return {**message, "content": [{"type": "text", "text": text}]}
    last = {**content[-1], "text": content[-1]["text"] + text}
    return {**message, "content": [*content[:-1], last]}


def _prepended(message: dict[str, Any], text: str) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": text + content}
    if not content:
        return {**message, "content": [{"type": "text", "text": text}]}
    first = {**content[0], "text": text + content[0]["text"]}
    return {**message, "content": [first, *content[1:]]}


def _marker(messages: Sequence[Mapping[str, Any]]) -> str:
    """A word that no message holds; letters and digits only, so that no filter of a template changes it."""
    text = "\n".join(_message_texts(messages))
    number = 0
    while (marker := f"learnonce7documents{number}here") in text:
        number += 1
    return marker


def _drop_empty(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    return tuple(segment for segment in segments if len(segment.ids))


def _refuse_opaque_documents(request: ParsedRequest, reason: OpaqueReason) -> None:
    if request.documents:
        raise RequestError(f"`documents` can not be combined with this request's form ({reason})", "documents")


def _check_fits(num_tokens: int, request: ParsedRequest, *, max_model_len: int, proof: str) -> None:
    # One token must be left to generate.
    wanted = max(request.max_tokens, 1)
    if num_tokens + wanted <= max_model_len:
        return
    raise PromptTooLongError(
        f"This model's maximum context length is {max_model_len} tokens. Your prompt has {proof}{num_tokens} tokens"
        f" and asks for at least {wanted} more. Shorten the prompt or the documents, or lower max_tokens.",
        request.endpoint.prompt_field,
    )
