"""Pool with real containers and connections: who gets the next one, and what becomes of it when an instance dies."""

import concurrent.futures
import contextlib
import itertools
import os
import pathlib
import shutil
import signal
import socket
import time
import unittest
from unittest import mock

from handlers.containers import logs, protocol
from handlers.serving import instance, pool, scaler
from handlers.serving.apart import Apart
from handlers.serving.connection import progress
from handlers.serving.injection import Injector
from handlers.serving.instance import InstanceState
from handlers.serving.loop import Loop
from handlers.serving.server import FaaSServer
from host import process
from host.guard import Unguarded
from tests import fakes, inside, lab

ADDRESS = 'fd00:faa5:1::a'

# Says its name. A request of "slow" waits until the file `go` is there, "half" answers a part and then waits, "die"
# reads and dies, "disconnect" takes the connection from its client and ends.
SOURCE = """
import ctypes, os, time
def wait():
    while not os.path.exists('/function/go'):
        time.sleep(0.01)
def handle(connection, address):
    request = connection.recv(64)
    if request == b'die':
        os.kill(os.getpid(), 9)
    if request == b'disconnect':
        ctypes.CDLL(None).connect(connection.fileno(), bytes(16), 16)
        os._exit(0)
    if request == b'half':
        connection.sendall(b'ha')
        wait()
    if request == b'slow':
        wait()
    connection.sendall(b'%s')
"""
DIES = 'import os\nos._exit(7)\n'
REFUSES = 'print("one")\nraise RuntimeError("no licence")\n'


class Progress(unittest.TestCase):
    """Over real TCP, since the kernel's counters are what is asked."""

    def setUp(self):
        with socket.create_server(('::1', 0), family=socket.AF_INET6) as listener:
            self.client = socket.create_connection(listener.getsockname()[:2])
            self.held, _ = listener.accept()
        self.addCleanup(self.client.close)
        self.addCleanup(self.held.close)

    def see(self, *expected):
        lab.wait_until(lambda: progress(self.held) == expected, 5, f'{expected}, not {progress(self.held)}')

    def test_nothing_and_what_waits_unread_are_untouched(self):
        self.see(False, False)
        self.client.sendall(b'request')
        self.see(False, False)
        self.client.shutdown(socket.SHUT_WR)
        self.see(False, False)

    def test_a_byte_read_is_seen(self):
        self.client.sendall(b'request')
        self.held.recv(1)
        self.see(True, False)

    def test_a_byte_written_is_seen_also_before_it_is_sent(self):
        self.held.sendall(b'a')
        self.see(False, True)
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        self.held.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                self.held.send(b'x' * 65536)
        self.see(False, True)

    def test_an_end_that_was_read_is_no_request(self):
        self.client.shutdown(socket.SHUT_WR)
        self.assertEqual(b'', self.held.recv(1))
        self.see(False, False)

    def test_a_reset_one_waits_for_nothing(self):
        self.client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes((1, 0, 0, 0, 0, 0, 0, 0)))
        self.client.close()
        with contextlib.suppress(ConnectionError):
            self.held.recv(1)
        self.see(True, True)


