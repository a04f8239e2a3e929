"""Errors by what the caller does next; names end in `Error`.

- CallerError       fix the request or the settings, do not retry           HTTP 4xx                 exit 2
- UnavailableError  later, or elsewhere                                     503 with Retry-After     exit 3
- DataError         drop these bytes and recompute                          never seen by users
- InvariantError    our bug: fail this request, keep what led here          500                      exit 1

Every class takes positional arguments only and passes all of them to `Exception.__init__`: Ray pickles errors by
replaying `args` (docs/adr/0005-errors-across-processes.md).
"""


class LearnonceError(Exception):
    """Root of every error that this project raises on purpose."""


class CallerError(LearnonceError):
    """The same call will fail again: the message says what to change."""


class UnavailableError(LearnonceError):
    """Another replica, or a later try, may succeed."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class DataError(LearnonceError):
    """Bytes that are not what they claim to be: drop them and recompute."""


class InvariantError(LearnonceError):
    """A promise of this project was broken: a bug."""


class SettingsError(CallerError):
    """Settings that cannot be used; the message names the setting and the remedy."""
