"""An accepted connection whose instance has died: how far it came, and what the client is told."""

import contextlib
import fcntl
import socket
import struct
import termios

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
        connection.send(protocol.BAD_GATEWAY, socket.MSG_DONTWAIT)
        connection.shutdown(socket.SHUT_WR)
    connection.close()
