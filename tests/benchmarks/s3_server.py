"""An S3 server on loopback, in memory and in a process of its own: `python -m tests.benchmarks.s3_server --port 0`.

Answers what s3fs asks, checks no signature, and lists a thousand keys in a millisecond or two, so that it is not what
is measured. Every request is delayed by the same time, all of them at once. `tests.s3` starts it and talks to it:
`/-/figures` (what was asked since the last time), `/-/settings` (delay, outage), `/-/objects` (many objects at once).
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import re
import time
import uuid
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from email.utils import formatdate
from typing import Any
from urllib.parse import parse_qsl, unquote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import uvloop

from tests.benchmarks.s3_objects import Bucket, S3Object, Upload, iso_time, render_page

CONTROL = "/-/"
MAX_KEYS = 1000
_META = "x-amz-meta-"
_NAMESPACE = re.compile(r"\{.*\}")


@dataclass
class Request:
    """One request; header names in lower case."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes = b""

    @property
    def bucket(self) -> str:
        return self.path[1:].partition("/")[0]

    @property
    def key(self) -> str:
        return self.path[1:].partition("/")[2]

    @property
    def metadata(self) -> dict[str, str]:
        return {name: value for name, value in self.headers.items() if name.startswith(_META)}


@dataclass
class Answer:
    """One answer; `length` is that of the body, if the answer to a HEAD leaves it out."""

    body: bytes = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    length: int | None = None

    def encode(self) -> bytes:
        """Return the bytes on the wire."""
        length = len(self.body) if self.length is None else self.length
        lines = [f"HTTP/1.1 {self.status} -", f"Content-Length: {length}", "x-amz-request-id: 0"]
        lines += [f"{name}: {value}" for name, value in self.headers.items()]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + self.body


