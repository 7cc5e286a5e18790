"""Pool: the instances of one function, and which of them gets the next connection.

Everything here runs in the loop's thread and never blocks, but for the methods that say so: those are for other
threads.
"""

import concurrent.futures
import contextlib
import socket
from collections.abc import Callable

from handlers.containers.bundle import ID_RANGE
from handlers.containers.containers import OUT_OF_MEMORY, Container
from handlers.containers.logs import LOG_LIMIT, Log
from handlers.serving import scaler
from handlers.serving.connection import ConnectionCounts, Waiting
from handlers.serving.instance import Instance, InstanceState, Revision, ServingMode, StartFailed, Surroundings
from handlers.serving.instance_set import InstanceSet
from handlers.serving.listeners import ListenerGroup, migrates
from handlers.serving.program import Program, make_instance
from handlers.serving.rollout import (
    KEEPALIVE_IDLE_S,
    REPLACED_INSTANCE_MAX_S,
    ROLLOUT_POLL_S,
    OwnerError,
    Rollout,
    Trials,
)
from handlers.serving.scaler import Scaler
from handlers.serving.turns import TakesTurns

__all__ = ['Pool', 'Revision', 'StartFailed', 'Surroundings']

LISTENERS = 2  # that a function may have
DISCARDED_INSTANCE_MAX_S = 5  # how long an instance that never served may take to end


class ForOtherThreads:
    """The methods of Pool that block. They are not for the loop's thread."""

    def start(self, revision: Revision, is_wanted: Callable[[], bool] = lambda: True) -> Instance:
        """Blocks until an instance of the Revision is ready, and returns it.

        It serves nothing yet. Raises StartFailed, and ConnectionAbortedError when it is wanted no more.
        """
        instance = self._make(self, revision, True)
        self.around.loop.call(self._try, instance)
        if not instance.wait_up(is_wanted):
            self.discard(instance)
            raise ConnectionAbortedError
        return instance

    def cut_over(self, instance: Instance) -> None:
        """Connections go to `instance` after this; the one before finishes what it holds."""
        self.around.loop.wait(self._cut_over, instance)

    def discard(self, instance: Instance) -> None:
        """Blocks until an instance that never served is gone."""
        self.around.loop.call(self._discard, instance)
        instance.gone.result()


