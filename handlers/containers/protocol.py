"""The messages between faasd and the runtime.py of an instance.

Each instance has one AF_UNIX SOCK_SEQPACKET pair. The runtime's end is descriptor 3. A message is one type byte and the
fields after it:

    runtime → faasd                              faasd → runtime
    ┌───┬─────────────┐                          ┌───┬────────────┐  + one descriptor (SCM_RIGHTS):
    │ H │ version: u8 │  greeting, first         │ C │ number u64 │    the connection
    ├───┼─────────────┴──┐                       ├───┼────────────┴┐
    │ R │ kind: UTF-8    │  ready to serve       │ S │ seconds u64 │   stop: finish open requests, close what is
    ├───┼────────────────┤                       └───┴─────────────┘   idle after that many seconds, exit
    │ F │ reason: UTF-8  │  cannot start
    ├───┼────────────┬───┘
    │ D │ number u64 │      done with connection `number`
    └───┴────────────┘

For example: faasd sends b'C', 7 in eight bytes, and a descriptor; when the answer is written, the runtime sends b'D'
and 7. Numbers are in network byte order and never repeat within an instance. A message has at most MAX_MESSAGE bytes.
SEQPACKET never merges messages. A read of zero bytes means that the other side has closed.

Who closes what: faasd keeps a duplicate of the connection until `D`. From it faasd knows what the client got if the
instance dies. The runtime owns the descriptor from its arrival on, before it parses the message.
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

# The answer to a client whose request no function code answered: the instance died, or never fetched the connection.
BAD_GATEWAY = (
    b'HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/plain\r\nContent-Length: 34\r\nConnection: close\r\n\r\n'
    b'the function died on this request\n'
)

_NUMBER = struct.Struct('!cQ')
_ANCILLARY = socket.CMSG_SPACE(4)


class ProtocolError(Exception):
    """The other side sent what this module does not define."""


def pair() -> tuple[socket.socket, socket.socket]:
    """(faasd's end, the runtime's end). Both are non-inheritable. faasd's end does not block."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    ours.setblocking(False)
    return ours, theirs


def send_connection(channel: socket.socket, number: int, connection: socket.socket) -> None:
    """Pass a copy of `connection` (borrowed).

    Raises BlockingIOError when the channel is full: the runtime has not read the messages before.
    """
    channel.sendmsg(
        (_NUMBER.pack(CONNECTION, number),),
        ((socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', (connection.fileno(),))),),
    )


def send_number(channel: socket.socket, kind: bytes, number: int) -> None:
    channel.send(_NUMBER.pack(kind, number))


def send_text(channel: socket.socket, kind: bytes, text: str) -> None:
    channel.send(kind + text.encode(errors='replace')[: MAX_MESSAGE - 1])


def number_of(message: bytes) -> int:
    """The number in a C, S or D message. Raises ProtocolError."""
    try:
        return _NUMBER.unpack(message)[1]
    except struct.error as error:
        raise ProtocolError(f'{len(message)} bytes where {_NUMBER.size} belong') from error


def hear(channel: socket.socket) -> bytes:
    """A message of the runtime; b'' when it has closed the channel. Raises ProtocolError.

    A descriptor is a breach of the protocol, and stays in the queue: taking it out could wait for its last close.
    """
    message, _, flags, _ = channel.recvmsg(MAX_MESSAGE, 0, socket.MSG_PEEK)
    if flags & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
        raise ProtocolError('more than one message can carry')
    channel.recv(1)  # the rest of the message is dropped with it
    return message


def receive(channel: socket.socket) -> tuple[bytes, int | None]:
    """(message, descriptor or None) of faasd; (b'', None) when it has closed. The caller owns the descriptor.

    Raises ProtocolError. socket.recv_fds would drop the flags and leave the descriptor inheritable.
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
