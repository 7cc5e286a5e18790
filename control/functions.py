"""The functions that are served: opens, removes, lists them. It knows no HTTP."""

import collections
import concurrent.futures
import contextlib
import ipaddress
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import registry
from control.events import Emit, attempt, date
from control.limit_watch import LimitWatch
from control.projection import Projection
from control.revisions import Revisions
from control.tcp_memory import TCPMemory
from dns_manager import DNSZoneManager
from handlers.containers.containers import Container
from handlers.serving.instance import Revision, Surroundings
from handlers.serving.pool import Pool
from handlers.serving.server import Adopted, FaaSServer
from host import sock_diag
from host.errors import EXPECTED, FaasError

NETWORK = 'fd00:faa5:1::/48'
FAILED_DEPLOY_STOP_S = 5  # how long what was opened for a deploy may take to end
CHANGES_END_S = 60  # how long the end of faasd waits for deploys and removals
CLOSE_EXTRA_S = 30  # beyond FAAS_STOP_TIMEOUT, until what does not end is left


class Ending(FaasError):
    """faasd is ending and takes no change."""

    status = 503

    def __init__(self) -> None:
        super().__init__('faasd is ending', 'try again when it runs again')


class NoListener(FaasError):
    """A function cannot be reached at the moment."""

    status = 503


