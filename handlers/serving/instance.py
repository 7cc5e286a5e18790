"""Instance: one container of a revision, from its start to its end; what holds a function's sockets.

Everything here runs in the loop's thread and never blocks, but for the methods that say so.
"""

import concurrent.futures
import contextlib
import enum
import resource
import socket
import time
import traceback
from collections.abc import Callable, Iterable
from typing import NamedTuple

from handlers.containers import protocol
from handlers.containers.containers import AT_LIMIT, OUT_OF_MEMORY, Container, ContainerError
from handlers.containers.logs import LogPipe
from handlers.serving.injection import Inside
from host.errors import FaasError

INSTANCE_MAX_CONNECTIONS = 1024  # handed to one instance at a time; more wait in the listener's backlog
MESSAGES_PER_TURN = 256  # of one instance before the others have their turn
MOST_CONNECTIONS = 16384  # the same, whatever the function's concurrency is and however many descriptors there are
INSTANCE_DESCRIPTORS = 8  # of faasd for an instance, beside its connections: pidfd, channel, log …
FULL_CHANNEL_RETRY_S = 0.005
CLIENT_POLL_S = 0.2  # how often a deploy that takes long is asked whether anybody waits for it
CLOSED_CHANNEL_MAX_S = 1  # how long an instance may live without a channel: most often it is ending by itself


class StartFailed(FaasError):
    """No instance came up; the text is the reason, `log` the instance's own last lines."""

    status = 422

    def __init__(self, reason: str, log: Iterable[str] = (), hint: str | None = None) -> None:
        super().__init__(reason, hint)
        self.log = list(log)


class TransitionError(RuntimeError):
    """An instance cannot go from the one state to the other: a fault in this program."""


class InstanceState(enum.Enum):
    """STARTING until it can serve; DRAINING once new connections go elsewhere, while it takes what waits for it.

    STOPPING once it was told to end. DEAD when it has ended, or is no longer this program's.
    """

    STARTING = 'starting'
    READY = 'ready'
    DRAINING = 'draining'
    STOPPING = 'stopping'
    DEAD = 'dead'


TRANSITIONS = {
    InstanceState.STARTING: {InstanceState.READY, InstanceState.STOPPING, InstanceState.DEAD},
    InstanceState.READY: {InstanceState.DRAINING, InstanceState.STOPPING, InstanceState.DEAD},
    InstanceState.DRAINING: {InstanceState.STOPPING, InstanceState.DEAD},
    InstanceState.STOPPING: {InstanceState.DEAD},
    InstanceState.DEAD: set(),
}


class ServingMode(enum.Enum):
    """How an instance gets its connections."""

    HANDLER = 'handler'  # we accept and hand each over by the channel of runtime.py
    CONTROL = 'control'  # we accept and hand one to whoever has connected to /control.sock
    LISTENING = 'listening'  # it accepts by itself at the listener that its listen() was answered with
    ADOPTED = 'adopted'  # LISTENING, started by a faasd that is no more: nobody answers its listen() now


class Surroundings(NamedTuple):
    """What every pool of a server shares."""

    loop: object  # call(f, *args) and wait(f, *args) from any thread, later(s, f, *args), watch(fd, f), unwatch(fd)
    containers: object  # handlers.containers.containers.Containers
    copier: object  # handlers.containers.logs.LogCopier
    workers: concurrent.futures.Executor
    emit: Callable  # emit(area, text, name=, problem=)
    start_timeout_s: float
    injector: object  # handlers.serving.injection.Injector
    apart: object  # handlers.serving.apart.Apart
    forget: Callable[[str], object] | None = None  # forget(folder): delete the files of a revision. May block
    stop_timeout_s: float = 10
    idle_timeout_s: float = 0  # 0: never
    gateway: str = '::1'  # whose port a probe comes from
    guarded: bool = True  # no function can make close() of a connection wait
    clock: Callable[[], float] = time.monotonic
    most_connections: int = MOST_CONNECTIONS  # that an instance may have, whatever its concurrency is


