"""Messages that others made, decoded or refused: one home for what hostile bytes make msgspec raise.

Covers: decoding. Does not cover: which messages there are, their signatures, bounds on their length.
"""

from collections.abc import Callable
from typing import Any, Final

import msgspec

from cluster.errors import LearnonceError

UNDECODABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for hostile bytes: text that is not UTF-8 is no `DecodeError`."""


def decoder_of(kind: Any, *, what: str, refusal: type[LearnonceError]) -> Callable[[bytes], Any]:
    """A function that reads one msgpack message.

    Args:
        kind: A struct, or a union of structs; the function returns one of these.
        what: Of the refusal, in words: "not a request".
        refusal: Raised for anything else.
    """
    decoder = msgspec.msgpack.Decoder(kind)

    def decode(body: bytes) -> Any:
        try:
            return decoder.decode(body)
        except UNDECODABLE as error:
            raise refusal(f"{what}: {error}") from error

    return decode
