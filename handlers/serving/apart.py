"""Runs what a function can make wait, apart from the loop and the injector.

close() of a socket with SO_LINGER waits for as long as the function has said. So does close() of a unix socket in whose
queue such a socket lies. accept() waits at a listener that a function has made blocking. docs/ARCHITECTURE.md has the
rule and its exceptions.
"""

import collections
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable

from host.errors import FaasError

EACH_MAX = 16  # calls of one function that run at a time
SLOW_S = 0.05  # how long a close may take before another thread goes on with the others
STUCK_S = 5  # how long a call may take before that is a problem


class Stuck(FaasError):
    """A function makes faasd wait."""


class Apart:
    """Runs calls in threads that may wait for ever. One function has at most EACH_MAX of them.

    For any thread; nothing here waits.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._queue: collections.deque[tuple[str, Callable]] = collections.deque()
        self._running: dict[object, tuple[str, float]] = {}  # a call → (name of the function, since when)
        # Of the threads that work at the queue: their calls, how many wait for more, and if one is about to begin.
        self._working: set[object] = set()
        self._idle, self._starting = 0, False

    def call(self, name: str, work: Callable, *args: object) -> bool:
        """Run work(*args) in a thread of its own. False when the function `name` has too many: nothing is done."""
        with self._changed:
            if self._count(name) >= EACH_MAX:
                return False
            key = self._begin(name)
        return self._start(self._run, key, lambda: work(*args)) or self._end(key)

    def close(self, name: str, owned: socket.socket | int) -> bool:
        """Close a socket or descriptor (consumed), soon. False when the function keeps too many threads: end it."""
        with self._changed:
            self._queue.append((name, owned.close if isinstance(owned, socket.socket) else lambda: os.close(owned)))
            self._wake()
            return self._count(name) < EACH_MAX

    def check(self) -> None:
        """Raises Stuck when calls take long. For the monitor, every second."""
        with self._changed:
            self._wake()
            late = time.monotonic() - STUCK_S
            names = sorted({name for name, since in self._running.values() if since < late})
        if names:
            raise Stuck(f'faasd waits for {", ".join(names)}: at close() or accept() of a socket')

    def _count(self, name):
        return sum(each == name for each, _ in self._running.values())

    def _begin(self, name):
        key = object()
        self._running[key] = name, time.monotonic()
        return key

    def _end(self, key):
        with self._changed:
            del self._running[key]
            self._working.discard(key)
        return False

    @staticmethod
    def _start(target: Callable, *args: object) -> bool:
        try:
            threading.Thread(target=target, args=args, name='apart', daemon=True).start()
        except RuntimeError:  # no thread is left
            return False
        return True

    def _run(self, key, work):
        try:
            work()
        except OSError:
            pass
        except Exception:
            traceback.print_exc()
        finally:
            self._end(key)

    def _wake(self):
        """Have the queue worked at: by a thread that is idle, or by a new one when all others are slow."""
        if self._idle:
            self._changed.notify()
        elif self._queue and not self._starting:
            slow = time.monotonic() - SLOW_S
            self._starting = all(self._running[key][1] < slow for key in self._working) and self._start(self._work)

    def _work(self):
        with self._changed:
            self._starting = False
            while True:
                if taken := self._take():
                    key = self._begin(taken[0])
                    self._working.add(key)
                    self._changed.release()
                    self._run(key, taken[1])
                    self._changed.acquire()
                elif self._idle:
                    return
                else:
                    self._idle += 1
                    self._changed.wait()
                    self._idle -= 1

    def _take(self):
        """The first of the queue whose function has not too many calls; None when there is none."""
        for _ in range(len(self._queue)):
            name, work = self._queue.popleft()
            if self._count(name) < EACH_MAX:
                return name, work
            self._queue.append((name, work))
        return None
