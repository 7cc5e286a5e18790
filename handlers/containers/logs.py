"""What instances print: a bounded log for each function, and the thread that copies into it."""

import collections
import contextlib
import os
import select
import threading
import time

LOG_LIMIT = 1 << 20  # bytes; one older file of that size is kept
TAIL_LINES = 20
LINE_LIMIT = 4096
PAUSE_S = 0.01  # between two turns of the copier: a function that floods its log gets a pipe's worth for each


class Log:
    """The output of a function's instances, in a file of bounded size."""

    def __init__(self, path):
        self.path = path
        self._lock = threading.Lock()

    def append(self, data):
        """Write as the instance did; what the disk refuses is lost, not the instance."""
        with self._lock, contextlib.suppress(OSError):
            with open(self.path, 'ab') as file:
                file.write(data)
                full = file.tell() >= LOG_LIMIT
            if full:
                os.replace(self.path, f'{self.path}.1')

    def last(self, lines):
        """The last `lines` lines as bytes."""
        data = b''
        for path in (f'{self.path}.1', self.path):
            with contextlib.suppress(OSError), open(path, 'rb') as file:
                data += file.read(2 * LOG_LIMIT)
        return b''.join(data.splitlines(keepends=True)[-lines:]) if lines else b''


class LogPipe:
    """One instance's stdout and stderr on their way into a Log."""

    def __init__(self, log, reader=None):
        """A new pipe, or the `reader` (consumed) of one whose instance was started by a faasd that is no more."""
        self._log, self._lines, self._rest = log, collections.deque(maxlen=TAIL_LINES), b''
        self._ended = threading.Event()
        self.reader, self.writer = reader, None
        if reader is None:
            self.reader, writer = os.pipe2(os.O_CLOEXEC)
            # The instance gets an end for both: should faasd die, it has a reader all the same, and no write fails.
            self.writer = os.open(f'/proc/self/fd/{writer}', os.O_RDWR | os.O_CLOEXEC)
            os.close(writer)
        os.set_blocking(self.reader, False)

    def close_writer(self):
        """Let go of our copy of the writing end: the instance has its own."""
        os.close(self.writer)

    def copy(self):
        """Move what is there; False at the end."""
        try:
            data = os.read(self.reader, 65536)
        except BlockingIOError:
            return True
        if not data:
            return False
        self._log.append(data)
        *lines, self._rest = (self._rest + data).split(b'\n')
        self._lines.extend(line[:LINE_LIMIT] for line in lines)
        self._rest = self._rest[-LINE_LIMIT:]
        return True

    def close(self):
        os.close(self.reader)
        self._ended.set()

    def wait(self):
        """Return when all was copied that an instance wrote before its end; a second at most."""
        self._ended.wait(timeout=1)

    def tail(self):
        """The instance's last lines as text."""
        lines = [*self._lines, self._rest] if self._rest else list(self._lines)
        return [line.decode(errors='replace') for line in lines]


class LogCopier:
    """One thread that copies every instance's output, so that a busy accept loop never waits for a disk."""

    def __init__(self):
        self._epoll, self._pipes = select.epoll(), {}
        threading.Thread(target=self._run, name='logs', daemon=True).start()

    def add(self, pipe):
        self._pipes[pipe.reader] = pipe
        self._epoll.register(pipe.reader, select.EPOLLIN)

    def _run(self):
        while True:
            time.sleep(PAUSE_S)
            for fd, _ in self._epoll.poll():
                if not self._pipes[fd].copy():
                    # Before it is closed: a child of ours may hold a copy between fork and exec, and epoll would go on.
                    self._epoll.unregister(fd)
                    self._pipes.pop(fd).close()