class Pool(ForOtherThreads, TakesTurns):
    """The instances of one function. At most one serves; replaced ones finish what they hold."""

    def __init__(
        self, name: str, log: Log, around: Surroundings, revision: Revision | None = None,
        make: Callable[..., Instance] = make_instance,
    ) -> None:
        """`revision` is the live one, None before the first."""
        self.name, self.log, self.around, self.revision = name, log, around, revision
        self._set_log_limit()
        self.crash_reason: str | None = None  # why the last instance ended that should not have
        self.limit_reason: str | None = None  # which limit an instance of the live revision came up against
        self.instances = InstanceSet(lambda folder: around.workers.submit(around.forget, folder))
        self._make = make
        self._unchecked: str | None = None  # the folder of the last such revision
        self._group: ListenerGroup | None = None
        self._set_accepting: Callable[[bool], None] = lambda accepting: None
        self._serving: Instance | None = None
        self._starting: Instance | None = None  # an instance of the live revision that serves as soon as it is ready
        self._trials = Trials(around)
        self._in_line: set[Instance] = set()  # that wait for the volumes of another
        self._rollout: Rollout | None = None  # the last one that has cut over and drains
        self._waiting = Waiting()
        self._scaler = Scaler(self.idle_timeout_s, around.clock())
        self._closed: concurrent.futures.Future | None = None
        self._counts = ConnectionCounts()

    @property
    def idle_timeout_s(self) -> float:
        """After which time without connections its instance is stopped; 0: never."""
        asked = self.revision.spec.settings.get('idle') if self.revision else None
        return self.around.idle_timeout_s if asked is None else asked

    def uncheck(self, revision: Revision) -> None:
        """The HEALTHCHECK of the revision does not pass where it does its work."""
        self._unchecked = revision.folder

    def is_unchecked(self, revision: Revision) -> bool:
        """True if the HEALTHCHECK of the revision is not looked at."""
        return revision.folder == self._unchecked

    def status(self) -> tuple[str, str | None]:
        """(status, reason or None) as the API says it."""
        serving = self._serving
        if self.crash_reason is not None:
            return 'crashing', self.crash_reason
        if serving and not serving.listens_itself and len(serving.connections) >= serving.max_connections:
            return 'full', f'it serves {serving.max_connections} connections, more wait'
        return ('running' if serving else 'starting' if self._starting else 'idle'), self.limit_reason

    # For the server, in the loop's thread

    def open(
        self, group: ListenerGroup, set_accepting: Callable[[bool], None], adopted: Container | None = None
    ) -> None:
        """Serve what comes to `group` (borrowed), by the `adopted` container if there is one.

        `set_accepting(True)` asks for connections: one take() and one dispatch() for each.
        """
        self._group, self._set_accepting = group, set_accepting
        if adopted:
            # It serves before anything is accepted: else a waiting client would start another at the same listener.
            self._serving = Program.adopt(self, self.revision, adopted, group.current)
            self.instances.add(self._serving)
            self._succeed_adopted()
        else:
            set_accepting(True)

    def take(self) -> bool:
        """True if a connection that is accepted now would be handed on at once.

        Otherwise see to it that this changes.
        """
        if self._serving and not self._waiting and self._serving.takes():
            return True
        self._set_accepting(False)
        self._start_one()
        return False

    def dispatch(self, connection: socket.socket) -> None:
        """Hand an accepted connection (consumed) to the serving instance, or keep it until one can take it."""
        if self._waiting or not self._serving or not self._serving.send(connection):
            self._waiting.append(connection)
            self._start_one()

    def look(self, counts: dict[int, int], counted: float) -> None:
        """Take in how many connections the function's address has, {uid: number}, as of `counted`."""
        self._counts.update(counts, counted)
        serving = self._serving
        if not serving or self._closed:
            return
        if serving.listens_itself:
            with contextlib.suppress(OSError):  # it is looked at again in a second
                self._group.revive()
        if counts or self._waiting or self._group.queued() or serving.connections:
            self._scaler.used(counted)
        elif not self._scaler.wanted(counted, 1, waiting=False) and not self._starting and not self._trials:
            self._scale_to_zero()

    def descriptors(self) -> int:
        """How many of faasd's descriptors the function takes, about."""
        return LISTENERS + len(self._waiting) + sum(instance.descriptors() for instance in self.instances)

    def serves_itself(self) -> bool:
        """True if an instance serves what faasd does not accept."""
        return self._serving is not None and self._serving.listens_itself

    def detach(self) -> bool:
        """Let an instance that listens by itself go on without us, before close(). True if there is one."""
        serving = self._serving
        if not self.serves_itself() or not serving.detach():
            return False
        self._serving = None
        self.instances.remove(serving)
        return True

    def close(self, within_s: float) -> concurrent.futures.Future:
        """Serve nothing more; a Future that is done when every instance has ended, after within_s at the latest."""
        self._closed = self._closed or concurrent.futures.Future()
        self._set_accepting(False)
        self._waiting.close_all()
        serving, drained = self._serving, None
        if self.serves_itself() and self._group.has_room:
            # What comes after this is refused in the end, as if nobody had listened.
            with contextlib.suppress(OSError):  # then what the instance has not accepted is cut off
                self._roll_out(Rollout(self._group, self.around), within_s)
                drained = serving
        for instance in self.instances:
            if instance is not drained:
                instance.stop(0, within_s)
        self._close_if_done()
        return self._closed

    # For the instances, in the loop's thread

    def flush(self) -> None:
        """Hand on what waits, since the serving instance may take more now."""
        if self.serves_itself():
            self._waiting.refuse_all()  # it can be handed none
        elif self._serving:
            self._waiting.hand_to(self._serving)
        if self._serving and not self._serving.listens_itself and not self._waiting and not self._closed:
            self._set_accepting(True)

    def served(self, instance: Instance) -> None:
        """`instance` is done with a connection."""
        if instance is self._serving and (self._waiting or len(instance.connections) == instance.max_connections - 1):
            self.flush()

    def ready(self, instance: Instance) -> None:
        """`instance` could serve now."""
        if instance is self._starting:
            self._cut_over(instance)

    def steer_probe(self, instance: Instance, end: int, port: int) -> str:
        """Have connections from that port go to `instance`, which is tried. Returns the address to connect to."""
        self._group.steer_probe(instance.listener, end, port)
        return self._group.ipv6

    def connections_of(self, container: Container, since: float = 0) -> int | None:
        """How many connections a container holds; None when nobody has looked after `since`."""
        return self._counts.of(range(container.base, container.base + ID_RANGE), since)

    def orphaned(self, connections: list[socket.socket]) -> None:
        """An instance has died that held these connections (consumed)."""
        for connection in connections:
            self._waiting.add_orphan(connection, retry=not self.serves_itself() and not self._closed)

    def ended(self, instance: Instance, before: InstanceState, reason: str) -> None:
        """`instance`, which was in state `before`, is dead."""
        self.instances.remove(instance)
        if self._rollout and instance is self._rollout.former:
            self._waiting.extend(self._rollout.former_ended())
            self._rollout = None
        expected = before in (InstanceState.DRAINING, InstanceState.STOPPING)
        well = instance is self._serving and instance.ended_well(reason)
        if instance is self._serving:
            self._serving = None
        self._trials.drop(instance)
        if instance is self._starting:
            self._starting = None
        elif before == InstanceState.STARTING:
            expected = True  # a deploy's, which tells the person itself
        if not expected and not well:
            self._note_crash(instance, before, reason)
        if self._closed:
            self._close_if_done()
        elif not self._serving:
            if well:
                self._start_one()  # the next one is there before its client
            self._retry()
        elif instance.revision is self.revision:
            self.around.loop.later(scaler.CRASH_LAST_DELAY_S, self._succeed_adopted)

    # Starting

    def _try(self, instance):
        """Start an instance that does not serve yet.

        While another serves, or may, it gets a listener of its own, when there is room for one; also when clients must
        not come before it has answered.
        """
        if instance.state != InstanceState.STARTING or self._closed or not self._group:
            self._in_line.discard(instance)
            return self._fail(instance, 'it is being shut down')
        if not self._has_turn(instance):
            return self.around.loop.later(ROLLOUT_POLL_S, self._try, instance)
        alone = not self._serving and self._starting in (None, instance)
        if alone and instance.must_answer:  # what waits is given to it when it has answered
            alone = not migrates()
        try:
            if not self._trials.place(instance, self._group, alone):
                return self.around.loop.later(ROLLOUT_POLL_S, self._try, instance)
        except OSError as error:
            return self._fail(instance, f'no listener: {error.strerror}')
        self.instances.add(instance)
        instance.begin()

    def _fail(self, instance, reason):
        if instance.state != InstanceState.DEAD:
            self.instances.add(instance)
            instance.fail(reason)

    def _discard(self, instance, within_s=DISCARDED_INSTANCE_MAX_S):
        instance.stop(0, within_s)
        self._trials.drop(instance)

    def _start_one(self):
        """Start an instance if there is none and none is on its way, not before the delay after a crash is over."""
        if self._serving or self._starting or self._closed or self.revision is None:
            return
        if self._trials.at_current_listener() or self._in_line:
            return
        now = self.around.clock()
        if not self._scaler.wanted(now, 0, waiting=True):
            return self.around.loop.later(self._scaler.delay_s(now), self._retry)
        self._starting = self._make(self, self.revision)
        self._try(self._starting)

    def _retry(self):
        if self._waiting:
            self._start_one()
        elif not self._serving and not self._starting and not self._closed:
            self._set_accepting(True)  # who waits in the backlog, or comes next, starts it

    def _succeed_adopted(self):
        """Start the successor of one that was adopted: nobody answers its listen() any more."""
        if self._closed or self._starting or not self._serving or self._serving.mode != ServingMode.ADOPTED:
            return
        self._starting = self._make(self, self.revision)
        self._try(self._starting)

    # Replacing

    def _cut_over(self, instance):
        if self._closed:
            return self._discard(instance)
        revision, rollout = instance.revision, self._trials.get(instance)
        if self.revision is not None and revision.number < self.revision.number:  # a later deploy was faster
            self._discard(instance, REPLACED_INSTANCE_MAX_S)
            return self.instances.replaced(revision.folder)
        if rollout is None:  # it has ended since it was ready: the next connection starts another
            rollout = Rollout(self._group, self.around)
        if rollout.must_wait(self._serving):
            return self.around.loop.later(ROLLOUT_POLL_S, self._cut_over, instance)
        self._trials.end(instance)
        if self._starting not in (None, instance):
            self._starting.stop(KEEPALIVE_IDLE_S, REPLACED_INSTANCE_MAX_S)
        self._starting = None
        try:
            self._roll_out(rollout)
        except (OSError, OwnerError) as error:
            self.around.emit('handler', f'{self.name}: no listener for an instance: {error}', name=self.name)
            self._serving = rollout.fall_back(self._serving)
        former, self.revision = self.revision, revision
        self._scaler.idle_timeout_s = self.idle_timeout_s
        self._set_log_limit()
        if former is not None and former.folder != revision.folder:
            self.instances.replaced(former.folder)
            self.limit_reason = None
            self._scaler.recovered()  # those failures were of other code
        self._scaler.used(self.around.clock())
        if self._serving is None:
            self._retry()
        self.around.loop.later(scaler.CRASH_AGE_S, self._grown, instance)
        self.flush()

    def _roll_out(self, rollout, within_s=REPLACED_INSTANCE_MAX_S):
        """Have the rollout's successor serve, or nobody. Raises OSError when there is no listener, OwnerError."""
        self._set_accepting(False)
        former = self._serving
        rollout.cut_over(former, self._waiting, within_s)
        if rollout.former:
            self._rollout = rollout
        self._serving = rollout.successor

    def _set_log_limit(self):
        if self.revision:
            self.log.limit = self.revision.spec.settings.get('log', LOG_LIMIT)

    def _scale_to_zero(self):
        """Stop the instance of a function that nobody uses. The next connection starts one."""
        rollout = Rollout(self._group, self.around)
        if rollout.must_wait(self._serving):
            return
        try:
            self._roll_out(rollout)
        except OSError:  # it is looked at again in a second
            return
        text = f'idle for {self.idle_timeout_s:g} s, stopped'
        self.around.emit('handler', f'{self.name}: {text}', name=self.name)
        self.around.workers.submit(self.log.append, f'[faasd] {text}\n'.encode())
        self._set_accepting(True)

    # Ends

    def _grown(self, instance):
        if instance is self._serving:
            self._scaler.recovered()
            self.crash_reason = None

    def _note_crash(self, instance, before, reason):
        self._scaler.failed(self.around.clock(), instance.age_s())
        if instance.hint and reason.startswith(OUT_OF_MEMORY):
            reason = f'{reason}: {instance.hint}'
        self.crash_reason = reason
        self.around.workers.submit(self.log.append, f'[faasd] {reason}\n'.encode())  # where a person looks first
        subject = f'{self.name}: the instance' if before == InstanceState.READY else f'{self.name}:'
        self.around.emit('handler', f'{subject} {reason}', name=self.name, problem=True)

    def _close_if_done(self):
        self._waiting.refuse_all()
        if not self.instances and not self._closed.done():
            self._closed.set_result(None)
