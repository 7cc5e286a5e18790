"""Pool: the instances of one function, and which of them gets the next connection.

Everything here runs in the accept loop's thread and never blocks, but for the methods that say so: those are for other
threads.
"""

import collections
import concurrent.futures
import contextlib
import fcntl
import socket
import struct
import termios
import time
import weakref

from handlers.containers import protocol
from handlers.containers.bundle import ID_RANGE
from handlers.serving import listeners
from handlers.serving.instance import Handler, Revision, StartFailed, Surroundings, text_of
from handlers.serving.program import ADOPTED, GRACE_S, Program

__all__ = ['Pool', 'Revision', 'StartFailed', 'Surroundings', 'progress', 'text_of']

YOUNG_S = 10  # an instance that dies before this age is crashing: the next start waits
FIRST_DELAY_S, LAST_DELAY_S = 0.5, 30
# Of linux/tcp.h.
TCP_ESTABLISHED, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_CLOSE_WAIT = 1, 4, 5, 8
TCP_CONNECTED = (TCP_ESTABLISHED, TCP_FIN_WAIT1, TCP_FIN_WAIT2, TCP_CLOSE_WAIT)
DRAIN_S = 600  # how long a replaced instance may take to finish what it holds
IDLE_S = 30  # how long it keeps idle connections that were kept alive
# A former front is done with when nothing came to it for so long: a client's last packet of the handshake may be on its
# way. And how often that is looked at.
QUIET_S, QUEUE_LOOK_S = 1, 0.02
WANTED_S = 0.2  # how often a start that takes its time is asked whether anybody waits for it


