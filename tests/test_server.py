"""FaaSServer with real listeners and real connections; the instances are fakes."""

import contextlib
import copy
import os
import resource
import socket
import subprocess
import sys
import threading
import time
import unittest

from handlers.serving import pool, server
from handlers.serving.loop import Loop
from handlers.serving.server import FaaSServer
from host import process
from host.guard import Unguarded
from tests import fakes, inside, lab

ADDRESS = 'fd00:faa5:1::a'
# Opens that many connections, says so, and keeps them until its stdin ends.
CLIENTS = """
import resource, socket, sys
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
held = [socket.create_connection((sys.argv[1], 80)) for _ in range(int(sys.argv[2]))]
print('connected', flush=True)
sys.stdin.read()
"""


def limit_descriptors(number):
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))


class Instance(fakes.FakeInstance):
    """Ready at once; holds what it gets."""

    def begin(self):
        self.capacity = 1 << 20
        self.pool.around.loop.call(self.come_up)


class Function:
    address = ADDRESS

    def __init__(self, stack, descriptors=None):
        self.events, self.stack, self.made = [], stack, []
        process.run(['ip', '-6', 'address', 'replace', f'{ADDRESS}/128', 'dev', 'lo', 'nodad'])
        self.loop = Loop()
        stack.callback(self.close_taken)
        stack.callback(self.loop.stop)
        self.around = pool.Surroundings(
            self.loop, None, None, fakes.FakeWorkers(), lambda *_, **__: None, 5, None, None, lambda folder: None
        )
        self.server = FaaSServer(self.loop, self.note, Unguarded(), descriptors)
        self.open()

    def open(self):
        self.pool = pool.Pool('test', fakes.FakeLog(), self.around, fakes.revision(1), self.make)
        self.server.add_listener(self.address, 'test', self.pool)
        self.stack.callback(self.server.close_listener, self.address, 0)

    def other(self, number):
        """Another function of the same server."""
        other = copy.copy(self)
        other.address, other.made = f'fd00:faa5:1::b{number}', []
        process.run(['ip', '-6', 'address', 'replace', f'{other.address}/128', 'dev', 'lo', 'nodad'])
        self.stack.callback(other.close_taken)
        other.open()
        return other

    def make(self, *args):
        self.made.append(Instance(*args))
        return self.made[-1]

    def close_taken(self):
        for instance in self.made:
            for connection in instance.took:
                connection.close()

    def note(self, area, text, name=None, problem=False):
        self.events.append((problem, text))

    @property
    def problems(self):
        return [text for problem, text in self.events if problem]

    def held(self):
        return [connection for instance in self.pool.instances for connection in instance.connections.values()]

    def close_held(self):
        def close():
            for instance in self.pool.instances:
                for connection in list(instance.connections.values()):
                    connection.close()
                    instance.finish(connection)

        self.loop.wait(close)

    def clients(self, count):
        """Another process with that many connections."""
        command = [sys.executable, '-c', CLIENTS, self.address, str(count)]
        clients = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.stack.callback(clients.communicate)
        assert clients.stdout.readline() == 'connected\n'
        return clients

    def idle(self):
        """Assert that the loop does not spin."""
        began = time.process_time()
        threading.Event().wait(0.5)
        spent = time.process_time() - began
        assert spent < 0.1, f'{spent} s of 0.5 s'