class Revision(NamedTuple):
    """A revision on disk: its number, its folder, its specs.Spec, and the tree or the layers that the Spec means."""

    number: int
    folder: str
    spec: object
    tree: str


class Instance:
    """What every kind of instance has in common. `pool` is told what happens to it."""

    warning: str | None = None  # for the person who deploys it
    hint: str | None = None

    def __init__(self, pool: object, revision: Revision, trial: bool = False) -> None:
        self.pool, self.revision, self.trial = pool, revision, trial
        self.state = InstanceState.STARTING
        self.mode: ServingMode | None = None  # None until it is known
        self.description: str | None = None  # the same in words, for a person
        self.has_listener = False  # it can do to `listener` what we can
        self.listener: socket.socket | None = None  # borrowed: where it listens by itself, or may
        self.connections: dict[int, socket.socket] = {}  # our duplicates, until the instance is done with each
        asked, most = revision.spec.concurrency, pool.around.most_connections
        self.max_connections = min(asked or INSTANCE_MAX_CONNECTIONS, most)
        if asked and asked > most:
            self.warning = f'concurrency is {most}: an instance may not have {asked} connections on this server'
            self.hint = f'faasd may have {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} descriptors for all functions'
        self.up = concurrent.futures.Future()  # the instance itself once it is ready, else StartFailed
        self.gone = concurrent.futures.Future()
        self._around = pool.around
        self._born = self._around.clock()
        self._reason = self._container = self._pipe = None
        self._listens: Inside | None = None  # answers its listen() calls
        self._start_timeout_s = revision.spec.start_timeout_s or self._around.start_timeout_s

    def __repr__(self) -> str:
        return f'<{type(self).__name__} of revision {self.revision.number}, {self.state.value}>'

    def become(self, state: InstanceState) -> None:
        """Change the state. Raises TransitionError."""
        if state not in TRANSITIONS[self.state]:
            raise TransitionError(f'{self!r} cannot become {state.value}')
        self.state = state

    @property
    def listens_itself(self) -> bool:
        """True if the kernel connects clients to it, and nobody else may accept at its listener."""
        return self.mode in (ServingMode.LISTENING, ServingMode.ADOPTED)

    @property
    def can_listen(self) -> bool:
        """True if it needs a listener at its start."""
        return False

    @property
    def must_answer(self) -> str | None:
        """What it is asked before clients come: 'tcp', a path, or None."""
        return None

    def descriptors(self) -> int:
        """How many of faasd's descriptors it takes, about."""
        return INSTANCE_DESCRIPTORS + len(self.connections)

    def use_listener(self, listener: socket.socket) -> None:
        """Serve `listener` (borrowed), should it listen by itself. Before begin()."""
        self.listener = listener

    def takes(self) -> bool:
        """True if a connection that is accepted now would be taken at once."""
        raise NotImplementedError

    def send(self, connection: socket.socket) -> bool:
        """Hand over `connection` (consumed). False when it takes no more at the moment; the caller keeps it then."""
        raise NotImplementedError

    def usage(self) -> dict[str, float | str] | None:
        """What its container uses (see limits.usage), None without one. From any thread."""
        container = self._container
        return self._around.containers.usage(container) if container else None

    def egress_address(self) -> str | None:
        """The address by which others see it, None without egress. From any thread."""
        container = self._container
        return self._around.containers.egress_address(container) if container else None

    def hits(self) -> dict[str, int]:
        """How often it came up against a limit (see limits.hits). From any thread."""
        container = self._container
        return self._around.containers.hits(container.ident) if container else {}

    def changed_mounts(self) -> set[tuple]:
        """See Private.changed(); nothing of one that does not serve. From any thread."""
        container = self._container
        if container is None or self.state != InstanceState.READY:
            return set()
        return self._around.containers.private.changed(self.revision.spec, container.pid)

    def stop(self, idle_s: float, within_s: float) -> None:
        """Let it finish what it holds, close idle connections after idle_s, and kill what remains after within_s."""
        raise NotImplementedError

    def told_s(self) -> float:
        """For how long it has known that it is to end."""
        return 0

    def ended_well(self, reason: str) -> bool:
        """True if an end for that reason is none that the function should be blamed for."""
        return False

    def begin(self) -> None:
        """Start it."""
        self._around.workers.submit(self._launch)

    def wait_up(self, is_wanted: Callable[[], bool]) -> bool:
        """Blocks until it is ready: True. False when it is wanted no more. Raises StartFailed."""
        while True:
            try:
                self.up.result(CLIENT_POLL_S)
                return True
            except concurrent.futures.TimeoutError:
                if not is_wanted():
                    return False

    def fail(self, reason: str) -> None:
        """End it before begin()."""
        self._ended(reason)

    def drain(self) -> None:
        """New connections go elsewhere; it takes what waits for it."""
        if self.state == InstanceState.READY:
            self.become(InstanceState.DRAINING)

    def _close(self, owned):
        """Close what the instance has shared or sent. From any thread."""
        if not self._around.apart.close(self.pool.name, owned):
            self._around.loop.call(self.kill, 'keeps faasd waiting at close() of its sockets')

    def _close_connection(self, connection):
        if self._around.guarded:
            connection.close()
        else:
            self._close(connection)

    def _launch(self):
        """In a worker thread: everything that waits for runc."""
        self._born = self._around.clock()
        try:
            with contextlib.ExitStack() as kept, contextlib.ExitStack() as lent:
                self._pipe = LogPipe(self.pool.log, no_egress=self._no_egress())
                lent.callback(self._pipe.close_writer)
                self._around.copier.add(self._pipe)
                launched = self._start(kept, lent)
                kept.pop_all()
        except Exception as error:
            if self._pipe:
                self._pipe.wait()
            reason = str(error) if isinstance(error, ContainerError) else repr(error)
            self.hint = getattr(error, 'hint', None)
            self._around.loop.call(self._ended, reason)
        else:
            self._around.loop.call(self._launched, *launched)

    def _no_egress(self):
        """What to say if it tries to reach something, None if it may."""
        name = self.pool.name
        text = f'{name} may reach nothing: faas config {name} --set egress=internet, or functions, host:PORT, NAME:PORT'
        return None if self.revision.spec.settings.get('egress') else text

    def _launched(self, container):
        self._container = container
        if container.notifier:
            self._listens = self._make_listens()
            self._around.injector.add(container.notifier, self._listens)
        self._around.loop.watch(container.pidfd, self._exited)
        self._around.loop.later(max(0, self._start_timeout_s - self.age_s()), self._check_up)
        if self._reason:
            container.kill()

    def _make_listens(self):
        return Inside(self.pool.name, self._close)

    def _end_listens(self):
        if self._listens:
            self._around.injector.remove(self._listens)
            self._listens = None

    def age_s(self) -> float:
        return self._around.clock() - self._born

    def _check_up(self):
        if self.state == InstanceState.STARTING:
            self.kill(*self._not_up())

    def _not_up(self):
        limit = 'its start_timeout' if self.revision.spec.start_timeout_s else 'FAAS_START_TIMEOUT'
        return f'not ready within {self._start_timeout_s:g} s ({limit})', None

    def kill(self, reason: str, hint: str | None = None) -> None:
        """End it now; what it holds is sorted out when its end is seen."""
        if not self._reason:
            self._reason, self.hint = reason, hint
        if self._container:
            self._container.kill()

    def _is_up(self, mode, description):
        self.mode, self.description = mode, description
        if self.state == InstanceState.STARTING:
            self.become(InstanceState.READY)
            self.up.set_result(self)
            self.pool.ready(self)

    def _exited(self):
        self._end_listens()
        self._around.loop.unwatch(self._container.pidfd)
        self._around.workers.submit(self._bury, self._container)
        self._container = None  # its pidfd is about to be closed
        orphans, self.connections = list(self.connections.values()), {}
        self.pool.orphaned(orphans)

    def _bury(self, container: Container):
        """In a worker thread: what waits for runc and for the last output."""
        try:
            reason = self._around.containers.remove(container)
            _, at_limit, names = reason.partition(AT_LIMIT)
            if at_limit:
                self._reason = self._reason and f'{self._reason}{at_limit}{names}'
                self.hint = f"raise it by 'faas config {self.pool.name} --set', or --memory and --pids of 'faas new'"
            if reason.startswith(OUT_OF_MEMORY):
                self.hint = f'raise it: faas config {self.pool.name} --set memory={2 * container.memory >> 20}M'
        except Exception as error:  # its end must be seen, whatever remains of it
            traceback.print_exc()
            reason = repr(error)
        if self._pipe:
            self._pipe.wait()
        self._around.loop.call(self._ended, self._reason or reason)

    def _ended(self, reason):
        before = self.state
        self.become(InstanceState.DEAD)
        if self._pipe and self._pipe.tries_to_reach and not self.hint:
            self.hint = f'say what it may reach, such as --egress internet: {self.pool.name} may reach nothing'
        if not self.up.done():
            self.up.set_exception(StartFailed(reason, self._pipe.tail() if self._pipe else (), self.hint))
        try:
            self.pool.ended(self, before, reason)
        finally:  # or who removes it would wait for ever
            self.gone.set_result(None)


