"""OpenAI request bodies as typed values: only what the router itself needs to know.

Covers: chat and completion bodies, documents, which requests can not be segmented and why.
Does not cover: everything that vLLM checks itself (sampling, tools, structured output): the original bytes go on to
the replica, and its answer is the client's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Literal, cast, get_args

import msgspec

from kvstore.untrusted import UNDECODABLE
from router.errors import RequestError, UnknownModelError

_DEFAULT_COMPLETION_TOKENS: Final = 16
"""OpenAI's default for `/v1/completions`, which vLLM keeps."""
_MAX_SALT_CHARS: Final = 1024

NamedQuality = Literal["exact", "high", "fast"]
Quality = NamedQuality | float
"""How near to full prefill an answer shall be: by name, or as the share of moved tokens that is computed again."""


class Endpoint(StrEnum):
    """Which API a body belongs to; the value is the path at the router and at the replicas."""

    CHAT = "/v1/chat/completions"
    COMPLETION = "/v1/completions"

    @property
    def prompt_field(self) -> str:
        """The field that holds the prompt, for error messages."""
        return "messages" if self is Endpoint.CHAT else "prompt"


class OpaqueReason(StrEnum):
    """Why a prompt is left to the replica: it is rendered there, and nothing of it is reused."""

    MULTIMODAL = "multimodal"
    CHAT_TEMPLATE = "chat_template"
    TEMPLATE_KWARGS = "chat_template_kwargs"
    CONTINUE_MESSAGE = "continue_final_message"
    TRUNCATE = "truncate_prompt_tokens"
    ECHO = "echo"
    PROMPT_LOGPROBS = "prompt_logprobs"
    PROMPT_FORM = "prompt_form"
    """A list of prompts or token ids, embeddings, or a suffix."""
    SCHEMA = "schema"
    """Something that the replica will refuse with its own words."""


@dataclass(frozen=True, slots=True)
class Document:
    """One passage as the client sent it."""

    text: str
    title: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ParsedRequest:
    """What the router knows about one request."""

    endpoint: Endpoint
    messages: tuple[Mapping[str, Any], ...] = ()
    """Chat only."""
    prompt: str = ""
    """Completion only."""
    documents: tuple[Document, ...] = ()
    tools: tuple[Mapping[str, Any], ...] | None = None
    template_variables: Mapping[str, Any] | None = None
    """Extra variables for the chat template."""
    add_generation_prompt: bool = True
    add_special_tokens: bool = False
    max_tokens: int = 0
    """Tokens asked for; 0 if the client left it open."""
    cache_salt: str = ""
    quality: Quality | None = None
    """None: the client left it open."""
    stream: bool = False
    opaque: OpaqueReason | None = None
    """Set: the prompt is not segmented."""


def decode_json(body: bytes) -> dict[str, Any]:
    """A JSON object from a request body.

    Raises:
        RequestError: Not JSON, or not an object.
    """
    try:
        value = msgspec.json.decode(body)
    except UNDECODABLE as error:
        raise RequestError(f"the body is not valid JSON: {error}", None, "invalid_json") from error
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object", None, "invalid_json")
    return value


def parse_request(
    body: Mapping[str, Any], *, endpoint: Endpoint, served_model: str, max_documents: int
) -> ParsedRequest:
    """Check what the router relies on, and find out whether the prompt can be segmented.

    Raises:
        RequestError: A field of a wrong type, empty documents, documents where they can not be used.
        UnknownModelError: Another model is named.
    """
    check_model(body, served_model=served_model)
    if any(body.get(name) is not None for name in ("kv_transfer_params", "ec_transfer_params")):
        raise RequestError("`kv_transfer_params` is set by the cluster and can not be sent", "kv_transfer_params")
    documents = parse_documents(body, max_documents=max_documents)
    opaque = _common_opaque(body)
    if endpoint is Endpoint.CHAT:
        request = _parse_chat(body, documents=documents, opaque=opaque)
    else:
        request = _parse_completion(body, documents=documents, opaque=opaque)
    if request.documents and request.opaque is not None:
        raise RequestError(f"`documents` can not be combined with this request's form ({request.opaque})", "documents")
    return request