class Choosing(unittest.TestCase):
    """Which instance gets the next connection, on fakes."""

    def setUp(self):
        self.function = fakes.FakeFunction(fakes.revision(1))
        self.pool, self.loop = self.function.pool, self.function.loop

    def connect(self, count):
        return [self.function.connect() for _ in range(count)]

    def serve(self, **more):
        """A function with an instance that serves; and that instance."""
        self.function = fakes.FakeFunction(fakes.revision(1), **more)
        self.pool, self.loop = self.function.pool, self.function.loop
        self.function.connect()
        self.function.group.current.queue.clear()
        return self.function.last.come_up()

    def test_the_first_client_starts_one_and_nobody_is_accepted_before_it_is_ready(self):
        self.assertTrue(self.function.accepting)
        self.assertEqual('idle', self.pool.status()[0])
        self.connect(3)
        self.assertFalse(self.function.accepting)
        self.assertEqual(1, len(self.function.made))
        self.assertEqual('starting', self.pool.status()[0])
        self.function.last.come_up()
        self.assertTrue(self.function.accepting)
        self.assertEqual('running', self.pool.status()[0])

    def test_without_a_revision_nothing_starts(self):
        function = fakes.FakeFunction()
        function.connect()
        self.assertEqual([], function.made)
        function.deploy(fakes.revision(1))
        self.assertTrue(function.accepting)

    def test_one_that_is_full_gets_the_next_when_it_is_done_with_one(self):
        instance = self.serve()
        instance.capacity = instance.max_connections = 2
        held = self.connect(2)
        self.connect(1)
        self.assertFalse(self.function.accepting)
        self.assertEqual('full', self.pool.status()[0])
        instance.finish(held[0])
        self.assertTrue(self.function.accepting)

    def test_what_it_does_not_take_is_kept_in_order(self):
        instance = self.serve()
        connections = [fakes.FakeConnection() for _ in range(3)]
        instance.capacity = 1
        for connection in connections:
            self.pool.dispatch(connection)
        instance.capacity = 9
        self.pool.flush()
        self.assertEqual(connections, instance.took)

    def test_young_deaths_delay_the_next_start_ever_more(self):
        instance = self.serve()
        for delay_s in (0.5, 1, 2, 4, 8, 16, 30, 30):
            instance.end('ended by SIGKILL')
            self.assertEqual(('crashing', 'ended by SIGKILL'), self.pool.status())
            self.assertTrue(self.function.accepting)
            self.connect(1)
            self.assertFalse(self.function.accepting)
            made = len(self.function.made)
            self.loop.advance(delay_s - 0.1)
            self.assertEqual(made, len(self.function.made))
            self.loop.advance(0.2)
            self.connect(1)
            self.assertEqual(made + 1, len(self.function.made))
            instance = self.function.last.come_up()
        self.assertEqual(8, len(self.function.events))
        self.assertIn(b'[faasd] ended by SIGKILL', self.function.log.data)
        self.loop.advance(scaler.CRASH_AGE_S)
        self.assertEqual(('running', None), self.pool.status())

    def test_one_that_may_end_is_succeeded_before_its_client_comes(self):
        instance = self.serve()
        instance.ended_well = lambda reason: True
        instance.end('ended with exit code 0')
        self.assertEqual('starting', self.pool.status()[0])
        self.assertEqual([], self.function.events)

    def test_an_idle_one_is_stopped_and_the_next_client_starts_one(self):
        for kind in ('handler', 'command'):
            with self.subTest(kind):
                function = fakes.FakeFunction(idle_timeout_s=10)
                instance = function.deploy(fakes.revision(1, kind))
                for _ in range(9):
                    function.loop.advance(1)
                    function.pool.look({}, function.loop.now)
                self.assertEqual(InstanceState.READY, instance.state)
                function.pool.look({1000: 1}, function.loop.now)  # somebody is connected
                function.loop.advance(10)
                function.pool.look({}, function.loop.now)
                self.assertEqual('running', function.pool.status()[0])
                function.loop.advance(1)
                function.pool.look({}, function.loop.now)
                self.assertEqual('idle', function.pool.status()[0])
                self.assertEqual('faasd', function.owner())
                function.loop.advance(2)
                self.assertEqual(InstanceState.STOPPING, instance.state)
                function.connect()
                function.last.come_up()
                self.assertEqual('running', function.pool.status()[0])
                instance.end('ended by SIGTERM')
                self.assertEqual('running', function.pool.status()[0])

    def test_one_that_is_used_is_not_stopped(self):
        function = fakes.FakeFunction(idle_timeout_s=10)
        instance = function.deploy(fakes.program(1))
        function.group.current.queue.append('a client')
        for _ in range(30):
            function.loop.advance(1)
            function.pool.look({}, function.loop.now)
        self.assertEqual(InstanceState.READY, instance.state)

    def test_what_nobody_can_be_handed_is_refused(self):
        function = fakes.FakeFunction(fakes.revision(1))
        waits = fakes.FakeConnection()
        function.pool.dispatch(waits)
        function.last.end()
        function.deploy(fakes.program(2))
        self.assertEqual((protocol.BAD_GATEWAY, True), (waits.sent, waits.is_closed))

    def test_closed(self):
        instance = self.serve()
        waits = fakes.FakeConnection()
        instance.capacity = 0
        self.pool.dispatch(waits)
        closed = self.pool.close(7)
        self.assertTrue(waits.is_closed)
        self.assertEqual([(0, 7)], instance.stops)
        self.assertFalse(self.function.accepting)
        self.assertFalse(closed.done())
        instance.end('ended by SIGTERM')
        self.assertTrue(closed.done())
        self.assertEqual([], self.function.events)
        late = self.function.trial(fakes.revision(2))
        self.assertIn('shut down', str(late.up.exception(0)))

    def test_closed_while_a_program_serves(self):
        function = fakes.FakeFunction()
        instance = function.deploy(fakes.program(1))
        function.pool.close(10)
        self.assertEqual((InstanceState.DRAINING, False), (instance.state, function.accepting))
        function.loop.advance(2)
        self.assertEqual(InstanceState.STOPPING, instance.state)
        self.assertAlmostEqual(9, instance.stops[-1][1], 1)
        instance.end('ended by SIGTERM')
        self.assertTrue(function.pool.close(10).done())

    def test_a_replaced_revisions_files_go_with_its_last_instance(self):
        first = self.function.deploy(fakes.revision(1))
        self.function.deploy(fakes.revision(2))
        self.assertEqual([], self.function.forgotten)
        first.end('ended by SIGTERM')
        self.assertEqual(['/functions/1/1'], self.function.forgotten)

    def test_one_of_a_revision_that_is_late_is_ended(self):
        late = self.function.trial(fakes.revision(1)).come_up()
        second = self.function.deploy(fakes.revision(2))
        self.pool.cut_over(late)
        self.assertEqual((InstanceState.STOPPING, InstanceState.READY), (late.state, second.state))
        late.end('ended by SIGTERM')
        self.assertEqual(['/functions/1/1'], self.function.forgotten)

    def test_one_on_its_way_gives_way_to_a_new_revision(self):
        self.connect(1)
        starting = self.function.last
        second = self.function.deploy(fakes.revision(2))
        self.assertEqual((InstanceState.STOPPING, InstanceState.READY), (starting.state, second.state))
        starting.come_up()
        self.assertEqual('running', self.pool.status()[0])
        self.connect(1)
        self.assertEqual(1, len(second.took))