class RefusedError(Exception):
    """An answer with an error code."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code

    def answer(self, request: Request) -> Answer:
        body = f"<Error><Code>{self.code}</Code><Message>{self.code}</Message></Error>".encode()
        return Answer(b"" if request.method == "HEAD" else body, self.status, {"Content-Type": "application/xml"})


class S3Store:
    """The operations, by the names that S3 gives them."""

    def __init__(self, *buckets: str) -> None:
        self.buckets = {name: Bucket() for name in buckets}

    def answer(self, request: Request) -> Answer:
        try:
            return self._operation(request)(request)
        except RefusedError as error:
            return error.answer(request)

    def name_of(self, request: Request) -> str:
        """Return what S3 calls this request, `ListObjectsV2` for example."""
        return self._operation(request).__name__.title().replace("_", "")

    def _operation(self, request: Request) -> Callable[[Request], Answer]:
        method, query = request.method, request.query
        if not request.bucket:
            return self.list_buckets
        if not request.key:
            if method == "POST" and "delete" in query:
                return self.delete_objects
            if method == "GET" and "uploads" in query:
                return self.list_multipart_uploads
            if method == "GET" and "list-type" in query:
                return self.list_objects_v2
            by_method = {"HEAD": self.head_bucket, "PUT": self.create_bucket, "GET": self.get_bucket_setting}
            return by_method.get(method, self.unknown)
        if "uploadId" in query:
            part = self.upload_part_copy if "x-amz-copy-source" in request.headers else self.upload_part
            by_method = {
                "PUT": part,
                "POST": self.complete_multipart_upload,
                "DELETE": self.abort_multipart_upload,
                "GET": self.list_parts,
            }
            return by_method.get(method, self.unknown)
        if method == "POST" and "uploads" in query:
            return self.create_multipart_upload
        put = self.copy_object if "x-amz-copy-source" in request.headers else self.put_object
        by_method = {"GET": self.get_object, "HEAD": self.head_object, "PUT": put, "DELETE": self.delete_object}
        return by_method.get(method, self.unknown)

    def unknown(self, request: Request) -> Answer:
        raise RefusedError(501, "NotImplemented")

    def list_buckets(self, request: Request) -> Answer:
        names = "".join(f"<Bucket><Name>{name}</Name></Bucket>" for name in self.buckets)
        return _xml(f"<ListAllMyBucketsResult><Buckets>{names}</Buckets></ListAllMyBucketsResult>")

    def create_bucket(self, request: Request) -> Answer:
        self.buckets.setdefault(request.bucket, Bucket())
        return Answer()

    def head_bucket(self, request: Request) -> Answer:
        self._bucket(request)
        return Answer(headers={"x-amz-bucket-region": "us-east-1"})

    def get_bucket_setting(self, request: Request) -> Answer:
        """Location and versioning: neither was ever set."""
        self._bucket(request)
        return _xml("<LocationConstraint/>" if "location" in request.query else "<VersioningConfiguration/>")

    def list_objects_v2(self, request: Request) -> Answer:
        bucket, asked = self._bucket(request), request.query
        count = min(int(asked.get("max-keys", MAX_KEYS)), MAX_KEYS)
        token = asked.get("continuation-token")
        after = bytes.fromhex(token).decode() if token else asked.get("start-after", "")
        page = bucket.page(asked.get("prefix", ""), asked.get("delimiter", ""), after, count)
        return Answer(
            render_page(bucket, request.bucket, page, asked, count), headers={"Content-Type": "application/xml"}
        )

    def head_object(self, request: Request) -> Answer:
        found = self._object(request)
        return Answer(length=found.size, headers=_headers(found))

    def get_object(self, request: Request) -> Answer:
        found = self._object(request)
        wanted = _range(request.headers.get("range"), found.size)
        if wanted is None:
            return Answer(found.read(0, found.size), headers=_headers(found))
        start, stop = wanted
        place = {"Content-Range": f"bytes {start}-{stop - 1}/{found.size}"}
        return Answer(found.read(start, stop), 206, _headers(found) | place)

    def put_object(self, request: Request) -> Answer:
        bucket = self._unless_changed(request)
        made = S3Object(
            len(request.body), hashlib.md5(request.body).hexdigest(), time.time(), request.body, request.metadata
        )
        bucket.put(request.key, made)
        return Answer(headers={"ETag": f'"{made.etag}"'})

    def copy_object(self, request: Request) -> Answer:
        bucket, source = self._unless_changed(request), self._source(request)
        metadata = request.metadata or source.metadata
        made = S3Object(source.size, source.etag.partition("-")[0], time.time(), source.body, metadata)
        bucket.put(request.key, made)
        return _xml(f"<CopyObjectResult>{_part_facts(made)}</CopyObjectResult>")

    def delete_object(self, request: Request) -> Answer:
        self._unless_changed(request).delete(request.key)
        return Answer(status=204)

    def delete_objects(self, request: Request) -> Answer:
        bucket, asked = self._bucket(request), ElementTree.fromstring(request.body)
        keys = [str(each.text) for each in asked.iter() if _NAMESPACE.sub("", each.tag) == "Key"]
        for key in keys:
            bucket.delete(key)
        quiet = any(_NAMESPACE.sub("", each.tag) == "Quiet" and each.text == "true" for each in asked)
        gone = "" if quiet else "".join(f"<Deleted><Key>{escape(key)}</Key></Deleted>" for key in keys)
        return _xml(f"<DeleteResult>{gone}</DeleteResult>")

    def create_multipart_upload(self, request: Request) -> Answer:
        name = uuid.uuid4().hex
        self._bucket(request).uploads[name] = Upload(request.key, request.metadata)
        place = f"<Bucket>{request.bucket}</Bucket><Key>{escape(request.key)}</Key>"
        return _xml(
            f"<InitiateMultipartUploadResult>{place}<UploadId>{name}</UploadId></InitiateMultipartUploadResult>"
        )

    def upload_part(self, request: Request) -> Answer:
        part = S3Object(len(request.body), hashlib.md5(request.body).hexdigest(), time.time(), request.body)
        self._upload(request).parts[int(request.query["partNumber"])] = part
        return Answer(headers={"ETag": f'"{part.etag}"'})

    def upload_part_copy(self, request: Request) -> Answer:
        upload, source = self._upload(request), self._source(request)
        start, stop = _range(request.headers.get("x-amz-copy-source-range"), source.size) or (0, source.size)
        body = None if source.body is None else source.body[start:stop]
        part = S3Object(stop - start, hashlib.md5(body or b"").hexdigest(), time.time(), body)
        upload.parts[int(request.query["partNumber"])] = part
        return _xml(f"<CopyPartResult>{_part_facts(part)}</CopyPartResult>")

    def complete_multipart_upload(self, request: Request) -> Answer:
        upload, bucket = self._upload(request), self._unless_changed(request)
        asked = ElementTree.fromstring(request.body)
        numbers = [int(str(each.text)) for each in asked.iter() if _NAMESPACE.sub("", each.tag) == "PartNumber"]
        try:
            made = upload.whole(numbers, time.time())
        except KeyError:
            raise RefusedError(400, "InvalidPart") from None
        bucket.put(request.key, made)
        del bucket.uploads[request.query["uploadId"]]
        place = f"<Bucket>{request.bucket}</Bucket><Key>{escape(request.key)}</Key>"
        return _xml(
            f"<CompleteMultipartUploadResult>{place}<ETag>&quot;{made.etag}&quot;</ETag></CompleteMultipartUploadResult>"
        )

    def abort_multipart_upload(self, request: Request) -> Answer:
        self._upload(request)
        del self._bucket(request).uploads[request.query["uploadId"]]
        return Answer(status=204)

    def list_parts(self, request: Request) -> Answer:
        parts = sorted(self._upload(request).parts.items())
        shown = (
            f"<Part><PartNumber>{number}</PartNumber><Size>{part.size}</Size>{_part_facts(part)}</Part>"
            for number, part in parts
        )
        return _xml(f"<ListPartsResult><IsTruncated>false</IsTruncated>{''.join(shown)}</ListPartsResult>")

    def list_multipart_uploads(self, request: Request) -> Answer:
        found = sorted((each.key, name) for name, each in self._bucket(request).uploads.items())
        shown = (
            f"<Upload><Key>{escape(key)}</Key><UploadId>{name}</UploadId></Upload>"
            for key, name in found
            if key.startswith(request.query.get("prefix", ""))
        )
        # All on one page: nobody has more of them than a page holds.
        return _xml(
            f"<ListMultipartUploadsResult><IsTruncated>false</IsTruncated>{''.join(shown)}</ListMultipartUploadsResult>"
        )

    def _bucket(self, request: Request) -> Bucket:
        if request.bucket not in self.buckets:
            raise RefusedError(404, "NoSuchBucket")
        return self.buckets[request.bucket]

    def _object(self, request: Request) -> S3Object:
        found = self._bucket(request).objects.get(request.key)
        if found is None:
            raise RefusedError(404, "NoSuchKey")
        if (version := request.headers.get("if-match")) and version.strip('"') != found.etag:
            raise RefusedError(412, "PreconditionFailed")
        return found

    def _unless_changed(self, request: Request) -> Bucket:
        """Return the bucket if the request's conditions on the object's present version hold."""
        bucket = self._bucket(request)
        if request.headers.get("if-none-match") == "*" and request.key in bucket.objects:
            raise RefusedError(412, "PreconditionFailed")
        if "if-match" in request.headers:
            self._object(request)
        return bucket

    def _source(self, request: Request) -> S3Object:
        path = unquote(request.headers["x-amz-copy-source"]).lstrip("/")
        return self._object(Request("GET", f"/{path}", {}, {}))

    def _upload(self, request: Request) -> Upload:
        upload = self._bucket(request).uploads.get(request.query["uploadId"])
        if upload is None or upload.key != request.key:
            raise RefusedError(404, "NoSuchUpload")
        return upload


def _xml(text: str) -> Answer:
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'.encode()
    return Answer(body, headers={"Content-Type": "application/xml"})


def _headers(found: S3Object) -> dict[str, str]:
    return {
        "ETag": f'"{found.etag}"',
        "Last-Modified": formatdate(found.modified, usegmt=True),
        "Accept-Ranges": "bytes",
        "Content-Type": "binary/octet-stream",
        **(found.metadata or {}),
    }


def _part_facts(part: S3Object) -> str:
    return f"<ETag>&quot;{part.etag}&quot;</ETag><LastModified>{iso_time(int(part.modified))}</LastModified>"


def _range(text: str | None, size: int) -> tuple[int, int] | None:
    """Return start and stop of `bytes=a-b`, `bytes=a-` or `bytes=-n`."""
    if not text:
        return None
    first, _, last = text.removeprefix("bytes=").partition("-")
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= size:
        raise RefusedError(416, "InvalidRange")
    return start, stop


@dataclass
class Figures:
    """What was asked since the last time.

    Attributes:
        requests: by name; those that an outage refused are `Refused`.
        seconds: of this process's CPU time spent on each kind of request, without reading and writing.
        bytes: sent.
        most_at_once: requests that waited for an answer together.
    """

    requests: Counter[str] = field(default_factory=Counter)
    seconds: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    most_at_once: int = 0


class Server:
    """What connections share: the store, the settings, the figures."""

    def __init__(self, store: S3Store, delay_s: float) -> None:
        self.store, self.delay_s = store, delay_s
        self.outage: str | None = None
        self.figures = Figures()
        self.waiting = 0

    def control(self, request: Request) -> Answer:
        """Answer a request of the tests' own."""
        what = request.path.removeprefix(CONTROL)
        if what == "figures":
            taken, self.figures = self.figures, Figures()
            return Answer(json.dumps(vars(taken)).encode())
        if what == "settings":
            settings = json.loads(request.body)
            self.delay_s = settings.get("delay_s", self.delay_s)
            self.outage = settings.get("outage", self.outage)
            return Answer()
        if what == "objects":
            self._add_objects(request.body)
            return Answer()
        return Answer(status=404)

    def _add_objects(self, lines: bytes) -> None:
        """Put an object a line: [bucket, key, size of zeros or text]."""
        now = time.time()
        for bucket, key, content in map(json.loads, lines.splitlines()):
            if isinstance(content, int):
                # A digest of gigabytes of zeros would take seconds, and nobody can tell it from this one.
                made = S3Object(content, f"{zlib.crc32(key.encode()):032x}", now)
            else:
                body = content.encode()
                made = S3Object(len(body), hashlib.md5(body).hexdigest(), now, body)
            self.store.buckets.setdefault(bucket, Bucket()).put(key, made)

    def answer(self, request: Request) -> Answer:
        name, started = self.store.name_of(request), time.thread_time()
        answer = self.store.answer(request)
        self.figures.requests[name] += 1
        self.figures.seconds[name] += time.thread_time() - started
        self.figures.bytes += len(answer.body)
        return answer


