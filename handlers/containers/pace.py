"""The pace of a client: it may keep a thread of runtime.py waiting for some seconds, and longer only with each byte."""

import fcntl
import io
import select
import socket
import struct
import time
from collections.abc import Callable

GRACE_S = 20  # for so long a client may keep a thread waiting …
RATE = 500  # … and a second longer for this many bytes that it sends or takes. Apache's mod_reqtimeout has the same
LOOK_S = 1  # how often it is looked what a client has taken
SIOCOUTQ = 0x5411  # of linux/sockios.h: the bytes that the client has not confirmed
TIMEOUT = b'HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n'

# Called for each request: without a look into the class.
send, sendall, recv_into, MSG_DONTWAIT = (
    socket.socket.send, socket.socket.sendall, socket.socket.recv_into, int(socket.MSG_DONTWAIT)
)  # fmt: skip


class TooSlow(TimeoutError, ConnectionAbortedError):
    """A client has kept a thread waiting for too long. http.server passes over the one base, wsgiref over the other."""


class Client(socket.socket):
    """A client's connection.

    Whatever is sent must be taken at the pace. What is read must come at the pace while owes() says so. Both apply
    beside a time-out that the function sets.
    """

    owes: Callable[[], bool] | None = None  # owes() is True while the client has not sent its request completely
    late = False
    left_s: float = GRACE_S

    def makefile(self, mode: str = 'r', buffering: int | None = None, **more: str | None) -> io.IOBase:
        if mode != 'rb' or buffering not in (None, -1):
            return super().makefile(mode, buffering, **more)
        self._io_refs += 1
        return io.BufferedReader(_Reader(self, 'r'))

    def read_at_pace(self, buffer: memoryview) -> int:
        """recv_into(buffer). Raises TooSlow, and TimeoutError as the function's own time-out says."""
        own_s = self.gettimeout()
        while not self._wait(select.POLLIN, self.left_s if own_s is None else min(own_s, self.left_s)):
            if self.left_s <= 0:
                self.late = True
                raise TooSlow
            if own_s is not None:
                raise TimeoutError('timed out')
        count = self.recv_into(buffer)
        self._earn(count)
        return count

    def send(self, data: bytes, flags: int = 0) -> int:
        if self.gettimeout() is not None:
            return send(self, data, flags)
        while True:
            try:
                return send(self, data, flags | MSG_DONTWAIT)
            except BlockingIOError:
                self._wait_to_send()

    def sendall(self, data: bytes, flags: int = 0) -> None:
        if self.gettimeout() is not None:  # of all that is sent, and not of each part
            return sendall(self, data, flags)
        sent = self.send(data, flags)
        if type(data) is not bytes or sent < len(data):
            with memoryview(data) as whole, whole.cast('B') as left:
                while sent < len(left):
                    sent += self.send(left[sent:], flags)

    def refuse(self) -> None:
        """Answer 408 if the request was late."""
        if self.late:
            send(self, TIMEOUT, MSG_DONTWAIT)

    def _wait_to_send(self):
        if self.left_s <= 0:
            # Nobody takes the rest: the kernel shall not keep it.
            self.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
            raise TooSlow
        before = self._unconfirmed()
        self._wait(select.POLLOUT, min(LOOK_S, self.left_s))
        self._earn(before - self._unconfirmed())

    def _unconfirmed(self):
        return struct.unpack('i', fcntl.ioctl(self, SIOCOUTQ, bytes(4)))[0]

    def _wait(self, events, seconds):
        """True if one of the events has come."""
        waiting, began = select.poll(), time.monotonic()
        waiting.register(self, events)
        came = waiting.poll(max(0, seconds) * 1000)
        self.left_s -= time.monotonic() - began
        return bool(came)

    def _earn(self, count):
        self.left_s = min(GRACE_S, self.left_s + count / RATE)


class _Reader(socket.SocketIO):
    """What Client.makefile('rb') reads from."""

    def readinto(self, buffer: memoryview) -> int | None:
        client = self._sock
        own_s = client.gettimeout()
        if own_s is None:
            try:
                return recv_into(client, buffer, 0, MSG_DONTWAIT)  # nearly always it is there
            except BlockingIOError:
                pass
        if own_s == 0 or client.owes is None or not client.owes():
            return super().readinto(buffer)
        return client.read_at_pace(buffer)