class Handler(Instance):
    """A handler.py under runtime.py, which is handed each connection by its channel."""

    def __init__(self, pool: object, revision: Revision, trial: bool = False) -> None:
        super().__init__(pool, revision, trial)
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
        if self.state == InstanceState.STOPPING:
            self._tell_stop(0)

    def takes(self) -> bool:
        return len(self.connections) < self.max_connections

    def stop(self, idle_s: float, within_s: float) -> None:
        if InstanceState.STOPPING in TRANSITIONS[self.state]:
            self.become(InstanceState.STOPPING)
            self._tell_stop(idle_s)
        self._around.loop.later(within_s, self.kill, 'did not stop in time')

    def _tell_stop(self, idle_s):
        if self._channel:
            with contextlib.suppress(OSError):
                protocol.send_number(self._channel, protocol.STOP, int(idle_s))

    def send(self, connection: socket.socket) -> bool:
        try:
            protocol.send_connection(self._channel, self._number, connection)
        except BlockingIOError:
            if not self._full:
                self._full = True
                self._around.loop.later(FULL_CHANNEL_RETRY_S, self._try_again)
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
        if not self._hear(MESSAGES_PER_TURN):
            self._around.loop.unwatch(self._channel.fileno())
            self._around.loop.later(CLOSED_CHANNEL_MAX_S, self.kill, 'closed its channel to faasd')

    def _hear(self, most):
        """Take in what the runtime has said; False when it has no more to say."""
        try:
            for _ in range(most):
                message = protocol.hear(self._channel)
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
            self._close_connection(connection)
            self.pool.served(self)
        elif kind == protocol.HELLO and not self._greeted:
            if message[1:] != bytes((protocol.VERSION,)):
                raise protocol.ProtocolError('another version')
            self._greeted = True
        elif kind == protocol.READY and self._greeted and self.mode is None:
            self._is_up(ServingMode.HANDLER, text_of(message))
        elif kind == protocol.FAILED and not self._reason:
            self._reason = text_of(message)
        else:
            raise protocol.ProtocolError('not what comes next')

    def _exited(self):
        self._hear(1 << 16)  # what it said last
        self._around.loop.unwatch(self._channel.fileno())
        self._close(self._channel)
        super()._exited()


def text_of(message: bytes) -> str:
    """What a function says of itself, as one printable line."""
    text = message[1:].decode(errors='replace')
    return ''.join(letter if letter.isprintable() else '\ufffd' for letter in text)
