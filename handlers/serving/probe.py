"""Asks a server that is tried one question, as a client would."""

import socket
import time

MOST_BYTES = 1 << 20  # of an answer


def ask(client: socket.socket, name: str, within_s: float) -> bytes | None:
    """The first bytes that a server answers on the connection `client` (borrowed). It takes `within_s` at most.

    b'': it closed the connection. None: it said nothing in time.
    """
    deadline, heard, count = time.monotonic() + within_s, None, 0

    def receive() -> bytes:
        client.settimeout(max(0.001, deadline - time.monotonic()))  # 0 would mean: do not block
        return client.recv(65536)

    try:
        client.settimeout(within_s)  # of all of sendall()
        client.sendall(b'GET / HTTP/1.0\r\nHost: %s.faas\r\n\r\n' % name.encode())
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