class Function:
    """A pool behind a real FaaSServer, in a host."""

    def __init__(self, stack, start_timeout_s=10, deployed=False):
        self.events, self.stack = [], stack
        self.folder = pathlib.Path(f'/var/lib/functions/{os.urandom(4).hex()}')
        self.folder.mkdir(parents=True)
        self.loop = Loop()
        stack.callback(self.loop.stop)
        workers = stack.enter_context(concurrent.futures.ThreadPoolExecutor(4))
        prepared = stack.enter_context(inside.prepared())
        around = pool.Surroundings(
            *(self.loop, prepared, logs.LogCopier(), workers, self.note, start_timeout_s, Injector(), Apart()),
            shutil.rmtree,
        )
        live = self.revision(1) if deployed else None
        self.pool = pool.Pool('test', logs.Log(str(self.folder / 'log')), around, live)
        self.server = FaaSServer(self.loop, lambda *_, **__: None, Unguarded())
        process.run(['ip', '-6', 'address', 'replace', f'{ADDRESS}/128', 'dev', 'lo', 'nodad'])
        self.server.add_listener(ADDRESS, 'test', self.pool)
        self.listener = self.server._listeners[ADDRESS]
        stack.callback(lambda: self.close(0).result(20))

    def close(self, within_s):
        return self.server.close_listener(ADDRESS, within_s)

    def note(self, area, text, name=None, problem=False):
        self.events.append((time.monotonic(), text))

    @property
    def accepts(self):
        return self.listener._watched is not None

    def revision(self, number, source=None):
        folder = self.folder / str(number)
        folder.mkdir()
        (folder / 'handler.py').write_text(source or SOURCE % f'revision {number}')
        return pool.Revision(number, str(folder), inside.SPEC, str(folder))

    def deploy(self, number, source=None):
        instance = self.pool.start(self.revision(number, source))
        self.pool.cut_over(instance)
        return instance

    def connect(self, request=b'hi'):
        client = self.stack.enter_context(socket.create_connection((ADDRESS, 80)))
        client.settimeout(15)
        client.sendall(request)
        return client

    def ask(self, request=b'hi'):
        return inside.read_all(self.connect(request)).decode()

    def holds(self, instance, count):
        lab.wait_until(lambda: len(instance.connections) == count, 10, f'{count} connections')

    @staticmethod
    def go(instance):
        """Let its slow requests go on."""
        pathlib.Path(instance.revision.folder, 'go').touch()

    @staticmethod
    def end(instance, number=signal.SIGKILL):
        os.kill(instance._container.pid, number)


