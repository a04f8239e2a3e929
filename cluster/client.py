"""The cluster's HTTP API as the command line uses it.

Covers: one streamed answer with its figures, the plan of a request, learning ahead. Does not cover: other uses; any
OpenAI client works (docs/api.md).
"""

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from cluster.errors import CallerError, UnavailableError

_TIMEOUT_S: Final = 600.0
Document = dict[str, str]
"""`{"title": ..., "text": ...}`, the title optional."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer and what it took."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens reused instead of computed, as the API reports them."""
    completion_tokens: int
    ttft_s: float
    """Request sent to first token received."""
    total_s: float


def ask(
    url: str,
    question: str,
    *,
    documents: Sequence[Document] = (),
    max_tokens: int = 128,
    cache_salt: str | None = None,
    quality: str | float | None = None,
    on_text: Callable[[str], None] = lambda _text: None,
) -> Answer:
    """Ask one question with streaming.

    Args:
        url: The API without /v1.
        question: The user's message.
        documents: Passages to answer from.
        max_tokens: Longest answer.
        cache_salt: Requests with different salts share no KV: a new one makes a cold request.
        quality: How near to full prefill the answer shall be (docs/api.md); None takes the cluster's default.
        on_text: Called with each piece of the answer as it arrives.

    Raises:
        CallerError: The API refused the request; its message is kept.
        UnavailableError: The API is not there, or busy.
    """
    # Here, because it takes a second that no other command needs.
    import openai

    extra: dict[str, Any] = {}
    if documents:
        extra["documents"] = list(documents)
    if cache_salt is not None:
        extra["cache_salt"] = cache_salt
    if quality is not None:
        extra["quality"] = quality
    body: dict[str, Any] = {
        "model": _first_model(url),
        "messages": [{"role": "user", "content": question}],
        "max_completion_tokens": max_tokens,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "extra_body": extra,
    }
    try:
        with openai.OpenAI(base_url=f"{url}/v1", api_key=_api_key(), timeout=_TIMEOUT_S, max_retries=0) as api:
            began_s = time.perf_counter()
            return _collect(api.chat.completions.create(**body), began_s=began_s, on_text=on_text)
    except openai.APIStatusError as error:
        raise _status_error(error.status_code, error.message) from error
    except openai.APIError as error:
        raise UnavailableError(f"the API at {url} broke off: {error}") from error


def _collect(stream: Iterable[Any], *, began_s: float, on_text: Callable[[str], None]) -> Answer:
    """The whole of a streamed answer, its pieces passed on as they arrive."""
    first_s: float | None = None
    pieces: list[str] = []
    usage: Any = None
    for chunk in stream:
        usage = chunk.usage or usage
        text = chunk.choices[0].delta.content if chunk.choices else None
        if text:
            first_s = first_s or time.perf_counter()
            pieces.append(text)
            on_text(text)
    end_s = time.perf_counter()
    if usage is None:
        raise UnavailableError("the API ended its answer early")
    details = usage.prompt_tokens_details
    return Answer(
        text="".join(pieces),
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=(details.cached_tokens or 0) if details else 0,
        completion_tokens=usage.completion_tokens,
        ttft_s=(first_s or end_s) - began_s,
        total_s=end_s - began_s,
    )


def explain(
    url: str, question: str, *, documents: Sequence[Document] = (), quality: str | float | None = None
) -> dict[str, Any]:
    """The plan for a request, without running it."""
    body: dict[str, Any] = {"model": _first_model(url), "messages": [{"role": "user", "content": question}]}
    if documents:
        body["documents"] = list(documents)
    if quality is not None:
        body["quality"] = quality
    return post_json(f"{url}/v1/plan", body)


def learn(url: str, documents: Sequence[Document]) -> list[dict[str, Any]]:
    """Learn documents ahead of any question.

    Returns:
        Per document: `tokens`, `state` ("learned" or "already_held") and `seconds`.

    Raises:
        UnavailableError: One of them could not be learned.
    """
    learned: list[dict[str, Any]] = post_json(f"{url}/v1/documents", {"documents": list(documents)})["data"]
    failed = [document for document in learned if document["state"] == "failed"]
    if failed:
        raise UnavailableError(f"{len(failed)} of {len(learned)} documents not learned: {failed[0]['error']}")
    return learned


def get_json(url: str) -> dict[str, Any]:
    """GET a JSON object. A status such as 503 from `/ready` is an answer like any other."""
    return _exchange(urllib.request.Request(url, headers=_headers()), error_is_answer=True)


def post_json(url: str, body: dict[str, Any]) -> dict[str, Any]:
    """POST a JSON object and return the answer's."""
    request = urllib.request.Request(
        url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json", **_headers()}
    )
    return _exchange(request, error_is_answer=False)


def _exchange(request: urllib.request.Request, *, error_is_answer: bool) -> dict[str, Any]:
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
            body: dict[str, Any] = json.load(answer)
            return body
    except urllib.error.HTTPError as error:
        text = error.read().decode(errors="replace")
        try:
            body = json.loads(text)
        except ValueError:
            body = {"error": {"message": text}}
        if error_is_answer:
            return body
        raise _status_error(error.code, body.get("error", {}).get("message", text)) from error
    except OSError as error:
        raise UnavailableError(f"no answer from {request.full_url} ({error}): is the cluster up?") from error


def _status_error(status: int, message: str) -> CallerError | UnavailableError:
    if status < 500 and status not in (408, 429):
        return CallerError(f"the API refused the request (HTTP {status}): {message}")
    return UnavailableError(f"the API could not answer (HTTP {status}): {message}")


def _first_model(url: str) -> str:
    models = get_json(f"{url}/v1/models")
    if "data" not in models:
        raise UnavailableError(models.get("error", {}).get("message", f"no models at {url}"))
    return str(models["data"][0]["id"])


def _api_key() -> str:
    return os.environ.get("LEARNONCE_API_KEY", "unused")


def _headers() -> dict[str, str]:
    return {"Authorization": f"Bearer {_api_key()}"}
