"""The control API over HTTP: parse, ask may(), call, answer."""

import codecs
import contextlib
import fcntl
import http
import http.server
import json
import re
import select
import socket
import struct
import termios
import threading
import time
import traceback
import urllib.parse
from typing import Any

from control.access import Caller, may
from control.body import Body, RequestError, json_object
from control.deployments import Change
from control.volume_verbs import VolumeVerbs
from handlers.containers.building import BuildFailed
from handlers.serving.instance import StartFailed
from host.errors import FaasError
from registry import BadInvite

UPLOAD_PAUSE_S = 300  # how long an upload may stand still: the program that makes the archive may be slow
ACKNOWLEDGED_S = 2  # how long an answer may take to arrive before what it announces is done
LINES = 'application/x-ndjson'  # what a client asks for that shows the output of a build
FROM_MAX = 200  # characters of what a deploy was made from
VERB_HINTS = {
    'stranger': "on the server use its socket: 'sudo faas …'",
    'peer': 'ask for an admin invite: sudo faas vpn invite --admin',
}


class ControlAPI(VolumeVerbs, http.server.BaseHTTPRequestHandler):
    """One connection. The server says who asks, and which verbs there are."""

    protocol_version = 'HTTP/1.1'
    default_request_version = 'HTTP/1.0'  # of what is no request: 0.9 would be answered without a status line
    server_version, sys_version = 'faasd', ''
    _streams = False  # the answer has begun: it is lines of JSON

    ROUTES = {  # (method, path; * stands for a name): verb
        ('POST', '/api/new'): 'new',
        ('GET', '/api/list'): 'list',
        ('GET', '/api/health'): 'health',
        ('GET', '/api/ip/*'): 'ip',
        ('GET', '/api/logs/*'): 'logs',
        ('GET', '/api/config/*'): 'config',
        ('POST', '/api/config/*'): 'configure',
        ('GET', '/api/describe/*'): 'describe',
        ('DELETE', '/api/remove/*'): 'remove',
        ('GET', '/api/secret'): 'secrets',
        ('POST', '/api/secret/*'): 'set_secret',
        ('DELETE', '/api/secret/*'): 'remove_secret',
        **VolumeVerbs.VOLUME_ROUTES,
        ('POST', '/api/vpn/create'): 'vpn_create',
        ('POST', '/api/vpn/invite'): 'vpn_invite',
        ('GET', '/api/vpn/list'): 'vpn_list',
        ('DELETE', '/api/vpn/remove/*'): 'vpn_remove',
    }

    def setup(self) -> None:
        self.timeout = self.server.limits.idle_s
        super().setup()
        self._deadline = threading.Timer(self.server.limits.whole_s or 0, self._cut)
        self._deadline.daemon = True
        if self.server.limits.whole_s:
            self._deadline.start()

    def finish(self) -> None:
        self._deadline.cancel()
        super().finish()

    def _cut(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, form: str, *args: object) -> None:
        pass  # what happens is an event; a request as such is not one

    def do_GET(self) -> None:
        self._body, self._caller = Body(self.rfile), None
        try:
            self._answer_request()
        except (ConnectionError, TimeoutError):
            self.close_connection = True  # the client has gone
        except Exception as error:
            self._refuse(error)
        with contextlib.suppress(ConnectionError, TimeoutError):
            self._body.drain(self.connection)
        self.close_connection = self.close_connection or self._body.ends_connection

    do_POST = do_DELETE = do_PUT = do_PATCH = do_HEAD = do_OPTIONS = do_GET

    def _answer_request(self) -> None:
        try:
            url = urllib.parse.urlsplit(self.path)
            self._query = dict(urllib.parse.parse_qsl(url.query))
        except ValueError as error:
            raise RequestError(400, 'this is not a path') from error
        path, name = url.path, None
        if not any(path == route for _, route in self.ROUTES):
            path, _, name = path.rpartition('/')
            path, name = f'{path}/*', urllib.parse.unquote(name)
        verb = self.ROUTES.get((self.command, path))
        self._body.measure(self.headers, self.command, takes_chunks=verb == 'new')
        caller = self._caller = self.server.caller(self.client_address)
        if caller.role == 'local':
            credentials = self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize('3i'))
            caller = self._caller = caller._replace(uid=struct.unpack('3i', credentials)[1])
        self._refuse_browsers(caller)
        if caller.role == 'newcomer' and verb != 'vpn_create':
            raise RequestError(404, 'only invites are redeemed here')
        if not verb:
            methods = [method for method, route in self.ROUTES if route == path]
            if not methods:
                raise RequestError(404, f'there is no {url.path[:200]}', 'docs/API.md lists what there is')
            raise RequestError(405, f'{self.command} is not for {url.path[:200]}', f'use {" or ".join(methods)}')
        if not may(caller, verb, name):
            raise RequestError(403, f'{caller.name or "this address"} may not do that', VERB_HINTS.get(caller.role))
        getattr(self, f'_{verb}')(caller, name)

    def _refuse_browsers(self, caller: Caller) -> None:
        """A page that a peer looks at must not speak for it: neither by requests of its own, nor by a rebound name."""
        ours = re.fullmatch(r'(\[[0-9a-fA-F:]+\]|ns\.faas)(:[0-9]+)?', self.headers.get('Host', ''))
        if 'Origin' in self.headers or (caller.role in ('peer', 'admin') and not ours):
            raise RequestError(403, 'this is not an API for web pages')

    def _refuse(self, error: Exception) -> None:
        status = error.status if isinstance(error, FaasError) else 503 if isinstance(error, OSError) else 500
        if status == 500:
            traceback.print_exception(error)
        text = str(error) if status != 500 else 'this is a fault of faasd; its log has more'
        first_line = text.splitlines()[0][:500] if text else type(error).__name__
        self._count_refusal(status, error)
        answer = {'error': first_line, 'hint': getattr(error, 'hint', None)}
        if isinstance(error, StartFailed):
            answer |= {
                'error': f'the function does not start: {answer["error"]}',
                'log': [] if error.log == [first_line] else error.log,
                'hint': error.hint or 'nothing has changed on the server; correct the function and deploy it again',
            }
        elif isinstance(error, BuildFailed):
            answer['log'] = [] if self._streams else error.log  # it was streamed
        with contextlib.suppress(OSError):
            self._answer(json.dumps(answer).encode(), status)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What http.server itself refuses, in the same form."""
        self._body, self._caller = Body(self.rfile), None  # there may be none yet
        self.close_connection = True
        code = 405 if code == 501 else code  # of a method that http.server finds no do_… for
        self._count_refusal(code)
        self._answer(json.dumps({'error': message or self.responses[code][0], 'hint': None}).encode(), code)

    def _count_refusal(self, status: int, error: Exception | None = None) -> None:
        if 400 <= status < 500:
            what = 'a bad invite' if isinstance(error, BadInvite) else http.HTTPStatus(status).phrase
            self.server.verbs.refusals.add(str(self._caller or 'unread'), what, self.client_address)

    def _answer(
        self,
        body: bytes,
        status: int = 200,
        content_type: str = 'application/json',
        headers: tuple[tuple[str, str], ...] = (),
    ) -> None:
        if self._streams:
            self._chunk(b'{"status": %d, "answer": %s}\n' % (status, body))
            self._chunk(b'')
            self._streams = False
            return
        self.send_response(status)
        self.send_header('Content-Type', content_type)
        self.send_header('Content-Length', str(len(body)))
        if self._body.left or self._body.ends_connection:
            self.send_header('Connection', 'close')
        for key, value in headers:
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def _json(self, value: Any, **options: Any) -> None:
        self._answer(json.dumps(value).encode(), **options)

    # One method for each verb

    def _new(self, caller: Caller, _: None) -> None:
        self._deadline.cancel()
        self.connection.settimeout(UPLOAD_PAUSE_S)
        source = self._query.get('from')
        if source is not None and not (len(source) <= FROM_MAX and source.isprintable()):
            raise RequestError(400, f"'from' is not a line of at most {FROM_MAX} characters")
        answer = self.server.verbs.deployments.deploy(
            self._query.get('name', ''),
            self._body.read,
            self._body.length,
            reference=self._query.get('image'),
            source=source,
            change=change_of(self._query.get('config', '{}').encode()),
            is_wanted=self._client_is_there,
            stop_reading=self._stop_reading,
            may_mount=may(caller, 'mount'),
            tell=self._tell if self.headers.get('Accept') == LINES else lambda data: None,
            needs=self._query.get('needs', '').split(','),
            by=str(caller),
        )
        self._body.finished()
        self._json(answer)

    def _tell(self, data: bytes) -> None:
        """Send output of a build: a line of JSON. After that the answer is the last line."""
        if not self._streams:
            if self.request_version == 'HTTP/1.0':  # it knows no chunks
                return
            self.send_response(200)
            self.send_header('Content-Type', LINES)
            self.send_header('Transfer-Encoding', 'chunked')
            self.send_header('Connection', 'close')
            self.end_headers()
            self._streams = True
            self._decoder = codecs.getincrementaldecoder('utf-8')('replace')
        self._chunk(json.dumps({'output': self._decoder.decode(data)}).encode() + b'\n')

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(b'%x\r\n%s\r\n' % (len(data), data))

    def _stop_reading(self) -> None:
        """End the body, also under a thread that waits for more of it. The answer can still be sent."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RD)

    def _client_is_there(self) -> bool:
        """False when the client has gone. One that has only ended its sending is there, if it is at a unix socket."""
        gone = select.POLLHUP | (select.POLLRDHUP if self.connection.family != socket.AF_UNIX else 0)
        poll = select.poll()
        poll.register(self.connection, gone)
        return not poll.poll(0)

    def _list(self, caller: Caller, _: None) -> None:
        self._json(self.server.verbs.functions.list())

    def _health(self, caller: Caller, _: None) -> None:
        answer = self.server.verbs.health.answer(with_recent=caller.role in ('local', 'admin'))
        if pad := self._query.get('pad'):  # a client that tries whether full packets arrive, in both directions
            answer['pad'] = pad
        self._json(answer)

    def _ip(self, caller: Caller, name: str) -> None:
        self._json({'ipv6': self.server.verbs.functions.ipv6(name)})

    def _logs(self, caller: Caller, name: str) -> None:
        lines = self._query.get('lines', '100')
        if not lines.isascii() or not lines.isdigit() or len(lines) > 6:
            raise RequestError(400, "'lines' is not a number")
        text = self.server.verbs.functions.logs(name, int(lines))
        self._answer(text, content_type='text/plain; charset=utf-8')

    def _config(self, caller: Caller, name: str) -> None:
        self._json(self.server.verbs.deployments.config(name))

    def _configure(self, caller: Caller, name: str) -> None:
        change = change_of(self._body.whole())
        self._deadline.cancel()
        answer = self.server.verbs.deployments.configure(
            name, change, is_wanted=self._client_is_there, may_mount=may(caller, 'mount'), by=str(caller)
        )
        self._json(answer)

    def _describe(self, caller: Caller, name: str) -> None:
        self._json(self.server.verbs.deployments.describe(name))

    def _remove(self, caller: Caller, name: str) -> None:
        self.server.verbs.deployments.remove(name, str(caller))
        self._answer(b'')

    def _secrets(self, caller: Caller, _: None) -> None:
        self._json(self.server.verbs.deployments.secrets())

    def _set_secret(self, caller: Caller, name: str) -> None:
        value = self._body.whole()
        self._deadline.cancel()
        self._json(self.server.verbs.deployments.set_secret(name, value, str(caller)))

    def _remove_secret(self, caller: Caller, name: str) -> None:
        self.server.verbs.deployments.remove_secret(name, str(caller))
        self._answer(b'')

    def _vpn_create(self, caller: Caller, _: None) -> None:
        peers, body = self.server.verbs.peers, self._body.whole()
        invite_id = self.headers.get('Faas-Invite')
        if caller.role == 'newcomer' and (invite_id or not peers.enrolls_openly):
            return self._redeem(body, invite_id or '')
        config, name = peers.create(*peer_fields(body), str(caller))
        self._json(config, headers=(('Faas-Peer', name),))

    def _redeem(self, body: bytes, invite_id: str) -> None:
        peers, nonce = self.server.verbs.peers, self.headers.get('Faas-Nonce', '')
        invite = peers.proved_invite(invite_id, self.headers.get('Faas-Proof', ''), nonce, body)
        config, name = peers.redeem(invite, *peer_fields(body))
        answer = json.dumps(config).encode()
        proof = invite.proof('faas1 answer', invite_id, nonce, name, answer)
        self._answer(answer, headers=(('Faas-Peer', name), ('Faas-Proof', proof)))

    def _vpn_remove(self, caller: Caller, name: str) -> None:
        result = self.server.verbs.peers.remove(name, str(caller), caller.name)
        try:
            self._answer(b'')
            if result:
                self._wait_acknowledged()
        finally:
            if result:
                result.act()

    def _wait_acknowledged(self) -> None:
        """Return when the client has acknowledged every byte, or after ACKNOWLEDGED_S."""
        deadline = time.monotonic() + ACKNOWLEDGED_S
        while time.monotonic() < deadline and struct.unpack(
            'i', fcntl.ioctl(self.connection, termios.TIOCOUTQ, b'\0' * 4)
        ) != (0,):
            time.sleep(0.01)
        self.close_connection = True

    def _vpn_list(self, caller: Caller, _: None) -> None:
        self._json(self.server.verbs.peers.list())

    def _vpn_invite(self, caller: Caller, _: None) -> None:
        fields = json_object(self._body.whole())
        name, expires, admin = fields.get('name'), fields.get('expires', 3600), fields.get('admin', False)
        if type(expires) is not int or not 60 <= expires <= 30 * 86400:
            raise RequestError(400, "'expires' is not a number of seconds from 60 to 2592000")
        if type(admin) is not bool or not isinstance(name, (str, type(None))):
            raise RequestError(400, "'name' is a text or null, 'admin' true or false")
        self._json(self.server.verbs.peers.invite(name, expires, admin, str(caller)))


def change_of(text: bytes) -> Change:
    """The Change in {"set": {"memory": "512M"}, "unset": ["env.NAME"]}. Raises RequestError, BadWant."""
    fields = json_object(text)
    sets, unsets = fields.pop('set', {}), fields.pop('unset', [])
    right = isinstance(sets, dict) and isinstance(unsets, list) and all(isinstance(key, str) for key in unsets)
    if fields or not right:
        raise RequestError(400, 'a change is not {"set": {KEY: TEXT}, "unset": [KEY]}')
    return Change(sets, unsets)


def peer_fields(body: bytes) -> tuple[str, str]:
    """(name, public_key) of a new peer: the two fields of the document. Raises RequestError."""
    fields = json_object(body)
    for key in ('name', 'public_key'):
        if not isinstance(fields.get(key), str):
            raise RequestError(
                400, f"the field '{key}' is missing or not a text", 'send {"name": "laptop", "public_key": "…"}'
            )
    return fields['name'], fields['public_key']
