"""Program: an image, or the command of a folder, that serves in a way of its own."""

import collections
import contextlib
import os
import socket
import time

from handlers.containers.logs import LogPipe
from handlers.images.spec import candidates, signal_number
from handlers.serving import injection
from handlers.serving.instance import Instance
from host.sock_diag import cookie

MOST_ASKING, PAUSE_S = 64, 0.01  # connections to the control socket in one turn, and how long after so many
SETTLE_S = 0.3  # how long one that is tried may take until it listens on IPv6 as well, or ends
PROBE_S = 5
GRACE_S = 10  # how long a program may finish what it holds before it gets its stop signal
LOOK_S = 0.1
CONTROL, ADOPTED = '/control.sock', 'adopted'  # kinds
CLEAN_EXIT = 'ended with exit code 0'


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
        start, mine = self._around.containers.start, cookie(self.listener)
        return (start(self.pool.name, number, spec, tree, self._pipe.writer, cookie=mine),)

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
        wanted = ' or '.join(map(str, candidates(self.revision.spec)))
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