class Serving(inside.InHost):
    @inside.inside
    def test_a_new_revision_takes_over_and_the_old_one_finishes_what_it_holds(self):
        function = Function(self.stack)
        first = function.deploy(1)
        self.assertEqual(('running', None), function.pool.status())
        slow = function.connect(b'slow')
        function.holds(first, 1)
        function.deploy(2)
        self.assertEqual('revision 2', function.ask())
        self.assertEqual(InstanceState.STOPPING, first.state)
        self.assertTrue((function.folder / '1').exists())  # it may still import from it
        function.go(first)
        self.assertEqual(b'revision 1', inside.read_all(slow))
        first.gone.result(10)
        lab.wait_until(lambda: not (function.folder / '1').exists(), 5, 'its files to go')
        self.assertTrue((function.folder / '2').exists())
        self.assertEqual([], function.events)

    @inside.inside
    def test_a_revision_that_is_late_does_not_take_over_from_a_newer_one(self):
        function = Function(self.stack)
        late = function.pool.start(function.revision(1))
        function.deploy(2)
        function.pool.cut_over(late)
        self.assertEqual('revision 2', function.ask())
        late.gone.result(10)
        self.assertEqual(('running', None), function.pool.status())

    @inside.inside
    def test_an_instance_holds_no_more_than_its_share(self):
        function = Function(self.stack)
        with mock.patch.object(instance, 'INSTANCE_MAX_CONNECTIONS', 2):
            serving = function.deploy(1)
            slow = [function.connect(b'slow') for _ in range(3)]
            function.holds(serving, 2)
            lab.wait_until(lambda: not function.accepts, 5, 'accepting to end')
            function.go(serving)
            self.assertEqual([b'revision 1'] * 3, [inside.read_all(client) for client in slow])
            lab.wait_until(lambda: function.accepts, 5, 'accepting')

    @inside.inside
    def test_a_runtime_that_does_not_read_loses_no_connection(self):
        function = Function(self.stack)
        instance = function.deploy(1)
        children = f'/proc/{instance._container.pid}/task/{instance._container.pid}/children'
        runtime = int(pathlib.Path(children).read_text().split()[0])
        os.kill(runtime, signal.SIGSTOP)
        clients = [function.connect() for _ in range(400)]  # more than a socket buffer of messages
        lab.wait_until(lambda: function.pool._waiting, 5, 'the channel to be full')
        os.kill(runtime, signal.SIGCONT)
        self.assertEqual({b'revision 1'}, {inside.read_all(client) for client in clients})

    @inside.inside
    def test_close_waits_for_what_runs_within_its_time(self):
        for within_s, answer in ((10, b'revision 1'), (0.3, b'')):
            with self.subTest(within_s):
                function = Function(self.stack)
                instance = function.deploy(1)
                slow = function.connect(b'slow')
                function.holds(instance, 1)
                done = function.close(within_s)
                with self.assertRaises(TimeoutError):
                    done.result(0.15)
                if answer:
                    function.go(instance)
                done.result(5)
                got = inside.read_all(slow)
                self.assertEqual(answer or protocol.BAD_GATEWAY, got)


