"""Servers that know nothing of faasd: what their listen() is answered with, and who gets the connections."""

import concurrent.futures
import contextlib
import os
import pathlib
import shutil
import signal
import socket
import threading
import time
import unittest

from handlers.containers import logs
from handlers.images import spec as specs
from handlers.serving import injection, listeners, pool
from handlers.serving.apart import Apart
from handlers.serving.instance import InstanceState, ServingMode
from handlers.serving.loop import Loop
from handlers.serving.server import Adopted, FaaSServer
from host import process, sock_diag
from host.guard import Unguarded
from tests import inside, lab

ADDRESS = 'fd00:faa5:1::a'

# A server that answers each connection with `text` and the client's address. Its ways of listening vary.
SERVER = """
import os, select, signal, socket, sys, threading, time
text = {text!r}
def listen(family=socket.AF_INET6, where='::', port=80, backlog=16, **options):
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind((where, port))
    if backlog:
        sock.listen(backlog)
    return sock
def answer(connection):
    with connection:
        connection.recv(4096)
        said = f'{{text}} {{connection.getpeername()[0]}}'.encode()
        head = b'HTTP/1.1 200 OK\\r\\nConnection: close\\r\\nContent-Length: %d\\r\\n\\r\\n' % len(said)
        connection.sendall(head + said)
def serve(sock):
    while True:
        answer(sock.accept()[0])
def serve_epoll(sock, epoll):
    while True:
        for fd, events in epoll.poll():
            assert not events & select.EPOLLHUP, 'it hangs up'
            try:
                answer(sock.accept()[0])
            except BlockingIOError:
                pass
{how}
"""


class Function:
    """A pool behind a real FaaSServer, in a host."""

    def __init__(self, stack, start_timeout_s=5, **around):
        self.events, self.stack, self.handed_over = [], stack, False
        self.folder = pathlib.Path(f'/var/lib/functions/{os.urandom(4).hex()}')
        self.folder.mkdir(parents=True)
        process.run(['ip', '-6', 'address', 'replace', f'{ADDRESS}/128', 'dev', 'lo', 'nodad'])
        self.loop = Loop()
        stack.callback(self.loop.stop)
        workers = stack.enter_context(concurrent.futures.ThreadPoolExecutor(4))
        self.containers = stack.enter_context(inside.prepared())
        self.around = pool.Surroundings(
            self.loop,
            self.containers,
            logs.LogCopier(),
            workers,
            lambda area, text, **more: self.events.append(text),
            start_timeout_s,
            injection.Injector(),
            Apart(),
            shutil.rmtree,
            **{'stop_timeout_s': 2, **around},
        )
        self.server = FaaSServer(self.loop, lambda *_, **__: None, Unguarded())
        self.open()
        stack.callback(lambda: self.close(0).result(20))
        self._ended = threading.Event()
        looker = threading.Thread(target=self.look)
        looker.start()
        stack.callback(looker.join)
        stack.callback(self._ended.set)

    def open(self, revision=None, adopted=None):
        self.pool = pool.Pool('test', logs.Log(str(self.folder / 'log')), self.around, revision)
        self.server.add_listener(ADDRESS, 'test', self.pool, adopted)
        self.group = self.server._listeners[ADDRESS].group

    def close(self, within_s, hand_over=False):
        return self.server.close_listener(ADDRESS, within_s, hand_over)

    def restart(self, within_s=2):
        """What a restart of faasd does: hand over, and adopt what goes on."""
        revision = self.pool.revision
        assert self.close(within_s, hand_over=True).result(20), 'nothing goes on'
        ((record, container),) = self.containers.prepare(lambda record: record['revision'] == revision.number)
        sock = self.containers.listener_of(record, container)
        assert sock, 'it has no listener'
        self.open(revision, Adopted(container, sock))

    def look(self):
        while not self._ended.wait(0.2):
            now, counts = time.monotonic(), {}
            for (_, uid), number in sock_diag.open_connections('fd00:faa5:1::/48', 80).counts.items():
                counts[uid] = number
            self.loop.call(self.pool.look, counts, now)

    def revision(self, number, how, text=None, ports=(), **more):
        tree = self.folder / str(number)
        tree.mkdir()
        (tree / 'server.py').write_text(SERVER.format(how=how, text=text or f'revision {number}'))
        spec = specs.Spec('command', ('/usr/bin/python3', '-u', 'server.py'), {}, '/function', ports=ports, **more)
        return pool.Revision(number, str(tree), spec, str(tree))

    def deploy(self, number, *args, **more):
        instance = self.pool.start(self.revision(number, *args, **more))
        self.pool.cut_over(instance)
        return instance

    def deploy_handler(self, number):
        tree = self.folder / str(number)
        tree.mkdir()
        (tree / 'handler.py').write_text(
            'def handle(connection, address):\n'
            '    connection.recv(999)\n'
            '    connection.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\nhandler")\n'
        )
        self.pool.cut_over(self.pool.start(pool.Revision(number, str(tree), inside.SPEC, str(tree))))

    def ask(self, timeout_s=10):
        with socket.create_connection((ADDRESS, 80), timeout=timeout_s) as client:
            client.sendall(b'GET / HTTP/1.0\r\n\r\n')
            return inside.read_all(client).partition(b'\r\n\r\n')[2].decode()


