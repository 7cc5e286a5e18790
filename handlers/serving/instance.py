"""Instance: one container of a revision, from its start to its end; what holds a function's sockets.

Everything here runs in the accept loop's thread and never blocks, but for the methods that say so.
"""

import concurrent.futures
import contextlib
import os
import time
import traceback
from typing import NamedTuple

from handlers.containers import protocol
from handlers.containers.containers import ContainerError
from handlers.containers.logs import LogPipe
from host.errors import FaasError

MOST_CONNECTIONS = 1024  # handed to one instance at a time; more wait in the listener's backlog
MOST_MESSAGES = 256  # of one instance before the others have their turn


class StartFailed(FaasError):
    """No instance came up; the text is the reason, `log` the instance's own last lines."""

    status = 422

    def __init__(self, reason, log=(), hint=None):
        super().__init__(reason, hint)
        self.log = list(log)


class Surroundings(NamedTuple):
    """What every pool of a server shares."""

    loop: object  # call(f, *args) and wait(f, *args) from any thread, later(s, f, *args), watch(fd, f), unwatch(fd)
    containers: object  # handlers.container.Containers
    copier: object  # handlers.container.LogCopier
    workers: concurrent.futures.Executor
    emit: object  # emit(area, text, name=, problem=)
    start_timeout_s: float
    injector: object = None  # handlers.injection.Injector
    forget: object = None  # forget(folder): delete the files of a revision. May block
    stop_timeout_s: float = 10
    idle_timeout_s: float = 0  # 0: never
    gateway: str = '::1'  # whose port a probe comes from


class Revision(NamedTuple):
    """A revision on disk: its number, its folder, its specs.Spec, and the tree or the layers that the Spec means."""

    number: int
    folder: str
    spec: object
    tree: str


class Instance:
    """States: starting, ready, stopping, dead."""

    listener = None  # the listening socket (borrowed) that it serves by itself, or may
    warning = hint = None  # for the person who deploys it

    def __init__(self, pool, revision, trial=False):
        self.pool, self.revision, self.trial = pool, revision, trial
        self.state, self.kind = 'starting', None
        self.connections = {}  # number → our duplicate, until the instance is done with it
        self.most = revision.spec.concurrency or MOST_CONNECTIONS
        self.born = time.monotonic()
        self.up = concurrent.futures.Future()  # the instance itself once it is ready, else StartFailed
        self.gone = concurrent.futures.Future()
        self._reason = self._container = self._pipe = None
        self._around = pool.around
        self.start_timeout_s = revision.spec.start_timeout_s or self._around.start_timeout_s

    def begin(self):
        self._around.workers.submit(self._launch)

    def _launch(self):
        """In a worker thread: everything that waits for runc."""
        self.born = time.monotonic()
        try:
            with contextlib.ExitStack() as kept, contextlib.ExitStack() as lent:
                self._pipe = LogPipe(self.pool.log)
                lent.callback(self._pipe.close_writer)
                self._around.copier.add(self._pipe)
                launched = self._start(kept, lent)
                kept.pop_all()
        except Exception as error:
            if self._pipe:
                self._pipe.wait()
            reason = str(error) if isinstance(error, ContainerError) else repr(error)
            self._around.loop.call(self._ended, reason)
        else:
            self._around.loop.call(self._launched, *launched)

    def _launched(self, container):
        self._container = container
        self._around.loop.watch(container.pidfd, self._exited)
        self._around.loop.later(max(0, self.start_timeout_s - self.age_s()), self._check_up)
        if self._reason:
            container.kill()

    def age_s(self):
        return time.monotonic() - self.born

    def _check_up(self):
        if self.state == 'starting':
            self.kill(*self._not_up())

    def _not_up(self):
        limit = 'start_timeout of faas.toml' if self.revision.spec.start_timeout_s else 'FAAS_START_TIMEOUT'
        return f'not ready within {self.start_timeout_s:g} s ({limit})', None

    def kill(self, reason, hint=None):
        """End it now; what it holds is sorted out when its end is seen."""
        if not self._reason:
            self._reason, self.hint = reason, hint
        if self._container:
            self._container.kill()

    def ended_well(self, reason):
        """True if an end for that reason is none that the function should be blamed for."""
        return False

    def _is_up(self, kind):
        self.kind = kind
        if self.state == 'starting':
            self.state = 'ready'
            self.up.set_result(self)
            self.pool.ready(self)

    def _exited(self):
        self._around.loop.unwatch(self._container.pidfd)
        self._around.workers.submit(self._bury, self._container)
        self._container = None  # its pidfd is about to be closed
        orphans, self.connections = list(self.connections.values()), {}
        self.pool.orphaned(orphans)

    def _bury(self, container):
        """In a worker thread: what waits for runc and for the last output."""
        try:
            reason = self._around.containers.remove(container)
        except Exception as error:  # its end must be seen, whatever remains of it
            traceback.print_exc()
            reason = repr(error)
        if self._pipe:
            self._pipe.wait()
        self._around.loop.call(self._ended, self._reason or reason)

    def _ended(self, reason):
        before, self.state = self.state, 'dead'
        if not self.up.done():
            self.up.set_exception(StartFailed(reason, self._pipe.tail() if self._pipe else (), self.hint))
        try:
            self.pool.ended(self, before, reason)
        finally:  # or who removes it would wait for ever
            self.gone.set_result(None)


