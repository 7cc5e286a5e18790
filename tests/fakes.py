"""A pool's surroundings without containers, sockets or waiting: a loop with its own clock, listeners, instances."""

import concurrent.futures
import heapq
import itertools

from handlers.images import spec as specs
from handlers.serving import pool
from handlers.serving.instance import Instance, InstanceState, Revision, ServingMode


class FakeLoop:
    """Runs calls at once, and timers when `advance` comes to them. `now` is what its clock says."""

    def __init__(self):
        self.now, self._timers, self._order = 1000.0, [], itertools.count()

    def clock(self):
        return self.now

    def call(self, function, *args):
        function(*args)

    def wait(self, function, *args):
        return function(*args)

    def later(self, delay_s, function, *args):
        heapq.heappush(self._timers, (self.now + delay_s, next(self._order), function, args))

    def advance(self, seconds):
        """Let time pass; every timer runs at its own time."""
        end = self.now + seconds
        while self._timers and self._timers[0][0] <= end:
            self.now, _, function, args = heapq.heappop(self._timers)
            function(*args)
        self.now = end


class FakeWorkers:
    def submit(self, function, *args):
        function(*args)


class FakeLog:
    def __init__(self):
        self.data = b''

    def append(self, data):
        self.data += data


class FakeListener:
    """A listening socket; `queue` is who waits at it."""

    def __init__(self):
        self.queue, self.is_closed = [], False

    def __repr__(self):
        return f'<listener {id(self):x}{" closed" if self.is_closed else ""}>'


class FakeGroup:
    """What ListenerGroup promises. `log` is what was done to it; with `is_full` no listener can be made."""

    ipv6 = 'fd00::a'

    def __init__(self):
        self.current, self.former, self.next = FakeListener(), None, None
        self.is_done, self.is_full, self.log = False, False, []

    @property
    def has_room(self):
        return self.next is None and (self.former is None or self.is_done)

    def add(self):
        if self.is_full:
            raise OSError(98, 'Address already in use')
        assert self.has_room
        self.close_former()
        self.next = FakeListener()
        return self.next

    def remove_next(self, listener):
        if listener and listener is self.next:
            self.next, listener.is_closed = None, True

    def cut_over(self, listener):
        assert listener is self.next and not listener.is_closed
        self.former, self.is_done, self.current, self.next = self.current, False, listener, None

    def former_is_done(self):
        self.is_done = True

    def close_former(self):
        if self.former:
            self.former.is_closed = True
            self.former = None

    def queued(self):
        return len(self.current.queue)

    def former_queued(self):
        return len(self.former.queue) if self.former else 0

    def accept_former(self):
        return self.former.queue.pop(0)

    def revive(self):
        self.log.append('revive')

    def set_nonblocking(self):
        pass


class FakeConnection:
    def __init__(self):
        self.is_closed, self.sent = False, b''

    def close(self):
        self.is_closed = True

    def send(self, data, _flags=0):
        self.sent += data

    def shutdown(self, _how):
        pass

    def setsockopt(self, *_):
        pass


class FakeInstance(Instance):
    """Comes up, takes and ends when the test says so. `mode` of its kind: None is a program that finds out."""

    def __init__(self, owner, revision, trial=False):
        super().__init__(owner, revision, trial)
        self.begun, self.stops, self.told, self.took, self.capacity = False, [], 0.0, [], 99

    @property
    def can_listen(self):
        return self.revision.spec.kind != 'handler'

    def begin(self):
        self.begun = True

    def come_up(self, mode=None):
        mode = mode or (ServingMode.LISTENING if self.can_listen else ServingMode.HANDLER)
        self._is_up(mode, mode.value)
        return self

    def takes(self):
        return not self.listens_itself and len(self.connections) < self.capacity

    def send(self, connection):
        if not self.takes() or self.state == InstanceState.DEAD:
            return False
        self.connections[len(self.took)] = connection
        self.took.append(connection)
        return True

    def finish(self, connection):
        """It is done with that connection."""
        number = next(number for number, held in self.connections.items() if held is connection)
        del self.connections[number]
        self.pool.served(self)

    def stop(self, idle_s, within_s):
        self.stops.append((idle_s, within_s))
        if self.state in (InstanceState.STARTING, InstanceState.READY, InstanceState.DRAINING):
            self.become(InstanceState.STOPPING)

    def told_s(self):
        return self.told

    def detach(self):
        if self.state != InstanceState.READY:
            return False
        self.become(InstanceState.DEAD)
        return True

    def end(self, reason='ended with exit code 1'):
        self._ended(reason)


class FakeFunction:
    """A pool on fakes. `accepting` is what it asked for; `instances` is every instance that was made."""

    def __init__(self, live=None, idle_timeout_s=0, **spec):
        self.loop, self.group, self.accepting = FakeLoop(), FakeGroup(), None
        self.events, self.forgotten, self.made = [], [], []
        around = pool.Surroundings(
            self.loop,
            None,
            None,
            FakeWorkers(),
            lambda area, text, **more: self.events.append(text),
            5,
            None,
            None,
            forget=self.forgotten.append,
            idle_timeout_s=idle_timeout_s,
            clock=self.loop.clock,
        )
        self.log = FakeLog()
        self.pool = pool.Pool('test', self.log, around, live, self.make)
        self.pool.open(self.group, self.set_accepting)

    def make(self, owner, revision, trial=False):
        self.made.append(FakeInstance(owner, revision, trial))
        return self.made[-1]

    def set_accepting(self, accepting):
        self.accepting = accepting

    @property
    def last(self):
        return self.made[-1]

    def trial(self, revision):
        """An instance of a deploy, which starts."""
        instance = self.make(self.pool, revision, True)
        self.pool._try(instance)
        return instance

    def deploy(self, revision, mode=None):
        instance = self.trial(revision).come_up(mode)
        self.pool.cut_over(instance)
        return instance

    def connect(self):
        """A client: it is accepted and dispatched, or waits at the current listener. Returns the connection."""
        connection = FakeConnection()
        if self.accepting and self.pool.take():
            self.pool.dispatch(connection)
        else:
            self.group.current.queue.append(connection)
        return connection

    def owner(self):
        """Who accepts at the current listener: an instance, 'faasd', or None while an instance is on its way."""
        listening = [
            instance
            for instance in self.pool.instances
            if instance.listens_itself and instance.listener is self.group.current
        ]
        return listening[0] if listening else 'faasd' if self.accepting else None


def revision(number, kind='handler'):
    return Revision(number, f'/functions/1/{number}', specs.Spec(kind), f'/functions/1/{number}')


def program(number):
    return revision(number, 'command')


def result(future):
    """What a future has now, which must be done."""
    assert future.done(), 'it is not done'
    try:
        return future.result(0)
    except concurrent.futures.CancelledError as error:
        raise AssertionError from error
