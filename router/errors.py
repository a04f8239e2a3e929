"""What goes wrong at the HTTP edge, and how it looks in OpenAI's error format.

- RequestError(CallerError): the request itself is wrong         400, 401, 404, 405, 413
- NoReplicaError, RouterBusyError, ReplicaAnswerError,
  DeadlineError(UnavailableError): later, or elsewhere           502, 503, 504 (+ Retry-After)
- ReplicaFailedError(UnavailableError): one replica, before the first byte; the relay tries the next one
"""

import json
from dataclasses import dataclass, field

from cluster.errors import CallerError, LearnonceError, UnavailableError


class RequestError(CallerError):
    """A request that will fail again as it is.

    Attributes:
        status: HTTP status.
        param: The field that is wrong, if one is.
        code: Machine-readable reason in OpenAI's vocabulary.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message, param, code, status)
        self.param = param
        self.code = code
        self.status = status

    def __str__(self) -> str:
        return str(self.args[0])


class PromptTooLongError(RequestError):
    """Prompt and requested answer do not fit the model."""

    def __init__(self, message: str, param: str | None = "messages") -> None:
        super().__init__(message, param, "context_length_exceeded", 400)
        self.args = (message, param)


class UnknownModelError(RequestError):
    """The request names a model that is not served here."""

    def __init__(self, model: str, served: str) -> None:
        super().__init__(f"The model `{model}` does not exist here; `{served}` does.", "model", "model_not_found", 404)
        self.args = (model, served)

    def __str__(self) -> str:
        return f"The model `{self.args[0]}` does not exist here; `{self.args[1]}` does."


class NoReplicaError(UnavailableError):
    """No decode replica can take the request now."""


class RouterBusyError(UnavailableError):
    """A bounded queue of this router is full."""


class DeadlineError(UnavailableError):
    """The request ran out of time."""


class ReplicaFailedError(UnavailableError):
    """A replica could not be reached, or died, before it had answered anything."""


class ReplicaAnswerError(UnavailableError):
    """A replica's answer can not be passed on."""


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """An HTTP answer in OpenAI's error format."""

    status: int
    body: bytes
    headers: dict[str, str] = field(default_factory=dict)


def error_body(message: str, *, error_type: str, param: str | None = None, code: str | None = None) -> bytes:
    """`{"error": {...}}` as bytes."""
    error = {"message": message, "type": error_type, "param": param, "code": code}
    return json.dumps({"error": error}, ensure_ascii=False).encode()


_TYPE_BY_STATUS = {401: "authentication_error", 404: "not_found_error"}


def answer_for(error: Exception) -> ErrorAnswer:
    """The HTTP answer for any error; only our own errors' messages are shown to the client."""
    match error:
        case RequestError():
            kind = _TYPE_BY_STATUS.get(error.status, "invalid_request_error")
            return ErrorAnswer(
                error.status, error_body(str(error), error_type=kind, param=error.param, code=error.code)
            )
        case CallerError():
            return ErrorAnswer(400, error_body(str(error), error_type="invalid_request_error"))
        case DeadlineError():
            return ErrorAnswer(504, error_body(str(error), error_type="timeout_error", code="deadline_exceeded"))
        case ReplicaAnswerError():
            return ErrorAnswer(502, error_body(str(error), error_type="server_error", code="bad_gateway"))
        case UnavailableError():
            retry_s = error.retry_after_s if error.retry_after_s is not None else 1.0
            body = error_body(str(error), error_type="service_unavailable_error", code="service_unavailable")
            return ErrorAnswer(503, body, {"retry-after": str(max(1, round(retry_s)))})
        case LearnonceError():
            return ErrorAnswer(500, error_body(str(error), error_type="server_error", code="internal_error"))
    return ErrorAnswer(500, error_body("internal error", error_type="server_error", code="internal_error"))


def stream_error_event(message: str, *, code: str) -> bytes:
    """The last event of a server-sent stream that broke; ends without `[DONE]`, so nobody takes it for complete."""
    return b"\n\ndata: " + error_body(message, error_type="server_error", code=code) + b"\n\n"
