"""The request path: accepts the connections of every function and gives each to the function's pool."""

import concurrent.futures
import contextlib
import os
import resource
import time
from typing import NamedTuple

from handlers.containers.containers import Container
from handlers.images.spec import NOBODY
from handlers.serving.instance import MOST_CONNECTIONS
from handlers.serving.listeners import ListenerGroup
from handlers.serving.loop import Loop
from handlers.serving.pool import Pool
from host.firewall import MARK
from host.guard import Guard, Unguarded

ACCEPTS_PER_TURN = 64  # of one listener before the others have their turn
ACCEPT_RETRY_S = 0.1  # how long nothing is accepted when descriptors run out
REPORT_AGAIN_S = 10  # a problem that goes on is reported so often
COUNT_AGAIN_S = 0.1  # how long a count of what all functions take is good for
INSTANCE_PART = 4  # of the descriptors for functions: more connections no instance gets
RESERVED_DESCRIPTORS = 128  # for the API, files and the start of instances; a quarter of all if those are few


class Adopted(NamedTuple):
    """What a faasd that is no more has left: a container and the listener that it serves."""

    container: Container
    listener: object  # socket.socket


class Listener:
    """The listener group of one function: it is watched while the pool accepts and nothing forbids it."""

    def __init__(self, group: ListenerGroup, pool: Pool, loop: Loop, accept: object) -> None:
        self.group, self.pool = group, pool
        self._loop, self._accept = loop, accept
        self._accepting, self._permitted, self._apart, self._resting = False, True, False, False
        self._watched: int | None = None  # a descriptor

    def set_accepting(self, accepting: bool) -> None:
        self._accepting = accepting
        self._update()

    def permit(self, permitted: bool) -> None:
        self._permitted = permitted
        self._update()

    def accept_apart(self, apart: bool) -> None:
        """While another thread accepts, the loop does not watch."""
        self._apart = apart
        self._update()

    def rest(self, seconds: float) -> None:
        """Accept nothing for so long. What comes waits in the kernel."""
        self._resting = True
        self._update()
        self._loop.later(seconds, self._go_on)

    def _go_on(self):
        self._resting = False
        self._update()

    def _update(self):
        wanted = self._accepting and self._permitted and not self._apart and not self._resting
        fd = self.group.current.fileno() if wanted else None
        if self._watched not in (None, fd):
            self._loop.unwatch(self._watched)
            self._watched = None
        if self._watched is None and fd is not None:
            self._watched = fd
            self._loop.watch(fd, self._readable)

    def _readable(self):
        self._accept(self)


