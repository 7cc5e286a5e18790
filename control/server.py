"""Serves the control API on one socket: how many connections at a time, for how long, and from whom."""

import collections
import errno
import ipaddress
import socket
import socketserver
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

from control.access import Caller
from control.api import ControlAPI
from control.deployments import Deployments
from control.events import Refusals
from control.functions import Functions
from control.health import Health
from control.peers import Peers
from control.volumes import Volumes
from registry import PEERS

BACKLOG = 128
NO_DESCRIPTORS_PAUSE_S = 0.1  # until some are closed


class Verbs(NamedTuple):
    """What the API speaks for."""

    functions: Functions
    deployments: Deployments
    volumes: Volumes
    peers: Peers
    health: Health
    refusals: Refusals


class Limits(NamedTuple):
    """`threads` connections at a time; more wait in the backlog. One address has at most `each_max` of them.

    A connection that sends nothing for idle_s is closed, and after whole_s in any case, unless it uploads.
    """

    threads: int
    idle_s: float
    whole_s: float | None = None
    each_max: int | None = None


class ControlServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Serves the API on a bound socket (consumed). `caller(address)` says who asks."""

    daemon_threads = True
    block_on_close = False

    def __init__(
        self, sock: socket.socket, caller: Callable[[tuple], Caller], limits: Limits, verbs: Verbs, name: str
    ) -> None:
        super().__init__(None, ControlAPI, bind_and_activate=False)
        self.socket.close()
        self.socket, self.caller, self.limits, self.verbs = sock, caller, limits, verbs
        self._open_from, self._count = collections.Counter(), threading.Lock()
        self._free, self._closing = threading.BoundedSemaphore(limits.threads), False
        sock.listen(BACKLOG)
        self.thread = threading.Thread(target=self.serve_forever, args=(0.1,), name=name, daemon=True)
        self.thread.start()

    def get_request(self) -> tuple[socket.socket, tuple]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # the connection stays in the backlog: do not spin
                time.sleep(NO_DESCRIPTORS_PAUSE_S)
            raise

    def verify_request(self, request: socket.socket, client_address: tuple) -> bool:
        most = self.limits.each_max
        with self._count:
            if most is None or self._open_from[source(client_address)] < most:
                return True
        self.verbs.refusals.add(self.thread.name, f'more than {most} connections at a time', client_address)
        return False

    def process_request(self, request: socket.socket, client_address: tuple) -> None:
        while not self._free.acquire(timeout=0.5):
            if self._closing:
                raise ConnectionAbortedError
        with self._count:
            self._open_from[source(client_address)] += 1
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._ended(client_address)
            raise

    def process_request_thread(self, request: socket.socket, client_address: tuple) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._ended(client_address)

    def _ended(self, client_address: tuple) -> None:
        with self._count:
            self._open_from[source(client_address)] -= 1
            self._open_from += collections.Counter()  # drops those that have none
        self._free.release()

    def handle_error(self, request: socket.socket, client_address: tuple) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            traceback.print_exc()

    def close(self) -> None:
        self._closing = True
        self.shutdown()
        self.server_close()


def source(client_address: tuple) -> object:
    """Whom an address stands for: IPv6 networks are given out by the /64, and the unix socket has no addresses."""
    if not client_address:
        return None
    address = ipaddress.ip_address(client_address[0].partition('%')[0])
    v4 = address if address.version == 4 else address.ipv4_mapped
    return v4 or (address if client_address[0].startswith(PEERS) else int(address) >> 64)
