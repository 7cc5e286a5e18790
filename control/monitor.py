"""Looks after everything that can break: named checks, each with a period and what it heals."""

import os
import select
import socket
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, NamedTuple

from control.health import Report
from host.errors import EXPECTED

TICK_S = 1  # how often the shortest period is due
CLOSELY_S = 5


class Check(NamedTuple):
    """`look()` heals what it can. It raises what is wrong with `area`; it returns False when that is not known.

    It is called every `period_s`, and at once when the `wakes` socket can be read from. With `matters` it is only for a
    message of which that is true, and when messages were lost.
    Of two checks of one area, one must return False when all is well, or it takes back what the other has reported.
    """

    area: str
    look: Callable[[], Any]
    period_s: float = TICK_S
    wakes: socket.socket | None = None
    matters: Callable[[bytes], bool] | None = None

    def is_woken(self, messages: dict[socket.socket, list[bytes | None]]) -> bool:
        """True if there is one that matters among the messages of its socket."""
        found = messages.get(self.wakes, ())
        return bool(found) and (not self.matters or any(each is None or self.matters(each) for each in found))


class Monitor:
    """One thread that runs the checks in their order. It knows none of what they look at."""

    def __init__(self, checks: list[Check], report: Report, clock: Callable[[], float] = time.monotonic) -> None:
        self._checks, self._report, self._clock = checks, report, clock
        self._due = dict.fromkeys(range(len(checks)), 0.0)
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self.thread = threading.Thread(target=self._run, name='monitor', daemon=True)

    def start(self) -> None:
        self.thread.start()

    def stop(self) -> None:
        """Return when the check that is under way has ended."""
        os.eventfd_write(self._end, 1)
        self.thread.join()
        os.close(self._end)

    def _run(self) -> None:
        poll = select.poll()  # select() would fail with descriptors from 1024 on
        sockets = {check.wakes.fileno(): check.wakes for check in self._checks if check.wakes}
        for fd in (self._end, *sockets):
            poll.register(fd, select.POLLIN)
        while True:
            readable = {fd for fd, _ in poll.poll(TICK_S * 1000)}
            if self._end in readable:
                return
            self.look({sockets[fd] for fd in readable})

    def look(self, woken: set[socket.socket] = frozenset()) -> None:
        """Run the checks that are due, and those whose socket is in `woken`."""
        messages = {sock: read_all(sock) for sock in woken}
        for number, check in enumerate(self._checks):
            now = self._clock()
            if check.is_woken(messages) or now >= self._due[number]:
                self._due[number] = now + check.period_s - TICK_S / 2  # a tick may come a little early
                self._run_check(check)

    def _run_check(self, check: Check) -> None:
        try:
            if check.look() is not False:
                self._report(check.area, None)
        except EXPECTED as error:
            self._report(check.area, str(error))
        except Exception as error:  # a fault in one check must not end the others
            traceback.print_exc()
            self._report(check.area, f'a fault of faasd: {type(error).__name__}; its log has more')


def read_all(sock: socket.socket) -> list[bytes | None]:
    """All messages that wait; None for those that a netlink socket lost, which it says once by ENOBUFS."""
    messages = []
    try:
        while data := sock.recv(65536, socket.MSG_DONTWAIT):
            messages.append(data)
    except BlockingIOError:
        return messages
    except OSError:
        pass
    return [*messages, None]