class Server(inside.InHost):
    @inside.inside
    def test_a_reserve_of_descriptors_is_kept(self):
        limit = len(os.listdir('/proc/self/fd')) + 160
        limit_descriptors(limit)
        function = Function(self.stack)
        first_reserved = limit - min(server.RESERVED_DESCRIPTORS, limit // 4)
        function.clients(400)
        lab.wait_until(lambda: function.problems, 5, 'the report')
        function.idle()
        held = len(function.held())
        self.assertLess(held, 400)
        self.assertGreater(held, 20)
        self.assertLess(max(connection.fileno() for connection in function.held()), first_reserved + 1)
        with contextlib.ExitStack() as others:  # the API has room
            for _ in range(20):
                others.enter_context(open('/proc/self/stat'))
        self.assertEqual(1, len(function.problems), function.problems)
        served = held
        while served < 400:  # nobody is forgotten
            function.close_held()
            lab.wait_until(function.held, 5, 'the next ones')
            function.idle()
            served += len(function.held())
        self.assertEqual(400, served)

    @inside.inside
    def test_one_function_leaves_descriptors_to_the_next(self):
        limit = 500
        functions = [Function(self.stack, descriptors=limit)]
        left = limit - min(server.RESERVED_DESCRIPTORS, limit // 4)
        for number in range(3):  # each takes what it can get
            functions[-1].clients(limit)
            lab.wait_until(functions[-1].held, 5, f'a client of function {number}')
            functions[-1].idle()
            held = len(functions[-1].held())
            self.assertGreater(held, left // 4, f'function {number}')
            self.assertLessEqual(held, left // 2, f'function {number}')
            left -= held
            functions.append(functions[0].other(number))
        self.assertEqual(
            ['test has as many of the descriptors as are left: its new connections wait'], functions[0].problems
        )

    @inside.inside
    def test_without_any_descriptor_it_waits_and_goes_on(self):
        function = Function(self.stack)
        limit = len(os.listdir('/proc/self/fd')) + 60
        limit_descriptors(limit)
        clients = function.clients(1)
        lab.wait_until(function.held, 5, 'one that is served')
        function.clients(0)
        taken = []
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.dup(0))
        for fd in taken[:2]:
            os.close(fd)
        client = socket.socket(socket.AF_INET6)
        last = os.dup(0)
        client.connect((ADDRESS, 80))
        lab.wait_until(lambda: function.problems, 5, 'the report')
        self.assertIn('Cannot accept: Too many open files', function.problems)
        function.idle()
        for fd in (*taken[2:], last):
            os.close(fd)
        lab.wait_until(lambda: len(function.held()) == 2, 5, 'the second one')
        self.assertIsNone(clients.poll())
        client.close()

    @inside.inside
    def test_nothing_is_handed_out_without_permission(self):
        function = Function(self.stack)
        function.server.permit(False)
        clients = function.clients(3)
        function.idle()
        self.assertEqual([], function.held())
        function.server.permit(True)
        lab.wait_until(lambda: len(function.held()) == 3, 5, 'the three')
        self.assertIsNone(clients.poll())

    @inside.inside
    def test_a_listener_that_is_added_without_permission_waits_for_it(self):
        function = Function(self.stack)
        function.server.permit(False)
        self.close(function)
        function.open()
        function.clients(1)
        function.idle()
        self.assertEqual([], function.held())
        function.server.permit(True)
        lab.wait_until(function.held, 5, 'it')

    def close(self, function):
        closed = function.server.close_listener(ADDRESS, 0)
        lab.wait_until(lambda: function.pool._closed, 5, 'the end')
        for instance in function.pool.instances:
            function.loop.wait(instance.end, 'ended by SIGTERM')
        return closed.result(5)

    @inside.inside
    def test_a_closed_listener_refuses_and_can_be_added_again(self):
        function = Function(self.stack)
        function.clients(1)
        lab.wait_until(function.held, 5, 'it')
        before = len(os.listdir('/proc/self/fd'))
        for _ in range(5):
            self.assertFalse(self.close(function))
            with self.assertRaises(ConnectionRefusedError):
                socket.create_connection((ADDRESS, 80))
            self.assertFalse(function.server.close_listener(ADDRESS, 0).result(5))
            function.open()
            function.clients(1)
            lab.wait_until(function.held, 5, 'it')
        self.assertLessEqual(len(os.listdir('/proc/self/fd')), before + 15)  # pipes of the clients

    @inside.inside
    def test_an_address_that_is_not_there_is_an_error_and_leaves_nothing(self):
        function = Function(self.stack)
        before = len(os.listdir('/proc/self/fd'))
        with self.assertRaises(OSError):
            function.server.add_listener('fd00:faa5:1::dead', 'other', function.pool)
        self.assertEqual(before, len(os.listdir('/proc/self/fd')))
        self.assertEqual([ADDRESS], list(function.server._listeners))

    @inside.inside
    def test_a_pool_that_fails_leaves_no_listener(self):
        function = Function(self.stack)
        self.close(function)
        broken = pool.Pool('test', fakes.FakeLog(), function.around, fakes.revision(1), function.make)

        def open_(*_):
            raise RuntimeError('broken')

        broken.open = open_
        with self.assertRaises(RuntimeError):
            function.server.add_listener(ADDRESS, 'test', broken)
        function.open()
        function.clients(1)
        lab.wait_until(function.held, 5, 'it')


if __name__ == '__main__':
    unittest.main()
