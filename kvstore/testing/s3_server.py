"""The program of `kvstore.testing.s3`: an S3 server that keeps its objects in memory and can fail in named ways.

Covers: GET (with Range and If-Match), HEAD, PUT (with If-None-Match), DELETE, DeleteObjects, multipart uploads,
ListObjectsV2 in pages; path style; one bucket. Run as `python -m kvstore.testing.s3_server PORT PAGE_SIZE`, it says its
port, takes commands as lines of JSON, and ends with its standard input.
Does not cover: signatures (any is taken), chunked signing (refused), versions, several buckets.

A fault fails requests on purpose until another is set:

    unavailable    503 to every request, or to every n-th
    forbidden      403
    silent         the request is read, an answer never comes
    stall          the headers and the first half of the body, then nothing more
    cut            the same, then the connection is closed
    wrong_bytes    one byte of every body is another
    slow           the body in small pieces with pauses
    no_condition   501 to every conditional PUT, like a server that does not know If-None-Match
"""

import itertools
import json
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, Literal
from urllib.parse import parse_qs, quote, unquote, urlsplit
from xml.sax.saxutils import escape, unescape

import msgspec

BUCKET: Final = "chunks"
_MAX_HEAD_BYTES: Final = 64 << 10
_SLOW_PIECES: Final = 64
_SILENCE_S: Final = 600.0
"""Longer than any test; the end of the process ends it."""

FaultKind = Literal["unavailable", "forbidden", "silent", "stall", "cut", "wrong_bytes", "slow", "no_condition"]


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """What goes wrong."""

    kind: FaultKind
    methods: tuple[str, ...] = ("GET", "HEAD", "PUT", "DELETE", "POST")
    every: int = 1
    """Of the requests with these methods, every n-th fails."""
    seconds: float = 0.0
    """Of `slow`: how long a body takes."""
    listings: bool = True
    """Whether it also fails listings."""


class _Object(msgspec.Struct, frozen=True, kw_only=True):
    body: bytearray
    etag: str
    modified_unix_s: float


class _Request(msgspec.Struct, kw_only=True):
    method: str
    key: str
    """Below the bucket; "" for the bucket itself."""
    query: dict[str, str]
    headers: dict[str, str]
    body: bytearray
    bucket: str = BUCKET


class _Refusal(Exception):
    def __init__(self, status: int, code: str) -> None:
        super().__init__(status, code)
        self.status = status
        self.code = code


class _State:
    """Objects, counts and the fault of one server process."""

    def __init__(self, *, page_size: int) -> None:
        self.page_size = page_size
        self.objects: dict[str, _Object] = {}
        self.lock = threading.Lock()
        self.fault: Fault | None = None
        self.requests: dict[str, int] = {}
        self.bytes_sent = 0
        self.connections: set[socket.socket] = set()
        self.parts: dict[str, dict[int, bytearray]] = {}
        """Of multipart uploads under way, by their ids."""
        self._etags = itertools.count(1)
        self._faulty = itertools.count(1)

    def take_bytes_sent(self) -> int:
        """Bytes of bodies since the last call."""
        with self.lock:
            sent, self.bytes_sent = self.bytes_sent, 0
            return sent

    def note_sent(self, num_bytes: int) -> None:
        """A body, or the part of one that a fault lets through, is about to be sent."""
        with self.lock:
            self.bytes_sent += num_bytes

    def fault_of(self, request: _Request) -> Fault | None:
        """The fault that hits this request, after counting it."""
        is_listing = request.method == "GET" and not request.key
        name = "LIST" if is_listing else request.method
        with self.lock:
            self.requests[name] = self.requests.get(name, 0) + 1
            fault = self.fault
            if fault is None or request.method not in fault.methods or (is_listing and not fault.listings):
                return None
            return fault if next(self._faulty) % fault.every == 0 else None

    def put(self, request: _Request) -> _Object:
        """Store a body; refuses what `If-None-Match: *` forbids."""
        with self.lock:
            if request.headers.get("if-none-match") == "*" and request.key in self.objects:
                raise _Refusal(412, "PreconditionFailed")
            stored = _Object(body=request.body, etag=f'"{next(self._etags):032x}"', modified_unix_s=time.time())
            self.objects[request.key] = stored
            return stored

    def begin_upload(self) -> str:
        """The id of a new multipart upload, as XML."""
        with self.lock:
            upload = f"upload{next(self._etags)}"
            self.parts[upload] = {}
            return f"<InitiateMultipartUploadResult><UploadId>{upload}</UploadId></InitiateMultipartUploadResult>"

    def end_upload(self, request: _Request) -> str:
        """Join the parts of an upload; its object as XML."""
        parts = self.parts.pop(request.query["uploadId"])
        request.body = bytearray().join(parts[number] for number in sorted(parts))
        etag = escape(self.put(request).etag)
        return f"<CompleteMultipartUploadResult><ETag>{etag}</ETag></CompleteMultipartUploadResult>"

    def find(self, request: _Request) -> _Object:
        """The object of a GET or HEAD."""
        found = self.objects.get(request.key)
        if found is None:
            raise _Refusal(404, "NoSuchKey")
        if request.headers.get("if-match", found.etag) != found.etag:
            raise _Refusal(412, "PreconditionFailed")
        return found

    def delete(self, key: str) -> None:
        """Forget an object; S3 does not say whether there was one."""
        with self.lock:
            self.objects.pop(key, None)

    def page(self, query: dict[str, str]) -> str:
        """One page of a listing, as XML."""
        prefix = query.get("prefix", "")
        after = query.get("continuation-token") or query.get("start-after", "")
        size = min(int(query.get("max-keys", "1000")), self.page_size)
        with self.lock:
            names = sorted(name for name in self.objects if name.startswith(prefix) and name > after)
            found = [(name, self.objects[name]) for name in names[:size]]
        is_cut = len(names) > size
        rows = "".join(
            f"<Contents><Key>{escape(name)}</Key><LastModified>{_iso(item.modified_unix_s)}</LastModified>"
            f"<ETag>{escape(item.etag)}</ETag><Size>{len(item.body)}</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
            for name, item in found
        )
        token = f"<NextContinuationToken>{escape(found[-1][0])}</NextContinuationToken>" if is_cut else ""
        return (
            f"<ListBucketResult><Name>{BUCKET}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(found)}</KeyCount>"
            f"<MaxKeys>{size}</MaxKeys><IsTruncated>{str(is_cut).lower()}</IsTruncated>{rows}{token}</ListBucketResult>"
        )