class Deaths(inside.InHost):
    @inside.inside
    def test_what_an_instance_never_touched_goes_to_the_next_one(self):
        function = Function(self.stack)
        instance = function.deploy(1)
        function.end(instance, signal.SIGSTOP)  # PID 1 only: it would have reaped the runtime
        children = f'/proc/{instance._container.pid}/task/{instance._container.pid}/children'
        os.kill(int(pathlib.Path(children).read_text().split()[0]), signal.SIGSTOP)
        clients = [function.connect() for _ in range(5)]
        function.holds(instance, 5)
        function.end(instance)
        self.assertEqual([b'revision 1'] * 5, [inside.read_all(client) for client in clients])

    @inside.inside
    def test_a_request_that_was_read_is_answered_502_and_a_part_of_an_answer_is_reset(self):
        function = Function(self.stack)
        instance = function.deploy(1)
        read, half = function.connect(b'slow'), function.connect(b'half')
        self.assertEqual(b'ha', half.recv(2))
        function.holds(instance, 2)
        lab.wait_until(lambda: all(progress(c)[0] for c in instance.connections.values()), 5, 'both to be read')
        function.end(instance)
        self.assertEqual(protocol.BAD_GATEWAY, inside.read_all(read))
        with self.assertRaises(ConnectionResetError):
            half.recv(64)

    @inside.inside
    def test_a_connection_that_two_instances_died_with_is_given_up(self):
        function = Function(self.stack)
        with mock.patch.object(scaler, 'CRASH_FIRST_DELAY_S', 0.01):
            first = function.deploy(1)
            (function.folder / '1' / 'handler.py').write_text(
                'import os\ndef handle(connection, address):\n    os.kill(os.getpid(), 9)\n'
            )
            for pid in self.processes(first):
                os.kill(pid, signal.SIGSTOP)
            client = function.connect()
            function.holds(first, 1)
            function.end(first)
            self.assertEqual(protocol.BAD_GATEWAY, inside.read_all(client))
        lab.wait_until(lambda: len(function.events) == 2, 5, 'both ends')

    @staticmethod
    def processes(instance):
        pid = instance._container.pid
        children = pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text().split()
        return [pid, *map(int, children)]

    @inside.inside
    def test_one_that_dies_young_again_and_again_is_started_ever_later(self):
        function = Function(self.stack)
        function.deploy(1)
        with mock.patch.object(scaler, 'CRASH_FIRST_DELAY_S', 0.05):
            for _ in range(4):
                function.ask(b'die')
        lab.wait_until(lambda: len(function.events) == 4, 5, 'four ends')
        moments = [moment for moment, _ in function.events]
        waits = [after - before for before, after in itertools.pairwise(moments)]
        for number, wait_s in enumerate(waits, 1):
            self.assertGreater(wait_s, 0.05 * 2 ** (number - 1))
        status, reason = function.pool.status()
        self.assertEqual('crashing', status)
        self.assertIn('SIGKILL', reason)

    @inside.inside
    def test_one_that_grew_old_is_replaced_at_once_and_well_again(self):
        function = Function(self.stack)
        with mock.patch.object(scaler, 'CRASH_AGE_S', 0.2):
            first = function.deploy(1)
            function.ask(b'die')
            lab.wait_until(lambda: function.pool.status()[0] == 'crashing', 5, 'crashing')
            self.assertEqual('revision 1', function.ask())
            lab.wait_until(lambda: function.pool.status() == ('running', None), 5, 'running')
        self.assertEqual(InstanceState.DEAD, first.state)

    @inside.inside
    def test_what_became_of_its_connections_does_not_keep_it_from_ending(self):
        function = Function(self.stack)
        instance = function.deploy(1)
        function.connect(b'disconnect')
        instance.gone.result(10)
        self.assertEqual('revision 1', function.ask())

    @inside.inside
    def test_one_that_breaks_the_protocol_is_ended_and_leaks_nothing(self):
        breaches = 'os.write(3, b"?")', 'os.write(3, b"H\\x01")', 'os.write(3, b"D" + bytes(8))'
        for number, breach in enumerate(breaches):
            with self.subTest(breach):
                before = len(os.listdir('/proc/self/fd'))
                with contextlib.ExitStack() as stack:
                    function = Function(stack)
                    function.deploy(number + 1, SOURCE % 'x' + breach + '\n')
                    events = function.events
                    lab.wait_until(lambda events=events: events, 5, 'its end')
                    self.assertIn('closed its channel', events[0][1])
                most = before + 2  # the epolls of the copier and of the injector
                lab.wait_until(lambda most=most: len(os.listdir('/proc/self/fd')) <= most, 5, 'the closing of all')

    @inside.inside
    def test_one_that_sends_a_descriptor_does_not_start(self):
        fd = 'import socket\nsocket.send_fds(socket.socket(fileno=os.dup(3)), [b"C"], [0])\n'
        with self.assertRaisesRegex(instance.StartFailed, 'closed its channel'):
            Function(self.stack).deploy(1, SOURCE % 'x' + fd)

    @inside.inside
    def test_one_that_is_on_its_way_gives_way_to_a_new_revision(self):
        function = Function(self.stack)
        with mock.patch.object(scaler, 'CRASH_FIRST_DELAY_S', 0.01):
            function.deploy(1)
            slow = 'import time\ntime.sleep(3)\n'
            pathlib.Path(function.pool.revision.folder, 'handler.py').write_text(slow + SOURCE % 'late')
            function.ask(b'die')
            client = function.connect()
            lab.wait_until(lambda: function.pool._starting, 5, 'the next')
            function.deploy(2)
        self.assertEqual(b'revision 2', inside.read_all(client))
        lab.wait_until(lambda: len(function.pool.instances) == 1, 10, 'the late one to go')
        self.assertEqual('revision 2', function.ask())

    @inside.inside
    def test_a_thousand_deaths_do_not_end_the_trying(self):
        function = Function(self.stack)
        function.deploy(1)
        function.pool._scaler._failures = 5000
        with mock.patch.object(scaler, 'CRASH_LAST_DELAY_S', 0.2):
            function.ask(b'die')
            self.assertEqual('revision 1', function.ask())