class Serving(inside.InHost):
    ANSWER = f'revision 1 {ADDRESS}'

    def serves(self, how, expected=ANSWER, **more):
        function = Function(self.stack)
        instance = function.deploy(1, how, **more)
        for _ in range(5):
            self.assertTrue(function.ask().startswith(expected), function.pool.log.last(20))
        return function, instance

    @inside.inside
    def test_one_that_listens_is_given_our_listener(self):
        function, instance = self.serves('serve(listen())')
        self.assertEqual(('port 80', None), (instance.description, instance.warning))
        self.assertEqual(ServingMode.LISTENING, instance.mode)
        self.assertEqual(('running', None), function.pool.status())

    @inside.inside
    def test_threads_that_call(self):
        self.serves('threading.Thread(target=lambda: serve(listen())).start()')

    @inside.inside
    def test_a_repeated_listen(self):
        self.serves('sock = listen(); sock.listen(5); sock.listen(10); serve(sock)')

    @inside.inside
    def test_epoll_registered_before_listen(self):
        self.serves(
            'sock = listen(backlog=0); sock.setblocking(False); epoll = select.epoll()\n'
            'epoll.register(sock, select.EPOLLIN); sock.listen(5); serve_epoll(sock, epoll)'
        )

    @inside.inside
    def test_nonblocking_and_inheritable_are_kept(self):
        for blocking in (True, False):
            for inheritable in (True, False):
                with self.subTest(blocking=blocking, inheritable=inheritable), contextlib.ExitStack() as self.stack:
                    flag = 0 if blocking else 'os.O_NONBLOCK'
                    self.serves(
                        f'sock = listen(backlog=0); sock.setblocking({blocking}); sock.set_inheritable({inheritable})\n'
                        'sock.listen(5)\nimport fcntl\n'
                        f'assert fcntl.fcntl(sock, fcntl.F_GETFL) & os.O_NONBLOCK == {flag}\n'
                        f'assert sock.get_inheritable() == {inheritable}\n'
                        'sock.setblocking(True); serve(sock)'
                    )

    @inside.inside
    def test_both_families_in_one_process_in_either_order(self):
        for first, second in (('AF_INET, "0.0.0.0"', 'AF_INET6, "::"'), ('AF_INET6, "::"', 'AF_INET, "0.0.0.0"')):
            with self.subTest(first), contextlib.ExitStack() as self.stack:
                _, instance = self.serves(
                    f'socks = [listen(socket.{first}), listen(socket.{second})]\nepoll = select.epoll()\n'
                    'four = next(s for s in socks if s.family == socket.AF_INET)\n'
                    'six = next(s for s in socks if s is not four)\n'
                    'assert four.getsockname() == ("0.0.0.0", 80), four.getsockname()\n'
                    'threading.Thread(target=serve, args=(four,), daemon=True).start()\n'
                    'with socket.create_connection(("127.0.0.1", 80)) as client:\n'
                    '    client.sendall(b"x"); assert client.recv(100), "not given back"\n'
                    'serve(six)'
                )
                self.assertIsNone(instance.warning)

    @inside.inside
    def test_children_that_accept_and_children_that_listen(self):
        self.serves('sock = listen()\nfor _ in range(3): os.fork()\nserve(sock)')
        with contextlib.ExitStack() as self.stack:
            self.serves('sock = listen(backlog=0)\nfor _ in range(2): os.fork()\nsock.listen(5)\nserve(sock)')

    @inside.inside
    def test_ipv4_alone_works_and_is_warned_of(self):
        _, instance = self.serves('serve(listen(socket.AF_INET, "0.0.0.0"))', 'revision 1 ')
        self.assertIn('IPv4', instance.warning)
        self.assertIn('[::]', instance.hint)

    def refuses(self, how, pattern, hint=None, **more):
        function = Function(self.stack, start_timeout_s=1.5)
        with self.assertRaisesRegex(pool.StartFailed, pattern) as caught:
            function.pool.start(function.revision(1, how, **more))
        if hint:
            self.assertIn(hint, caught.exception.hint)
        lab.wait_until(lambda: not function.pool.instances, 10, 'its end')
        return caught.exception

    @inside.inside
    def test_ipv4_alone_that_closes_on_ipv6_clients_is_refused(self):
        self.refuses(
            'sock = listen(socket.AF_INET, "0.0.0.0")\nwhile True: sock.accept()[0].close()',
            'IPv4 alone',
            'listen on [::]',
        )

    @inside.inside
    def test_one_that_never_listens_is_refused_with_its_log(self):
        error = self.refuses('print("here I am"); time.sleep(60)', r'not ready within 1.5 s \(FAAS_START_TIMEOUT\)')
        self.assertEqual(['here I am'], error.log)

    @inside.inside
    def test_one_that_ends_is_refused(self):
        self.refuses('sys.exit(3)', 'ended with exit code 3')

    @inside.inside
    def test_one_that_listens_and_ends_is_refused(self):
        self.refuses('listen(); time.sleep(0.1); sys.exit(3)', 'ended with exit code 3')
        with contextlib.ExitStack() as self.stack:
            how = 'sock = listen()\nif os.fork(): os._exit(0)\nserve(sock)'
            self.refuses(how, 'ended with exit code 0', 'stay in the foreground')

    @inside.inside
    def test_loopback_does_not_count(self):
        self.refuses('serve(listen(where="::1", port=5000))', '::1 port 5000 only', 'listen on [::], port 80')

    @inside.inside
    def test_a_port_that_is_not_exposed_does_not_count(self):
        self.refuses('serve(listen(port=3000))', ':: port 3000 only', 'port 8080', ports=(8080,))

    @inside.inside
    def test_which_port_counts(self):
        self.serves('serve(listen(port=5000))')
        for how, more in (
            ('other = listen(port=9090); serve(listen(port=80))', {}),
            ('other = listen(port=9090); serve(listen(port=8080))', {'ports': (8080,)}),
            ('assert os.environ["PORT"] == "8080"; serve(listen(port=8080))', {'ports': (8080,)}),
            ('serve(listen(port=int(os.environ["PORT"])))', {}),
        ):
            with self.subTest(how), contextlib.ExitStack() as self.stack:
                self.serves(how, **more)

    @inside.inside
    def test_unix_sockets_and_others_go_on_inside(self):
        self.serves(
            'path = "/tmp/s"; unix = socket.socket(socket.AF_UNIX); unix.bind(path); unix.listen()\n'
            'def echo():\n    while True: unix.accept()[0].sendall(b"unix")\n'
            'threading.Thread(target=echo, daemon=True).start()\n'
            'with socket.socket(socket.AF_UNIX) as c: c.connect(path); assert c.recv(9) == b"unix"\n'
            'try: os.close(os.dup(0)); socket.socket(socket.AF_INET6, socket.SOCK_DGRAM).listen()\n'
            'except OSError as error: assert error.errno == 95, error\n'
            'else: raise AssertionError\n'
            'serve(listen())'
        )

    @inside.inside
    def test_it_asks_for_connections_at_the_control_socket(self):
        function, instance = self.serves(
            'import array\nwhile True:\n'
            '    with socket.socket(socket.AF_UNIX) as control:\n'
            '        control.connect("/control.sock")\n'
            '        _, ancillary, _, _ = control.recvmsg(1024, socket.CMSG_LEN(4))\n'
            '    answer(socket.socket(fileno=array.array("i", ancillary[0][2])[0]))'
        )
        self.assertEqual('/control.sock', instance.description)
        self.assertEqual(ServingMode.CONTROL, instance.mode)

    @inside.inside
    def test_one_connection_for_each_process(self):
        function, instance = self.serves(
            'import array\nwith socket.socket(socket.AF_UNIX) as control:\n'
            '    control.connect("/control.sock")\n'
            '    _, ancillary, _, _ = control.recvmsg(1024, socket.CMSG_LEN(4))\n'
            'answer(socket.socket(fileno=array.array("i", ancillary[0][2])[0]))'
        )
        self.assertEqual([], function.events)

    @inside.inside
    def test_what_runc_exec_starts_may_listen_too(self):
        function, instance = self.serves('serve(listen())')
        listens = 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 81)); s.listen(); print("listens")'
        said = process.run(
            [*function.containers._runtime, 'exec', instance._container.ident, '/usr/bin/python3', '-c', listens]
        )
        self.assertEqual('listens\n', said.stdout)

    @inside.inside
    def test_one_that_listens_without_end_does_not_hold_up_the_others(self):
        flood = Function(self.stack)
        flood.deploy(
            1,
            'threading.Thread(target=serve, args=(listen(),)).start()\n'
            'while True:\n    with socket.socket() as s: s.bind(("127.0.0.1", 0)); s.listen()',
        )
        began = time.monotonic()
        instance = flood.pool._make(flood.pool, flood.revision(2, 'serve(listen())'), True)
        flood.loop.call(flood.pool._try, instance)
        instance.up.result(10)
        self.assertLess(time.monotonic() - began, 5)
        flood.pool.discard(instance)

    @inside.inside
    def test_one_that_floods_the_control_socket_does_not_hold_up_the_others(self):
        function, _ = self.serves(
            'sock = listen()\n'
            'if os.fork() and os.fork() and os.fork() and os.fork(): serve(sock)\n'
            'while True:\n'
            '    with socket.socket(socket.AF_UNIX) as s:\n'
            '        try: s.connect("/control.sock")\n'
            '        except OSError: pass'
        )
        turns = []
        for _ in range(50):
            began = time.monotonic()
            function.loop.wait(lambda: None)
            turns.append(time.monotonic() - began)
        self.assertLess(sorted(turns)[25], 0.05)

    @inside.inside
    def test_a_great_many_epoll_registrations_are_not_all_read(self):
        function = Function(self.stack)
        function.deploy(
            1,
            'socks = [socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) for _ in range(4000)]\n'
            'epolls = [select.epoll() for _ in range(50)]\n'
            'for epoll in epolls:\n    for each in socks: epoll.register(each, 1)\n'
            'began = time.monotonic()\nsock = listen()\nprint(f"{time.monotonic() - began:.3f} s")\nserve(sock)',
        )
        lab.wait_until(lambda: b' s\n' in function.pool.log.last(1), 5, 'its word')
        self.assertLess(float(function.pool.log.last(1).split()[0]), 0.5)

    @inside.inside
    def test_what_makes_answers_dear_gets_few_of_them(self):
        """3,000 descriptors make 300,000 registrations (of a number and an open file), all to be rendered."""
        function = Function(self.stack)
        function.deploy(
            1,
            'socks = [socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) for _ in range(3000)]\n'
            'epoll = select.epoll()\n'
            'for turn in range(100):\n'
            '    for number, each in enumerate(socks):\n'
            '        os.dup2(each.fileno(), 4000 + (number + turn) % 3000)\n'
            '        epoll.register(4000 + (number + turn) % 3000, 1)\n'
            'keep = []\n'
            'while True:\n'
            '    sock = socket.socket(socket.AF_INET6)\n'
            '    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)\n'
            '    sock.bind(("::", 80))\n    sock.listen()\n    keep.append(sock)',
        )
        began = time.process_time()
        time.sleep(3)
        self.assertLess(time.process_time() - began, 1)

    @inside.inside
    def test_what_it_does_to_its_listener_holds_up_neither_its_successor_nor_its_removal(self):
        refused = (
            'for option in (25, 44, 51, 52, 62, 68, 1 << 32 | 44):\n'
            '    import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n'
            '    for level in (1, 1 << 32 | 1):\n'
            '        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)\n'
            '        program = ctypes.create_string_buffer(16)\n'
            '        done = libc.syscall(SETSOCKOPT, sock.fileno(), ctypes.c_ulong(level), ctypes.c_ulong(option),'
            ' program, 16)\n'
            '        assert done == -1 and ctypes.get_errno() == 1, (option, level, done)\n'
        ).replace('SETSOCKOPT', {'x86_64': '54', 'aarch64': '208'}[os.uname().machine])
        alone = 'for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT): sock.setsockopt(1, option, 0)\n'
        function, _ = self.serves(f'sock = listen()\n{refused}{alone}serve(sock)')
        with contextlib.suppress(OSError):  # who was accepted has the same options, and keeps others from the address
            function.deploy(2, 'serve(listen())')
        self.assertIn('revision', function.ask())
        function.close(1).result(10)

    @inside.inside
    def test_one_that_cannot_be_steered_away_from_is_ended_all_the_same(self):
        function, instance = self.serves('serve(listen())')

        def add():
            raise OSError(98, 'Address already in use')

        function.group.add = add
        with self.assertRaisesRegex(pool.StartFailed, 'Address already in use'):
            function.pool.start(function.revision(2, 'serve(listen())'))
        function.loop.wait(function.pool._scale_to_zero)
        self.assertEqual(('running', None), function.pool.status())
        function.close(1).result(10)
        self.assertEqual(InstanceState.DEAD, instance.state)

    @inside.inside
    def test_no_descriptor_leaks(self):
        function, _ = self.serves('serve(listen(socket.AF_INET, "0.0.0.0"))', 'revision 1 ')
        lab.wait_until(lambda: len(function.pool.instances) == 1, 20, 'one instance')
        before = len(os.listdir('/proc/self/fd'))
        for number in range(2, 6):
            function.deploy(number, 'socks = [listen(socket.AF_INET, "0.0.0.0"), listen()]; serve(socks[1])')
            with self.assertRaises(pool.StartFailed):
                function.pool.start(function.revision(number + 10, 'sys.exit(1)'))
        lab.wait_until(lambda: len(function.pool.instances) == 1, 30, 'one instance')
        lab.wait_until(lambda: len(os.listdir('/proc/self/fd')) <= before, 10, f'no more than {before} descriptors')

    @inside.inside
    def test_a_listener_that_was_shut_down_is_revived(self):
        function, _ = self.serves(
            'sock = listen()\nwhile True:\n'
            '    try: answer(sock.accept()[0])\n'
            '    except OSError: time.sleep(0.05)\n'
            '    if os.path.exists("/function/shut"):\n'
            '        sock.shutdown(2)\n'
            '        while os.path.exists("/function/shut"): time.sleep(0.01)\n'
        )
        shut = function.folder / '1' / 'shut'
        shut.touch()
        with contextlib.suppress(OSError):  # it may look for the file before it answers
            function.ask()
        lab.wait_until(lambda: not listeners.listens(function.group.current), 5, 'the shutdown')
        shut.unlink()
        lab.wait_until(lambda: listeners.listens(function.group.current), 5, 'its revival')
        self.assertEqual(self.ANSWER, function.ask())


