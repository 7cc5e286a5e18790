"""Pool: the instances of one function, and which of them gets the next connection.

Everything here runs in the accept loop's thread and never blocks, but for the methods that say so: those are for other
threads.
"""

import collections
import concurrent.futures
import contextlib
import fcntl
import os
import shutil
import socket
import struct
import termios
import time
import traceback
import weakref
from typing import NamedTuple

from handlers import protocol
from handlers.container import ContainerError, LogPipe

MOST_CONNECTIONS = 1024  # handed to one instance at a time; more wait in the listener's backlog
MOST_MESSAGES = 256  # of one instance before the others have their turn
YOUNG_S = 10  # an instance that dies before this age is crashing: the next start waits
FIRST_DELAY_S, LAST_DELAY_S = 0.5, 30
# Of linux/tcp.h.
TCP_ESTABLISHED, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_CLOSE_WAIT = 1, 4, 5, 8
TCP_CONNECTED = (TCP_ESTABLISHED, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_CLOSE_WAIT)
DRAIN_S = 600  # how long a replaced instance may take to finish what it holds
IDLE_S = 30  # how long it keeps idle connections that were kept alive


class StartFailed(Exception):
    """No instance came up; the text is the reason, `log` the instance's own last lines."""

    def __init__(self, reason, log=()):
        super().__init__(reason)
        self.log = list(log)


class Surroundings(NamedTuple):
    """What every pool of a server shares."""

    loop: object  # call(f, *args) and wait(f, *args) from any thread, later(s, f, *args), watch(fd, f), unwatch(fd)
    containers: object  # handlers.container.Containers
    copier: object  # handlers.container.LogCopier
    workers: concurrent.futures.Executor
    emit: object  # emit(area, text, name=, problem=)
    start_timeout_s: float


class Instance:
    """One container of a revision, from its start to its end. States: starting, ready, stopping, dead."""

    def __init__(self, pool, folder, revision):
        self.pool, self.folder, self.revision = pool, folder, revision
        self.state, self.kind = 'starting', None
        self.connections = {}  # number → our duplicate, until the instance is done with it
        self.born = time.monotonic()
        self.up = concurrent.futures.Future()  # the instance itself once it is ready, else StartFailed
        self.gone = concurrent.futures.Future()
        self._number = 0
        self._reason = self._container = self._channel = self._pipe = None
        self._greeted = self._full = False
        self._around = pool.around

    def begin(self):
        self._around.workers.submit(self._launch)

    def _launch(self):
        """In a worker thread: everything that waits for runc."""
        self.born = time.monotonic()
        try:
            with contextlib.ExitStack() as kept, contextlib.ExitStack() as lent:
                ours, theirs = protocol.pair()
                kept.enter_context(ours)
                lent.enter_context(theirs)
                self._pipe = LogPipe(self.pool.log)
                lent.callback(self._pipe.close_writer)
                self._around.copier.add(self._pipe)
                container = self._around.containers.start(
                    self.pool.name, self.revision, self.folder, theirs.fileno(), self._pipe.writer
                )
                kept.pop_all()
        except Exception as error:
            if self._pipe:
                self._pipe.wait()
            reason = str(error) if isinstance(error, ContainerError) else repr(error)
            self._around.loop.call(self._ended, reason)
        else:
            self._around.loop.call(self._launched, container, ours)

    def _launched(self, container, channel):
        self._container, self._channel = container, channel
        self._around.loop.watch(channel.fileno(), self._read)
        self._around.loop.watch(container.pidfd, self._exited)
        self._around.loop.later(max(0, self._around.start_timeout_s - self.age_s()), self._check_up)
        if self.state == 'stopping':
            self._tell_stop(0)
        if self._reason:
            container.kill()

    def age_s(self):
        return time.monotonic() - self.born

    def _check_up(self):
        if self.state == 'starting':
            self.kill(f'not ready within {self._around.start_timeout_s:g} s (FAAS_START_TIMEOUT)')

    def kill(self, reason):
        """End it now; what it holds is sorted out when its end is seen."""
        self._reason = self._reason or reason
        if self._container:
            self._container.kill()

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
            self.kind = text_of(message)
            if self.state == 'starting':
                self.state = 'ready'
                self.up.set_result(self)
                self.pool.ready(self)
        elif kind == protocol.FAILED and not self._reason:
            self._reason = text_of(message)
        else:
            raise protocol.ProtocolError('not what comes next')

    def _exited(self):
        self._hear(1 << 16)  # what it said last
        self._around.loop.unwatch(self._channel.fileno())
        self._around.loop.unwatch(self._container.pidfd)
        self._channel.close()
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
        self._pipe.wait()
        self._around.loop.call(self._ended, self._reason or reason)

    def _ended(self, reason):
        before, self.state = self.state, 'dead'
        if not self.up.done():
            self.up.set_exception(StartFailed(reason, self._pipe.tail() if self._pipe else ()))
        self.pool.ended(self, before, reason)
        self.gone.set_result(None)


