"""The body of a request: how long it is, and how it is read."""

import contextlib
import json
import math
import re
import socket
import time
from email.message import Message
from typing import Any, BinaryIO

from host.errors import FaasError

JSON_MAX = 64 << 10  # bytes of a JSON body
REFUSED_BODY_DRAIN_S = 3  # how long the body of a refused request is read
READ_SIZE = 1 << 20


class RequestError(FaasError):
    """A request is refused with that HTTP status."""

    def __init__(self, status: int, text: str, hint: str | None = None) -> None:
        super().__init__(text, hint)
        self.status = status


class BodyCut(RequestError):
    """The client ended before the body did."""

    def __init__(self, end: str) -> None:
        super().__init__(400, f'the body ended before its {end}', 'try again')


class Body:
    """The body of one request, read from the connection's buffered `file`.

    Raises RequestError when the headers do not say clearly how long it is. `ends_connection` is True then, and where
    another reader could see the next request begin elsewhere.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._chunks = file, None
        self.left = 0  # bytes that were not read yet; infinite when that is not known
        self.ends_connection = False

    def measure(self, headers: Message, method: str, takes_chunks: bool) -> None:
        lengths, codings = (headers.get_all(key, []) for key in ('Content-Length', 'Transfer-Encoding'))
        malformed = headers.get_payload()  # a line that is not a header, and all lines after it
        if codings or malformed or len(lengths) > 1:
            self.ends_connection, self.left = True, math.inf
        if malformed:
            raise RequestError(400, 'a header is malformed')
        if len(lengths) + len(codings) > 1:
            raise RequestError(400, 'the length of the body is said twice')
        if codings:
            if not takes_chunks or codings[0].lower() != 'chunked':
                raise RequestError(411, f'a body that is {codings[0][:40]} is not taken', 'send Content-Length')
            self._chunks = Chunks(self._file)
            return
        if not lengths and method == 'POST':
            self.ends_connection = True  # what follows may be a body all the same
            raise RequestError(411, 'Content-Length is missing')
        if lengths and not re.fullmatch('[0-9]{1,18}', lengths[0]):
            self.ends_connection = True
            raise RequestError(400, 'Content-Length is not a number')
        self.left = int(lengths[0]) if lengths else 0

    @property
    def length(self) -> int | None:
        """Bytes of the body; None when only its last chunk will tell."""
        return None if self._chunks else self.left

    def read(self, most: int) -> bytes:
        """Some of what comes next, at most `most` bytes; b'' at the end. Raises BodyCut when the client ended."""
        try:
            if self._chunks:
                return self._chunks.read(most)
            data = self._file.read1(min(most, self.left))
            if not data and self.left:
                raise EOFError
        except EOFError as error:
            end = 'last chunk' if self._chunks else 'Content-Length'
            self.left, self.ends_connection = 0, True
            raise BodyCut(end) from error
        self.left -= len(data)
        return data

    def whole(self) -> bytes:
        """All of a small body. Raises RequestError."""
        if self.left > JSON_MAX:
            raise RequestError(413, f'the body is longer than {JSON_MAX} bytes')
        body = b''
        while self.left:
            body += self.read(JSON_MAX)
        return body

    def finished(self) -> None:
        """Nothing of the body is left to be read."""
        self.left = 0

    def drain(self, connection: socket.socket) -> None:
        """Read what nobody wanted, for a while: closing on unread bytes would reset the connection under the answer."""
        if not self.left:
            return
        self.ends_connection = True
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(1)
            deadline = time.monotonic() + REFUSED_BODY_DRAIN_S
            while self.left and time.monotonic() < deadline:
                data = self._file.read1(int(min(READ_SIZE, self.left)))
                if not data:
                    return
                self.left -= len(data)


class Chunks:
    """The body of a chunked request (RFC 9112 7.1), read from a buffered file. Raises RequestError, EOFError."""

    LINE_MAX, TRAILERS_MAX = 4096, 64

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left, self._first, self._over = file, 0, True, False

    def read(self, most: int) -> bytes:
        """Some of what comes next, at most `most` bytes; b'' at the end."""
        if not self._left and not self._over:
            if not self._first and self._line():
                raise RequestError(400, 'a chunk is longer than it says')
            self._first = False
            size = re.fullmatch(rb'([0-9a-fA-F]{1,8})([ \t]*;[^\r]*)?', self._line())
            if not size:
                raise RequestError(400, 'a chunk has no size')
            self._left = int(size[1], 16)
            self._over = not self._left
            if self._over and all(self._line() for _ in range(self.TRAILERS_MAX)):
                raise RequestError(400, 'the last chunk has too many trailers')
        if self._over:
            return b''
        data = self._file.read1(min(most, self._left))
        if not data:
            raise EOFError
        self._left -= len(data)
        return data

    def _line(self) -> bytes:
        line = self._file.readline(self.LINE_MAX)
        if not line.endswith(b'\n') and len(line) < self.LINE_MAX:
            raise EOFError
        if not line.endswith(b'\r\n'):
            raise RequestError(400, 'a chunk has no end of line')
        return line[:-2]


def json_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body. Raises RequestError."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, 'the body is not JSON') from error
    if not isinstance(fields, dict):
        raise RequestError(400, 'the body is not a JSON object')
    return fields
