"""Runs Python in a lab host: a test method there uses the server's modules on real parts, and fails as any other."""

import contextlib
import ctypes
import fcntl
import functools
import gc
import json
import os
import pathlib
import pickle
import resource
import select
import signal
import socket
import struct
import sys
import tempfile
import time
import traceback
import unittest
import warnings

from handlers.containers import containers, limits, protocol
from handlers.images.spec import Spec
from handlers.serving.injection import Injector, Inside
from host import process
from tests import lab

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWNET = 0x20000, 0x4000000, 0x8000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
NOBODY = 65534

libc = ctypes.CDLL(None, use_errno=True)


def enter(path, kind):
    """Put this thread into the namespace at `path`. Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(fd, kind):
            raise OSError(ctypes.get_errno(), f'setns: {os.strerror(ctypes.get_errno())}')
    finally:
        os.close(fd)


def call(host, function, *args, timeout_s=60):
    """What function(*args) returns in a process of `host`, root there as a daemon would be.

    Raises AssertionError with its traceback, SkipTest as it did, TimeoutError.
    """
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _enter_and_call(host, function, args, writer)
    os.close(writer)
    deadline, data = time.monotonic() + timeout_s, b''
    try:
        while len(data) < 8 or len(data) < 8 + struct.unpack_from('Q', data)[0]:
            ready, _, _ = select.select([reader], [], [], max(0, deadline - time.monotonic()))
            if not ready:
                raise TimeoutError(f'{function.__name__} did not end within {timeout_s} s')
            chunk = os.read(reader, 65536)
            if not chunk:
                raise AssertionError(f'{function.__name__} died in {host.name}')
            data += chunk
    finally:
        os.kill(child, signal.SIGKILL)  # it only waited; its own child goes with it
        os.waitpid(child, 0)
        os.close(reader)
    kind, value = pickle.loads(data[8:])
    if kind == 'skip':
        raise unittest.SkipTest(value)
    if kind == 'error':
        raise AssertionError(f'in {host.name}:\n{value}')
    value, warned = value
    for text, category in warned:
        warnings.warn(f'in {host.name}: {text}', category, stacklevel=2)
    return value


def _enter_and_call(host, function, args, writer):
    # What this process forks and leaves behind must not hold the pipes on which the hosts live. The numbers stay
    # taken: objects that own them are still here.
    null = os.open('/dev/null', os.O_RDWR | os.O_CLOEXEC)
    for fd in map(int, os.listdir('/proc/self/fd')):
        if fd > 2 and fd not in (writer, null):
            with contextlib.suppress(OSError):
                os.fstat(fd)
                os.dup2(null, fd, inheritable=False)
    try:
        enter(f'/proc/{host.pid}/ns/pid', lab.CLONE_NEWPID)
        if os.fork():
            signal.pause()
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        entered = {'net': CLONE_NEWNET, 'uts': CLONE_NEWUTS, 'ipc': CLONE_NEWIPC, 'mnt': CLONE_NEWNS}
        fds = {kind: os.open(f'/proc/{host.pid}/ns/{kind}', os.O_RDONLY | os.O_CLOEXEC) for kind in entered}
        for kind, fd in fds.items():
            if libc.setns(fd, entered[kind]):
                raise OSError(ctypes.get_errno(), 'setns')
            os.close(fd)
        os.chdir(lab.REPO)
        environ = lab.environment()
        os.environ.clear()
        os.environ.update(environ)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter('always')
            value = function(*args)
            gc.collect()
        answer = 'value', (value, [(str(each.message), each.category) for each in warned])
    except unittest.SkipTest as skip:
        answer = 'skip', str(skip)
    except BaseException:
        answer = 'error', traceback.format_exc()
    data = pickle.dumps(answer)
    data = struct.pack('Q', len(data)) + data
    while data:
        data = data[os.write(writer, data) :]
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


@contextlib.contextmanager
def sub_test(what=None, **more):
    """subTest() that raises: unittest would note the failure in a result that ends with this process."""
    try:
        yield
    except Exception as error:
        error.add_note(f'with {what!r} {more or ""}')
        raise


def inside(method):
    """A test method that runs in `self.host`; what it enters into `self.stack` ends there too."""

    def body(self):
        self.subTest = sub_test
        with contextlib.ExitStack() as self.stack:
            method(self)

    @functools.wraps(method)
    def run(self):
        call(self.host, body, self)

    return run


@contextlib.contextmanager
def no_descriptor_left():
    """While it lasts this process cannot open anything: EMFILE."""
    lowest_free = os.open('/dev/null', os.O_RDONLY | os.O_CLOEXEC)
    os.close(lowest_free)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


_hosts = {}  # module → its host


@lab.needs_root
class InHost(unittest.TestCase):
    """Tests that share one host, self.host, with the others of their module."""

    @classmethod
    def setUpClass(cls):
        if cls.__module__ not in _hosts:
            _hosts[cls.__module__] = lab.Host('server')
            unittest.addModuleCleanup(lambda: _hosts.pop(cls.__module__).close())
        cls.host = _hosts[cls.__module__]


class OnDisk(InHost):
    """Tests of what is on a disk of its own."""

    def disk(self, options='size=4m'):
        """A new folder, with a file system in memory of these options."""
        folder = self.stack.enter_context(tempfile.TemporaryDirectory())
        process.run(['mount', '-t', 'tmpfs', '-o', options, 'test', folder])
        self.stack.callback(process.run, ['umount', '--lazy', folder])
        return pathlib.Path(folder)

    def fill(self, folder, left=0):
        """Take all of the room but `left` bytes."""
        with open(folder / 'filler', 'ab', buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        os.truncate(folder / 'filler', os.stat(folder / 'filler').st_size - left)


def tunnel(laptop, private_key, server_key, ipv6):
    """The tunnel from the laptop of lab.pair() to its server, by hand: wg-faas with no route but its own network."""
    lab.add_wireguard(laptop, 'wg-faas')
    laptop.run(
        ['wg', 'setconf', 'wg-faas', '/dev/stdin'],
        input=f'[Interface]\nPrivateKey = {private_key}\n[Peer]\nPublicKey = {server_key}\n'
        f'Endpoint = {lab.SERVER[0].partition("/")[0]}:51820\nAllowedIPs = fd00:faa5::/32\n',
    )
    laptop.run(['ip', 'address', 'add', f'{ipv6}/64', 'dev', 'wg-faas', 'nodad'])
    laptop.run(['ip', 'link', 'set', 'wg-faas', 'up'])


# Containers, in a host


SPEC = Spec('handler')
LIMITS = limits.Limits(memory=256 << 20, pids=64, cpus=2)


@contextlib.contextmanager
def prepared(limits=LIMITS, run_dir='/run/faasd', name=''):
    """Prepared Containers that are closed at the end."""
    them = containers.Containers(f'faas-t{os.getpid()}{name}-{time.monotonic_ns() & 0xFFFFFF:x}', limits, run_dir)
    them.prepare()
    try:
        yield them
    finally:
        them.close()


@functools.cache
def injector():
    """Who answers the listen() calls of instances, in this process."""
    return Injector()


class Instance:
    """One instance as the pool would hold it: a container, its channel, its output. Ends with the context."""

    def __init__(self, containers, source, name='test', files=()):
        self._containers, self._number, self.done = containers, 0, []
        self.ready = self.failed = self.reason = None
        self.folder = pathlib.Path(f'/var/lib/functions/{os.urandom(4).hex()}')
        self.folder.mkdir(parents=True)
        for path, text in {'handler.py': source, **dict(files)}.items():
            (self.folder / path).write_text(text)
        self.channel, theirs = protocol.pair()
        self._output, writer = os.pipe()
        fcntl.fcntl(self._output, fcntl.F_SETPIPE_SZ, 1 << 20)
        os.set_blocking(self._output, False)
        self._text = b''
        self._listener = socket.socket(socket.AF_INET6)
        self._listener.bind(('::1', 0))
        self._listener.listen(256)
        try:
            self.container = containers.start(name, 1, SPEC, str(self.folder), writer, channel=theirs.fileno())
        finally:
            theirs.close()
            os.close(writer)
        self.pid = self.container.pid
        self._listens = Inside(name, socket.socket.close)
        injector().add(self.container.notifier, self._listens)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.end()
        self._listener.close()
        self.channel.close()
        os.close(self._output)

    def end(self):
        """Kill it if it runs, and remove it; why it ended."""
        if self.reason is None:
            self.container.kill()
            injector().remove(self._listens)
            self.reason = self._containers.remove(self.container)
        return self.reason

    def wait_end(self, timeout_s=10):
        """Why it ended by itself."""
        ended = select.poll()
        ended.register(self.container.pidfd, select.POLLIN)
        if not ended.poll(timeout_s * 1000):
            raise TimeoutError(f'the instance runs on; it said: {self.output()}')
        return self.end()

    def hear(self):
        """Take in what the runtime has said; False after its end."""
        while True:
            try:
                message, fd = protocol.receive(self.channel)
            except BlockingIOError:
                return True
            except ConnectionError:
                return False
            assert fd is None, 'the runtime sent a descriptor'
            if not message:
                return False
            kind, rest = message[:1], message[1:]
            if kind == protocol.READY:
                self.ready = rest.decode()
            elif kind == protocol.FAILED:
                self.failed = rest.decode()
            elif kind == protocol.DONE:
                self.done.append(protocol.number_of(message))
            else:
                assert message == protocol.HELLO + bytes((protocol.VERSION,)), message

    def wait_up(self):
        """Self, once it is ready; AssertionError with its output if it never will be."""
        lab.wait_until(lambda: not self.hear() or self.ready or self.failed, 15, f'readiness: {self.output()}')
        if not self.ready:
            raise AssertionError(f'it does not start: {self.failed}\n{self.output()}')
        return self

    def wait_failed(self):
        """The reason with which it refuses to start."""
        lab.wait_until(lambda: not self.hear() or self.ready or self.failed, 15, 'a refusal')
        return self.failed

    def output(self):
        """Everything that the function printed so far."""
        with contextlib.suppress(BlockingIOError):
            while chunk := os.read(self._output, 65536):
                self._text += chunk
        return self._text.decode(errors='replace')

    def connect(self, first=b''):
        """A client's connection, which was handed over; `first` was sent before."""
        client = socket.create_connection(self._listener.getsockname()[:2])
        client.settimeout(10)
        client.sendall(first)
        accepted, _ = self._listener.accept()
        with accepted:
            self.hand_over(accepted)
        return client

    def hand_over(self, connection):
        protocol.send_connection(self.channel, self._number, connection)
        self._number += 1

    def ask(self, request=b'GET / HTTP/1.0\r\n\r\n'):
        """Everything that one connection gets for `request`, as bytes."""
        with self.connect(request) as client:
            return read_all(client)

    def stop(self, idle_s=0):
        protocol.send_number(self.channel, protocol.STOP, idle_s)

    def wait_done(self, count):
        lab.wait_until(lambda: self.hear() is None or len(self.done) >= count, 10, f'{count} times done')


