"""runtime.py in its real container: four ways to be served, many connections on few threads, every way to end."""

import contextlib
import os
import pathlib
import signal
import socket
import unittest

from handlers.containers import protocol, runtime
from tests import inside, lab

HTTP = """
from http.server import BaseHTTPRequestHandler
import time
class Answer(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    def do_GET(self):
        if self.path == '/slow':
            time.sleep(1)
        if self.path == '/raise':
            raise ValueError('on purpose')
        body = f'{self.path} {self.client_address[0]}'.encode()
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
"""

# The document's handler: connect, one descriptor, serve, exit.
CONTROL = """
import array
import os
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f'{os.getpid()} {__name__} {self.client_address[0]}'.encode())

def receive_socket_fd():
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    control.connect('/control.sock')
    fds = array.array('i')
    message, ancillary, flags, address = control.recvmsg(1, socket.CMSG_LEN(fds.itemsize))
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[:fds.itemsize])
    return fds[0]

if os.path.exists('/tmp/die'):
    sys.exit(3)
tcp_fd = receive_socket_fd()
client_sock = socket.fromfd(tcp_fd, socket.AF_INET6, socket.SOCK_STREAM)
first = client_sock.recv(9, socket.MSG_PEEK)
if first == b'GET /die ':
    open('/tmp/die', 'w').close()
Handler(client_sock, client_sock.getpeername(), None)
sys.exit(0)
"""

GET = b'GET /%s HTTP/1.1\r\nHost: x\r\n\r\n'


class Syntax(unittest.TestCase):
    def test_only_the_string_itself_speaks_to_the_control_socket(self):
        for source, speaks in (
            (b"connect('/control.sock')", True),
            (b"connect(b'/control.sock')", True),
            (b'x = "/control" ".sock"', False),  # the bytes are not in the file: it is not looked for
            (b"# '/control.sock'", False),
            (b"'''a text about /control.sock'''", False),
            (b'', False),
        ):
            self.assertEqual(speaks, runtime.speaks_control(source, 'handler.py'), source)


class InContainer(inside.InHost):
    def start(self, source, **more):
        """An instance that ends with the test."""
        if not hasattr(self, 'them'):
            self.them = self.stack.enter_context(inside.prepared())
        return self.stack.enter_context(inside.Instance(self.them, source, **more))

    @staticmethod
    def threads(instance):
        """(threads, descriptors, processes) of the container's runtime, the child of its PID 1."""
        children = pathlib.Path(f'/proc/{instance.pid}/task/{instance.pid}/children').read_text().split()
        folder = f'/proc/{children[0]}'
        return len(os.listdir(f'{folder}/task')), len(os.listdir(f'{folder}/fd')), len(children)


