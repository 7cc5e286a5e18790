"""A real faasd on a host of its own: start it, talk to its API from outside, ask its functions from inside."""

import contextlib
import http.client
import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tarfile
import threading

from tests import lab

FAASD = (sys.executable, 'faasd.py')  # functions run with /usr/bin/python3 in any case
HELLO = 'def handle(connection, address):\n    connection.recv(4096)\n    connection.sendall(%r)\n'


def answer(text):
    """A whole HTTP answer with that body."""
    return b'HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s' % (len(text), text.encode())


def archive(files):
    """An uncompressed tar of {name: text}."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(text.encode()), 0o644
            tar.addfile(info, io.BytesIO(text.encode()))
    return out.getvalue()


def saying(text):
    """The archive of a function that says `text`."""
    return archive({'handler.py': HELLO % answer(text)})


class Reply:
    def __init__(self, response):
        self.status, self.headers, self.body = response.status, response.headers, response.read()

    @property
    def json(self):
        return json.loads(self.body)


class UnixConnection(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__('faasd', timeout=90)
        self._path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Server:
    """faasd on `host`. `lines` is what it printed so far."""

    def __init__(self, host, *arguments, umask=-1, **settings):
        self.umask = umask
        self.host, self.arguments, self.settings = host, arguments, {'FAAS_VPN_ENDPOINT': '203.0.113.10', **settings}
        self.lines = []
        self.process = None

    def start(self, wait=True):
        self.process = self.host.popen(
            [FAASD[0], '-u', *FAASD[1:], *self.arguments],
            env=self.settings,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            umask=self.umask,
        )
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()
        if wait:
            lab.wait_until(lambda: self.printed('[faasd] Ready') or self.process.poll() is not None, 30, 'faasd')
            if self.process.poll() is not None:
                raise AssertionError('faasd did not start:\n' + ''.join(self.lines))
        return self

    def _read(self, stream):
        with stream:
            for line in stream:
                self.lines.append(line)

    def printed(self, text):
        return any(text in line for line in self.lines)

    def stop(self, number=signal.SIGTERM):
        """End it with a signal; its exit code."""
        if self.process and self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)
        code = self.process.wait(60)
        if number != signal.SIGKILL:  # its children live on then, and hold the pipe
            self._reader.join(10)
        return code

    def restart(self):
        self.stop()
        self.lines.clear()
        return self.start()

    def api(self, method, path, body=None, headers=None):
        """A Reply from the unix socket; a body that is no bytes goes as JSON."""
        if body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
        connection = UnixConnection(str(self.host.path('/run/faasd/faasd.sock')))
        with contextlib.closing(connection):
            connection.request(method, path, body, headers or {})
            return Reply(connection.getresponse())

    def deploy(self, name, source):
        """Deploy an archive, or {file: text}, as `name`; the Reply."""
        return self.api('POST', f'/api/new?name={name}', source if isinstance(source, bytes) else archive(source))

    def get(self, ipv6, path='/', *, ok=(0,), timeout_s=20):
        """What curl on the host gets from the function at ipv6."""
        return self.host.run(
            ['curl', '-sg', '--max-time', str(timeout_s), f'http://[{ipv6}]{path}'], ok=ok, timeout_s=timeout_s + 10
        ).stdout

    def descriptors(self):
        """How many file descriptors the daemon holds."""
        children = self.host.run(['pgrep', '-f', 'faasd.py']).stdout.split()
        return len(self.host.run(['ls', f'/proc/{children[0]}/fd']).stdout.split())

    def status_of(self, name):
        return next(item for item in self.api('GET', '/api/list').json if item['name'] == name)


@contextlib.contextmanager
def standalone(host, **settings):
    """A started Server that is ended, and must end well."""
    server = Server(host, '--standalone', **settings).start()
    try:
        yield server
    except BaseException:
        server.stop()
        print(''.join(server.lines[-40:]))
        raise
    code = server.stop()
    assert code == 0, f'faasd ended with {code}:\n' + ''.join(server.lines[-40:])


@contextlib.contextmanager
def holding(host, kind, port):
    """Another program of the host has the port on every address; kind is TCP or UDP."""
    program = (
        'import socket, time\n'
        f'sock = socket.socket(socket.AF_INET6, socket.{"SOCK_STREAM" if kind == "TCP" else "SOCK_DGRAM"})\n'
        f'sock.bind(("::", {port}))\n'
        f'{"sock.listen()" if kind == "TCP" else ""}\n'
        'time.sleep(600)'
    )
    with host.popen(['/usr/bin/python3', '-c', program]) as other:
        try:
            lab.wait_until(lambda: f':{port} ' in host.run(['ss', '-Hln', f'--{kind.lower()}']).stdout, 5, 'it')
            yield
        finally:
            other.kill()


EXAMPLES = pathlib.Path(lab.REPO, 'handlers')


def example(name):
    """The archive of one of the example functions."""
    folder = EXAMPLES / name
    return archive({entry: (folder / entry).read_text() for entry in os.listdir(folder) if entry.endswith('.py')})