class Pool:
    """The instances of one function. At most one serves; replaced ones finish what they hold."""

    def __init__(self, name, log, around):
        self.name, self.log, self.around = name, log, around
        self.revision = self.folder = None
        self.reason = None  # why the last instance ended that should not have
        self.gate = lambda is_open: None  # the listener's: False while nobody could take a connection
        self._serving = self._starting = None
        self._instances, self._replaced = set(), set()  # the folders of revisions that were replaced
        self._pending = collections.deque()  # accepted, and nobody's yet
        self._retried = weakref.WeakSet()  # connections that one instance left untouched when it died
        self._failures, self._not_before, self._closed = 0, 0.0, False

    # For other threads

    def start(self, folder, revision):
        """Blocks until an instance of the revision is ready, and returns it.

        It serves nothing yet. Raises StartFailed.
        """
        instance = Instance(self, folder, revision)
        self.around.loop.call(self._begin, instance)
        return instance.up.result()

    def switch(self, instance):
        """Connections go to `instance` from its return on; the one before finishes what it holds."""
        self.around.loop.wait(self._switch, instance)

    def discard(self, instance):
        """Blocks until an instance that never served is gone."""
        self.around.loop.call(instance.stop, 0, 5)
        instance.gone.result()

    def close(self, within_s):
        """Serve nothing more; a Future that is done when every instance has ended, after within_s at the latest."""
        done = concurrent.futures.Future()
        self.around.loop.call(self._close, within_s, done)
        return done

    def status(self):
        """(status, reason or None) as the API says it."""
        if self.reason is not None:
            return 'crashing', self.reason
        if self._serving and len(self._serving.connections) >= MOST_CONNECTIONS:
            return 'full', f'it serves {MOST_CONNECTIONS} connections, more wait'
        return ('running' if self._serving else 'starting' if self._starting else 'idle'), None

    # In the loop's thread

    def take(self):
        """True if a connection that is accepted now would be handed on at once.

        Otherwise see to it that this changes.
        """
        if self._serving and not self._pending and len(self._serving.connections) < MOST_CONNECTIONS:
            return True
        self.gate(False)
        self._wake()
        return False

    def dispatch(self, connection):
        """Hand an accepted connection (consumed) to the serving instance, or keep it until one can take it."""
        if self._pending or not self._serving or not self._serving.send(connection):
            self._pending.append(connection)
            self._wake()

    def flush(self):
        while self._pending and self._serving and self._serving.send(self._pending[0]):
            self._pending.popleft()
        if self._serving and not self._pending and not self._closed:
            self.gate(True)

    def _begin(self, instance):
        self._instances.add(instance)
        if self._closed:
            instance._ended('it is being shut down')
        else:
            instance.begin()

    def _wake(self):
        """Start an instance if there is none and none is on its way, not before the delay after a crash is over."""
        if self._serving or self._starting or self._closed or self.folder is None:
            return
        wait_s = self._not_before - time.monotonic()
        if wait_s > 0:
            return self.around.loop.later(wait_s, self._retry)
        self._starting = Instance(self, self.folder, self.revision)
        self._begin(self._starting)

    def _retry(self):
        if self._pending:
            self._wake()
        elif not self._serving and not self._starting and not self._closed:
            self.gate(True)  # who waits in the backlog, or comes next, starts it

    def ready(self, instance):
        if instance is self._starting:
            self._switch(instance)

    def _switch(self, instance):
        if self.revision is not None and instance.revision < self.revision:  # a later deploy was faster
            self._replaced.add(instance.folder)
            return instance.stop(0, DRAIN_S)
        for other in (self._serving, self._starting):
            if other not in (None, instance):
                other.stop(IDLE_S, DRAIN_S)
        self._serving, self._starting = instance, None
        if self.folder not in (None, instance.folder):
            self._replaced.add(self.folder)
        self.revision, self.folder = instance.revision, instance.folder
        self._forget_replaced()
        if instance.state == 'dead':  # between its readiness and this call
            self._serving = None
            self.gate(True)
        self.around.loop.later(YOUNG_S, self._grown, instance)
        self.flush()

    def _forget_replaced(self):
        """Delete the files of replaced revisions, unless an instance that finishes its work needs them."""
        for folder in self._replaced - {instance.folder for instance in self._instances}:
            self._replaced.discard(folder)
            self.around.workers.submit(shutil.rmtree, folder, ignore_errors=True)

    def _grown(self, instance):
        if instance is self._serving:
            self._failures, self.reason = 0, None

    def served(self, instance):
        if instance is self._serving and (self._pending or len(instance.connections) == MOST_CONNECTIONS - 1):
            self.flush()

    def orphaned(self, connections):
        """Do right by the clients of an instance that died: what it had not touched goes to the next one, once."""
        for connection in connections:
            received, answered = progress(connection)
            if answered:  # they must not take a part for the whole
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
                connection.close()
            elif received or connection in self._retried:
                with contextlib.suppress(OSError):
                    connection.send(protocol.BAD_GATEWAY, socket.MSG_DONTWAIT)
                    connection.shutdown(socket.SHUT_WR)
                connection.close()
            else:
                self._retried.add(connection)
                self._pending.append(connection)

    def ended(self, instance, before, reason):
        self._instances.discard(instance)
        self._forget_replaced()
        expected = before == 'stopping'
        if instance is self._serving:
            self._serving = None
        if instance is self._starting:
            self._starting = None
        elif before == 'starting':
            expected = True  # a deploy's, which tells the person itself
        if not expected:
            self._failures = self._failures + 1 if instance.age_s() < YOUNG_S else 0
            delay_s = min(LAST_DELAY_S, FIRST_DELAY_S * 2 ** min(self._failures - 1, 10)) if self._failures else 0
            self._not_before = time.monotonic() + delay_s
            self.reason = reason
            self.around.emit(
                'handler',
                f'{self.name}: the instance {reason}' if before == 'ready' else f'{self.name}: {reason}',
                name=self.name,
                problem=True,
            )
        if self._closed:
            self._close_if_done()
        elif not self._serving:
            self._retry()

    def _close(self, within_s, done):
        self._closed = done
        while self._pending:
            self._pending.pop().close()
        for instance in self._instances:
            instance.stop(0, within_s)
        self._close_if_done()

    def _close_if_done(self):
        if not self._instances and not self._closed.done():
            self._closed.set_result(None)


def text_of(message):
    """What a function says of itself, as one printable line."""
    text = message[1:].decode(errors='replace')
    return ''.join(letter if letter.isprintable() else '\ufffd' for letter in text)


def progress(connection):
    """(anything was read from it, anything was written to it) by whoever held it: the kernel's TCP_INFO knows.

    struct tcp_info of linux/tcp.h: tcpi_bytes_received at 128, tcpi_notsent_bytes at 144, tcpi_bytes_sent at 200.
    """
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    if info[0] not in TCP_CONNECTED:  # it was reset, or turned into something else: nobody waits any more
        return True, True
    (unread,) = struct.unpack('i', fcntl.ioctl(connection, termios.FIONREAD, b'\0' * 4))
    (received,) = struct.unpack_from('Q', info, 128)
    (notsent,) = struct.unpack_from('I', info, 144)
    (sent,) = struct.unpack_from('Q', info, 200)
    half_closed = info[0] == TCP_CLOSE_WAIT  # the FIN counts as one byte
    return received - unread - half_closed > 0, sent + notsent > 0