class _Connection:
    """One client connection, served by a thread of its own."""

    def __init__(self, peer: socket.socket, state: _State) -> None:
        self._peer = peer
        self._state = state
        self._left = bytearray()
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def serve(self) -> None:
        with self._peer, suppress(OSError, EOFError):
            while True:
                request = self._read_request()
                fault = self._state.fault_of(request)
                if fault is not None and fault.kind == "silent":
                    time.sleep(_SILENCE_S)
                try:
                    _refuse_for(fault, request)
                    self._answer(request, fault)
                except _Refusal as refusal:
                    self._send_error(request, refusal)
        with self._state.lock:
            self._state.connections.discard(self._peer)

    def _read_request(self) -> _Request:
        while b"\r\n\r\n" not in self._left:
            piece = self._peer.recv(_MAX_HEAD_BYTES)
            if not piece or len(self._left) > _MAX_HEAD_BYTES:
                raise EOFError
            self._left += piece
        head, _, rest = bytes(self._left).partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        method, target, _ = lines[0].split(" ", 2)
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
        body = bytearray(int(headers.get("content-length", "0")))
        with memoryview(body) as view:
            have = min(len(rest), len(body))
            view[:have] = rest[:have]
            while have < len(body):
                count = self._peer.recv_into(view[have:])
                if not count:
                    raise EOFError
                have += count
        self._left = bytearray(rest[len(body) :])
        parts = urlsplit(target)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        return _Request(method=method, key=key, query=query, headers=headers, body=body, bucket=bucket)

    def _answer(self, request: _Request, fault: Fault | None) -> None:
        if request.bucket != BUCKET:
            raise _Refusal(404, "NoSuchBucket")
        if request.headers.get("x-amz-content-sha256", "").startswith("STREAMING"):
            raise _Refusal(501, "NotImplemented")
        if "uploads" in request.query:
            self._send_xml(self._state.begin_upload())
        elif request.query.get("uploadId", "") in self._state.parts:
            self._answer_upload(request)
        elif request.method == "PUT" and request.key:
            self._send(200, {"ETag": self._state.put(request).etag})
        elif request.method in ("GET", "HEAD") and request.key:
            self._send_object(request, self._state.find(request), fault)
        elif request.method == "GET":
            self._send_xml(self._state.page(request.query))
        elif request.method == "DELETE" and request.key:
            self._state.delete(request.key)
            self._send(204, {})
        elif request.method == "POST" and "delete" in request.query:
            names = [part.partition("</Key>")[0] for part in bytes(request.body).decode().split("<Key>")[1:]]
            for name in names:
                self._state.delete(unescape(name))
            rows = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in names)
            self._send_xml(f"<DeleteResult>{rows}</DeleteResult>")
        else:
            raise _Refusal(405, "MethodNotAllowed")

    def _answer_upload(self, request: _Request) -> None:
        if request.method == "PUT":
            number = int(request.query["partNumber"])
            self._state.parts[request.query["uploadId"]][number] = request.body
            self._send(200, {"ETag": f'"part{number}"'})
        elif request.method == "POST":
            self._send_xml(self._state.end_upload(request))
        else:
            del self._state.parts[request.query["uploadId"]]
            self._send(204, {})

    def _send_object(self, request: _Request, item: _Object, fault: Fault | None) -> None:
        start, stop = 0, len(item.body)
        asked = request.headers.get("range")
        if asked:
            start, stop = _parse_range(asked, stop)
        headers = {"ETag": item.etag, "Last-Modified": _http_date(item.modified_unix_s), "Accept-Ranges": "bytes"}
        if asked:
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(item.body)}"
        body = memoryview(item.body)[start:stop]
        if request.method == "HEAD":
            self._send(200, headers, length=len(body))
        elif fault is None or fault.kind not in ("stall", "cut", "wrong_bytes", "slow"):
            self._state.note_sent(len(body))
            self._send(206 if asked else 200, headers, body)
        else:
            self._send(206 if asked else 200, headers, length=len(body))
            self._send_badly(body, fault)

    def _send_badly(self, body: memoryview, fault: Fault) -> None:
        if fault.kind == "wrong_bytes":
            wrong = bytearray(body)
            wrong[len(wrong) // 2] ^= 0xFF
            self._peer.sendall(wrong)
        elif fault.kind == "slow":
            step = -(-len(body) // _SLOW_PIECES)
            for start in range(0, len(body), step):
                self._peer.sendall(body[start : start + step])
                time.sleep(fault.seconds / _SLOW_PIECES)
        else:
            self._state.note_sent(len(body) // 2)
            self._peer.sendall(body[: len(body) // 2])
            if fault.kind == "stall":
                time.sleep(_SILENCE_S)
            raise EOFError

    def _send_xml(self, text: str) -> None:
        self._send(200, {"Content-Type": "application/xml"}, memoryview(text.encode()))

    def _send_error(self, request: _Request, refusal: _Refusal) -> None:
        text = f"<Error><Code>{refusal.code}</Code><Message>{refusal.code}</Message></Error>".encode()
        body = None if request.method == "HEAD" else memoryview(text)
        self._send(refusal.status, {"Content-Type": "application/xml"}, body)

    def _send(
        self, status: int, headers: dict[str, str], body: memoryview | None = None, *, length: int | None = None
    ) -> None:
        size = length if length is not None else len(body) if body is not None else 0
        lines = [f"HTTP/1.1 {status} x", *(f"{name}: {value}" for name, value in headers.items())]
        if status != 204:
            lines.append(f"Content-Length: {size}")
        self._peer.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        if body is not None:
            self._peer.sendall(body)


def _refuse_for(fault: Fault | None, request: _Request) -> None:
    if fault is None:
        return
    if fault.kind == "unavailable":
        raise _Refusal(503, "SlowDown")
    if fault.kind == "forbidden":
        raise _Refusal(403, "AccessDenied")
    if fault.kind == "no_condition" and "if-none-match" in request.headers:
        raise _Refusal(501, "NotImplemented")


def _parse_range(asked: str, size: int) -> tuple[int, int]:
    first, _, last = asked.removeprefix("bytes=").partition("-")
    start, stop = (int(first), int(last) + 1 if last else size) if first else (size - int(last), size)
    if not 0 <= start < size:
        raise _Refusal(416, "InvalidRange")
    return start, min(stop, size)


def _iso(unix_s: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(unix_s)) + f".{int(unix_s * 1000) % 1000:03d}Z"


def _http_date(unix_s: float) -> str:
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(unix_s))


def _accept(listener: socket.socket, state: _State) -> None:
    while True:
        peer, _ = listener.accept()
        with state.lock:
            state.connections.add(peer)
        threading.Thread(target=_Connection(peer, state).serve, daemon=True).start()


def main() -> None:
    """Serve until whoever started this process is gone."""
    port, page_size = int(sys.argv[1]), int(sys.argv[2])
    state = _State(page_size=page_size)
    listener = socket.create_server(("127.0.0.1", port), backlog=256)
    threading.Thread(target=_accept, args=(listener, state), daemon=True).start()
    _say(listener.getsockname()[1])
    answers: dict[str, Callable[[], Any]] = {
        "requests": lambda: state.requests,
        "bytes_sent": state.take_bytes_sent,
        "connections": lambda: len(state.connections),
        "names": lambda: sorted(quote(name, safe="/") for name in state.objects),
    }
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "fault":
            state.fault = msgspec.convert(command["fault"], Fault | None)
            _say(True)
        else:
            _say(answers[command["do"]]())


def _say(value: Any) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