class Kinds(InContainer):
    @inside.inside
    def test_a_request_handler_class(self):
        instance = self.start(HTTP).wait_up()
        self.assertEqual('class Answer', instance.ready)
        with instance.connect(GET % b'a' + GET % b'b') as client:
            self.assertEqual((200, b'/a ::1'), inside.read_response(client)[::2])
            self.assertEqual((200, b'/b ::1'), inside.read_response(client)[::2])
            client.sendall(GET % b'c')
            self.assertEqual((200, b'/c ::1'), inside.read_response(client)[::2])

    @inside.inside
    def test_the_most_derived_of_the_handlers_own_classes(self):
        source = (
            HTTP + 'class Base(Answer):\n    pass\nclass Last(Base):\n    def do_PUT(self):\n        self.do_GET()\n'
        )
        self.assertEqual('class Last', self.start(source).wait_up().ready)

    @inside.inside
    def test_a_wsgi_app_gets_what_pep_3333_says(self):
        instance = self.start(
            'import io, sys\n'
            'from wsgiref.validate import validator\n'
            '@validator\n'
            'def app(environ, start_response):\n'
            '    body = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"] or 0))\n'
            '    start_response("201 Created", [("Content-Type", "text/plain"), ("X-Test", "1")])\n'
            '    text = [environ[key] for key in ("REQUEST_METHOD", "PATH_INFO", "QUERY_STRING", "REMOTE_ADDR")]\n'
            '    return [" ".join(text).encode(), b"\\n", body]\n'
        ).wait_up()
        self.assertEqual('WSGI app', instance.ready)
        answer = instance.ask(b'POST /a%20b?x=1 HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody')
        head, _, body = answer.partition(b'\r\n\r\n')
        self.assertIn(b' 201 Created\r\n', head)
        self.assertIn(b'\r\nX-Test: 1', head)
        self.assertEqual(b'POST /a b x=1 ::1\nbody', body, instance.output())

    @inside.inside
    def test_a_handle_function(self):
        instance = self.start(
            'def handle(connection, address):\n    connection.sendall(repr(address).encode())'
        ).wait_up()
        self.assertEqual('handle', instance.ready)
        self.assertTrue(instance.ask(b'x').startswith(b"('::1', "))

    @inside.inside
    def test_the_documents_control_handler_is_a_process_for_each_connection(self):
        instance = self.start(CONTROL).wait_up()
        self.assertEqual('/control.sock', instance.ready)
        answers = [instance.ask() for _ in range(6)]
        bodies = [answer.partition(b'\r\n\r\n')[2].split() for answer in answers]
        self.assertEqual(6, len({pid for pid, *_ in bodies}))
        self.assertEqual({(b'__main__', b'::1')}, {tuple(rest) for _, *rest in bodies})
        instance.wait_done(6)
        before = self.threads(instance)
        for _ in range(5):
            instance.ask()
        instance.wait_done(11)
        self.assertEqual(before, self.threads(instance))

    @inside.inside
    def test_a_control_handler_that_dies_before_it_fetches_is_a_502(self):
        instance = self.start(CONTROL).wait_up()
        instance.ask(b'GET /die HTTP/1.0\r\n\r\n')
        self.assertEqual(protocol.BAD_GATEWAY, instance.ask())
        instance.wait_done(2)

    @inside.inside
    def test_they_are_looked_for_in_this_order(self):
        all_four = HTTP + 'def app(environ, start): pass\ndef handle(connection, address): pass\n'
        self.assertEqual('/control.sock', self.start(all_four + 'where = "/control.sock"\n').wait_up().ready)
        self.assertEqual('class Answer', self.start(all_four).wait_up().ready)
        self.assertEqual('WSGI app', self.start(all_four.replace('(BaseHTTPRequestHandler)', '')).wait_up().ready)

    @inside.inside
    def test_none_of_them_is_refused_with_all_four_named(self):
        instance = self.start('x = 1\n')
        failed = instance.wait_failed()
        for word in ('BaseHTTPRequestHandler', '`app`', '`handle(connection, address)`', '/control.sock'):
            self.assertIn(word, failed)
        self.assertNotIn('\n', failed)
        self.assertEqual('ended with exit code 1', instance.wait_end())

    @inside.inside
    def test_code_that_does_not_load_is_told_in_its_own_lines(self):
        for source, reason, line in (
            ('def broken(:\n', 'SyntaxError', 'def broken(:'),
            ('import nowhere\n', "ModuleNotFoundError: No module named 'nowhere'", 'import nowhere'),
            ('def f():\n    raise ValueError("no")\nf()\n', 'ValueError: no', 'raise ValueError("no")'),
            ('import sys\nsys.exit("gone")\n', 'SystemExit: gone', 'sys.exit'),
        ):
            instance = self.start(source)
            self.assertIn(reason, instance.wait_failed())
            instance.wait_end()
            self.assertIn(line, instance.output())
            self.assertIn('/function/handler.py', instance.output())
            self.assertNotIn('runtime.py', instance.output())

    @inside.inside
    def test_modules_beside_it_are_found_also_one_called_protocol(self):
        source = 'import protocol, helper\ndef handle(c, a):\n    c.sendall((protocol.x + helper.x).encode())\n'
        instance = self.start(source, files={'protocol.py': 'x = "its own "', 'helper.py': 'x = "too"'}).wait_up()
        self.assertEqual(b'its own too', instance.ask(b'x'))