class Handler(Instance):
    """A handler.py under runtime.py, which is handed each connection by its channel."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._number = 0
        self._channel = None
        self._greeted = self._full = False

    def _start(self, kept, lent):
        ours, theirs = protocol.pair()
        kept.enter_context(ours)
        lent.enter_context(theirs)
        number, _, spec, tree = self.revision
        container = self._around.containers.start(
            self.pool.name, number, spec, tree, self._pipe.writer, channel=theirs.fileno()
        )
        return container, ours

    def _launched(self, container, channel):
        self._channel = channel
        self._around.loop.watch(channel.fileno(), self._read)
        super()._launched(container)
        if self.state == 'stopping':
            self._tell_stop(0)

    def takes(self):
        """True if a connection that is accepted now would be taken at once."""
        return len(self.connections) < self.most

    def stop(self, idle_s, within_s):
        """Let it finish what it holds, close idle connections after idle_s, and kill what remains after within_s."""
        if self.state in ('starting', 'ready'):
            self.state = 'stopping'
            self._tell_stop(idle_s)
        self._around.loop.later(within_s, self.kill, 'did not stop in time')

    def _tell_stop(self, idle_s):
        if self._channel:
            with contextlib.suppress(OSError):
                protocol.send_number(self._channel, protocol.STOP, int(idle_s))

    def send(self, connection):
        """Hand over `connection` (consumed).

        False when the instance takes no more at the moment; the caller keeps it then.
        """
        try:
            protocol.send_connection(self._channel, self._number, connection)
        except BlockingIOError:
            if not self._full:
                self._full = True
                self._around.loop.later(0.005, self._try_again)
            return False
        except OSError:  # it is about to be seen as dead
            return False
        self.connections[self._number] = connection
        self._number += 1
        return True

    def _try_again(self):
        self._full = False
        self.pool.flush()

    def _read(self):
        if not self._hear(MOST_MESSAGES):
            self._around.loop.unwatch(self._channel.fileno())
            self._around.loop.later(1, self.kill, 'closed its channel to faasd')  # most often it is ending by itself

    def _hear(self, most):
        """Take in what the runtime has said; False when it has no more to say."""
        try:
            for _ in range(most):
                message, fd = protocol.receive(self._channel)
                if fd is not None:
                    os.close(fd)
                    return False
                if not message:
                    return False
                self._heard(message[:1], message)
        except BlockingIOError:
            pass
        except (OSError, protocol.ProtocolError):
            return False
        return True

    def _heard(self, kind, message):
        if kind == protocol.DONE and (connection := self.connections.pop(protocol.number_of(message), None)):
            connection.close()
            self.pool.served(self)
        elif kind == protocol.HELLO and not self._greeted:
            if message[1:] != bytes((protocol.VERSION,)):
                raise protocol.ProtocolError('another version')
            self._greeted = True
        elif kind == protocol.READY and self._greeted and self.kind is None:
            self._is_up(text_of(message))
        elif kind == protocol.FAILED and not self._reason:
            self._reason = text_of(message)
        else:
            raise protocol.ProtocolError('not what comes next')

    def _exited(self):
        self._hear(1 << 16)  # what it said last
        self._around.loop.unwatch(self._channel.fileno())
        self._channel.close()
        super()._exited()


def text_of(message):
    """What a function says of itself, as one printable line."""
    text = message[1:].decode(errors='replace')
    return ''.join(letter if letter.isprintable() else '\ufffd' for letter in text)
