"""Instance: one container of a revision, from its start to its end; what holds a function's sockets.

Everything here runs in the accept loop's thread and never blocks, but for the methods that say so.
"""

import collections
import concurrent.futures
import contextlib
import os
import socket
import time
import traceback
from typing import NamedTuple

from handlers import injection, protocol
from handlers.container import ContainerError, LogPipe
from handlers.image import signal_number

MOST_CONNECTIONS = 1024  # handed to one instance at a time; more wait in the listener's backlog
MOST_MESSAGES = 256  # of one instance before the others have their turn
MOST_ASKING, PAUSE_S = 64, 0.01  # connections to the control socket in one turn, and how long after so many
SETTLE_S = 0.3  # how long one that is tried may take until it listens on IPv6 as well, or ends
PROBE_S = 5
GRACE_S = 10  # how long a program may finish what it holds before it gets its stop signal
LOOK_S = 0.1
CONTROL, ADOPTED = '/control.sock', 'adopted'  # kinds
CLEAN_EXIT = 'ended with exit code 0'


class StartFailed(Exception):
    """No instance came up; the text is the reason, `log` the instance's own last lines."""

    def __init__(self, reason, log=(), hint=None):
        super().__init__(reason)
        self.log, self.hint = list(log), hint


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
    """A revision on disk: its number, its folder, its image.Spec, and the tree or the layers that the Spec means."""

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


