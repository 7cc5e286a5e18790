"""Runs inside the container: loads /function/handler.py and serves the connections that faasd passes, several at once.

How handler.py is called depends on what it has. The first of these counts:
  1. it uses /control.sock itself: it runs as __main__, one process for each connection, and fetches it there
  2. a class derived from http.server.BaseHTTPRequestHandler
  3. a WSGI callable `app` (PEP 3333)
  4. a function `handle(connection, address)`

The threads wait on one epoll, and the one that wakes serves. No thread is started for a connection, no connection is
passed between threads, and an idle kept-alive connection holds no thread.
"""

import ast
import contextlib
import importlib.util
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import pace
import protocol

del sys.path[0], sys.modules['protocol'], sys.modules['pace']  # the function may have modules of these names

FUNCTION = '/function'
CONTROL = '/control.sock'
# Python runs one thread at a time, so threads that compute slow each other down. There are few threads. More are
# started only when all have been busy for a while, and they end when they have nothing to do.
FEW_THREADS, MOST_THREADS = 2, 32
ALL_BUSY_S = 0.005
MOST_PROCESSES = 32
KEEPALIVE_IDLE_S, SWEEP_S = 75, 5  # the longest silence between two requests; how often it is checked
SHARE = 3  # a client may hold so many times as many threads as are free: one alone gets 24 of 32
CROWD = 8  # while fewer threads serve, nobody is asked
KINDS = (
    'handler.py offers nothing to call: it needs a class derived from BaseHTTPRequestHandler, a WSGI callable `app`, '
    'a function `handle(connection, address)`, or to connect to /control.sock itself'
)


class Unusable(Exception):
    """The function cannot be served; the text is one line for the person who deploys it."""