class Serving(InContainer):
    @inside.inside
    def test_idle_kept_alive_connections_hold_no_thread(self):
        instance = self.start(HTTP).wait_up()
        clients = [self.stack.enter_context(instance.connect(GET % b'x')) for _ in range(100)]
        for client in clients:
            self.assertEqual(200, inside.read_response(client)[0])
        self.assertLess(self.threads(instance)[0], 10)
        with instance.connect(GET % b'new') as client:
            self.assertEqual(b'/new ::1', inside.read_response(client)[2])
        clients[50].sendall(GET % b'again')
        self.assertEqual(b'/again ::1', inside.read_response(clients[50])[2])

    @inside.inside
    def test_silent_connections_hold_no_thread_either(self):
        instance = self.start(HTTP).wait_up()
        for _ in range(100):
            self.stack.enter_context(instance.connect())
        self.assertIn(b'200 OK', instance.ask())
        self.assertLess(self.threads(instance)[0], 10)

    @inside.inside
    def test_slow_requests_do_not_hold_up_others_and_threads_are_bounded(self):
        instance = self.start(HTTP).wait_up()
        slow = [self.stack.enter_context(instance.connect(GET % b'slow')) for _ in range(8)]
        with instance.connect(GET % b'quick') as client:
            client.settimeout(0.9)
            self.assertEqual(b'/quick ::1', inside.read_response(client)[2])
        for client in slow:
            self.assertEqual(b'/slow ::1', inside.read_response(client)[2])
        for _ in range(100):
            self.stack.enter_context(instance.connect(GET % b'slow'))
        with contextlib.suppress(TimeoutError):
            lab.wait_until(lambda: self.threads(instance)[0] > runtime.MOST_THREADS + 2, 0.7, 'too many threads')
            self.fail('a thread for each connection')

    @inside.inside
    def test_an_exception_is_a_500_and_its_traceback_is_in_the_log(self):
        instance = self.start(HTTP).wait_up()
        with instance.connect(GET % b'raise') as client:
            status, headers, _ = inside.read_response(client)
            self.assertEqual((500, 'close'), (status, headers['connection']))
            self.assertEqual(b'', client.recv(10))
        lab.wait_until(lambda: 'ValueError: on purpose' in instance.output(), 5, 'the traceback')
        self.assertIn('File "/function/handler.py"', instance.output())
        self.assertNotIn('runtime.py', instance.output())
        self.assertIn(b'200 OK', instance.ask())

    @inside.inside
    def test_an_exception_in_handle_or_app_is_in_the_log_and_the_next_is_served(self):
        for source in (
            'def handle(connection, address):\n    raise ValueError("on purpose")\n',
            'def app(environ, start_response):\n    raise ValueError("on purpose")\n',
        ):
            instance = self.start(source).wait_up()
            for _ in range(2):
                answer = instance.ask()
                self.assertIn(answer.partition(b'\r\n')[0][9:12], (b'', b'500'))
            lab.wait_until(lambda one=instance: one.output().count('ValueError: on purpose') == 2, 5, 'the traceback')

    @inside.inside
    def test_fifty_hand_offs_failing_ones_too_leave_no_descriptor(self):
        instance = self.start(HTTP).wait_up()
        instance.ask()
        instance.wait_done(1)
        before, mine = self.threads(instance)[1], len(os.listdir('/proc/self/fd'))
        for number in range(50):
            client = instance.connect(
                (b'', b'GET /raise HTTP/1.1\r\n\r\n', b'garbage\r\n\r\n', GET % b'x', b'GET')[number % 5]
            )
            if number % 3 == 0:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b'\1\0\0\0\0\0\0\0')  # a reset
            client.close()
        instance.wait_done(51)
        self.assertEqual(sorted(instance.done), list(range(51)))
        lab.wait_until(lambda: self.threads(instance)[1] == before, 5, f'{before} descriptors')
        self.assertEqual(mine, len(os.listdir('/proc/self/fd')))

    @inside.inside
    def test_orphans_are_reaped_and_exit_codes_are_the_functions_own(self):
        instance = self.start(
            'import subprocess, os\n'
            'def handle(connection, address):\n'
            '    connection.recv(100)\n'
            '    subprocess.run(["sh", "-c", "sleep 0.01 & sleep 0.02 &"])\n'
            '    code = subprocess.run(["sh", "-c", "exit 7"]).returncode\n'
            '    connection.sendall(str(code).encode())\n'
        ).wait_up()
        for _ in range(5):
            self.assertEqual(b'7', instance.ask())
        lab.wait_until(lambda: self.threads(instance)[2] == 1, 5, 'no orphan')


