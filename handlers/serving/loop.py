"""Loop: descriptors, timers and calls, all in one thread."""

import collections
import concurrent.futures
import heapq
import itertools
import os
import select
import threading
import time
import traceback
from collections.abc import Callable


class Loop:
    """One epoll loop in a thread of its own. Nothing that it runs may block."""

    def __init__(self) -> None:
        self._epoll, self._watched = select.epoll(), {}
        self._calls, self._timers, self._order = collections.deque(), [], itertools.count()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._running = True
        self.watch(self._wake, lambda: os.eventfd_read(self._wake))
        self.thread = threading.Thread(target=self._run, name='loop', daemon=True)
        self.thread.start()

    def call(self, function: Callable, *args) -> None:
        """Run it in the loop's thread soon. From any thread."""
        self._calls.append((function, args))
        os.eventfd_write(self._wake, 1)

    def wait(self, function: Callable, *args) -> object:
        """Run it in the loop's thread and return what it returned, or raise what it raised. From any other thread."""
        done = concurrent.futures.Future()
        self.call(self._answer, done, function, args)
        return done.result()

    @staticmethod
    def _answer(done: concurrent.futures.Future, function: Callable, args: tuple) -> None:
        try:
            done.set_result(function(*args))
        except BaseException as error:
            done.set_exception(error)

    def later(self, delay_s: float, function: Callable, *args) -> None:
        """Run it in the loop's thread after `delay_s`. From the loop's thread."""
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._order), function, args))

    def watch(self, fd: int, readable: Callable[[], None]) -> None:
        """Call `readable` in the loop's thread while `fd` can be read."""
        self._watched[fd] = readable
        self._epoll.register(fd, select.EPOLLIN)

    def unwatch(self, fd: int) -> None:
        """Also of one that is not watched."""
        if self._watched.pop(fd, None):
            self._epoll.unregister(fd)

    def stop(self) -> None:
        """End the thread. From any other thread."""
        self.call(setattr, self, '_running', False)
        self.thread.join()
        self._epoll.close()
        os.close(self._wake)

    def _run(self):
        while self._running:
            wait_s = max(0, self._timers[0][0] - time.monotonic()) if self._timers else -1
            for fd, _ in self._epoll.poll(wait_s):
                if fd in self._watched:  # an earlier one of this round may have unwatched it
                    self._safely(self._watched[fd])
            while self._timers and self._timers[0][0] <= time.monotonic():
                _, _, function, args = heapq.heappop(self._timers)
                self._safely(function, *args)
            while self._calls:
                function, args = self._calls.popleft()
                self._safely(function, *args)

    @staticmethod
    def _safely(function: Callable, *args: object) -> None:
        try:
            function(*args)
        except Exception:  # a fault in one function's affairs is not the others'
            traceback.print_exc()