class Program(Instance):
    """An image, or the command of a folder, that serves in one of two ways, found out at its start.

    It connects to /control.sock and is handed a connection each time, or it listens and gets its own `listener`.
    """

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self._injection = self._family = None
        self._asking = collections.deque()  # connections to /control.sock that wait for a descriptor
        self._inside = []  # where it listens, and that does not count
        self._handed, self._signalled, self._deadline = False, None, float('inf')

    @classmethod
    def adopt(cls, pool, revision, container, listener):
        """One that a faasd which is no more has started; it serves `listener`."""
        instance = cls(pool, revision)
        instance.listener, instance.state, instance.kind = listener, 'ready', ADOPTED
        instance.up.set_result(instance)
        instance._container = container
        output = instance._around.containers.output_of(container)
        if output is not None:
            instance._pipe = LogPipe(pool.log, output)
            instance._around.copier.add(instance._pipe)
        instance._around.loop.watch(container.pidfd, instance._exited)
        return instance

    @property
    def serves_itself(self):
        return self.kind is not None and self.kind != CONTROL

    def _start(self, kept, lent):
        number, _, spec, tree = self.revision
        cookie = injection.cookie(self.listener)
        return (self._around.containers.start(self.pool.name, number, spec, tree, self._pipe.writer, cookie=cookie),)

    def _launched(self, container):
        loop = self._around.loop
        loop.watch(container.control.fileno(), self._asked)
        report = lambda *what: loop.call(self._listens, *what)  # noqa: E731
        self._injection = injection.Injection(self.revision.spec, self.listener, report)
        self._around.injector.add(container.notifier, self._injection)
        super()._launched(container)
        if self.state == 'stopping':
            container.kill()

    # Listening by itself

    def _listens(self, how, family, where):
        if how == 'inside':
            if where not in self._inside and len(self._inside) < 10:
                self._inside.append(where)
        elif self.kind is None and self.state == 'starting':
            before, self._family = self._family, family
            if not self.trial:
                self._is_up(f'port {where[1]}')
            elif before is None:
                self._around.loop.later(SETTLE_S, self._settled, where)

    def _settled(self, where):
        """It has not ended just after it began to listen, and what it listens on may have become better."""
        if self.state == 'starting' and self._family == socket.AF_INET:
            self._around.workers.submit(self._probe, where)
        elif self.state == 'starting':
            self._is_up(f'port {where[1]}')

    def _probe(self, where):
        """In a worker thread: does it talk to IPv6 clients, though it made an IPv4 socket?"""
        loop, heard = self._around.loop, None
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as client:
            client.settimeout(PROBE_S)
            client.bind((self._around.gateway, 0))
            end, port = client.getsockname()[0], client.getsockname()[1]
            end = int.from_bytes(socket.inet_pton(socket.AF_INET6, end)[-4:], 'big')
            loop.wait(self.pool.front.probe, end, port)
            client.connect((self.pool.front.ipv6, 80))
            try:
                client.sendall(b'GET / HTTP/1.0\r\nHost: %s.faas\r\n\r\n' % self.pool.name.encode())
                heard = client.recv(65536)
                client.shutdown(socket.SHUT_WR)
                while client.recv(65536):  # to its end, or the server may complain of us
                    pass
            except ConnectionError:
                heard = heard or b''
        loop.call(self._probed, where, heard)

    def _probed(self, where, heard):
        if self.state != 'starting':
            return
        text = f'it listens on {where[0]} port {where[1]}, for IPv4 alone'
        hint = 'let it listen on [::], as --host :: does'
        if heard == b'':
            return self.kill(f'{text}, and closes the connections of IPv6 clients, of which all are', hint)
        self.warning, self.hint = f'{text}: it works, but sees wrong client addresses', hint
        self._is_up(f'port {where[1]}')

    def _not_up(self):
        reason, hint = super()._not_up()
        if not self._inside:
            return f'{reason}: it has neither listened on a port nor connected to {CONTROL}', hint
        places = ', '.join(f'{address} port {port}' for address, port in self._inside)
        wanted = ' or '.join(map(str, injection.candidates(self.revision.spec)))
        hint = f'let it listen on [::], port {wanted}'
        if self.revision.spec.ports:
            hint += ', or name its own port in EXPOSE, or as port in faas.toml'
        return f'{reason}: it listens on {places} only', hint

    # Being handed connections

    def _asked(self):
        """Take in who has connected; one that does so without end is heard again after a pause, not all the time."""
        control = self._container.control
        with contextlib.suppress(BlockingIOError):
            for _ in range(MOST_ASKING):
                asking, _ = control.accept()
                asking.setblocking(False)
                self._asking.append(asking)
                if len(self._asking) > self.most:
                    self._asking.popleft().close()
            self._around.loop.unwatch(control.fileno())
            self._around.loop.later(PAUSE_S, self._ask_again, control)
        if self._asking and self.kind is None and self._family is None:  # the first way counts
            self._injection.enough()
            self._is_up(CONTROL)
        elif self.kind == CONTROL:
            self.pool.flush()

    def _ask_again(self, control):
        if self._container and self._container.control is control:
            self._around.loop.watch(control.fileno(), self._asked)

    def takes(self):
        """True if a connection that is accepted now would be taken at once."""
        return bool(self._asking) and self.kind == CONTROL

    def send(self, connection):
        """Pass `connection` (consumed) to who has asked for the longest time; False if nobody has."""
        while self._asking:
            with self._asking.popleft() as asking, contextlib.suppress(OSError):
                os.fchown(connection.fileno(), self._container.base, -1)  # so that it counts as this instance's
                socket.send_fds(asking, [b'c'], [connection.fileno()])
                connection.close()  # a plain close() there is the end of the connection: we must not hold it open
                self._handed = True
                return True
        return False

    # Its end

    def stop(self, idle_s, within_s):
        """Let it finish what it holds within GRACE_S, send it the stop signal, and kill it after within_s.

        Once more: only within_s can change, and become less.
        """
        now = time.monotonic()
        self._deadline = min(self._deadline, now + within_s)
        if self.state in ('starting', 'ready'):
            self.state = 'stopping'
            self._leave(now)

    def told_s(self):
        """For how long it has had its stop signal; 0 before."""
        return time.monotonic() - self._signalled if self._signalled else 0

    def _leave(self, since):
        if self.state == 'dead' or not self._container:
            return
        now, held = time.monotonic(), self.pool.connections_of(self._container, since)
        if not self._signalled and (held == 0 or now >= since + min(GRACE_S, (self._deadline - since) / 2)):
            number = signal_number(self.revision.spec.stop_signal)
            self._patience_s = self._around.stop_timeout_s if self._container.catches(number) else 0
            self._signalled = now
            self._container.kill(number)
        if now >= self._deadline or (self._signalled and held == 0 and now >= self._signalled + self._patience_s):
            self.kill('did not stop in time')
        self._around.loop.later(LOOK_S, self._leave, since)

    def leave(self):
        """Let it go on without us; a next faasd adopts it."""
        self._around.loop.unwatch(self._container.pidfd)
        self._forget_ways()
        os.close(self._container.pidfd)
        self.state, self._container = 'dead', None
        self.gone.set_result(None)

    def _exited(self):
        self._forget_ways()
        super()._exited()

    def _ended(self, reason):
        if reason == CLEAN_EXIT and self.state == 'starting':
            self.hint = "let it stay in the foreground, as httpd -f and nginx -g 'daemon off;' do"
        super()._ended(reason)

    def _forget_ways(self):
        if self._injection:
            self._around.injector.remove(self._injection)
            self._injection = None
        if self._container.control:
            self._around.loop.unwatch(self._container.control.fileno())
            self._container.control.close()
            self._container.notifier.close()
        while self._asking:
            self._asking.popleft().close()

    def ended_well(self, reason):
        """A program may serve one connection each time, and exit."""
        return self._handed and reason == CLEAN_EXIT


def text_of(message):
    """What a function says of itself, as one printable line."""
    text = message[1:].decode(errors='replace')
    return ''.join(letter if letter.isprintable() else '\ufffd' for letter in text)