class Pool:
    """The instances of one function. At most one serves; replaced ones finish what they hold."""

    def __init__(self, name, log, around):
        self.name, self.log, self.around = name, log, around
        self.revision = None  # the live Revision
        self.reason = None  # why the last instance ended that should not have
        self.gate = lambda is_open: None  # the front's: False while nobody could take a connection
        self.front = None  # handlers.listeners.Front
        self._serving = self._starting = self._trial = self._draining = None
        self._instances, self._replaced = set(), set()  # the folders of revisions that were replaced
        self._pending = collections.deque()  # accepted, and nobody's yet
        self._retried = weakref.WeakSet()  # connections that one instance left untouched when it died
        self._failures, self._not_before, self._closed = 0, 0.0, False
        self._counts, self._counted, self._used = {}, 0.0, time.monotonic()

    # For other threads

    def start(self, revision, is_wanted=lambda: True):
        """Blocks until an instance of the Revision is ready, and returns it.

        It serves nothing yet. Raises StartFailed, and ConnectionAbortedError when it is wanted no more.
        """
        instance = self._make(revision, trial=True)
        self.around.loop.call(self._try, instance)
        while True:
            try:
                return instance.up.result(WANTED_S)
            except concurrent.futures.TimeoutError:
                if not is_wanted():
                    self.discard(instance)
                    raise ConnectionAbortedError from None

    def switch(self, instance):
        """Connections go to `instance` from its return on; the one before finishes what it holds."""
        self.around.loop.wait(self._switch, instance)

    def discard(self, instance):
        """Blocks until an instance that never served is gone."""
        self.around.loop.call(self._discard, instance)
        instance.gone.result()

    def close(self, within_s):
        """Serve nothing more; a Future that is done when every instance has ended, after within_s at the latest."""
        done = concurrent.futures.Future()
        self.around.loop.call(self._close, within_s, done)
        return done

    def status(self):
        """(status, reason or None) as the API says it."""
        serving = self._serving
        if self.reason is not None:
            return 'crashing', self.reason
        if serving and not listens_itself(serving) and len(serving.connections) >= serving.most:
            return 'full', f'it serves {serving.most} connections, more wait'
        return ('running' if serving else 'starting' if self._starting else 'idle'), None

    # In the loop's thread

    def take(self):
        """True if a connection that is accepted now would be handed on at once.

        Otherwise see to it that this changes.
        """
        if self._serving and not self._pending and self._serving.takes():
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
        if self._serving and not listens_itself(self._serving) and not self._pending and not self._closed:
            self.gate(True)

    def _make(self, revision, trial=False):
        return (Handler if revision.spec.kind == 'handler' else Program)(self, revision, trial)

    def _begin(self, instance):
        self._instances.add(instance)
        if self._closed or (isinstance(instance, Program) and not self.front):
            instance._ended('it is being shut down')
        else:
            instance.begin()

    def _try(self, instance):
        """Start an instance of a new revision.

        While another serves, it gets a listener of its own, when there is room for one.
        """
        if isinstance(instance, Program) and self.front and not self._closed:
            if not self._serving and not self._starting:
                instance.listener = self.front.sock
            elif self.front.may_fork:
                try:
                    instance.listener = self.front.fork()
                except OSError as error:
                    self._instances.add(instance)
                    return instance._ended(f'no listener: {error.strerror}')
            else:
                return self.around.loop.later(QUEUE_LOOK_S, self._try, instance)
            if instance.listener is self.front.sock:
                self._trial = instance  # no other shall be at the same listener
        self._begin(instance)

    def _discard(self, instance, within_s=5):
        instance.stop(0, within_s)
        if instance.listener and self.front:
            self.front.drop(instance.listener)

    def _wake(self):
        """Start an instance if there is none and none is on its way, not before the delay after a crash is over."""
        if self._serving or self._starting or self._trial or self._closed or self.revision is None:
            return
        wait_s = self._not_before - time.monotonic()
        if wait_s > 0:
            return self.around.loop.later(wait_s, self._retry)
        self._starting = self._make(self.revision)
        if isinstance(self._starting, Program) and self.front:
            self._starting.listener = self.front.sock
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
        revision = instance.revision
        if self._closed:
            return self._discard(instance)
        if self.revision is not None and revision.number < self.revision.number:  # a later deploy was faster
            self._replaced.add(revision.folder)
            return self._discard(instance, DRAIN_S)
        if listens_itself(self._serving) and instance.listener in (None, self.front.sock) and not self.front.may_fork:
            return self.around.loop.later(QUEUE_LOOK_S, self._switch, instance)
        if self._trial is instance:
            self._trial = None
        former, self._serving = self._serving, instance
        if self._starting not in (None, instance):
            self._starting.stop(IDLE_S, DRAIN_S)
        self._starting = None
        self._turn(former, instance)
        if self.revision is not None and self.revision.folder != revision.folder:
            self._replaced.add(self.revision.folder)
            self._failures, self._not_before = 0, 0.0  # those were of other code
        self.revision, self._used = revision, time.monotonic()
        self._forget_replaced()
        if self._serving is None or instance.state == 'dead':  # it has ended between its readiness and this call
            self._serving = None
            self.gate(True)
        elif listens_itself(instance):
            self.gate(False)
        elif self.front:
            self.front.sock.setblocking(False)  # a server that listened there may have wanted it otherwise
        self.around.loop.later(YOUNG_S, self._grown, instance)
        self.flush()

    def _turn(self, former, instance):
        """Turn the front from the `former` instance, if there is one, to the one that serves now."""
        forked = instance.listener is not None and instance.listener is not self.front.sock
        if forked and not listens_itself(instance) and not listens_itself(former):
            self.front.drop(instance.listener)  # both are handed what we accept, so the front may stay
            forked = False
        if former is None:
            if forked:  # who waits at the front of one that died meanwhile is served there, by another
                self._discard(instance, DRAIN_S)
                self._serving = None
        elif forked or listens_itself(former):
            self.gate(False)
            try:
                fork = instance.listener if forked else self.front.fork()
            except OSError:  # then both have this one, until the former has ended
                return former.stop(0, GRACE_S)
            self.front.steer(fork)
            self._drain(former)
        else:
            former.stop(IDLE_S, DRAIN_S)

    def _drain(self, former, within_s=DRAIN_S):
        """Have `former` take what waits at the former front, then stop it."""
        waiting, self._pending = self._pending, collections.deque()
        self._draining = former
        began = time.monotonic()

        def look(quiet_since):
            sock, now = self.front and self.front.former, time.monotonic()
            if former is not self._draining or sock is None:
                return
            if not listens_itself(former):
                with contextlib.suppress(OSError):
                    while former.takes() and (waiting or listeners.queued(sock)):
                        connection = waiting.popleft() if waiting else sock.accept()[0]
                        if not former.send(connection):
                            waiting.appendleft(connection)
                            break
            if waiting or listeners.queued(sock):
                quiet_since = now
            if now < min(quiet_since + QUIET_S, began + within_s / 2):
                return self.around.loop.later(QUEUE_LOOK_S, look, quiet_since)
            former.stop(IDLE_S, began + within_s - now)
            self._free(former)

        look(began)

    def _free(self, former):
        """Let the former front go, when that disturbs nobody.

        A server whose listener is shut down before it was told to stop may take that for the end of everything, and
        drop what it holds: such as a Go program with log.Fatal(http.ListenAndServe(…)).
        """
        if former is not self._draining or not self.front:
            return
        if listens_itself(former) and former.told_s() < QUIET_S:
            return self.around.loop.later(QUEUE_LOOK_S, self._free, former)
        self.front.former_is_empty = True

    def look(self, counts, counted):
        """Take in how many connections the function's address has, {uid: number}, as of `counted`."""
        self._counts, self._counted = counts, counted
        serving = self._serving
        if not self.front or not serving or self._closed:
            return
        if listens_itself(serving) and not listeners.listens(self.front.sock):
            with contextlib.suppress(OSError):  # it is looked at again in a second
                self.front.revive()
        if counts or self._pending or listeners.queued(self.front.sock) or serving.connections:
            self._used = counted
        elif 0 < self.around.idle_timeout_s < counted - self._used and not self._starting and not self._trial:
            self._rest(serving)

    def _rest(self, serving):
        """Stop the instance of a function that nobody uses. The next connection starts one."""
        if listens_itself(serving):
            if not self.front.may_fork:
                return
            try:
                fork = self.front.fork()
            except OSError:  # it is looked at again in a second
                return
            self.gate(False)
            self.front.steer(fork)
            self._drain(serving)
        else:
            serving.stop(0, DRAIN_S)
        self._serving = None
        self.around.emit('handler', f'{self.name}: idle for {self.around.idle_timeout_s:g} s, stopped', name=self.name)
        self.gate(True)

    def connections_of(self, container, since=0):
        """How many connections a container holds; None when nobody has looked after `since`."""
        if self._counted <= since:
            return None
        ids = range(container.base, container.base + ID_RANGE)
        return sum(number for uid, number in self._counts.items() if uid in ids)

    def adopt(self, container, sock):
        """An instance that a faasd which is no more has left serves on `sock`, the front, until another is ready."""
        self._serving = Program.adopt(self, self.revision, container, sock)
        self._instances.add(self._serving)
        self.gate(False)
        self._succeed()

    def _succeed(self):
        """Start the successor of one that was adopted: nobody answers its listen() any more."""
        if self._serving and self._serving.kind == ADOPTED and not self._starting and not self._closed:
            self._starting = self._make(self.revision)
            self._try(self._starting)

    def _forget_replaced(self):
        """Delete the files of replaced revisions, unless an instance that finishes its work needs them."""
        for folder in self._replaced - {instance.revision.folder for instance in self._instances}:
            self._replaced.discard(folder)
            self.around.workers.submit(self.around.forget, folder)

    def _grown(self, instance):
        if instance is self._serving:
            self._failures, self.reason = 0, None

    def served(self, instance):
        if instance is self._serving and (self._pending or len(instance.connections) == instance.most - 1):
            self.flush()

    def orphaned(self, connections):
        """Do right by the clients of an instance that died: what it had not touched goes to the next one, once."""
        for connection in connections:
            received, answered = progress(connection)
            if answered:  # they must not take a part for the whole
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
                connection.close()
            elif received or connection in self._retried or listens_itself(self._serving):
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
        expected = before == 'stopping' or instance is self._draining
        if instance is self._draining:
            self._draining = None
            if self.front:
                self.front.retire()
        if instance.listener and self.front:
            self.front.drop(instance.listener)
        if instance is self._trial:
            self._trial = None
        well = instance is self._serving and instance.ended_well(reason)
        if instance is self._serving:
            self._serving = None
        if instance is self._starting:
            self._starting = None
        elif before == 'starting':
            expected = True  # a deploy's, which tells the person itself
        if not expected and not well:
            self._failures = self._failures + 1 if instance.age_s() < YOUNG_S else 0
            delay_s = min(LAST_DELAY_S, FIRST_DELAY_S * 2 ** min(self._failures - 1, 10)) if self._failures else 0
            self._not_before = time.monotonic() + delay_s
            self.reason = reason
            self.log.append(f'[faasd] {reason}\n'.encode())  # where a person looks first
            self.around.emit(
                'handler',
                f'{self.name}: the instance {reason}' if before == 'ready' else f'{self.name}: {reason}',
                name=self.name,
                problem=True,
            )
        if self._closed:
            self._close_if_done()
        elif not self._serving:
            if well:
                self._wake()  # the next one is there before its client
            self._retry()
        elif instance.revision is self.revision:
            self.around.loop.later(LAST_DELAY_S, self._succeed)

    def _close(self, within_s, done):
        self._closed = done
        while self._pending:
            self._pending.pop().close()
        drained = None
        if self.serves_itself() and self.front and self.front.may_fork:
            with contextlib.suppress(OSError):  # then what it has not accepted is cut off
                self.front.steer(self.front.fork())  # what comes now is refused in the end, as if nobody had listened
                drained = self._serving
                self._drain(drained, within_s)
        for instance in list(self._instances):
            if instance is not drained:
                instance.stop(0, within_s)
        self._close_if_done()

    def serves_itself(self):
        """True if what it does not accept is not to be cut off before its end."""
        return listens_itself(self._serving)

    def leave(self):
        """Let an instance that listens by itself go on without us. True if there is one."""
        serving = self._serving
        if not listens_itself(serving) or serving.state != 'ready':
            return False
        self._instances.discard(serving)
        self._serving = None
        serving.leave()
        return True

    def _close_if_done(self):
        if not self._instances and not self._closed.done():
            self._closed.set_result(None)


def listens_itself(instance):
    """True if the kernel connects its clients to it, and nobody else may accept at its listener."""
    return isinstance(instance, Program) and instance.serves_itself


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
