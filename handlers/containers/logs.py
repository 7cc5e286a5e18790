"""The output of instances: a log of limited size for each function, and the thread that writes it."""

import collections
import contextlib
import os
import re
import select
import threading
import time

LOG_LIMIT = 1 << 20  # bytes of a log file, unless the function asks for another; one older file is kept
TAIL_LINES = 20
LINE_LIMIT = 4096
REPEATS, MOST_UNTOLD = 3, 100_000  # of one line: more are counted, and told at the latest after so many
# What programs print that have no network: of libc, Go, Node, Java, musl.
UNREACHABLE = re.compile(
    rb'[Nn]etwork is unreachable|ENETUNREACH|Name or service not known|Temporary failure in name resolution'
    rb'|no such host|ENOTFOUND|EAI_AGAIN|UnknownHostException|Name does not resolve'
)
COPY_PERIOD_S = 0.01  # between two turns of the copier: in each a function gets at most one pipe copied


class Log:
    """The output of a function's instances, in a file of limited size."""

    def __init__(self, path: str) -> None:
        self.path, self.limit = path, LOG_LIMIT
        self._lock = threading.Lock()

    def append(self, data: bytes) -> None:
        """Write what an instance printed. On a full disk the output is lost, and the instance goes on."""
        with self._lock, contextlib.suppress(OSError):
            with open(self.path, 'ab') as file:
                file.write(data)
                full = file.tell() >= self.limit
            if full:
                os.replace(self.path, f'{self.path}.1')

    def last(self, lines: int) -> bytes:
        """The last `lines` lines as bytes."""
        data = b''
        for path in (f'{self.path}.1', self.path):
            with contextlib.suppress(OSError), open(path, 'rb') as file:
                data += file.read(2 * self.limit)
        return b''.join(data.splitlines(keepends=True)[-lines:]) if lines else b''


class LogPipe:
    """The pipe from one instance's stdout and stderr to a Log."""

    def __init__(self, log: Log, reader: int | None = None, no_egress: str | None = None) -> None:
        """A new pipe, or the one whose reading end is `reader` (consumed): a former faasd started that instance.

        `no_egress` is a line for a function without egress that tries to reach something.
        """
        self._no_egress, self.tries_to_reach = no_egress, False
        self._log, self._lines, self._rest = log, collections.deque(maxlen=TAIL_LINES), b''
        self._last, self._count, self._untold = None, 0, 0  # the last line, and how often it was repeated
        self._ended = threading.Event()
        self.reader, self.writer = reader, None
        if reader is None:
            self.reader, writer = os.pipe2(os.O_CLOEXEC)
            # The instance gets an end that can also read: if faasd dies, the pipe has a reader, and writes succeed.
            self.writer = os.open(f'/proc/self/fd/{writer}', os.O_RDWR | os.O_CLOEXEC)
            os.close(writer)
        os.set_blocking(self.reader, False)

    def close_writer(self) -> None:
        """Close our copy of the writing end. The instance has its own."""
        os.close(self.writer)

    def copy(self) -> bool:
        """Copy what has arrived to the log. False at the end of the output."""
        try:
            data = os.read(self.reader, 65536)
        except BlockingIOError:
            return True
        if not data:
            return False
        begun = len(self._rest)  # bytes of an unfinished line, which are written already
        *lines, self._rest = (self._rest + data).split(b'\n')
        if lines:
            self._log.append(self._folded(lines, begun) + self._rest)
            self._lines.extend(line[:LINE_LIMIT] for line in lines)
        else:
            self._log.append(self._told() + data)
        self._rest = self._rest[-LINE_LIMIT:]
        if self._no_egress and not self.tries_to_reach and UNREACHABLE.search(data):
            self.tries_to_reach = True
            self._log.append((b'' if data.endswith(b'\n') else b'\n') + f'[faasd] {self._no_egress}\n'.encode())
        return True

    def _folded(self, lines, begun):
        """The lines, less what repeats the line before more than REPEATS times, and less the first `begun` bytes."""
        out = []
        for line in lines:
            self._count = self._count + 1 if line == self._last and not begun else 0
            self._last = line
            if self._count < REPEATS:
                out.append(self._told() + line[begun:] + b'\n')
            else:
                self._untold += 1
                if self._untold == MOST_UNTOLD:
                    out.append(self._told())
            begun = 0
        return b''.join(out)

    def _told(self):
        count, self._untold = self._untold, 0
        return b'[faasd] the line above came %d times more\n' % count if count else b''

    def close(self) -> None:
        if text := self._told():
            self._log.append(text)
        os.close(self.reader)
        self._ended.set()

    def wait(self) -> None:
        """Return when the whole output of an instance that has ended is copied, or after a second."""
        self._ended.wait(timeout=1)

    def tail(self) -> list[str]:
        """The last lines of the instance."""
        lines = [*self._lines, self._rest] if self._rest else list(self._lines)
        return [line.decode(errors='replace') for line in lines]


class LogCopier:
    """One thread that copies the output of all instances, so that the accept loop never waits for a disk."""

    def __init__(self) -> None:
        self._epoll, self._pipes = select.epoll(), {}
        self.thread = threading.Thread(target=self._run, name='logs', daemon=True)
        self.thread.start()

    def add(self, pipe: LogPipe) -> None:
        self._pipes[pipe.reader] = pipe
        self._epoll.register(pipe.reader, select.EPOLLIN)

    def _run(self):
        while True:
            time.sleep(COPY_PERIOD_S)
            for fd, _ in self._epoll.poll():
                if not self._pipes[fd].copy():
                    # First: between fork and exec a child of ours may hold a copy, and then epoll still reports it.
                    self._epoll.unregister(fd)
                    self._pipes.pop(fd).close()
