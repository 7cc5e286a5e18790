"""Asks a server that is tried one question, as a client would."""

import re
import socket
import time

MOST_BYTES = 1 << 20  # of an answer
KEPT_S = 0.2  # a server that keeps a connection for so long means to


def readiness(client: socket.socket, name: str, how: str, within_s: float) -> str | None:
    """None if the server at the other end of `client` (borrowed) is ready, else what it did instead.

    `how` is a path, which must be answered with a status from 200 to 399; or 'tcp': it must keep the connection.
    """
    if how == 'tcp':
        client.settimeout(KEPT_S)
        try:
            return None if client.recv(1) else 'a closed connection'
        except TimeoutError:
            return None
        except OSError:
            return 'a reset connection'
    heard = ask(client, name, within_s, how)
    found = re.match(rb'HTTP/1\.[01] ([0-9]{3})', heard or b'')
    if not found:
        return 'no answer' if heard is None else 'a closed connection' if not heard else 'what is not HTTP'
    return None if 200 <= int(found[1]) < 400 else f'status {int(found[1])}'


def ask(client: socket.socket, name: str, within_s: float, path: str = '/') -> bytes | None:
    """The first bytes that a server answers on the connection `client` (borrowed). It takes `within_s` at most.

    b'': it closed the connection. None: it said nothing in time.
    """
    deadline, heard, count = time.monotonic() + within_s, None, 0

    def receive() -> bytes:
        client.settimeout(max(0.001, deadline - time.monotonic()))  # 0 would mean: do not block
        return client.recv(65536)

    try:
        client.settimeout(within_s)  # of all of sendall()
        client.sendall(f'GET {path} HTTP/1.0\r\nHost: {name}.faas\r\n\r\n'.encode())
        heard = more = receive()
        client.shutdown(socket.SHUT_WR)
        while more and count < MOST_BYTES and time.monotonic() < deadline:  # to its end, or the server may complain
            more = receive()
            count += len(more)
    except TimeoutError:
        pass
    except OSError:  # it was reset, or is over
        return heard or b''
    return heard