class Connection(asyncio.Protocol):
    """One client: a request in, its answer out after the delay, kept alive."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._received = bytearray()
        self._request: Request | None = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        while request := self._next_request():
            self._take(request)

    def _next_request(self) -> Request | None:
        """Return the next request that has arrived whole."""
        if self._request is None:
            end = self._received.find(b"\r\n\r\n")
            if end < 0:
                return None
            self._request = _parse(bytes(self._received[:end]).decode("latin-1"))
            del self._received[: end + 4]
            if "expect" in self._request.headers:
                self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = int(self._request.headers.get("content-length", 0))
        if len(self._received) < length:
            return None
        request, self._request = self._request, None
        request.body = bytes(self._received[:length])
        del self._received[:length]
        return request

    def _take(self, request: Request) -> None:
        server = self._server
        if request.path.startswith(CONTROL):
            self._transport.write(server.control(request).encode())
            return
        if server.outage == "closed":
            server.figures.requests["Refused"] += 1
            self._transport.abort()
            return
        server.waiting += 1
        server.figures.most_at_once = max(server.figures.most_at_once, server.waiting)
        asyncio.get_running_loop().call_later(server.delay_s, self._answer, request)

    def _answer(self, request: Request) -> None:
        server = self._server
        server.waiting -= 1
        if self._transport.is_closing():
            return
        if server.outage:
            server.figures.requests["Refused"] += 1
            answer = RefusedError(503, "ServiceUnavailable").answer(request)
        else:
            answer = server.answer(request)
        self._transport.write(answer.encode())


def _parse(head: str) -> Request:
    first, *lines = head.split("\r\n")
    method, target, _ = first.split(" ")
    path, _, query = target.partition("?")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Request(method, unquote(path), dict(parse_qsl(query, keep_blank_values=True)), headers)


async def _serve(server: Server, port: int) -> None:
    loop = asyncio.get_running_loop()
    listener = await loop.create_server(lambda: Connection(server), "127.0.0.1", port, backlog=4096)
    print(listener.sockets[0].getsockname()[1], flush=True)
    await listener.serve_forever()


def main() -> None:
    """Serve until killed; the first line of stdout is the port."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.s3_server", description=__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes one that is free")
    parser.add_argument("--bucket", default="bucket", help="made at the start")
    parser.add_argument("--delay-s", type=float, default=0.0, help="between a request and its answer")
    options = parser.parse_args()
    uvloop.run(_serve(Server(S3Store(options.bucket), options.delay_s), options.port))


if __name__ == "__main__":
    main()