class FaaSServer:
    """Accepts on [function address]:80 and hands each connection to the function's pool.

    It reads no byte of a request.
    """

    def __init__(self, loop: Loop, emit: object, guard: Guard | Unguarded, descriptors: int | None = None) -> None:
        """`guard` makes the listeners. `descriptors` is how many this process may have; by default its limit."""
        self._loop, self._emit, self.guard = loop, emit, guard
        self._listeners: dict[str, Listener] = {}  # by address
        self._permitted, self._paused, self._reported = True, False, False
        most = descriptors or resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._first_reserved = most - min(RESERVED_DESCRIPTORS, most // 4)
        self._for_functions = self._first_reserved - len(os.listdir('/proc/self/fd'))
        self._used, self._counted = 0, 0.0  # how many of these all functions take at most, and when that was counted
        self.most_connections = max(1, min(MOST_CONNECTIONS, self._for_functions // INSTANCE_PART))

    def add_listener(self, ipv6: str, name: str, pool: Pool, adopted: Adopted | None = None) -> None:
        """Bind and listen; what comes waits until `pool` takes it. Or go on with what was `adopted` (consumed).

        An adopted instance serves before anything is accepted. Raises OSError; the container is the caller's then.
        """
        group = ListenerGroup(ipv6, MARK, self.guard, adopted and adopted.listener)
        self._loop.wait(self._add, ipv6, group, pool, adopted and adopted.container)
        self._emit('listener', f'Listening on [{ipv6}]:80 for {name}', name=name)

    def _add(self, ipv6, group, pool, container):
        listener = Listener(group, pool, self._loop, self._accept)
        listener.permit(self._may_accept())
        try:
            pool.open(group, listener.set_accepting, container)
        except BaseException:
            listener.set_accepting(False)
            group.close()
            raise
        self._listeners[ipv6] = listener

    def close_listener(self, ipv6: str, within_s: float, hand_over: bool = False) -> concurrent.futures.Future:
        """Serve [ipv6] no more; what runs may finish within `within_s`.

        With `hand_over` an instance that listens by itself goes on, for a next faasd to adopt. Returns a Future that is
        done when every other instance has ended: True if one goes on.
        """
        closed = concurrent.futures.Future()
        self._loop.call(self._close, ipv6, within_s, hand_over, closed)
        return closed

    def _close(self, ipv6, within_s, hand_over, closed):
        listener = self._listeners.pop(ipv6, None)
        if listener is None:
            return closed.set_result(False)
        listener.set_accepting(False)
        group, pool = listener.group, listener.pool
        goes_on = hand_over and pool.detach()
        if goes_on:
            group.detach()
        elif not pool.serves_itself():
            group.refuse()

        def end(_):
            group.close()
            closed.set_result(goes_on)

        try:
            pool.close(within_s).add_done_callback(end)
        except Exception as error:  # or who waits would wait for ever
            closed.set_exception(error)
            raise

    def permit(self, permitted: bool) -> None:
        """Hand nothing out while permitted is False: without the nftables table a passed socket opens the host."""
        self._loop.call(self._set, permitted, None)

    def _set(self, permitted, paused):
        if permitted is not None:
            self._permitted = permitted
        if paused is not None:
            self._paused = paused
        for listener in self._listeners.values():
            listener.permit(self._may_accept())

    def _may_accept(self):
        return self._permitted and not self._paused

    def _accept(self, listener):
        pool, sock = listener.pool, listener.group.current
        room = self._room(pool)
        if room <= 0:
            self._report(f'{pool.name} has as many of the descriptors as are left: its new connections wait')
            return listener.rest(ACCEPT_RETRY_S)
        if pool.instances.share(sock):
            return self._accept_apart(listener, sock)
        sock.setblocking(False)  # a server that shared it may have wanted it otherwise
        for _ in range(min((room + 1) // 2, ACCEPTS_PER_TURN)):  # each takes one of it, and adds one to what it has
            if self._paused or not pool.take():
                return
            try:
                connection, _ = sock.accept()
            except BlockingIOError:
                return
            except ConnectionAbortedError:
                continue
            except OSError as error:
                return self._pause(f'Cannot accept: {error.strerror}')
            if not self._dispatch(pool, connection):
                return

    def _dispatch(self, pool, connection):
        """False when descriptors have become scarce."""
        # As another user's, it cannot join the listeners on port 80 by SO_REUSEPORT, should a function try.
        os.fchown(connection.fileno(), NOBODY, -1)
        # The kernel gives the lowest free number: all below this one are in use.
        scarce = connection.fileno() >= self._first_reserved
        self._used += 1
        pool.dispatch(connection)
        if scarce:
            self._pause(f'{self._first_reserved} descriptors are in use: new connections wait')
        return not scarce

    def _accept_apart(self, listener, sock):
        """Accept where an instance can make accept() wait: one connection at a time, in another thread."""

        def accept():
            connection = None
            with contextlib.suppress(OSError):
                connection, _ = sock.accept()
            self._loop.call(self._accepted_apart, listener, connection)

        listener.accept_apart(True)
        if not (listener.pool.take() and listener.pool.around.apart.call(listener.pool.name, accept)):
            self._loop.later(ACCEPT_RETRY_S, listener.accept_apart, False)

    def _accepted_apart(self, listener, connection):
        listener.accept_apart(False)
        if connection and listener in self._listeners.values():
            self._dispatch(listener.pool, connection)
        elif connection:
            connection.close()

    def _room(self, pool):
        """How many connections the function may get: it never has more descriptors than are left for all others.

        So one function gets half of them, two get a third each, and there is always something left for the next.
        """
        has, now = pool.descriptors(), time.monotonic()
        if has + ACCEPTS_PER_TURN > self._for_functions - self._used and now > self._counted + COUNT_AGAIN_S:
            self._used = sum(listener.pool.descriptors() for listener in self._listeners.values())
            self._counted = now
        return self._for_functions - self._used - has

    def _report(self, reason):
        if not self._reported:
            self._reported = True
            self._emit('listener', reason, problem=True)
            self._loop.later(REPORT_AGAIN_S, self._report_again)

    def _pause(self, reason):
        """Out of descriptors: accept nothing until some were closed. What comes waits in the kernel."""
        self._report(reason)
        self._set(None, True)
        self._loop.later(ACCEPT_RETRY_S, self._resume)

    def _report_again(self):
        self._reported = False

    def _resume(self):
        try:
            probe = os.eventfd(0, os.EFD_CLOEXEC)
            os.close(probe)
        except OSError:
            probe = self._first_reserved
        if probe >= self._first_reserved:
            return self._loop.later(ACCEPT_RETRY_S, self._resume)
        self._set(None, False)