class Turns(inside.InHost):
    ANSWER = Serving.ANSWER

    @inside.inside
    def test_what_waits_at_one_that_is_killed_is_served_by_the_next(self):
        function = Function(self.stack)
        instance = function.deploy(
            1, 'sock = listen()\nwhile not os.path.exists("/function/go"): time.sleep(0.01)\nserve(sock)'
        )
        with concurrent.futures.ThreadPoolExecutor(20) as clients:
            answers = [clients.submit(function.ask) for _ in range(20)]
            lab.wait_until(lambda: listeners.queued(function.group.current) == 20, 5, 'the queue')
            (function.folder / '1' / 'go').touch()
            os.kill(instance._container.pid, signal.SIGKILL)
            answers = [each.result(20) for each in answers]
        served = [each for each in answers if each == f'revision 1 {ADDRESS}']
        self.assertGreaterEqual(len(served), 19)  # one may have been accepted when the end came

    @inside.inside
    def test_redeploys_under_load_lose_nothing(self):
        function = Function(self.stack)
        function.deploy(1, 'serve(listen())')
        failed, asked, going = [], [], threading.Event()

        def load():
            while not going.is_set():
                try:
                    asked.append(function.ask())
                except OSError as error:
                    failed.append(error)

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        for number in range(2, 7):
            function.deploy(number, 'serve(listen())')
            lab.wait_until(lambda number=number: function.ask().startswith(f'revision {number}'), 5, 'the new one')
        going.set()
        for thread in threads:
            thread.join()
        self.assertEqual(([], 0), (failed, asked.count('')))
        self.assertGreater(len(asked), 100)
        lab.wait_until(lambda: len(function.pool.instances) == 1, 20, 'the former ones to end')
        self.assertEqual(1, len(function.group._order))

    @inside.inside
    def test_two_redeploys_while_one_answers_and_would_end_with_its_listener(self):
        function = Function(self.stack)
        instance = function.deploy(1, ENDS_WITH_ITS_LISTENER.replace('SLOW_S', '3'))
        with concurrent.futures.ThreadPoolExecutor() as clients:
            slow = clients.submit(function.ask)
            lab.wait_until(lambda: function.pool.connections_of(instance._container), 5, 'the connection')
            for number in (2, 3):
                function.deploy(number, 'serve(listen())')
            self.assertEqual(self.ANSWER, slow.result())
        self.assertEqual(f'revision 3 {ADDRESS}', function.ask())

    @inside.inside
    def test_an_idle_one_is_stopped_and_the_next_connection_starts_one(self):
        function = Function(self.stack, idle_timeout_s=0.5)
        function.deploy(1, 'signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); serve(listen())')
        lab.wait_until(lambda: function.pool.status() == ('idle', None), 10, 'its rest')
        lab.wait_until(lambda: not function.pool.instances, 10, 'its end')
        self.assertEqual(f'revision 1 {ADDRESS}', function.ask())
        lab.wait_until(lambda: function.pool.status() == ('running', None), 5, 'the word of it')

    @inside.inside
    def test_from_one_way_to_serve_to_the_other(self):
        function = Function(self.stack)
        function.deploy(1, 'serve(listen())')
        function.deploy_handler(2)
        self.assertEqual(['handler'] * 3, [function.ask() for _ in range(3)])
        lab.wait_until(lambda: len(function.pool.instances) == 1, 20, 'the end of the former')
        function.deploy(3, 'serve(listen())')
        self.assertEqual([f'revision 3 {ADDRESS}'] * 3, [function.ask() for _ in range(3)])


