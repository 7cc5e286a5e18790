"""What happens, told once: the lines of the log, and the recent problems that /api/health shows."""

import collections
import contextlib
import datetime
import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from host.errors import EXPECTED

Emit = Callable[..., None]  # emit(area, text, name=None, problem=False)


class Event(NamedTuple):
    """`time` in seconds since the epoch; `name` of the function or peer that it is about."""

    time: float
    area: str
    text: str
    name: str | None
    problem: bool


class Events:
    """Prints a line on stdout for each event, and keeps the last problems."""

    LINES_MAX = 10_000  # lines that wait to be printed; a terminal that was stopped must not stop the accept loop

    def __init__(self) -> None:
        self._problems = collections.deque(maxlen=20)
        self._lines = queue.Queue(self.LINES_MAX)
        self.thread = threading.Thread(target=self._print, name='events', daemon=True)
        self.thread.start()

    def emit(self, area: str, text: str, name: str | None = None, problem: bool = False) -> None:
        event = Event(time.time(), area, text, name, problem)
        if problem:
            self._problems.append(event)
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(f'[{area}] {text}')

    def _print(self) -> None:
        while (line := self._lines.get()) is not None:
            with contextlib.suppress(OSError):  # nobody reads the output any more, or the disk is full
                print(line, flush=True)

    def close(self) -> None:
        """Return when all is printed, or after two seconds."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
            self.thread.join(timeout=2)

    def problems(self) -> list[dict]:
        return [
            {'time': timestamp(event.time), 'area': event.area, 'what': event.text} for event in list(self._problems)
        ]


class Refusals:
    """Counts what is refused. Whoever asks too much gets one line a minute, however often he asks."""

    PERIOD_S = 60
    KINDS_MAX = 8  # that a line names

    def __init__(self, emit: Emit) -> None:
        self._emit, self._lock = emit, threading.Lock()
        self._counts, self._last = collections.Counter(), None

    def add(self, who: str, what: str, client_address: tuple) -> None:
        """`who` and `what` are of a few kinds: they hold nothing that a stranger chose."""
        with self._lock:
            self._counts[who, what] += 1
            self._last = client_address[0] if client_address else self._last

    def tell(self) -> None:
        """Tell what was refused since the last time, if anything was."""
        with self._lock:
            counts, self._counts = self._counts, collections.Counter()
            last, self._last = self._last, None
        if not counts:
            return
        kinds = [f'{who}: {what} × {count}' for (who, what), count in counts.most_common(self.KINDS_MAX)]
        kinds += [f'{len(counts) - self.KINDS_MAX} other kinds'] * (len(counts) > self.KINDS_MAX)
        kinds += [f'the last from {last}'] * bool(last)
        self._emit('api', f'Refused {counts.total()} requests: {"; ".join(kinds)}')


def timestamp(seconds: float) -> str:
    """RFC 3339, UTC, whole seconds."""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime('%Y-%m-%dT%H:%M:%SZ')


def date(seconds: float) -> str:
    return timestamp(seconds)[:10]


def attempt(emit: Emit, function: Callable[..., object], *args: object) -> None:
    """Call it. What fails is told and left, since the next projection or the next start does it again."""
    try:
        function(*args)
    except EXPECTED as error:
        emit('faasd', f'Left for later: {error}')
