"""Program: an image, or the command of a folder, that serves in a way of its own."""

import collections
import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterable

from handlers.containers.containers import Container
from handlers.containers.logs import LogPipe
from handlers.images.spec import candidates, signal_number
from handlers.serving import injection, probe
from handlers.serving.apart import is_empty
from handlers.serving.healthcheck import MOST_S, Healthcheck, checked
from handlers.serving.instance import TRANSITIONS, Handler, Instance, InstanceState, Revision, ServingMode
from host.sock_diag import cookie

CONTROL_ACCEPTS_PER_TURN, CONTROL_FLOOD_PAUSE_S = 64, 0.01  # of connections to the control socket
ASKING_PART = 16  # of the connections that an instance may have: so many may wait for one at the control socket
CONTROL_ERROR_PAUSE_S = 0.1  # out of descriptors: others get the time to close some
IPV6_OPTIONS = {  # a program → what makes it listen on IPv6
    'gunicorn': '--bind [::]:80 does',
    'jupyter': '--ip=:: does',
    'haproxy': 'bind [::]:80 does',
    'next': 'HOSTNAME=:: does',
    'http.server': '--bind :: does',
    'hypercorn': '--bind [::]:80 does',
    'nginx': 'listen [::]:80; does',
}
NOT_HTTP = {21, 22, 25, 53, 110, 143, 465, 587, 993, 995, 1883, 3306, 5432, 5672, 6379, 9092, 11211, 27017}
LOG_S = 0.1  # how long the line about a request may take to its log
SETTLE_S = 0.3  # how long one that is tried may take until it listens on IPv6 as well, or ends
PROBE_TIMEOUT_S = 5  # for the whole of it
UNSIGNALLED_MAX_S = 10  # how long a program may finish what it holds before it gets its stop signal
SIGNALLED_MIN_S = 2  # how long it has after the signal, if there is twice as much time
STOP_POLL_S = 0.1
READY_POLL_S = 0.1  # how often one that listens is asked whether it is ready
CONTROL_PATH = '/control.sock'
CLEAN_EXIT = 'ended with exit code 0'


def ipv6_hint(args: Iterable[str]) -> str:
    """How that program is told to listen on IPv6."""
    words = ' '.join(args)
    known = next((how for name, how in IPV6_OPTIONS.items() if name in words), '--host :: does')
    return f'let it listen on [::], as {known}'