# Ends when its listener is shut down, as log.Fatal(http.ListenAndServe(…)) does. Answers after SLOW_S.
ENDS_WITH_ITS_LISTENER = (
    'def slow(connection):\n    time.sleep(SLOW_S)\n    answer(connection)\n'
    'sock = listen()\nwhile True:\n'
    '    try: connection = sock.accept()[0]\n'
    '    except OSError: os._exit(1)\n'
    '    threading.Thread(target=slow, args=(connection,)).start()'
)


class Restarts(inside.InHost):
    """Of faasd, while an instance listens by itself."""

    def owned(self, function):
        """Assert that the instance that serves has the listener that connections are steered to."""
        serving = function.pool._serving
        self.assertIs(function.group.current, serving.listener)

    @inside.inside
    def test_clients_that_wait_start_nothing_at_the_adopted_listener(self):
        function = Function(self.stack)
        function.deploy(1, 'sock = listen()\nwhile not os.path.exists("/function/go"): time.sleep(0.01)\nserve(sock)')
        with concurrent.futures.ThreadPoolExecutor(8) as clients:
            answers = [clients.submit(function.ask) for _ in range(8)]
            lab.wait_until(lambda: listeners.queued(function.group.current) == 8, 5, 'the queue')
            function.restart()
            self.owned(function)
            starting = function.pool._starting
            self.assertIsNot(function.group.current, starting and starting.listener)
            lab.wait_until(lambda: function.pool._serving.mode == ServingMode.LISTENING, 10, 'the next instance')
            self.owned(function)
            (function.folder / '1' / 'go').touch()
            self.assertEqual([f'revision 1 {ADDRESS}'] * 8, [each.result(20) for each in answers])
        self.assertEqual(f'revision 1 {ADDRESS}', function.ask())

    @inside.inside
    def test_restarts_under_load_lose_nothing(self):
        function = Function(self.stack)
        function.deploy(1, 'serve(listen())')
        failed, asked, going = [], [], threading.Event()

        def load():
            while not going.is_set():
                try:
                    asked.append(function.ask())
                except OSError as error:
                    failed.append(error)

        threads = [threading.Thread(target=load) for _ in range(8)]
        for thread in threads:
            thread.start()
        for pause_s in (0, 0.2, 0.5, 1, 1.5, 0.1):  # before the next instance serves, while the former drains, after it
            count = len(asked)
            function.restart()
            self.owned(function)
            lab.wait_until(lambda count=count: len(asked) > count + 20, 10, 'answers')
            time.sleep(pause_s)
        lab.wait_until(lambda: function.pool._serving.mode == ServingMode.LISTENING, 10, 'the next instance')
        self.owned(function)
        going.set()
        for thread in threads:
            thread.join()
        self.assertEqual(([], 0), (failed, asked.count('')))
        lab.wait_until(lambda: len(function.pool.instances) == 1, 20, 'the former ones to end')

    def finishes_its_answer(self, replace, end):
        """What an instance answers outlives `replace(function)`, and `end(function)` right after it."""
        function = Function(self.stack)
        instance = function.deploy(1, ENDS_WITH_ITS_LISTENER.replace('SLOW_S', '3'))
        with concurrent.futures.ThreadPoolExecutor() as clients:
            slow = clients.submit(function.ask)
            lab.wait_until(lambda: function.pool.connections_of(instance._container), 5, 'the connection')
            replace(function)
            self.assertEqual(InstanceState.DRAINING, instance.state)
            end(function)
            self.assertEqual(f'revision 1 {ADDRESS}', slow.result())
        return function

    @staticmethod
    def by_a_program(function):
        function.deploy(2, 'serve(listen())')

    @staticmethod
    def by_a_handler(function):
        function.deploy_handler(2)

    @staticmethod
    def remove(function):
        assert not function.close(10).result(15)

    @inside.inside
    def test_what_a_replaced_instance_answers_outlives_a_hand_over(self):
        function = self.finishes_its_answer(self.by_a_program, lambda function: function.restart(10))
        self.assertEqual(f'revision 2 {ADDRESS}', function.ask())

    @inside.inside
    def test_what_a_replaced_instance_answers_outlives_a_removal(self):
        self.finishes_its_answer(self.by_a_program, self.remove)

    @inside.inside
    def test_what_a_program_answers_outlives_the_removal_of_the_handler_that_replaced_it(self):
        self.finishes_its_answer(self.by_a_handler, self.remove)

    @inside.inside
    def test_a_handler_does_not_go_on(self):
        function = Function(self.stack)
        function.deploy_handler(1)
        self.assertFalse(function.close(2, hand_over=True).result(10))
        with self.assertRaises(ConnectionRefusedError):
            function.ask()


class Candidates(unittest.TestCase):
    def test_expose_then_port_then_80(self):
        for ports, env, expected in (
            ((), {}, (80,)),
            ((), {'PORT': '3000'}, (3000,)),
            ((), {'PORT': 'many'}, (80,)),
            ((), {'PORT': '70000'}, (80,)),
            ((8080,), {}, (8080,)),
            ((443, 80), {}, (80, 443)),
            ((5000, 3000), {'PORT': '5000'}, (5000, 3000)),
            ((5000, 3000), {'PORT': '80'}, (3000, 5000)),
        ):
            with self.subTest(ports=ports, env=env):
                self.assertEqual(expected, specs.candidates(specs.Spec('command', ('x',), env, ports=ports)))
