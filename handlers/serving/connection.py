"""Accepted connections: those that wait for an instance, and those whose instance has died."""

import collections
import contextlib
import fcntl
import socket
import struct
import termios
import weakref

from handlers.containers import protocol

# Of linux/tcp.h.
TCP_ESTABLISHED, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_CLOSE_WAIT = 1, 4, 5, 8
TCP_CONNECTED = (TCP_ESTABLISHED, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_CLOSE_WAIT)


def progress(connection: socket.socket) -> tuple[bool, bool]:
    """(anything was read from it, anything was written to it) by whoever held it: the kernel's TCP_INFO knows.

    struct tcp_info of linux/tcp.h: tcpi_bytes_received at 128, tcpi_notsent_bytes at 144, tcpi_bytes_sent at 200.
    """
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    if info[0] not in TCP_CONNECTED:  # it was reset, or turned into something else: nobody waits any more
        return True, True
    (unread,) = struct.unpack('i', fcntl.ioctl(connection, termios.FIONREAD, b'\0' * 4))
    (received,) = struct.unpack_from('Q', info, 128)
    (notsent,) = struct.unpack_from('I', info, 144)
    (sent,) = struct.unpack_from('Q', info, 200)
    half_closed = info[0] == TCP_CLOSE_WAIT  # the FIN counts as one byte
    return received - unread - half_closed > 0, sent + notsent > 0


def reset(connection: socket.socket) -> None:
    """Close `connection` (consumed) so that the client does not take a part for the whole."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    connection.close()


def refuse(connection: socket.socket) -> None:
    """Answer 502 and close `connection` (consumed)."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 0, 0))  # or close() could wait
        connection.send(protocol.BAD_GATEWAY, socket.MSG_DONTWAIT)
        connection.shutdown(socket.SHUT_WR)
    connection.close()


class Waiting(collections.deque):
    """Accepted connections (owned) that no instance has, the oldest first."""

    def __init__(self) -> None:
        super().__init__()
        self._retried = weakref.WeakSet()  # connections that one instance left untouched when it died

    def hand_to(self, instance: object) -> None:
        """Send what waits to `instance`, until it takes no more."""
        while self and instance.send(self[0]):
            self.popleft()

    def add_orphan(self, connection: socket.socket, retry: bool) -> None:
        """Do right by the client of an instance that died. What it had not touched waits for another one, once."""
        received, answered = progress(connection)
        if answered:  # the client must not take a part for the whole
            reset(connection)
        elif received or connection in self._retried or not retry:
            refuse(connection)
        else:
            self._retried.add(connection)
            self.append(connection)

    def refuse_all(self) -> None:
        """Answer 502 to what waits."""
        while self:
            refuse(self.popleft())

    def close_all(self) -> None:
        """Close what waits. The clients see the end of a connection from which nobody has read."""
        while self:
            self.popleft().close()


class ConnectionCounts:
    """How many connections of one address each user id holds, as of one look at the kernel's table."""

    def __init__(self) -> None:
        self._by_uid: dict[int, int] = {}
        self._looked = 0.0

    def update(self, by_uid: dict[int, int], looked: float) -> None:
        self._by_uid, self._looked = by_uid, looked

    def of(self, ids: range, since: float) -> int | None:
        """The connections of these user ids; None when nobody has looked after `since`."""
        if self._looked <= since:
            return None
        return sum(count for uid, count in self._by_uid.items() if uid in ids)