class Changes:
    """Counts what the end of faasd has to wait for."""

    def __init__(self) -> None:
        self._under_way, self._changed, self.ended = [], threading.Condition(), False

    @contextlib.contextmanager
    def one(self, hurry: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Raises Ending after refuse() was called, which calls hurry() of those that are under way."""
        with self._changed:
            if self.ended:
                raise Ending
            self._under_way.append(hurry)
        try:
            yield
        finally:
            with self._changed:
                self._under_way.remove(hurry)
                self._changed.notify_all()

    def refuse(self) -> None:
        """Let no new change begin."""
        with self._changed:
            self.ended = True
            for hurry in self._under_way:
                hurry()

    def wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._under_way, timeout=CHANGES_END_S)


class Functions:
    """The functions of the registry, and what serves them. `addresses` and `zone` project their rows."""

    def __init__(
        self,
        known: registry.Registry,
        revisions: Revisions,
        server: FaaSServer,
        around: Surroundings,
        dns: DNSZoneManager,
        addresses: Projection,
        zone: Projection,
        emit: Emit,
    ) -> None:
        self._registry, self._revisions, self._server, self._around = known, revisions, server, around
        self._dns, self._addresses, self._zone = dns, addresses, zone
        self._emit = emit
        self._tcp_memory = TCPMemory(around.containers.bounds, emit)
        self.limit_watch = LimitWatch(around.containers.bounds, emit)
        self.changes = Changes()
        self._opening = threading.RLock()  # held while listeners are opened and taken away
        self._open_now: dict[int, tuple[registry.Function, Pool]] = {}
        self._pools: dict[int, tuple[registry.Function, Pool]] = {}  # the same, and those that are about to end
        self._unopened: dict[int, tuple[registry.Function, Revision | None, str]] = {}  # and why
        self._handover = False
        self.left_behind = False  # an instance lives on that the next faasd adopts

    # Start and end

    def open_all(self, left: Iterable[tuple[dict, Container]] = ()) -> None:
        """Open every function; what a former faasd has `left` serves on, or is ended."""
        adoptable = self._adoptable(left)
        for function in self._registry.functions():
            revision = None
            try:
                revision = self._revisions.load(function, function.revision)
            except (OSError, ValueError) as error:  # the others are not to blame
                text = f'{function.name}: {error}: deploy it again'
                self._emit('handler', text, name=function.name, problem=True)
            try:
                self._open(function, revision, adoptable.pop(function.name, None) if revision else None)
            except OSError as error:
                self._emit('listener', f'{function.name}: {error}', name=function.name, problem=True)
                self._unopened[function.id] = function, revision, str(error)
        self._around.containers.remove_leftovers()
        for adopted in adoptable.values():  # of a revision that cannot be used any more
            adopted.listener.close()
            self._end(adopted.container)

    def _adoptable(self, left: Iterable[tuple[dict, Container]]) -> dict[str, Adopted]:
        """{function: Adopted} of what a former faasd has left; the rest is ended."""
        containers, found = self._around.containers, {}
        for record, container in sorted(left, key=lambda each: -each[0]['start_time']):
            sock = None if record['function'] in found else containers.listener_of(record, container)
            if sock and self._server.guard.holds(sock):
                found[record['function']] = Adopted(container, sock)
                continue
            if sock:
                sock.close()
            self._end(container)
        return found

    def _end(self, container: Container) -> None:
        container.kill()
        self._around.containers.remove(container)

    def _open(
        self,
        function: registry.Function,
        revision: Revision | None = None,
        adopted: Adopted | None = None,
    ) -> Pool:
        """A pool and a listener for the function; an instance that a former faasd has left may be `adopted`.

        Without `revision` it serves nothing until one is cut over to. Raises OSError.
        """
        with self._opening:
            pool = Pool(function.name, self._revisions.log(function), self._around, revision)
            try:
                self._server.add_listener(function.ipv6, function.name, pool, adopted)
            except OSError:
                if adopted:
                    self._end(adopted.container)
                raise
            self._open_now[function.id] = self._pools[function.id] = function, pool
            return pool

    def open_others(self) -> None:
        """Open the functions that could not be opened at the start. Raises NoListener when one still cannot.

        A function can set options on connections that keep others from listening beside them. The kernel keeps such
        connections for a minute.
        """
        failed = []
        for ident in list(self._unopened):
            with self._opening:
                function, revision, _ = self._unopened.get(ident, (None, None, None))
                if function is None:  # it was removed meanwhile
                    continue
                try:
                    self._open(function, revision)
                    del self._unopened[ident]
                except OSError as error:
                    self._unopened[ident] = function, revision, str(error)
                    failed.append(f'{function.name}: {error}')
        if failed:
            raise NoListener('; '.join(failed))

    def _shut(self, function: registry.Function, within_s: float) -> concurrent.futures.Future:
        """Undo _open; what runs may finish within within_s seconds, or goes on at a handover."""
        with self._opening:
            self._unopened.pop(function.id, None)
            known = self._open_now.pop(function.id, None)
            end = self._server.close_listener(function.ipv6, within_s, self._handover)
        if known:  # else somebody else does it
            end.add_done_callback(lambda _: self._ended(function, end))  # in the loop's thread
        return end

    def _ended(self, function: registry.Function, end: concurrent.futures.Future) -> None:
        self._pools.pop(function.id, None)
        self.left_behind |= end.result()

    def close(self, handover: bool) -> None:
        """Serve nothing any more; with `handover` what listens by itself goes on for the next faasd to adopt."""
        self._handover = handover
        self.changes.refuse()
        self._close_open()
        self.changes.wait()
        self._close_open()  # what a change under way has opened meanwhile

    def _close_open(self) -> None:
        stop_s = self._around.stop_timeout_s
        ends = [self._shut(function, stop_s) for function, _ in list(self._open_now.values())]
        deadline = time.monotonic() + stop_s + CLOSE_EXTRA_S
        while concurrent.futures.wait(ends, timeout=0.2).not_done and time.monotonic() < deadline:
            attempt(self._emit, self.count_connections)  # the monitor, which does so otherwise, has ended

    def count_connections(self) -> None:
        """Tell every pool what the kernel says of its address, and bound the memory there. Raises OSError."""
        now, counts = time.monotonic(), collections.defaultdict(dict)
        found = sock_diag.open_connections(NETWORK, 80)
        for (address, uid), count in found.counts.items():
            counts[socket.inet_ntop(socket.AF_INET6, address)][uid] = count
        self._around.loop.call(self._spread, counts, now)
        self._tcp_memory.look(found.memory, list(self._pools.values()))

    def look_at_limits(self) -> bool:
        """False: it tells nothing of the state of this server."""
        return self.limit_watch.look([pool for _, pool in list(self._pools.values())])

    def _spread(self, counts: dict[str, dict[int, int]], now: float) -> None:
        for function, pool in list(self._pools.values()):
            count_by_uid = counts.get(str(ipaddress.ip_address(function.ipv6)), {})
            self._around.loop.call(pool.look, count_by_uid, now)  # apart: a fault in one pool must not stop the others

    # Verbs

    def pool_for(self, function: registry.Function, steps: contextlib.ExitStack) -> Pool:
        """The pool that a revision is started in; a new function gets one. Raises NoListener."""
        if function.revision is None:
            self._addresses.sync()
            pool = self._open(function)
            steps.callback(lambda: self._shut(function, FAILED_DEPLOY_STOP_S).result())
            return pool
        _, pool = self._open_now.get(function.id, (None, None))
        if pool is None:
            raise NoListener(f'{function.name} has no listener at the moment', 'try again in a minute')
        return pool

    def publish(self, function: registry.Function) -> str | None:
        """Project the zone and wait until CoreDNS answers the name; a warning if that is not so."""
        try:
            self._zone.sync()
        except EXPECTED as error:
            self._emit('dns', f'The zone cannot be written: {error}', problem=True)
            return 'deployed, not yet in DNS'
        return None if self._dns.wait_served(function.name, function.ipv6) else 'deployed, not yet in DNS'

    def remove(self, name: str, by: str) -> None:
        with self.changes.one():
            function = self._registry.remove_function(name)
            attempt(self._emit, self._zone.sync)
            self._shut(function, self._around.stop_timeout_s).result()
            attempt(self._emit, self._addresses.sync)
            self._revisions.forget(self._revisions.folder(function))
        self._emit('listener', f'Removed {name} from {function.ipv6}, by {by}', name=name)

    def ipv6(self, name: str) -> str:
        return self._registry.function(name).ipv6

    def instances(self, function: registry.Function) -> list[dict]:
        """What the instances of a function are and use: see Instance.usage()."""
        _, pool = self._open_now.get(function.id, (None, None))
        return [
            {
                'revision': instance.revision.number,
                'state': instance.state.value,
                'age_s': round(instance.age_s(), 1),
                **(instance.usage() or {}),
            }
            for instance in (pool.instances if pool else ())
        ]

    def changed_mounts(self) -> dict[str, set[tuple]]:
        """{function: {(path, device, inode)}} of the folders of the host that its instance sees a former one of."""
        found = {}
        for function, pool in list(self._open_now.values()):
            if folders := {each for instance in pool.instances for each in instance.changed_mounts()}:
                found[function.name] = folders
        return found

    def list(self) -> list[dict]:
        answer = []
        for function in self._registry.functions():
            _, pool = self._open_now.get(function.id, (None, None))
            instances = pool.instances if pool else ()
            if pool:
                status, reason = pool.status()
            elif function.id in self._unopened:
                status, reason = 'unreachable', f'it has no listener: {self._unopened[function.id][2]}'
            else:  # it is being removed
                continue
            answer.append(
                {
                    'name': function.name,
                    'ipv6': function.ipv6,
                    'dns': f'{function.name}.faas',
                    'status': status,
                    'reason': reason,
                    'revision': function.revision,
                    'created': date(function.created),
                    'from': function.source,
                    'egress': sorted(filter(None, (each.egress_address() for each in instances))),
                }
            )
        return answer

    def logs(self, name: str, lines: int) -> bytes:
        return self._revisions.log(self._registry.function(name)).last(lines)
