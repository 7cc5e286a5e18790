"""Runs what a function can make wait, apart from the loop and the injector.

close() of a socket with SO_LINGER waits for as long as the function has said. So does close() of a unix socket in whose
queue such a socket lies. accept() waits at a listener that a function has made blocking. docs/ARCHITECTURE.md has the
rule and its exceptions.
"""

import collections
import contextlib
import ctypes
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable

from host import process
from host.errors import FaasError

EACH_MAX = 16  # calls of one function that run at a time
STUCK_S = 5  # how long a call may take before that is a problem
NO_THREAD_PAUSE_S = 0.1
# linux/close_range.h; the number is the same on every architecture.
CLOSE_RANGE, CLOSE_RANGE_UNSHARE, LAST_FD = 436, 2, 0xFFFFFFFF

libc = ctypes.CDLL(None, use_errno=True)


class Stuck(FaasError):
    """A function makes faasd wait."""


class Closing:
    """The close() of one descriptor, in two steps: here, where nobody may wait, and in a thread that has it alone.

    A program that is started gets a copy of all descriptors, and closes it before it runs; until then its parent waits.
    So no copy may be the last one: the thread takes the descriptor out of this process's table first.
    """

    def __init__(self, owned: socket.socket | int) -> None:
        self._owned = owned
        self._copied, self._closed = threading.Event(), threading.Event()

    def keep(self) -> None:
        """In a thread of its own: take a copy into a table of its own, and close it when nobody else has one."""
        fd = self._owned if isinstance(self._owned, int) else self._owned.fileno()
        try:
            if libc.syscall(CLOSE_RANGE, 0, LAST_FD, CLOSE_RANGE_UNSHARE):
                raise OSError(ctypes.get_errno(), 'close_range')
            copy = process.copy_of(os.getpid(), fd)
        finally:
            self._copied.set()
        self._closed.wait()
        os.close(copy)

    def close(self) -> None:
        """Close the descriptor here. It is not the last copy."""
        self._copied.wait()
        with process.forking:
            self._owned.close() if isinstance(self._owned, socket.socket) else os.close(self._owned)
        self._closed.set()


class Apart:
    """Runs calls in threads that may wait for ever. One function has at most EACH_MAX of them.

    For any thread; nothing here waits.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: collections.deque[tuple[str, socket.socket | int]] = collections.deque()
        self._running: dict[object, tuple[str, float]] = {}  # a call → (name of the function, since when)
        self.thread = threading.Thread(target=self._work, name='closer', daemon=True)
        self.thread.start()

    def call(self, name: str, work: Callable, *args: object, within_s: float = 0) -> bool:
        """Run work(*args) in a thread of its own. False when the function `name` has too many: nothing is done.

        It may take `within_s` longer than others before that is a problem.
        """
        key = object()
        with self._changed:
            if self._count(name) >= EACH_MAX:
                return False
            self._running[key] = name, time.monotonic() + within_s
        try:
            threading.Thread(target=self._run, args=(key, work, args), name='apart', daemon=True).start()
        except RuntimeError:  # no thread is left
            self._end(key)
            return False
        return True

    def close(self, name: str, owned: socket.socket | int) -> bool:
        """Close a socket or descriptor (consumed), soon. False when the function keeps too many threads: end it."""
        with self._changed:
            self._queue.append((name, owned))
            self._changed.notify()
            return self._count(name) < EACH_MAX

    def check(self) -> None:
        """Raises Stuck when calls take long. For the monitor."""
        late = time.monotonic() - STUCK_S
        with self._changed:
            names = sorted({name for name, since in self._running.values() if since < late})
        if names:
            raise Stuck(f'faasd waits for {", ".join(names)}, at close() or accept() of a socket')

    def _count(self, name):
        return sum(each == name for each, _ in self._running.values())

    def _end(self, key):
        with self._changed:
            del self._running[key]
            self._changed.notify()

    def _run(self, key, work, args):
        try:
            work(*args)
        except OSError:
            pass
        except Exception:
            traceback.print_exc()
        finally:
            self._end(key)

    def _work(self):
        while True:
            with self._changed:
                while not (taken := self._take()):
                    self._changed.wait()
            name, owned = taken
            closing = Closing(owned)
            if self.call(name, closing.keep):
                with contextlib.suppress(OSError):
                    closing.close()
            else:
                time.sleep(NO_THREAD_PAUSE_S)
                self.close(name, owned)

    def _take(self):
        """The first of the queue whose function has not too many calls; None when there is none."""
        for _ in range(len(self._queue)):
            name, owned = self._queue.popleft()
            if self._count(name) < EACH_MAX:
                return name, owned
            self._queue.append((name, owned))
        return None


def is_empty(sock: socket.socket) -> bool:
    """True if nothing lies in the queue of a unix stream socket, which gets nothing more: its close() does not wait."""
    try:
        sock.shutdown(socket.SHUT_RD)
        data, _, flags, _ = sock.recvmsg(1, 0, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:
        return False
    return not data and not flags & socket.MSG_CTRUNC