def close(connection: socket.socket) -> None:
    """Close a connection so that the last bytes arrive: close() with unread input would reset it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)
        connection.setblocking(False)
        for _ in range(16):
            if not connection.recv(65536):
                break
    connection.close()


def report() -> None:
    """Print the current exception without the frames of the runtime."""
    kind, error, frames = sys.exc_info()
    while frames is not None and frames.tb_frame.f_code.co_filename.startswith((__file__, '<frozen importlib')):
        frames = frames.tb_next
    traceback.print_exception(kind, error, frames)


class Whole:
    """A connection that serve(connection, address) serves from the first to the last byte in one call."""

    def __init__(self, connection: socket.socket, address: tuple, serve: Callable) -> None:
        self.connection, self.address, self._serve = connection, address, serve

    def step(self) -> bool:
        self._serve(self.connection, self.address)
        return False


class Driven:
    """A connection of a BaseHTTPRequestHandler class. It is served one request at a time.

    Between two requests it waits without a thread.
    """

    def __init__(self, connection: socket.socket, address: tuple, make: Callable) -> None:
        self.connection, self.address, self._make = connection, address, make
        self._handler = None

    def step(self) -> bool:
        """Serve what has arrived. True: the client may send another request. False: the connection is done."""
        if self._handler is None:
            self._handler = self._make(self.connection, self.address, SERVER)
            self.connection.owes = self._handler.owes
        handler = self._handler
        while True:
            handler.close_connection, handler.answered, handler.part = True, False, HEAD
            self.connection.left_s = pace.GRACE_S
            try:
                handler.handle_one_request()
            except (ConnectionError, TimeoutError):
                raise
            except Exception:
                report()
                if not handler.answered:
                    handler.send_error(500, explain="the function raised an exception: see the function's log")
                handler.close_connection = True
            handler.part = None
            if handler.close_connection:
                if not handler.answered:
                    self.connection.refuse()
                handler.end()
                return False
            self.connection.setblocking(False)  # a pipelined request may be in the buffer already
            waiting = handler.rfile.peek(1)
            self.connection.settimeout(handler.timeout)
            if not waiting:
                return True


HEAD, BODY = 'head', 'body'  # of a request: what is being read


class Owes:
    """Of a BaseHTTPRequestHandler: says whether its client has to send more before it gets an answer."""

    part: str | None = HEAD

    def owes(self) -> bool:
        if self.part != BODY:
            return self.part == HEAD
        return 'Content-Length' in self.headers or 'Transfer-Encoding' in self.headers

    def parse_request(self) -> bool:
        parsed = super().parse_request()
        self.part = BODY
        return parsed


SERVER = types.SimpleNamespace(server_name='localhost', server_port=80, server_address=('::', 80, 0, 0))


def drive(handler_class: type, runtime: 'Runtime') -> Callable:
    """A maker of connections for a handler class. The class keeps its own setup(), do_GET() and so on."""
    from http.server import BaseHTTPRequestHandler

    if handler_class.handle is not BaseHTTPRequestHandler.handle:
        return lambda connection, address: Whole(connection, address, lambda *both: handler_class(*both, SERVER))

    class Requests(Owes, handler_class):
        def handle(self):  # __init__ calls it; Driven does the work
            pass

        def finish(self):
            pass

        def end(self):
            super().finish()

        def send_response_only(self, code, message=None):
            self.answered = code >= 200
            super().send_response_only(code, message)

        def end_headers(self):
            sent = b''.join(getattr(self, '_headers_buffer', ())).lower()
            if (runtime.stopping or self.close_connection) and b'\nconnection:' not in sent:
                self.send_header('Connection', 'close')  # the client must not use the connection again
            super().end_headers()

    Requests.__name__, Requests.__qualname__ = handler_class.__name__, handler_class.__qualname__
    return lambda connection, address: Driven(connection, address, Requests)


def wsgi(app: Callable) -> Callable:
    """A maker of connections for a WSGI application: one request for each connection, by wsgiref."""
    from wsgiref.simple_server import ServerHandler, WSGIRequestHandler

    server = types.SimpleNamespace(
        **vars(SERVER),
        base_environ={
            'SERVER_NAME': 'localhost',
            'SERVER_PORT': '80',
            'GATEWAY_INTERFACE': 'CGI/1.1',
            'REMOTE_HOST': '',
            'CONTENT_LENGTH': '',
            'SCRIPT_NAME': '',
        },
    )

    class Request(Owes, WSGIRequestHandler):
        def handle(self):
            self.connection.owes = self.owes
            try:
                self.raw_requestline = self.rfile.readline(65537)
                if not self.raw_requestline or not self.parse_request():
                    return
            except pace.TooSlow:
                return self.connection.refuse()
            handler = ServerHandler(self.rfile, self.wfile, sys.stderr, self.get_environ(), multithread=True)
            handler.request_handler = self  # for its log line
            handler.run(app)
            if not handler.headers_sent:
                self.connection.refuse()

    return lambda connection, address: Whole(connection, address, lambda *both: Request(*both, server))


class Runtime:
    """Serves connections from the channel with threads that stay.

    `connect(connection, address)` makes a Whole or a Driven of one.
    """

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self.stopping = False
        self._lock = threading.Lock()
        self._epoll = select.epoll()
        self._open = {}  # number → connection, being served or parked
        self._parked = {}  # fd → (number, since)
        self._serving = {}  # thread → address of the client that holds it
        self._deferred = []  # (number, fd as _step has it) that wait for others of their client
        self._threads = self._waiting = 0
        self._all_busy, self._over = threading.Event(), threading.Event()

    def run(self, connect: Callable) -> None:
        """Serve until stop() was called and every connection is done."""
        self._connect = connect
        self._epoll.register(self.channel, select.EPOLLIN | select.EPOLLONESHOT)
        while True:
            with self._lock:
                if self._threads and self._waiting:
                    self._all_busy.clear()
                elif self._threads < MOST_THREADS:
                    try:
                        threading.Thread(target=self._work, daemon=True).start()
                        self._threads += 1
                    except RuntimeError:  # FAAS_PIDS is reached: the others go on
                        if not self._threads:
                            raise
            if self._over.is_set():
                return
            if not self._all_busy.wait(SWEEP_S):
                self._close_idle(KEEPALIVE_IDLE_S)
            elif self._over.wait(ALL_BUSY_S):
                return

    def _work(self):
        while True:
            with self._lock:
                if self._waiting >= FEW_THREADS:
                    self._threads -= 1
                    return
                self._waiting += 1
            ((fd, _),) = self._epoll.poll(maxevents=1)
            with self._lock:
                self._waiting -= 1
                if not self._waiting:
                    self._all_busy.set()
            if fd == self.channel.fileno():
                self._receive()
            else:
                with self._lock:
                    number, _ = self._parked.pop(fd, (None, None))
                if number is not None:
                    self._step(number, fd)

    def _receive(self):
        number, connection = 0, None
        try:
            message, fd = protocol.receive(self.channel)
            if message[:1] in (protocol.CONNECTION, protocol.STOP):
                number = protocol.number_of(message)
            if fd is not None:
                connection = pace.Client(socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=fd)
        except (OSError, protocol.ProtocolError):  # it is not faasd: end as if it had closed
            message = b''
        kind = message[:1]
        if kind == protocol.CONNECTION and connection:
            self._open[number] = None  # before another thread can receive STOP
            self._listen_on()
            with contextlib.suppress(OSError):  # the client may be gone
                address = connection.getpeername()
                self._open[number] = self._connect(connection, address)
                return self._step(number, None) if arrived(connection) else self._park(number, new=True)
            self._done(number, connection)
        elif kind in (protocol.STOP, b''):
            self.stop(min(number, threading.TIMEOUT_MAX))
        else:
            self._listen_on()

    def _listen_on(self):
        self._epoll.modify(self.channel, select.EPOLLIN | select.EPOLLONESHOT)

    def stop(self, idle_s: float) -> None:
        """Finish the open requests. Close the connections that are idle after idle_s seconds."""
        self.stopping = True
        threading.Timer(idle_s, self._close_idle, (0,)).start()
        self._exit_when_done()

    def _close_idle(self, after_s):
        before = time.monotonic() - after_s
        with self._lock:
            idle = {fd: number for fd, (number, since) in self._parked.items() if since <= before}
            for fd in idle:
                del self._parked[fd]
        for number in idle.values():
            self._done(number, self._open[number].connection)

    def _park(self, number, new=False):
        connection = self._open[number].connection
        with self._lock:
            self._parked[connection.fileno()] = number, time.monotonic()
        events = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLONESHOT
        (self._epoll.register if new else self._epoll.modify)(connection, events)

    def _step(self, number, fd):
        """Serve a connection, and after that those that wait because their clients had their share of the threads."""
        me, entry = threading.get_ident(), (number, fd)
        if len(self._serving) >= CROWD:
            with self._lock:
                self._deferred.append(entry)  # first: who is done now either sees it or is not counted
                if not self._admits(number):
                    return
                self._deferred.remove(entry)
                self._serving[me] = self._address(number)
        while entry:
            self._serving[me] = self._address(entry[0])
            self._serve(*entry)
            del self._serving[me]
            entry = self._deferred and self._following(me)

    def _following(self, me):
        """One that has waited and may be served now, which counts from here on; None without one."""
        with self._lock:
            entry = next((each for each in self._deferred if self._admits(each[0])), None)
            if entry:
                self._deferred.remove(entry)
                self._serving[me] = self._address(entry[0])
            return entry

    def _address(self, number):
        return self._open[number].address[0]

    def _admits(self, number):
        """True if the client of a connection may hold one more thread. Called with the lock."""
        held = list(self._serving.values())
        return held.count(self._address(number)) < SHARE * (MOST_THREADS - len(held))

    def _serve(self, number, fd):
        try:
            if self._open[number].step():
                return self._park(number, new=fd is None)
        except (ConnectionError, TimeoutError):  # the client is gone, or too slow for the function's time-out
            pass
        except BaseException:
            report()
        self._done(number, self._open[number].connection)

    def _done(self, number, connection):
        connection.owes = None  # else the two hold each other
        close(connection)
        del self._open[number]
        with contextlib.suppress(OSError):
            protocol.send_number(self.channel, protocol.DONE, number)
        self._exit_when_done()

    def _exit_when_done(self):
        if self.stopping and not self._open:
            self._over.set()
            self._all_busy.set()


def arrived(connection: socket.socket) -> bool:
    """True if a read would not block: a request has arrived, or the client is gone."""
    try:
        connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        return False
    return True


class Processes:
    """Serves a handler.py that fetches the connection from /control.sock: one process for each connection."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self._children = {}  # pid → numbers of the connections of this process
        self._fds = {}  # number → descriptor not yet fetched
        self._queue = []  # numbers for which no process runs yet
        self._stopping = False
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path = os.path.realpath(CONTROL)
        os.makedirs(os.path.dirname(path))
        self._control.bind(path)
        self._control.listen(128)
        self._wake, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(wakes, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wakes)

    def run(self) -> bool:
        """Serve until the message STOP. Returns True in a child, which then runs the function, False at the end."""
        poll = select.poll()
        for fd in (self.channel, self._control, self._wake):
            poll.register(fd, select.POLLIN)
        while not (self._stopping and not self._children and not self._queue):
            while self._queue and len(self._children) < MOST_PROCESSES:
                try:
                    pid = os.fork()
                except BlockingIOError:  # FAAS_PIDS is reached: wait until a process ends
                    break
                if pid == 0:
                    self._leave()
                    return True
                self._children[pid] = [self._queue.pop(0)]
            for fd, _ in poll.poll(100 if self._queue else None):
                if fd == self.channel.fileno():
                    self._receive(poll)
                elif fd == self._control.fileno():
                    self._hand_out()
                else:
                    self._reap()
        return False

    def _leave(self):
        """In the child: close what belongs to the parent."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for fd in (self.channel.detach(), self._control.detach(), self._wake, *self._fds.values()):
            os.close(fd)

    def _receive(self, poll):
        message, fd = protocol.receive(self.channel)
        if fd is not None:
            number = protocol.number_of(message)
            self._fds[number] = fd
            self._queue.append(number)
        elif message[:1] in (protocol.STOP, b''):
            self._stopping = True
            poll.unregister(self.channel)

    def _hand_out(self):
        """Answer a process that asks: with the connection that it was started for, or the oldest not yet fetched."""
        asking, _ = self._control.accept()
        with asking:
            (pid,) = struct.unpack_from('i', asking.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            mine = [number for number in self._children.get(pid, ()) if number in self._fds]
            number = (mine or list(self._fds) or [None])[0]
            if number is not None:
                fd = self._fds.pop(number)
                with contextlib.suppress(OSError):
                    socket.send_fds(asking, [b'c'], [fd])
                os.close(fd)

    def _reap(self):
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 4096)
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, _ = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    break
                for number in self._children.pop(pid, ()):
                    if number in self._fds:  # the process ended without fetching its connection
                        with socket.socket(fileno=self._fds.pop(number)) as connection:
                            with contextlib.suppress(OSError):
                                connection.send(protocol.BAD_GATEWAY, socket.MSG_DONTWAIT)
                            close(connection)
                    with contextlib.suppress(OSError):
                        protocol.send_number(self.channel, protocol.DONE, number)


def speaks_control(source: bytes, path: str) -> bool:
    """True if the program has the string '/control.sock' in its syntax tree.

    A comment or a longer text does not count.
    """
    return CONTROL.encode() in source and any(
        isinstance(node, ast.Constant) and node.value in (CONTROL, CONTROL.encode())
        for node in ast.walk(ast.parse(source, path))
    )


def load(path: str) -> dict:
    """The namespace of the file at `path`, after it was imported as the module `handler`."""
    spec = importlib.util.spec_from_file_location('handler', path)
    module = sys.modules['handler'] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


def connections(namespace: dict, runtime: Runtime) -> tuple[str, Callable]:
    """(name, maker of connections) for the first of the ways to serve that the namespace has. Raises Unusable."""
    http = sys.modules.get('http.server')
    if http:
        classes = [
            item
            for item in namespace.values()
            if isinstance(item, type)
            and issubclass(item, http.BaseHTTPRequestHandler)
            and item.__module__ not in ('http.server', 'wsgiref.simple_server')
        ]
        classes = [
            item for item in classes if not any(other is not item and issubclass(other, item) for other in classes)
        ]
        if classes:
            return f'class {classes[-1].__name__}', drive(classes[-1], runtime)
    if callable(namespace.get('app')):
        return 'WSGI app', wsgi(namespace['app'])
    if callable(namespace.get('handle')):
        handle = namespace['handle']
        return 'handle', lambda connection, address: Whole(connection, address, handle)
    raise Unusable(KINDS)


def become_child_of_init() -> None:
    """Fork: PID 1 reaps orphans and passes SIGTERM on, and the child returns from here as the runtime.

    If the runtime were PID 1, reaping orphans would take the exit codes of the function's own subprocesses.
    """
    child = os.fork()
    if child == 0:
        return
    os.close(protocol.CHANNEL_FD)
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def main() -> int:
    channel = socket.socket(fileno=protocol.CHANNEL_FD)
    channel.set_inheritable(False)
    become_child_of_init()
    channel.send(protocol.HELLO + bytes((protocol.VERSION,)))
    path = os.path.join(FUNCTION, 'handler.py')
    more = os.environ.get('PYTHONPATH', '').split(':')  # which -I keeps from Python
    sys.path[:0] = [FUNCTION, *filter(os.path.isabs, more)]
    sys.argv = [path]
    runtime = Runtime(channel)
    signal.signal(signal.SIGTERM, lambda *_: channel.shutdown(socket.SHUT_RD))  # the next receive is the end
    try:
        with open(path, 'rb') as file:
            source = file.read()
        if speaks_control(source, path):
            kind, make = CONTROL, None
            processes, code = Processes(channel), compile(source, path, 'exec')
        else:
            kind, make = connections(load(path), runtime)
    except Unusable as error:
        print(error, file=sys.stderr)
        protocol.send_text(channel, protocol.FAILED, str(error))
        return 1
    except BaseException as error:
        report()
        protocol.send_text(
            channel, protocol.FAILED, ''.join(traceback.format_exception_only(error)).strip().splitlines()[-1]
        )
        return 1
    protocol.send_text(channel, protocol.READY, kind)
    if make:
        runtime.run(make)
    elif processes.run():
        main_module = sys.modules['__main__'] = types.ModuleType('__main__')
        main_module.__file__ = path
        exec(code, main_module.__dict__)
    return 0


if __name__ == '__main__':
    sys.exit(main())