def read_all(client):
    data = b''
    while chunk := client.recv(65536):
        data += chunk
    return data


def read_response(client):
    """(status, headers, body) of one HTTP answer, and not a byte of the next."""
    head = b''
    while not head.endswith(b'\r\n\r\n'):
        byte = client.recv(1)
        if not byte:
            raise EOFError(head)
        head += byte
    status, *lines = head.decode().rstrip().split('\r\n')
    headers = {key.lower(): value for key, value in (line.split(': ', 1) for line in lines)}
    body = b''
    while missing := int(headers.get('content-length', 0)) - len(body):
        chunk = client.recv(missing)
        if not chunk:
            raise EOFError(body)
        body += chunk
    return int(status.split()[1]), headers, body


class Expressions(Instance):
    """An instance that evaluates Python text and answers in JSON: ('ok', value) or (error's name, errno or text)."""

    SOURCE = """
import ctypes, errno, json, os, socket, subprocess, sys
libc = ctypes.CDLL(None, use_errno=True)
def syscall(number, *args):
    result = libc.syscall(number, *args)
    if result == -1:
        raise OSError(ctypes.get_errno(), 'syscall')
    return result
def handle(connection, address):
    with connection.makefile('rb') as file:
        text = file.readline().decode()
    names = {**globals(), 'connection': connection, 'address': address}
    try:
        answer = 'ok', eval(json.loads(text), names)
    except OSError as error:
        answer = 'OSError', errno.errorcode.get(error.errno)
    except BaseException as error:
        answer = type(error).__name__, str(error)
    connection.sendall(json.dumps(answer, default=repr).encode())
"""

    def __init__(self, containers, name='test'):
        super().__init__(containers, self.SOURCE, name)

    def eval(self, text):
        """[how it went, value] of the expression there."""
        return json.loads(self.ask(json.dumps(text).encode() + b'\n'))

    def value(self, text):
        how, value = self.eval(text)
        assert how == 'ok', f'{text}: {how} {value}'
        return value
