"""Malformed and hostile requests as raw bytes. Each must get a 4xx.

test_server.py and the proof of malformed HTTP send them.
"""

from __future__ import annotations

POST = b"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
GET = b"GET /v1/jobs HTTP/1.1\r\nHost: x\r\n"
HOSTILE = {
    "both lengths": POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "both lengths, turned": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n{}",
    "doubled lengths": POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
    "different lengths": POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "list of lengths": POST + b"Content-Length: 2, 2\r\n\r\n{}",
    "negative length": POST + b"Content-Length: -1\r\n\r\n{}",
    "signed length": POST + b"Content-Length: +2\r\n\r\n{}",
    "hex length": POST + b"Content-Length: 0x2\r\n\r\n{}",
    "length over 64 bits": POST + b"Content-Length: 99999999999999999999999\r\n\r\n{}",
    "doubled coding": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "coding not last": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "coding that is none": POST + b"Transfer-Encoding: identity, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "coding of HTTP/1.0": POST.replace(b"1.1", b"1.0")
    + b"Connection: keep-alive\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "coding in disguise": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "bad chunk size": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "chunk size over 64 bits": POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n{}\r\n0\r\n\r\n",
    "chunk longer than announced": POST + b"Transfer-Encoding: chunked\r\n\r\n1\r\n{}\r\n0\r\n\r\n",
    "space before the colon": POST + b"Content-Length : 2\r\n\r\n{}",
    "folded header": GET + b"X-A: a\r\n b\r\n\r\n",
    "bare line feeds": b"GET /v1/jobs HTTP/1.1\nHost: x\n\n",
    "NUL in a header": GET + b"X-A: a\x00b\r\n\r\n",
    "NUL in the path": b"GET /v1/\x00jobs HTTP/1.1\r\nHost: x\r\n\r\n",
    "control in a header name": GET + b"X\x01A: a\r\n\r\n",
    "no Host": b"GET /v1/jobs HTTP/1.1\r\n\r\n",
    "two Hosts": GET + b"Host: y\r\n\r\n",
    "huge header": GET + b"X-A: " + b"a" * 100_000 + b"\r\n\r\n",
    "huge header name": GET + b"x" * 100_000 + b": a\r\n\r\n",
    "many headers": GET + b"".join(b"X-%d: a\r\n" % n for n in range(2000)) + b"\r\n",
    "huge path": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "no HTTP": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "SSH": b"SSH-2.0-OpenSSH_9.2\r\n",
    "unknown method": b"BREW /v1/jobs HTTP/1.1\r\nHost: x\r\n\r\n",
    "lower-case method": b"get /v1/jobs HTTP/1.1\r\nHost: x\r\n\r\n",
    "HTTP/2 preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/0.9": b"GET /v1/jobs\r\n\r\n",
    "HTTP/2.0": b"GET /v1/jobs HTTP/2.0\r\nHost: x\r\n\r\n",
    "HTTP/3.0": b"GET /v1/jobs HTTP/3.0\r\nHost: x\r\n\r\n",
    "no path": b"GET  HTTP/1.1\r\nHost: x\r\n\r\n",
    "bad URL": b"GET http://[::1/v1/jobs HTTP/1.1\r\nHost: x\r\n\r\n",
    "CONNECT": b"CONNECT evil.example:443 HTTP/1.1\r\nHost: x\r\n\r\n",
    "asterisk": b"OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n",
    "upgrade": GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\nX: \x01\r\n\r\n",
    "old websocket": GET + b"Sec-WebSocket-Key1: x\r\n\r\n",
}

CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
# More requests, too large or too slow for the ordinary tests.
EXTENDED = {
    "header over its line": GET + b"X-A: " + b"a" * 9_000 + b"\r\n\r\n",
    "UTF-8 that is none, in the path": b"GET /v1/jobs/\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    "UTF-8 that is none, escaped": b"GET /v1/jobs/%ff%fe HTTP/1.1\r\nHost: x\r\n\r\n",
    "NUL, escaped": b"GET /v1/jobs/a%00b HTTP/1.1\r\nHost: x\r\n\r\n",
    "surrogates, escaped": b"GET /v1/jobs/%ed%a0%80 HTTP/1.1\r\nHost: x\r\n\r\n",
    "half an escape": b"GET /v1/jobs/%4 HTTP/1.1\r\nHost: x\r\n\r\n",
    "parent directories": b"GET /v1/../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n",
    "parent directories, escaped": b"GET /v1/jobs/%2e%2e%2f%2e%2e%2fetc%2fpasswd HTTP/1.1\r\nHost: x\r\n\r\n",
    "parent directories, escaped twice": b"GET /v1/jobs/%252e%252e%252fetc HTTP/1.1\r\nHost: x\r\n\r\n",
    "to the other API": b"GET /v1/jobs/../../admin/../admin/job-management/locks HTTP/1.1\r\nHost: x\r\n\r\n",
    "absolute form, with a user": b"GET http://x@evil.example/v1/jobs HTTP/1.1\r\nHost: x\r\n\r\n",
    "backslashes": b"GET \\v1\\jobs HTTP/1.1\r\nHost: x\r\n\r\n",
    "tabs for spaces": b"GET\t/v1/jobs\tHTTP/1.1\r\nHost: x\r\n\r\n",
    "wrong method": b"PUT /v1/jobs HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
    "TRACE": b"TRACE /v1/jobs HTTP/1.1\r\nHost: x\r\n\r\n",
    "method of a kilobyte": b"A" * 1_000 + b" /v1/jobs HTTP/1.1\r\nHost: x\r\n\r\n",
    "a thousand parameters": b"GET /v1/jobs?" + b"&".join([b"a=1"] * 1_000) + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "repeated headers": GET + b"Authorization: Bearer x\r\n" * 100 + b"Content-Length: 0\r\n" * 2 + b"\r\n",
    "compressed transfer": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunk size with a sign": CHUNKED + b"+2\r\n{}\r\n0\r\n\r\n",
    "chunk size with a blank": CHUNKED + b" 2\r\n{}\r\n0\r\n\r\n",
    "chunk extension of 100 KB": CHUNKED + b"2;" + b"a" * 100_000 + b"\r\n{]\r\n0\r\n\r\n",
    "chunk ended by a line feed": CHUNKED + b"2\r\n{}\n0\r\n\r\n",
    "trailers without end": CHUNKED + b"2\r\n{]\r\n0\r\n" + b"X-T: a\r\n" * 5_000 + b"\r\n",
    "a hundred thousand chunks": CHUNKED + b"1\r\n{\r\n" * 100_000 + b"0\r\n\r\n",
    "length far too large": POST + b"Content-Length: 9223372036854775807\r\n\r\n{}",
}

_ALL = 1 << 20  # the limit of a body


def _fill(head: bytes, one: bytes, tail: bytes, between: bytes = b",") -> bytes:
    """Repeat `one` as often as a body can contain it."""
    return head + between.join([one] * ((_ALL - len(head) - len(tail)) // (len(one) + len(between)))) + tail


# Bodies within the limit that are expensive to decode: name -> path, body.
EXPENSIVE = {
    "a third of a million jobs": ("/v1/jobs/bulk", _fill(b'{"jobs":[', b"{}", b"]}")),
    "a quarter of a million queues": ("/v1/claim", _fill(b'{"worker":"w","queues":[', b'"a"', b"]}")),
    "a quarter of a million kinds": ("/v1/claim", _fill(b'{"worker":"w","kinds":[', b'"a"', b"]}")),
    "one field repeated": ("/v1/jobs", _fill(b"{", b'"queue":"a"', b"}")),
    "one field of a job repeated": ("/v1/jobs/bulk", _fill(b'{"jobs":[{', b'"kind":"a"', b"}]}")),
    "as many fields as are allowed": ("/v1/jobs", b"{" + b",".join([b'"queue":"a"'] * 24_000) + b',"queue":""}'),
    "one name of a megabyte": ("/v1/jobs", b'{"' + b"a" * (_ALL - 10) + b'":1}'),
    "a name that looks like a message": ("/v1/jobs", _fill(b'{"', b" - at `$", b'":1}', b"")),
    "a number of a megabyte": ("/v1/jobs", b'{"priority":' + b"9" * (_ALL - 20) + b"}"),
    "a fraction of a megabyte": ("/v1/jobs/a/progress", b'{"lock_id":"a","progress":0.' + b"9" * (_ALL - 40) + b"}"),
    "an exponent of a megabyte": ("/v1/jobs/a/progress", b'{"lock_id":"a","progress":1e' + b"9" * (_ALL - 40) + b"}"),
    "lists in lists": ("/v1/jobs", b'{"payload":' + b"[" * (_ALL - 20)),
    "objects in objects": ("/v1/jobs", _fill(b'{"payload":', b'{"a":', b"1}", b"")),
    "a text of a megabyte": ("/v1/jobs", b'{"queue":"' + b"a" * (_ALL - 20) + b'"}'),
    "escapes of a megabyte": ("/v1/jobs", _fill(b'{"kind":"', b"\\u0041", b'"}', b"")),
    "blanks of a megabyte": ("/v1/jobs", b" " * (_ALL - 20) + b'{"queue":1}'),
    "UTF-8 broken at its end": ("/v1/jobs", b'{"payload":"' + "é".encode() * 500_000 + b'\xff"}'),
    "a payload over its limit": ("/v1/jobs", _fill(b'{"payload":[', b"1", b"]}")),
    "metadata of half a million numbers": ("/v1/jobs/a/complete", _fill(b'{"lock_id":"a","metadata":[', b"1", b"]}")),
    "dots and slashes": ("/v1/jobs/a/complete", b'{"lock_id":"a","storage_key":"' + b"../" * 1_300 + b'a"}'),
    "a byte over the limit": ("/v1/jobs", b'{"payload":"' + b"a" * _ALL + b'"}'),
}


def post(path: str, body: bytes, *more: str) -> bytes:
    """Encode a request that is valid except for its body."""
    lines = ["Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}", *more]
    return "\r\n".join([f"POST {path} HTTP/1.1", *lines, "\r\n"]).encode() + body