def check_model(body: Mapping[str, Any], *, served_model: str) -> None:
    """Refuse a request for a model that is not served; no model means the served one.

    Raises:
        RequestError: Not a string.
        UnknownModelError: Another model.
    """
    model = _typed(body, "model", str, "a string")
    if model is not None and model != served_model:
        raise UnknownModelError(model, served_model)


def parse_documents(body: Mapping[str, Any], *, max_documents: int) -> tuple[Document, ...]:
    """The request's `documents`, or none if the field is absent.

    Raises:
        RequestError: Empty, too many, or an entry that is not `{title?: str, text: str}` with text in it.
    """
    entries = _typed(body, "documents", list, "a list of {title?, text}")
    if entries is None:
        return ()
    if not entries:
        raise RequestError("`documents` is empty: leave it out, or send at least one", "documents")
    if len(entries) > max_documents:
        raise RequestError(f"`documents` has {len(entries)} entries, at most {max_documents} are allowed", "documents")
    return tuple(_document(entry, f"documents[{index}]") for index, entry in enumerate(entries))


def _document(entry: Any, where: str) -> Document:
    if not isinstance(entry, dict):
        raise RequestError(f"`{where}` must be an object with `text`", where)
    unknown = sorted(set(entry) - {"title", "text"})
    if unknown:
        raise RequestError(f"`{where}` has the unknown field `{unknown[0]}`; known are `title` and `text`", where)
    text, title = entry.get("text"), entry.get("title")
    if not isinstance(text, str) or not text.strip():
        raise RequestError(f"`{where}.text` must be a string with text in it", f"{where}.text")
    if "title" in entry and not isinstance(title, str):
        raise RequestError(f"`{where}.title` must be a string", f"{where}.title")
    return Document(text=text, title=title or None)


def _parse_chat(
    body: Mapping[str, Any], *, documents: tuple[Document, ...], opaque: OpaqueReason | None
) -> ParsedRequest:
    messages = _typed(body, "messages", list, "a list of messages")
    if not messages:
        raise RequestError("`messages` must hold at least one message", "messages")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")
    tools, tools_opaque = parse_tools(body)
    if _has_media(messages):
        opaque = opaque or OpaqueReason.MULTIMODAL
    max_tokens = _count(body, "max_completion_tokens") or _count(body, "max_tokens")
    return ParsedRequest(
        endpoint=Endpoint.CHAT,
        messages=tuple(messages),
        documents=documents,
        tools=tools,
        template_variables=_template_variables(body),
        add_generation_prompt=_flag(body, "add_generation_prompt", default=True),
        add_special_tokens=_flag(body, "add_special_tokens", default=False),
        max_tokens=max_tokens,
        cache_salt=parse_salt(body),
        quality=_quality(body),
        stream=_flag(body, "stream", default=False),
        opaque=opaque or tools_opaque,
    )


def _parse_completion(
    body: Mapping[str, Any], *, documents: tuple[Document, ...], opaque: OpaqueReason | None
) -> ParsedRequest:
    prompt = body.get("prompt")
    if prompt is not None and not isinstance(prompt, str | list):
        raise RequestError("`prompt` must be a string, or a list of strings or token ids", "prompt")
    if prompt in (None, "", []) and body.get("prompt_embeds") is None:
        raise RequestError("`prompt` must not be empty", "prompt")
    if not isinstance(prompt, str) or body.get("prompt_embeds") is not None or body.get("suffix"):
        opaque = opaque or OpaqueReason.PROMPT_FORM
    return ParsedRequest(
        endpoint=Endpoint.COMPLETION,
        prompt=prompt if isinstance(prompt, str) else "",
        documents=documents,
        add_special_tokens=_flag(body, "add_special_tokens", default=True),
        max_tokens=_count(body, "max_tokens") if "max_tokens" in body else _DEFAULT_COMPLETION_TOKENS,
        cache_salt=parse_salt(body),
        quality=_quality(body),
        stream=_flag(body, "stream", default=False),
        opaque=opaque,
    )