class Starting(inside.InHost):
    @inside.inside
    def test_one_that_does_not_start_says_why_and_leaves_the_other_serving(self):
        function = Function(self.stack, start_timeout_s=1.5)
        function.deploy(1)
        for number, (source, reason, log) in enumerate(
            (
                (REFUSES, 'RuntimeError: no licence', ['one', 'Traceback']),
                (DIES, 'ended with exit code 7', []),
                (DIES.replace('7', '200'), 'ended with exit code 200', []),
                ('import time\ntime.sleep(60)\n', r'not ready within 1.5 s \(FAAS_START_TIMEOUT\)', []),
            ),
            2,
        ):
            with self.subTest(reason):
                with self.assertRaisesRegex(pool.StartFailed, reason) as caught:
                    function.pool.start(function.revision(number, source))
                self.assertEqual(log, [line.split(' ')[0] for line in caught.exception.log[: len(log)]])
                self.assertEqual('revision 1', function.ask())
        self.assertEqual(('running', None), function.pool.status())
        self.assertEqual([], function.events)

    @inside.inside
    def test_without_descriptors_it_fails_and_can_be_tried_again(self):
        function = Function(self.stack)
        revision = function.revision(1)
        none_left = mock.patch.object(protocol, 'pair', side_effect=OSError(24, 'Too many open files'))
        with none_left, self.assertRaisesRegex(pool.StartFailed, 'Too many open files'):
            function.pool.start(revision)
        function.pool.cut_over(function.pool.start(revision))
        self.assertEqual('revision 1', function.ask())

    @inside.inside
    def test_in_a_closed_pool_nothing_starts(self):
        function = Function(self.stack)
        function.close(5).result(5)
        with self.assertRaisesRegex(pool.StartFailed, 'shut down'):
            function.pool.start(function.revision(1))

    @inside.inside
    def test_one_that_was_not_wanted_after_all_is_gone(self):
        function = Function(self.stack)
        function.deploy(1)
        instance = function.pool.start(function.revision(2))
        function.pool.discard(instance)
        self.assertEqual(InstanceState.DEAD, instance.state)
        self.assertEqual('revision 1', function.ask())

    @inside.inside
    def test_one_that_dies_between_its_readiness_and_its_turn_is_replaced(self):
        function = Function(self.stack)
        instance = function.pool.start(function.revision(1))
        function.end(instance)
        instance.gone.result(10)
        function.pool.cut_over(instance)
        self.assertEqual('revision 1', function.ask())

    @inside.inside
    def test_without_a_running_one_the_first_connection_starts_it(self):
        function = Function(self.stack, deployed=True)
        self.assertEqual(('idle', None), function.pool.status())
        self.assertEqual('revision 1', function.ask())
        self.assertEqual(('running', None), function.pool.status())

    @inside.inside
    def test_what_it_says_of_itself_is_one_printable_line(self):
        function = Function(self.stack)
        source = 'raise RuntimeError("\\x1b[2J\\rx")\n'
        with self.assertRaises(pool.StartFailed) as caught:
            function.pool.start(function.revision(1, source))
        self.assertTrue(str(caught.exception).isprintable(), caught.exception)


if __name__ == '__main__':
    unittest.main()
