"""Names of objects: everything that an index needs to know of a record, so that a listing alone rebuilds it.

Covers: writing and reading names. Does not cover: prefixes, which belong to the bucket.

    ab/<64 hex digits of the key>.<tokens>.<base position>.<codec>.<tenant>.<payload bytes>.rec

Codec and tenant are words: "-" for none, letters, digits and `_` as they are, anything else as `=` and the hex digits
of their UTF-8 bytes. A name is read only if it is exactly what would be written, so one record has one name.
"""

import re
from typing import Final

from kvstore.container import MAX_PAYLOAD_BYTES, stored_bytes
from kvstore.interfaces import TierEntry
from kvstore.keys import KEY_BYTES, ChunkKey

MAX_NAME_CHARS: Final = 250
"""What file systems take as one name (255 bytes), less what clients append while they write."""
_MAX_COUNT: Final = 1 << 31
_WORD: Final = r"-|[A-Za-z0-9_]+|=(?:[0-9a-f]{2})+"
_NAME: Final = re.compile(
    rf"[0-9a-f]{{2}}/([0-9a-f]{{{2 * KEY_BYTES}}})\.([0-9]{{1,10}})\.([0-9]{{1,10}})\.({_WORD})\.({_WORD})"
    r"\.([0-9]{1,13})\.rec",
    re.ASCII,
)
_PLAIN: Final = re.compile(r"[A-Za-z0-9_]+", re.ASCII)


def object_name(key: ChunkKey, entry: TierEntry) -> str:
    """The name of a record's object.

    Example:
        >>> entry = TierEntry(payload_bytes=10, stored_bytes=8192, num_tokens=3, base_position=7, codec="raw")
        >>> object_name(ChunkKey(bytes.fromhex("ab" * 32)), entry).replace("ab" * 32, "abab...")
        'ab/abab....3.7.raw.-.10.rec'
    """
    digits = key.hex()
    codec, tenant = _word(entry.codec), _word(entry.tenant)
    return f"{digits[:2]}/{digits}.{entry.num_tokens}.{entry.base_position}.{codec}.{tenant}.{entry.payload_bytes}.rec"


def parse_name(name: str, *, learned_unix_s: float = 0.0) -> tuple[ChunkKey, TierEntry] | None:
    """The record behind a name, or None if it is not one that we would write."""
    match = _NAME.fullmatch(name) if len(name) <= MAX_NAME_CHARS else None
    if match is None:
        return None
    digits, tokens, position, codec, tenant, payload = match.groups()
    try:
        codec, tenant = _unword(codec), _unword(tenant)
    except UnicodeDecodeError:
        return None
    payload_bytes = int(payload)
    if not (0 < int(tokens) < _MAX_COUNT and int(position) < _MAX_COUNT and 0 < payload_bytes <= MAX_PAYLOAD_BYTES):
        return None
    key = ChunkKey(bytes.fromhex(digits))
    entry = TierEntry(
        payload_bytes=payload_bytes,
        stored_bytes=stored_bytes(payload_bytes),
        num_tokens=int(tokens),
        base_position=int(position),
        codec=codec,
        tenant=tenant,
        learned_unix_s=learned_unix_s,
    )
    return (key, entry) if object_name(key, entry) == name else None


def _word(text: str) -> str:
    if not text:
        return "-"
    return text if _PLAIN.fullmatch(text) else "=" + text.encode().hex()


def _unword(word: str) -> str:
    if word == "-":
        return ""
    return bytes.fromhex(word[1:]).decode() if word.startswith("=") else word
