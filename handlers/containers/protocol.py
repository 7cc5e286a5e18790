"""The hand-off wire between faasd and an instance's runtime.py.

One AF_UNIX SOCK_SEQPACKET pair for each instance; the runtime finds its end as descriptor 3. A message is one type byte
and what follows:

    runtime → faasd                              faasd → runtime
    ┌───┬─────────────┐                          ┌───┬────────────┐  + one descriptor (SCM_RIGHTS):
    │ H │ version: u8 │  greeting, first         │ C │ number u64 │    the connection
    ├───┼─────────────┴──┐                       ├───┼────────────┴┐
    │ R │ kind: UTF-8    │  ready to serve       │ S │ seconds u64 │   stop: serve what you hold, close what is idle
    ├───┼────────────────┤                       └───┴─────────────┘   after that many seconds, exit
    │ F │ reason: UTF-8  │  cannot start
    ├───┼────────────┬───┘
    │ D │ number u64 │      done with connection `number`
    └───┴────────────┘

For example b'C' + 7 in eight bytes with a descriptor, and after the answer is written b'D' + 7. Numbers are network
byte order and never repeat within an instance. A message is at most MAX_MESSAGE bytes. The kernel never merges messages
that carry descriptors; SEQPACKET never merges any, and a zero-length read is the other side's end.

Who closes what: faasd keeps its duplicate of the connection until `D`, so that it knows what the client got if the
instance dies. The runtime owns the descriptor it received, from before the message is parsed.
"""

import array
import os
import socket
import struct

VERSION = 1
MAX_MESSAGE = 4096
CHANNEL_FD = 3

HELLO, READY, FAILED, DONE = b'H', b'R', b'F', b'D'
CONNECTION, STOP = b'C', b'S'

# What a client gets whose connection no function code has answered: an instance died or its process never fetched it.
BAD_GATEWAY = (
    b'HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/plain\r\nContent-Length: 34\r\nConnection: close\r\n\r\n'
    b'the function died on this request\n'
)

_NUMBER = struct.Struct('!cQ')
_ANCILLARY = socket.CMSG_SPACE(4)


class ProtocolError(Exception):
    """The other side sent what is not in the drawing above."""


def pair():
    """(faasd's end, the runtime's end), both non-inheritable; faasd's does not block."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    ours.setblocking(False)
    return ours, theirs


def send_connection(channel, number, connection):
    """Borrow `connection` and pass a copy of it.

    Raises BlockingIOError when the runtime has not read what it was sent.
    """
    channel.sendmsg(
        (_NUMBER.pack(CONNECTION, number),),
        ((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', (connection.fileno(),))),),
    )


def send_number(channel, kind, number):
    channel.send(_NUMBER.pack(kind, number))


def send_text(channel, kind, text):
    channel.send(kind + text.encode(errors='replace')[: MAX_MESSAGE - 1])


def number_of(message):
    """The number of a C or D message."""
    try:
        return _NUMBER.unpack(message)[1]
    except struct.error as error:
        raise ProtocolError(f'{len(message)} bytes where {_NUMBER.size} belong') from error


def receive(channel):
    """(message, descriptor or None) from the other side; (b'', None) at its end. The caller owns the descriptor.

    socket.recv_fds would drop the flags and leave the descriptor inheritable.
    """
    message, ancillary, flags, _ = channel.recvmsg(MAX_MESSAGE, _ANCILLARY, socket.MSG_CMSG_CLOEXEC)
    fds = array.array('i')
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if len(fds) > 1 or flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC) or (fds and message[:1] != CONNECTION):
        for fd in fds:
            os.close(fd)
        raise ProtocolError('more than one message can carry')
    return message, fds[0] if fds else None