def _common_opaque(body: Mapping[str, Any]) -> OpaqueReason | None:
    checks = (
        ("truncate_prompt_tokens", OpaqueReason.TRUNCATE),
        ("echo", OpaqueReason.ECHO),
        ("prompt_logprobs", OpaqueReason.PROMPT_LOGPROBS),
        ("continue_final_message", OpaqueReason.CONTINUE_MESSAGE),
        ("chat_template", OpaqueReason.CHAT_TEMPLATE),
        ("mm_processor_kwargs", OpaqueReason.MULTIMODAL),
        ("media_io_kwargs", OpaqueReason.MULTIMODAL),
    )
    for name, reason in checks:
        # By identity: 0 is a value here.
        if (value := body.get(name)) is not None and value is not False:
            return reason
    return None


def _template_variables(body: Mapping[str, Any]) -> dict[str, Any]:
    given = _typed(body, "chat_template_kwargs", dict, "an object")
    variables: dict[str, Any] = dict(given or {})
    effort = body.get("reasoning_effort")
    if effort is not None:
        # The same two variables as vLLM sets.
        variables["reasoning_effort"] = effort
        variables.setdefault("enable_thinking", effort != "none")
    return variables


def parse_tools(body: Mapping[str, Any]) -> tuple[tuple[Mapping[str, Any], ...] | None, OpaqueReason | None]:
    """Tools in the form that vLLM hands to the template: absent descriptions and parameters are null."""
    entries = body.get("tools")
    if entries is None:
        return None, None
    if not isinstance(entries, list):
        raise RequestError("`tools` must be a list", "tools")
    tools = []
    for entry in entries:
        function = entry.get("function") if isinstance(entry, dict) else None
        if not isinstance(function, dict) or entry.get("type", "function") != "function":
            return None, OpaqueReason.SCHEMA
        if not isinstance(function.get("name"), str) or "defer_loading" in entry or "defer_loading" in function:
            return None, OpaqueReason.SCHEMA
        shown = {name: function.get(name) for name in ("name", "description", "parameters")}
        if function.get("strict") is not None:
            shown["strict"] = function["strict"]
        tools.append({"type": "function", "function": shown})
    return tuple(tools), None


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestError(f"`{where}` must be an object with a `role`", where)
    content = message.get("content")
    if content is not None and not isinstance(content, str | list):
        raise RequestError(f"`{where}.content` must be a string, a list of parts, or null", f"{where}.content")


_TEXT_PARTS: Final = frozenset({"text", "input_text", "output_text", "refusal", "thinking"})


def _has_media(messages: list[Any]) -> bool:
    for message in messages:
        content = message.get("content")
        parts = content if isinstance(content, list) else []
        if any(not isinstance(part, str) and not _is_text_part(part) for part in parts):
            return True
    return False


def _is_text_part(part: Any) -> bool:
    if not isinstance(part, dict) or part.get("type") not in _TEXT_PARTS:
        return False
    return isinstance(part_text(part), str) and not set(part) - {"type", "cache_control", part["type"], "text"}


def part_text(part: Mapping[str, Any]) -> Any:
    """The text of a text part: it stands under `text`, or under the part's own type (refusal, thinking)."""
    return part.get(part["type"]) if part["type"] in ("refusal", "thinking") else part.get("text")


def _typed(body: Mapping[str, Any], name: str, kind: type, expected: str) -> Any:
    value = body.get(name)
    if value is not None and not isinstance(value, kind):
        raise RequestError(f"`{name}` must be {expected}", name)
    return value


def _flag(body: Mapping[str, Any], name: str, *, default: bool) -> bool:
    value = _typed(body, name, bool, "true or false")
    return default if value is None else bool(value)


def _count(body: Mapping[str, Any], name: str) -> int:
    value = body.get(name)
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RequestError(f"`{name}` must be a whole number, 0 or more", name)
    return value


def _quality(body: Mapping[str, Any]) -> Quality | None:
    value = body.get("quality")
    if value is None or value in get_args(NamedQuality):
        return cast("Quality | None", value)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise RequestError('`quality` must be "exact", "high", "fast", or a number from 0 to 1', "quality")


def parse_salt(body: Mapping[str, Any]) -> str:
    """The client's `cache_salt`, "" without one."""
    salt = _typed(body, "cache_salt", str, "a string")
    if salt is not None and not 0 < len(salt) <= _MAX_SALT_CHARS:
        raise RequestError(f"`cache_salt` must have 1 to {_MAX_SALT_CHARS} characters", "cache_salt")
    return salt or ""