class Ending(InContainer):
    @inside.inside
    def test_stop_finishes_what_runs_and_closes_what_is_idle(self):
        instance = self.start(HTTP).wait_up()
        with instance.connect(GET % b'x') as idle, instance.connect(GET % b'slow') as slow:
            inside.read_response(idle)
            instance.stop(0)
            self.assertEqual(b'', idle.recv(10))
            status, headers, body = inside.read_response(slow)
            self.assertEqual((200, b'/slow ::1', 'close'), (status, body, headers.get('connection', '').lower()))
        self.assertEqual('ended with exit code 0', instance.wait_end())

    @inside.inside
    def test_stop_lets_idle_connections_ask_once_more_before_they_are_closed(self):
        instance = self.start(HTTP).wait_up()
        with instance.connect(GET % b'x') as idle:
            inside.read_response(idle)
            instance.stop(30)

            def last():  # it may hear the request before the word to stop
                idle.sendall(GET % b'x')
                status, headers, _ = inside.read_response(idle)
                self.assertEqual(200, status)
                return headers.get('connection') == 'close'

            lab.wait_until(last, 5, 'the last answer')
            self.assertEqual(b'', idle.recv(10))
        self.assertEqual('ended with exit code 0', instance.wait_end())

    @inside.inside
    def test_sigterm_and_the_end_of_the_channel_stop_it_gracefully(self):
        for end in (
            lambda instance: os.kill(instance.pid, signal.SIGTERM),
            lambda instance: instance.channel.shutdown(socket.SHUT_RDWR),
        ):
            instance = self.start(HTTP).wait_up()
            with instance.connect(GET % b'slow') as slow:
                lab.wait_until(lambda one=instance: self.fetched(one), 5, 'the hand-off')
                end(instance)
                self.assertEqual(b'/slow ::1', inside.read_response(slow)[2])
            self.assertEqual('ended with exit code 0', instance.wait_end())

    @staticmethod
    def fetched(instance):
        """True if the runtime holds a connection: a socket more than its channel."""
        child = pathlib.Path(f'/proc/{instance.pid}/task/{instance.pid}/children').read_text().split()[0]
        links = [os.readlink(f'/proc/{child}/fd/{fd}') for fd in os.listdir(f'/proc/{child}/fd')]
        return sum(link.startswith('socket:') for link in links) > 1

    @inside.inside
    def test_a_control_handler_has_its_turn_when_there_is_room_for_its_process(self):
        with inside.prepared(inside.LIMITS._replace(pids=6)) as them, inside.Instance(them, CONTROL) as instance:
            instance.wait_up()
            clients = [instance.connect() for _ in range(12)]  # they say nothing yet, so their processes wait
            for client in clients:
                client.sendall(GET % b'a')
            for client in clients:
                self.assertIn(b'__main__', inside.read_all(client))
                client.close()

    @inside.inside
    def test_a_control_handlers_instance_stops_after_its_processes(self):
        instance = self.start(CONTROL).wait_up()
        with instance.connect() as client:
            instance.stop(0)
            client.sendall(b'GET / HTTP/1.0\r\n\r\n')
            self.assertIn(b' 200 OK', inside.read_all(client))
        self.assertEqual('ended with exit code 0', instance.wait_end())


if __name__ == '__main__':
    unittest.main()
