"""The enroll port: where invites are redeemed, open only while one is outstanding."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator

from control.events import Emit
from control.settings import WIREGUARD_PORT
from host.errors import FaasError
from vpn_manager import split_endpoint


class EnrollUnavailable(FaasError):
    """Nobody could redeem an invite."""

    status = 503


class EnrollPort:
    """Keeps `address` bound, and serves there while `wanted()` is true."""

    def __init__(self, address: str, wanted: Callable[[], bool], emit: Emit) -> None:
        self._address, self._wanted, self._emit = address, wanted, emit
        self._host, self.port = split_endpoint(address, WIREGUARD_PORT)
        self._lock = threading.RLock()
        self._serve = self._server = self._socket = None

    def begin(self, serve: Callable) -> None:
        """From now on `serve(sock)` serves the API on a socket (consumed); what it returns has close()."""
        self._serve = serve
        with contextlib.suppress(OSError):  # the first invite will say it
            self._keep_bound()
        self.adjust()

    def _keep_bound(self) -> None:
        """The port is one of those that the kernel gives to outgoing connections: it is taken from the start."""
        if self._socket is None:
            self._socket = bound(self._host, self.port)

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """While an invite is made: open, and not closed by adjust(). Raises EnrollUnavailable."""
        with self._lock:
            self._open()
            yield

    def _open(self) -> None:
        if self._server is not None:
            return
        if self._serve is None:
            raise EnrollUnavailable('faasd is starting', 'try again in a moment')
        try:
            self._keep_bound()
            self._server = self._serve(self._socket.dup())
        except OSError as error:
            raise EnrollUnavailable(
                f'nobody could redeem it: tcp {self._address}: {error.strerror}',
                'end what listens there, or set FAAS_ENROLL_BIND to another address',
            ) from error
        self._emit('vpn', f'Invites can be redeemed at tcp {self._address}')

    def _shut(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
            self._socket.shutdown(socket.SHUT_RD)  # it listens no more, and stays bound
            self._emit('vpn', f'Closed tcp {self._address}')

    def adjust(self) -> None:
        """Listen while an invite is outstanding, and no longer. Raises EnrollUnavailable."""
        with self._lock:
            if self._server is not None and not self._server.thread.is_alive():
                self._shut()
            if self._wanted():
                self._open()
            else:
                self._shut()

    def close(self) -> None:
        with self._lock:
            self._shut()
            if self._socket:
                self._socket.close()


def bound(host: str, port: int) -> socket.socket:
    """A TCP socket bound to (host, port); :: takes IPv4 as well. Raises OSError."""
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    with contextlib.ExitStack() as undo:
        sock = undo.enter_context(socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != '::')
        sock.bind((host, port))
        undo.pop_all()
        return sock