class Program(Instance):
    """An image, or the command of a folder, that serves in one of two ways, found out at its start.

    It connects to /control.sock and is handed a connection each time, or it listens and gets its own `listener`.
    """

    def __init__(self, pool: object, revision: Revision, trial: bool = False) -> None:
        super().__init__(pool, revision, trial)
        self._family = None
        self._asking = collections.deque()  # connections to /control.sock that wait for a descriptor
        self._inside = []  # where it listens, and that does not count
        self._healthcheck: Healthcheck | None = None
        self._where = None  # where it listens, once it does
        self._answered, self._said = False, None  # whether it is ready, else what it answered
        self._handed, self._signalled, self._deadline = False, None, float('inf')
        self._patience_s = 0.0  # how long it has after the signal before it may be killed

    @classmethod
    def adopt(cls, pool: object, revision: Revision, container: Container, listener: socket.socket) -> 'Program':
        """One that a faasd which is no more has started; it serves `listener` (borrowed)."""
        instance = cls(pool, revision)
        instance.use_listener(listener)
        instance.become(InstanceState.READY)
        instance.mode, instance.description = ServingMode.ADOPTED, 'adopted'
        instance.up.set_result(instance)
        instance._container = container
        output = instance._around.containers.output_of(container)
        if output is not None:
            instance._pipe = LogPipe(pool.log, output)
            instance._around.copier.add(instance._pipe)
        instance._around.loop.watch(container.pidfd, instance._exited)
        return instance

    @property
    def can_listen(self) -> bool:
        return True

    def _start(self, kept, lent):
        number, _, spec, tree = self.revision
        start, mine = self._around.containers.start, cookie(self.listener)
        return (start(self.pool.name, number, spec, tree, self._pipe.writer, cookie=mine),)

    def _launched(self, container):
        super()._launched(container)
        self._around.loop.watch(container.control.fileno(), self._asked)
        if self.state == InstanceState.STOPPING:
            container.kill()

    def _make_listens(self):
        report = lambda *what: self._around.loop.call(self._listened, *what)  # noqa: E731
        return injection.Injection(self.pool.name, self._close, self.revision.spec, self.listener, report)

    # Listening by itself

    def _listened(self, how, family, where):
        self.has_listener |= how == 'injected'
        if how == 'inside':
            if where not in self._inside and len(self._inside) < 10:
                self._inside.append(where)
        elif self.mode is None and self.state == InstanceState.STARTING:
            before, self._family = self._family, family
            if not self.trial and not self.must_answer:
                self._is_up(ServingMode.LISTENING, self._port(where[1]))
            elif before is None:
                self._around.loop.later(SETTLE_S if self.trial else 0, self._settled, where)

    def _settled(self, where):
        """It has not ended just after it began to listen, and what it listens on may have become better."""
        if self.state != InstanceState.STARTING or not self._container:
            return
        self._where = where
        if self.must_answer and not self._answered:
            if not self._around.apart.call(self.pool.name, self._ask, where, within_s=MOST_S):
                self.kill('keeps faasd waiting')
        elif self.trial and self._family == socket.AF_INET and where[1] not in NOT_HTTP:
            if not self._around.apart.call(self.pool.name, self._probe, where):
                self.kill('keeps faasd waiting')
        else:
            self._is_up(ServingMode.LISTENING, self._port(where[1]))

    def _is_up(self, mode, description):
        super()._is_up(mode, description)
        check = self.revision.spec.healthcheck
        if check and not self.pool.is_unchecked(self.revision):
            self._healthcheck = Healthcheck(self._around, self.pool.name, self._container, check, self._fails)

    def _fails(self, reason):
        if self.state == InstanceState.READY:
            self.kill(reason)

    def _check_up(self):
        """One that listens, and never passes its HEALTHCHECK, may be right: inside, nothing listens at its port."""
        if self.state == InstanceState.STARTING and self.must_answer == 'HEALTHCHECK' and self._where:
            said = self._said or 'no answer'
            self.warning = f'its HEALTHCHECK does not pass ({said}), and is not looked at: it cannot reach its own port'
            self.hint = 'let it ask by curl or wget for http://localhost/…, or say what to ask: ready = "/path"'
            self.pool.uncheck(self.revision)
            self._is_up(ServingMode.LISTENING, self._port(self._where[1]))
        else:
            super()._check_up()

    @property
    def must_answer(self) -> str | None:
        spec = self.revision.spec
        checks = spec.healthcheck and not self.pool.is_unchecked(self.revision)
        return spec.settings.get('ready') or ('HEALTHCHECK' if checks else None)

    def _ask(self, where):
        """In a thread of its own: does it answer as one that is ready does?"""
        said, container = 'no connection', self._container
        if container is None:  # it has ended
            return
        if self.must_answer == 'HEALTHCHECK':
            said = checked(self._around, container, self.revision.spec.healthcheck)
            self._around.loop.call(self._asked_it, where, said)
            return
        with contextlib.suppress(OSError), self._client() as client:
            said = probe.readiness(client, self.pool.name, self.must_answer, PROBE_TIMEOUT_S)
        self._around.loop.call(self._asked_it, where, said)

    def _asked_it(self, where, said):
        self._answered, self._said = said is None, said
        self._around.loop.later(0 if self._answered else READY_POLL_S, self._settled, where)

    def _client(self):
        """A connection to the instance, whoever serves the address. Raises OSError."""
        client = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        try:
            client.settimeout(PROBE_TIMEOUT_S)
            client.bind((self._around.gateway, 0))
            end, port = client.getsockname()[0], client.getsockname()[1]
            end = int.from_bytes(socket.inet_pton(socket.AF_INET6, end)[-4:], 'big')
            client.connect((self._around.loop.wait(self.pool.steer_probe, self, end, port), 80))
            return client
        except BaseException:
            client.close()
            raise

    def _port(self, port):
        """'port 8000', or of several that the image names: 'port 80 → 8000 (of 8000, 9000)'."""
        ports = self.revision.spec.ports
        return f'port {port}' if len(ports) < 2 else f'port 80 → {port} (of {", ".join(map(str, ports[:9]))})'

    def _probe(self, where):
        """In a thread of its own: does it talk to IPv6 clients, though it made an IPv4 socket?"""
        heard = None
        with contextlib.suppress(OSError), self._client() as client:
            heard = probe.ask(client, self.pool.name, PROBE_TIMEOUT_S)
        self._around.loop.call(self._probed, where, heard)

    def _probed(self, where, heard):
        if self.state != InstanceState.STARTING:
            return
        text = f'it listens on {where[0]} port {where[1]}, for IPv4 alone'
        hint = ipv6_hint(self.revision.spec.args)
        if heard == b'':
            return self.kill(f'{text}, and closes the connections of IPv6 clients, of which all are', hint)
        self._around.loop.later(LOG_S, self._judge, where, text, hint)

    def _judge(self, where, text, hint):
        """Its log may show that it saw the address of the probe."""
        if self.state != InstanceState.STARTING:
            return
        right = {self._around.gateway, ipaddress.ip_address(self._around.gateway).exploded}
        if not any(address in line for line in self._pipe.tail() for address in right):
            self.warning, self.hint = f'{text}: it works, but may see wrong client addresses', hint
        self._is_up(ServingMode.LISTENING, self._port(where[1]))

    def _not_up(self):
        reason, hint = super()._not_up()
        if self._said:
            return f'{reason}: it listens, and its readiness ({self.must_answer}) got: {self._said}', hint
        if not self._inside:
            return f'{reason}: it has neither listened on a port nor connected to {CONTROL_PATH}', hint
        places = ', '.join(f'{address} port {port}' for address, port in self._inside)
        wanted = ' or '.join(map(str, candidates(self.revision.spec)))
        hint = f'let it listen on [::], port {wanted}'
        if self.revision.spec.ports:
            hint += ', or name its own port in EXPOSE, or as port in faas.toml'
        return f'{reason}: it listens on {places} only', hint

    # Being handed connections

    def _asked(self):
        """Take in who has connected; one that does so without end is heard again after a pause, not all the time."""
        control, pause_s = self._container.control, CONTROL_FLOOD_PAUSE_S
        try:
            for _ in range(CONTROL_ACCEPTS_PER_TURN):
                asking, _ = control.accept()
                asking.setblocking(False)
                self._asking.append(asking)
                if len(self._asking) > min(self.max_connections, max(1, self._around.most_connections // ASKING_PART)):
                    self._close_asking(self._asking.popleft())
        except BlockingIOError:
            pause_s = None
        except OSError:  # out of descriptors
            pause_s = CONTROL_ERROR_PAUSE_S
        if pause_s is not None:
            self._around.loop.unwatch(control.fileno())
            self._around.loop.later(pause_s, self._ask_again, control)
        if self._asking and self.mode is None and self._listens.enough():  # the first way counts
            self._is_up(ServingMode.CONTROL, CONTROL_PATH)
        elif self.mode == ServingMode.CONTROL:
            self.pool.flush()

    def _ask_again(self, control):
        if self._container and self._container.control is control:
            self._around.loop.watch(control.fileno(), self._asked)

    def descriptors(self) -> int:
        return super().descriptors() + len(self._asking)

    def takes(self) -> bool:
        return bool(self._asking) and self.mode == ServingMode.CONTROL

    def send(self, connection: socket.socket) -> bool:
        """Pass `connection` (consumed) to who has asked for the longest time; False if nobody has."""
        while self._asking:
            asking = self._asking.popleft()
            try:
                os.fchown(connection.fileno(), self._container.base, -1)  # so that it counts as this instance's
                socket.send_fds(asking, [b'c'], [connection.fileno()])
                # A plain close() there is the end of the connection: we must not hold it open.
                self._close_connection(connection)
                self._handed = True
                return True
            except OSError:
                pass
            finally:
                self._close_asking(asking)
        return False

    def _close_asking(self, asking):
        if is_empty(asking):
            asking.close()
        else:
            self._close(asking)

    # Its end

    def stop(self, idle_s: float, within_s: float) -> None:
        """Let it finish what it holds within UNSIGNALLED_MAX_S, send it the stop signal, kill it after within_s.

        Calling it again can only shorten `within_s`.
        """
        now = self._around.clock()
        self._deadline = min(self._deadline, now + within_s)
        if InstanceState.STOPPING in TRANSITIONS[self.state]:
            self.become(InstanceState.STOPPING)
            self._poll_end(now)

    def told_s(self) -> float:
        """For how long it has had its stop signal; 0 before."""
        return self._around.clock() - self._signalled if self._signalled is not None else 0

    def _poll_end(self, since):
        if self.state == InstanceState.DEAD or not self._container:
            return
        now, held = self._around.clock(), self.pool.connections_of(self._container, since)
        if self._signalled is None and (held == 0 or now >= since + unsignalled_s(self._deadline - since)):
            number = signal_number(self.revision.spec.stop_signal)
            self._patience_s = self._around.stop_timeout_s if self._container.catches(number) else 0
            self._signalled = now
            self._container.kill(number)
        done = self._signalled is not None and held == 0 and now >= self._signalled + self._patience_s
        if done or now >= self._deadline:
            self.kill('did not stop in time')
        self._around.loop.later(STOP_POLL_S, self._poll_end, since)

    def detach(self) -> bool:
        """Let it go on without us; a next faasd adopts it. False when that cannot be: it has ended, or is about to."""
        if self.state != InstanceState.READY or not self._container:
            return False
        self._around.loop.unwatch(self._container.pidfd)
        self._forget_ways()
        self._container.close()
        self._container = None
        self.become(InstanceState.DEAD)
        self.gone.set_result(None)
        return True

    def _exited(self):
        if self._healthcheck:
            self._healthcheck.end()
        self._forget_ways()
        super()._exited()

    def _ended(self, reason):
        if reason == CLEAN_EXIT and self.state == InstanceState.STARTING:
            self.hint = "let it stay in the foreground, as httpd -f and nginx -g 'daemon off;' do"
        super()._ended(reason)

    def _forget_ways(self):
        self._end_listens()
        if self._container.control:
            self._around.loop.unwatch(self._container.control.fileno())
            self._close(self._container.control)
        while self._asking:
            self._close_asking(self._asking.popleft())

    def ended_well(self, reason: str) -> bool:
        """A program may serve one connection each time, and exit."""
        return self._handed and reason == CLEAN_EXIT


def unsignalled_s(within_s: float) -> float:
    """How much of `within_s` passes before the stop signal, while it holds connections."""
    return min(UNSIGNALLED_MAX_S, max(within_s / 2, within_s - SIGNALLED_MIN_S))


def make_instance(pool: object, revision: Revision, trial: bool = False) -> Instance:
    """An instance of the kind that the revision's spec says."""
    return (Handler if revision.spec.kind == 'handler' else Program)(pool, revision, trial)
