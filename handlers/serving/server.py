"""The request path: accepts the connections of every function and gives each to the function's pool."""

import os

from handlers.images.spec import NOBODY
from handlers.serving import listeners
from host.firewall import MARK


class FaaSServer:
    """Accepts on [function address]:80 and hands each connection to the function's pool.

    It reads no byte of a request.
    """

    ACCEPTS = 64  # of one listener before the others have their turn

    def __init__(self, loop, emit):
        self._loop, self._emit = loop, emit
        self._listeners = {}  # ipv6 → Listener
        self._permitted = True

    def add_listener(self, ipv6, name, its_pool, adopted=None):
        """Bind and listen, or go on with `adopted` (consumed); what comes waits until `its_pool` takes it.

        Raises OSError.
        """
        its = Listener(listeners.Front(ipv6, MARK, adopted), its_pool)
        self._emit('listener', f'Listening on [{ipv6}]:80 for {name}', name=name)
        self._loop.wait(self._add, ipv6, its)

    def _add(self, ipv6, its):
        self._listeners[ipv6] = its
        its.pool.front = its.front
        its.pool.gate = lambda is_open: self._gate(its, is_open)
        self._gate(its, True)

    def remove_listener(self, ipv6):
        """Listen no more; blocks until it is so. An address without a listener is left at that."""
        self._loop.wait(self.remove, ipv6)

    def remove(self, ipv6):
        """The same, in the loop's thread."""
        its = self._listeners.pop(ipv6, None)
        if its:
            self._gate(its, False)
            its.pool.gate, its.pool.front = lambda is_open: None, None
            its.front.close()

    def leave(self, ipv6):
        """In the loop's thread: let go of an address whose front an instance goes on to serve."""
        its = self._listeners.pop(ipv6)
        self._gate(its, False)
        its.pool.front = None
        its.front.leave()

    def permit(self, permitted):
        """Hand nothing out while permitted is False: without the nftables table a passed socket opens the host."""
        self._loop.call(self._permit, permitted)

    def _permit(self, permitted):
        self._permitted = permitted
        for its in self._listeners.values():
            self._gate(its, its.open)

    def _gate(self, its, is_open):
        its.open = is_open
        fd = its.front.sock.fileno() if is_open and self._permitted else -1
        if its.watched not in (None, fd):
            self._loop.unwatch(its.watched)
            its.watched = None
        if its.watched is None and fd >= 0:
            its.watched = fd
            self._loop.watch(fd, lambda: self._accept(its))

    def _accept(self, its):
        for _ in range(self.ACCEPTS):
            if not its.pool.take():
                return
            try:
                connection, _ = its.front.sock.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:  # out of descriptors: let some be closed
                self._emit('listener', f'Cannot accept: {error.strerror}', problem=True)
                self._gate(its, False)
                return self._loop.later(0.1, self._gate, its, True)
            # As another user's, it cannot join the listeners on port 80 by SO_REUSEPORT, should a function try.
            os.fchown(connection.fileno(), NOBODY, -1)
            its.pool.dispatch(connection)


class Listener:
    def __init__(self, front, its_pool):
        self.front, self.pool = front, its_pool
        self.open, self.watched = False, None  # the descriptor that is watched
