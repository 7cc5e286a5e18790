#!/usr/bin/env python3
"""faasd: private functions on one server.

Accepts each function's connections and hands the sockets to containers; see docs/.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import datetime
import fcntl
import grp
import hmac
import http.server
import ipaddress
import itertools
import json
import math
import os
import pathlib
import queue
import re
import resource
import secrets
import select
import shutil
import signal
import socket
import socketserver
import sqlite3
import struct
import sys
import termios
import threading
import time
import traceback
import urllib.parse
from typing import NamedTuple

import dns_manager
import registry
import vpn_manager
from handlers.containers import bundle, containers, logs
from handlers.images import layers
from handlers.images import spec as specs
from handlers.images import staging as image
from handlers.serving import injection, pool
from handlers.serving.loop import Loop
from handlers.serving.server import Adopted, FaaSServer
from host import files, firewall, netlink, process, sock_diag, systemd
from host.errors import FaasError

STATE = '/var/lib/faasd'
RUN = '/run/faasd'
CONTROL_PORT = 8080
NOBODYS = 'fd00:faa5::'  # a port is taken there only by who listens on every address
WIREGUARD_PORT = 51820
ENV_FILE = '/etc/faasd/faasd.env'

PR_SET_CHILD_SUBREAPER = 36
MOST_JSON = 64 << 10  # bytes of a JSON request body
PAUSE_S = 300  # how long an upload may stand still: what makes the archive may take its time
DRAIN_S = 3  # how long is read what was refused
FUNCTIONS = 'fd00:faa5:1::/48'
TICK_S, CLOSELY_TICKS = 1, 5  # how often the guard looks, and looks closely


# Settings


def size(text):
    """Bytes from '300', '64K', '100M' or '2G'."""
    factor = {'K': 1 << 10, 'M': 1 << 20, 'G': 1 << 30}.get(text[-1:].upper(), 1)
    return int(text[:-1] if factor > 1 else text) * factor


def number(convert, least, most):
    def parse(text):
        value = convert(text)
        if not least <= value <= most:  # nor is NaN
            raise ValueError(f'a number from {least} to {most} is expected')
        return value

    return parse


def matching(pattern, what):
    def parse(text):
        if not re.fullmatch(pattern, text, re.ASCII):
            raise ValueError(f'{what} is expected')
        return text

    return parse


def endpoint(text):
    if text:
        vpn_manager.split_endpoint(text, WIREGUARD_PORT)
    return text


def resolvers(text):
    return [str(ipaddress.ip_address(address)) for address in text.split()]


SETTINGS = {  # name: (default, parser); docs/API.md has the same table, a test compares them
    'FAAS_VPN_ENDPOINT': ('', endpoint),
    'FAAS_WG_INTERFACE': ('wg0', matching(r'[a-zA-Z0-9_][\w.-]{0,14}', "an interface's name")),
    'FAAS_WG_PORT': ('51820', number(int, 1, 65535)),
    'FAAS_NFT_TABLE': ('faas', matching(r'[a-zA-Z]\w{0,30}', "a table's name")),
    'FAAS_ENROLL': ('invite', matching('invite|open', 'invite or open')),
    'FAAS_ENROLL_BIND': ('[::]:51820', endpoint),
    'FAAS_DNS_FORWARD': ('', resolvers),
    'FAAS_MAX_UPLOAD': ('4G', number(size, 1 << 10, 1 << 40)),
    'FAAS_MAX_UNPACKED': ('16G', number(size, 1 << 10, 1 << 40)),
    'FAAS_START_TIMEOUT': ('30', number(float, 0.1, 3600)),
    'FAAS_STOP_TIMEOUT': ('10', number(float, 0, 3600)),
    'FAAS_IDLE_TIMEOUT': ('900', number(float, 0, 1e9)),
    'FAAS_MEMORY': ('256M', number(size, 16 << 20, 1 << 50)),
    'FAAS_PIDS': ('128', number(int, 8, 1 << 20)),
    'FAAS_CPUS': ('1', number(float, 0.01, 4096)),
    'FAAS_RUNTIME': ('runc', matching('runc|crun', 'runc or crun')),
    'FAAS_CGROUP': ('', matching(r'(/[\w@.-]+)*', "a cgroup's path from the root")),
    'FAAS_ID_BASE': ('1879048192', number(int, 65536, (1 << 31) - containers.ID_SLOTS * bundle.ID_RANGE)),
}


class StartError(FaasError):
    """faasd cannot start."""


class BadSettings(StartError):
    """A setting that cannot be: another try would not mend it."""


def read_settings(environ, path=ENV_FILE):
    """{'wg_port': value, …} from the environment, then the file, then the defaults. Raises BadSettings."""
    texts, lines = {}, []
    try:
        with contextlib.suppress(FileNotFoundError), open(path, encoding='utf-8-sig') as file:
            lines = list(file)
    except UnicodeDecodeError as error:
        raise BadSettings(f'{path} is not UTF-8: {error.reason}', 'save it as UTF-8') from error
    for line in lines:
        key, equals, value = line.strip().partition('=')
        if equals and not key.startswith('#'):
            if key.strip() not in SETTINGS:
                raise BadSettings(f'{path}: there is no setting {key.strip()}', 'docs/API.md lists them')
            texts[key.strip()] = value.strip().strip('"\'')
    settings = {}
    for name, (default, parse) in SETTINGS.items():
        text = environ.get(name, texts.get(name, default))
        try:
            settings[name.removeprefix('FAAS_').lower()] = parse(text)
        except (ValueError, vpn_manager.VPNError) as error:
            raise BadSettings(f'{name}={text}: {error}', f'correct it in {path} or in the environment') from error
    return settings


# Events


class Event(NamedTuple):
    time: float
    area: str
    text: str
    name: str | None
    problem: bool


class Events:
    """What happens, told once: a line on stdout for each event; the last problems are kept for /api/health."""

    MOST_LINES = 10_000  # waiting to be printed; a terminal that was stopped must not stop the accept loop

    def __init__(self):
        self._problems = collections.deque(maxlen=20)
        self._lines = queue.Queue(self.MOST_LINES)
        self._printer = threading.Thread(target=self._print, name='events', daemon=True)
        self._printer.start()

    def emit(self, area, text, name=None, problem=False):
        event = Event(time.time(), area, text, name, problem)
        if problem:
            self._problems.append(event)
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(f'[{area}] {text}')

    def _print(self):
        while (line := self._lines.get()) is not None:
            with contextlib.suppress(OSError):  # nobody reads it any more, or the disk is full
                print(line, flush=True)

    def close(self):
        """Return when all is printed; after two seconds at most."""
        with contextlib.suppress(queue.Full):
            self._lines.put_nowait(None)
            self._printer.join(timeout=2)

    def problems(self):
        return [
            {'time': timestamp(event.time), 'area': event.area, 'what': event.text} for event in list(self._problems)
        ]


def timestamp(seconds):
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime('%Y-%m-%dT%H:%M:%SZ')


def date(seconds):
    return timestamp(seconds)[:10]


# Who may do what


class Caller(NamedTuple):
    """role: 'local' (unix socket), 'admin', 'peer' (tunnel address), 'newcomer' (the enroll address), 'stranger'."""

    role: str
    name: str | None = None


def may(caller, verb, name=None):
    """True if the caller may do that. The only place that decides."""
    match caller.role:
        case 'local' | 'admin':
            return True
        case 'peer':
            return verb in ('list', 'ip', 'health') or (verb == 'vpn_remove' and name == caller.name)
        case 'newcomer':
            return verb == 'vpn_create'
    return False


class RequestError(FaasError):
    """A request that is refused with that HTTP status."""

    def __init__(self, status, text, hint=None):
        super().__init__(text, hint)
        self.status = status


def http_status(error):
    """The HTTP status that says what `error` is."""
    match error:
        case RequestError():
            return error.status
        case registry.NotFound():
            return 404
        case registry.NameTaken() | registry.KeyTaken() | registry.AddressTaken():
            return 409
        case registry.BadInvite():
            return 403
        case registry.RangeFull() | image.DiskFull():
            return 507
        case sqlite3.OperationalError() if 'full' in str(error):
            return 507
        case registry.BadName() | vpn_manager.BadKey() | image.ImageError():
            return 400
        case pool.StartFailed():
            return 422
        case process.CommandError() | vpn_manager.VPNError() | OSError():
            return 503
    return 500


# The server as a whole


class Faasd:
    """Deployments, peers and invites.

    Each method is one verb of the control API. The registry is the truth; the rest follows it.
    """

    def __init__(self, settings, standalone, events):
        self.settings, self.standalone, self.events = settings, standalone, events
        self.emit = events.emit
        self._stack = contextlib.ExitStack()
        self._handover = self._left_behind = False
        self._stopping, self._end = threading.Event(), os.eventfd(0, os.EFD_CLOEXEC)  # the second wakes the guard
        self._functions = {}  # id → (Function, Pool)
        self._pools = {}  # the same, and those that are about to end
        self._unopened = {}  # id → (Function, its Revision or None): of those that have no listener yet
        self._changes, self._changed = 0, threading.Condition()  # how many are under way
        self._children = {}  # what standalone supervises: name → process
        self._ailing = {}  # what is wrong now: area → text

    # From start to end

    def start(self):
        """Bring everything up; whatever fails is undone and raised."""
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise

    def stop(self, handover=False):
        """Accept no more, let what runs finish within FAAS_STOP_TIMEOUT, take everything down.

        With `handover` what listens by itself goes on, with its address and the table, and the next faasd adopts it.
        """
        self._handover = handover
        self.emit('faasd', 'Stopping')
        self._stack.close()
        self.emit('faasd', 'Stopped')

    def _start(self):
        undo, settings = self._stack.callback, self.settings
        for folder, mode in ((STATE, 0o711), (RUN, 0o755)):  # CoreDNS reads the zone below the first as another user
            os.makedirs(folder, mode=mode, exist_ok=True)
        self._claim_state()
        self.registry = registry.Registry(f'{STATE}/registry.db')
        undo(self.registry.close)
        self.registry.abandon_stale()
        self.vpn = self._vpn_manager()
        self.firewall = firewall.Firewall(
            settings['nft_table'], settings['wg_interface'], registry.GATEWAY, registry.ZONE_SERVER
        )
        self.dns = dns_manager.DNSZoneManager(
            self.registry.next_serial, self.emit, registry.GATEWAY, registry.ZONE_SERVER
        )
        self.peers = registry.Projection(self._project_peers)
        self.zone = registry.Projection(lambda: self.dns.project({f.name: f.ipv6 for f in self.registry.functions()}))
        self.addresses = registry.Projection(lambda: self.vpn.project_addresses(self.registry.function_addresses()))
        self._end_leftovers()
        self._prepare()
        if self.standalone:
            self._bring_up()
        self.vpn.check_interface()
        undo(self._unless_left, self.vpn.project_addresses, [])
        self._adopt_peers()
        self._refuse_strangers()
        self.peers.sync()

        limits = bundle.Limits(settings['memory'], settings['pids'], settings['cpus'])
        prefix = f'faas-{self.registry.instance}'
        self._layers = layers.Layers(f'{STATE}/layers')
        self._layers.prepare()
        self._layers_base = self._layers.id_base(settings['id_base'])
        made = containers.Containers(
            prefix, limits, RUN, settings['id_base'], settings['cgroup'], settings['runtime'], self._layers_base
        )
        undo(made.close)
        live = {function.name: function.revision for function in self.registry.functions()}
        left = made.prepare(lambda record: live.get(record['function']) == record['revision'])
        self.firewall.load()  # before the first listener, until after the last instance
        undo(self._unless_left, self.firewall.remove)
        self._remove_stray_files()

        self.loop = Loop()
        undo(self.loop.stop)
        workers = concurrent.futures.ThreadPoolExecutor(max_workers=4, thread_name_prefix='instances')
        undo(workers.shutdown)
        self.server = FaaSServer(self.loop, self.emit)
        self._around = pool.Surroundings(
            self.loop,
            made,
            logs.LogCopier(),
            workers,
            self.emit,
            settings['start_timeout'],
            injection.Injector(),
            self._forget,
            settings['stop_timeout'],
            settings['idle_timeout'],
            registry.GATEWAY,
        )
        undo(self._close_functions)  # once more, what a change under way has opened meanwhile
        undo(self._wait_for_changes)
        undo(self._close_functions)
        self.addresses.sync()
        adoptable = self._adoptable(made, left)
        for function in self.registry.functions():
            revision = None
            try:
                revision = self._revision(function, function.revision)
            except (OSError, ValueError) as error:  # the others are not to blame
                self.emit('handler', f'{function.name}: {error}: deploy it again', name=function.name, problem=True)
            try:
                self._open(function, revision, *(adoptable.get(function.name, ()) if revision else ()))
            except OSError as error:
                self.emit('listener', f'{function.name}: {error}', name=function.name, problem=True)
                self._unopened[function.id] = function, revision
        self.zone.sync()
        forwarders = settings['dns_forward'] or dns_manager.default_forwarders(
            own=(registry.GATEWAY, registry.ZONE_SERVER)
        )
        self.dns.write_corefile(forwarders)
        if self.standalone:
            self._start_coredns(forwarders)
        self._serve_api()
        self._guard = threading.Thread(target=self._watch, name='guard', daemon=True)
        self._guard.start()
        undo(self._guard.join)
        undo(os.eventfd_write, self._end, 1)
        undo(self._stopping.set)
        self.emit(
            'faasd',
            f'Ready: {len(self._functions)} functions, {len(self.registry.peers())} peers, '
            f'endpoint {vpn_manager.join_endpoint(*self._endpoint_parts())}',
        )

    def prepare(self):
        """Make keys and wg0.conf, which wg-quick needs before faasd can run, also while it does. Raises as start()."""
        self.vpn = self._vpn_manager()
        self._prepare(moving=True)

    def _prepare(self, moving=False):
        self.vpn.check_host(moving)
        hint = 'let it listen on addresses of its own, not on [::]'
        for port in (53, 80, CONTROL_PORT):
            vpn_manager.refuse_taken(socket.SOCK_STREAM, NOBODYS, port, hint)
        vpn_manager.refuse_taken(socket.SOCK_DGRAM, NOBODYS, 53, hint)
        self.vpn.ensure_keys()
        self.vpn.write_wg0_conf()

    def _claim_state(self):
        """One faasd for each state directory: the lock lasts as long as the process."""
        self._lock = os.open(f'{RUN}/faasd.lock', os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        self._stack.callback(os.close, self._lock)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StartError('another faasd runs on this host', 'end it first') from error

    def _vpn_manager(self):
        names = (self.settings[name] for name in ('wg_interface', 'wg_port'))
        return vpn_manager.VPNManager(
            self.emit, registry.GATEWAY, registry.ZONE_SERVER, self._endpoint(), *names
        )

    def _unless_left(self, function, *args):
        """Call it, unless an instance lives on that needs what it takes away."""
        if not self._left_behind:
            self._attempt(function, *args)

    def _endpoint(self):
        endpoint = self.settings['vpn_endpoint']
        if not endpoint:
            endpoint = vpn_manager.default_address() or 'localhost'
            self.emit(
                'vpn', f'FAAS_VPN_ENDPOINT is not set: newcomers are told {endpoint}, the address of the default route'
            )
        return endpoint

    def _endpoint_parts(self):
        return vpn_manager.split_endpoint(self.vpn.endpoint, self.settings['wg_port'])

    def _attempt(self, function, *args):
        """Call it; what fails is told and left, since the next projection or start sees to it."""
        try:
            function(*args)
        except (process.CommandError, OSError, sqlite3.Error) as error:
            self.emit('faasd', f'Left for later: {error}')

    @contextlib.contextmanager
    def _change(self):
        """Around what faasd's end has to wait for. Raises RequestError when that has begun."""
        with self._changed:
            if self._stopping.is_set():
                raise RequestError(503, 'faasd is ending', 'try again when it runs again')
            self._changes += 1
        try:
            yield
        finally:
            with self._changed:
                self._changes -= 1
                self._changed.notify_all()

    def _wait_for_changes(self):
        with self._changed:
            self._changed.wait_for(lambda: not self._changes, timeout=60)

    # What standalone supervises

    def _end_leftovers(self):
        """End the children and remove the interface of a run that was killed; the record in RUN names them."""
        path = f'{RUN}/children.json'
        try:
            with open(path) as file:
                record = json.load(file)
        except (FileNotFoundError, ValueError):
            return
        for name, (pid, started) in record['children'].items():
            if process.end(pid, started):
                self.emit('faasd', f'Ended {name}, left by a run that was killed')
        interface, index = record['interface']
        if interface == self.vpn.interface and index in (0, self.vpn.index()):  # 0: it was being made
            self.vpn.take_down()
        files.remove_file(path)

    def _record_children(self):
        files.write_file(
            f'{RUN}/children.json',
            json.dumps(
                {
                    'interface': [self.vpn.interface, self.vpn.index()],
                    'children': {
                        name: [child.pid, process.start_time(child.pid)] for name, child in self._children.items()
                    },
                }
            ),
        )

    def _bring_up(self):
        if self.vpn.index():
            raise StartError(
                f'there is an interface {self.vpn.interface} already',
                'run faasd.py without --standalone if it is for faasd, or set FAAS_WG_INTERFACE to another name',
            )
        self._stack.callback(files.remove_file, f'{RUN}/children.json')
        self._stack.callback(self._take_down)
        self._make_interface()

    def _make_interface(self):
        self._record_children()
        child = self.vpn.bring_up()
        if child:
            self._children['wireguard-go'] = child
        self._record_children()
        self.emit(
            'vpn',
            f'{self.vpn.interface} is up at {registry.GATEWAY}, UDP port {self.vpn.port}'
            f'{" (wireguard-go)" if child else ""}',
        )

    def _take_down(self):
        self._attempt(self.vpn.take_down, self._children.pop('wireguard-go', None))

    def _start_coredns(self, forwarders):
        self._stack.callback(self._stop_coredns)
        self._run_coredns()
        if self.dns.wait_served('ns', registry.GATEWAY, timeout_s=5):
            others = ' '.join(forwarders) or 'nobody'
            self.emit('dns', f'CoreDNS answers for faas at {registry.GATEWAY}; other names go to {others}')
        else:
            self.emit('dns', f'CoreDNS does not answer at {registry.GATEWAY}', problem=True)

    def _run_coredns(self):
        child = process.start(['coredns', '-quiet', '-conf', self.dns.corefile], output=True)
        self._children['coredns'] = child
        self._record_children()
        threading.Thread(target=self._read_coredns, args=(child.stdout,), daemon=True).start()

    def _read_coredns(self, output):
        """Tell CoreDNS's troubles, of failing queries one a minute; its line for each query is not kept."""
        told = 0
        with output:
            for line in output:
                of_a_query = b'plugin/errors' in line
                if b'[INFO]' in line or b'maxprocs:' in line or (of_a_query and time.monotonic() < told + 60):
                    continue
                if of_a_query:
                    told = time.monotonic()
                self.emit('dns', f'CoreDNS: {line.decode(errors="replace").strip()}', problem=not of_a_query)

    def _stop_coredns(self):
        child = self._children.pop('coredns', None)
        if child:
            process.finish(child)

    # Functions

    def _folder(self, function, revision=None):
        folder = f'{STATE}/functions/{function.id}'
        return folder if revision is None else f'{folder}/{revision}'

    def _revision(self, function, number):
        """A pool.Revision of what is on the disk."""
        folder = self._folder(function, number)
        spec = specs.read_spec(folder)
        return pool.Revision(number, folder, spec, self._layers.folder if spec.layers else specs.tree(folder))

    def _remove_stray_files(self):
        """Remove from functions/ what no row names: uploads that were cut off, revisions that were never live."""
        top = pathlib.Path(STATE, 'functions')
        top.mkdir(mode=0o700, exist_ok=True)
        live = {str(function.id): str(function.revision) for function in self.registry.functions()}
        for folder in top.iterdir():
            if folder.name not in live:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                for revision in folder.iterdir():
                    if revision.is_dir() and revision.name != live[folder.name]:
                        shutil.rmtree(revision, ignore_errors=True)
        self._collect_layers()

    def _forget(self, folder):
        """Delete a revision's files, and the layers that no other needs."""
        shutil.rmtree(folder, ignore_errors=True)
        self._collect_layers()

    def _collect_layers(self):
        def wanted():
            return {
                layer
                for path in pathlib.Path(STATE, 'functions').glob('*/*/spec.json')
                for layer in specs.read_spec(path.parent).layers
            }

        try:
            self._attempt(self._layers.collect, wanted)
        except ValueError as error:  # a spec that cannot be read may need any of them
            self.emit('handler', f'Layers are kept for now: {error}', problem=True)

    def _adoptable(self, made, left):
        """{function: (Container, its listener)} of what a faasd that is no more has left; the rest is ended."""
        found = {}
        for record, its in sorted(left, key=lambda each: -each[0]['start_time']):
            sock = None if record['function'] in found else made.listener_of(record, its)
            if sock:
                found[record['function']] = its, sock
            else:
                its.kill()
                made.remove(its)
        return found

    def _open(self, function, revision=None, left=None, sock=None):
        """A pool and a listener for the function, which may have a Container `left` that serves `sock`.

        Without `revision` it serves nothing until one is switched to.
        """
        its_pool = pool.Pool(function.name, logs.Log(f'{self._folder(function)}/log'), self._around, revision)
        try:
            self.server.add_listener(function.ipv6, function.name, its_pool, Adopted(left, sock) if left else None)
        except OSError:
            if left:
                left.kill()
                self._around.containers.remove(left)
            raise
        self._functions[function.id] = self._pools[function.id] = function, its_pool
        return its_pool

    def _open_others(self):
        """Open the functions that could not be at the start. Raises OSError when one still cannot.

        A function may have made the options of its connections such that nobody can listen beside them, and the kernel
        keeps them for a minute.
        """
        for ident, (function, revision) in list(self._unopened.items()):
            self._open(function, revision)
            self._unopened.pop(ident, None)

    def _shut(self, function, within_s):
        """Undo _open; what runs may finish within within_s seconds, or goes on at a handover."""
        self._unopened.pop(function.id, None)
        known = self._functions.pop(function.id, None)
        end = self.server.close_listener(function.ipv6, within_s, self._handover)
        if known:  # else somebody else does it
            end.add_done_callback(lambda _: self._ended(function, end))  # in the loop's thread
        return end

    def _ended(self, function, end):
        self._pools.pop(function.id, None)
        self._left_behind |= end.result()

    def _close_functions(self):
        ends = [self._shut(function, self.settings['stop_timeout']) for function, _ in list(self._functions.values())]
        deadline = time.monotonic() + self.settings['stop_timeout'] + 30
        while concurrent.futures.wait(ends, timeout=0.2).not_done and time.monotonic() < deadline:
            self._attempt(self._look_at_connections)  # the guard, which does so otherwise, has ended

    def new(self, name, read, length, reference=None, is_wanted=lambda: True):
        """Deploy the archive that read(n) gives as `name`: `length` bytes, or to its end when that is None.

        `reference` says which of several images. What served before serves until the new one is ready. When nobody
        waits for the answer any more, which is_wanted() knows, all is undone.
        """
        registry.check_name(name, registry.RESERVED)
        if length is not None and length > self.settings['max_upload']:
            raise too_large(f'{length} bytes are', self.settings['max_upload'])
        with self._change(), contextlib.ExitStack() as undo:
            undo.push(lambda error, *_: self._collect_layers() if error else None)
            staging = undo.enter_context(
                image.Staging(
                    f'{STATE}/functions',
                    self._layers,
                    id_base=self._layers_base,
                    most_bytes=self.settings['max_unpacked'],
                    reference=reference,
                )
            )
            staging.receive(read, length)
            steps = undo.enter_context(contextlib.ExitStack())
            steps.callback(self._attempt, self.addresses.sync)
            function, number = self.registry.begin_revision(name)
            steps.callback(self.registry.abandon_revision, function, number)
            folder = self._folder(function, number)
            if function.revision is None:
                steps.callback(shutil.rmtree, self._folder(function), ignore_errors=True)
            staging.keep(folder)
            steps.callback(shutil.rmtree, folder, ignore_errors=True)
            if function.revision is None:
                self.addresses.sync()
                its_pool = self._open(function)
                steps.callback(lambda: self._shut(function, 5).result())
            elif function.id in self._functions:
                _, its_pool = self._functions[function.id]
            else:
                raise RequestError(503, f'{name} has no listener at the moment', 'try again in a minute')
            instance = its_pool.start(self._revision(function, number), is_wanted)
            steps.callback(its_pool.discard, instance)
            if not is_wanted():
                raise ConnectionAbortedError
            self.registry.commit_revision(function, number)
            steps.pop_all()
        its_pool.cut_over(instance)
        text = f'Deployed {name} at {function.ipv6}, revision {number} ({instance.description})'
        self.emit('handler', text, name=name)
        return {
            'name': name,
            'ipv6': function.ipv6,
            'dns': f'{name}.faas',
            'revision': number,
            'warning': self._publish(function) or instance.warning,
            'hint': instance.hint,
        }

    def _publish(self, function):
        """Project the zone and wait until CoreDNS answers the name; a warning if that is not so."""
        try:
            self.zone.sync()
        except (OSError, sqlite3.Error) as error:
            self.emit('dns', f'The zone cannot be written: {error}', problem=True)
            return 'deployed, not yet in DNS'
        return None if self.dns.wait_served(function.name, function.ipv6) else 'deployed, not yet in DNS'

    def remove(self, name):
        with self._change():
            function = self.registry.remove_function(name)
            self._attempt(self.zone.sync)
            self._shut(function, self.settings['stop_timeout']).result()
            self._attempt(self.addresses.sync)
            self._forget(self._folder(function))
        self.emit('listener', f'Removed {name} from {function.ipv6}', name=name)

    def ip(self, name):
        return {'ipv6': self.registry.function(name).ipv6}

    def list(self):
        answer = []
        for function in self.registry.functions():
            _, its_pool = self._functions.get(function.id, (None, None))
            if its_pool is None:  # it is being removed
                continue
            status, reason = its_pool.status()
            answer.append(
                {
                    'name': function.name,
                    'ipv6': function.ipv6,
                    'dns': f'{function.name}.faas',
                    'status': status,
                    'reason': reason,
                    'revision': function.revision,
                    'created': date(function.created),
                }
            )
        return answer

    def logs(self, name, lines):
        return logs.Log(f'{self._folder(self.registry.function(name))}/log').last(lines)

    def health(self, with_recent):
        """What is wrong now; `with_recent`: what was, too, in words that are not for everybody."""
        problems = [{'area': area, 'what': text} for area, text in list(self._ailing.items())]
        listed = self.list()
        problems += [
            {'area': 'function', 'what': f'{item["name"]}: {item["reason"]}'}
            for item in listed
            if item['reason']
        ]
        try:
            dns_manager.query(registry.GATEWAY, 'ns.faas')
        except OSError as error:
            problems.append({'area': 'dns', 'what': f'CoreDNS does not answer at {registry.GATEWAY}: {error}'})
        return {
            'status': 'degraded' if problems else 'ok',
            'problems': problems,
            'functions': {'live': len(listed), 'crashing': sum(item['status'] == 'crashing' for item in listed)},
            **({'recent': self.events.problems()} if with_recent else {}),
        }

    # Peers

    def _project_peers(self):
        """Make peers/ and wg0 follow the registry, after what a person put into peers/ was adopted."""
        self._adopt_peers()
        removed = [name for name, _ in self.registry.removed_peers()]
        self.vpn.project(self.registry.peers(), removed)
        for name in removed:
            self.registry.end_peer_removal(name)
            self.emit('vpn', f'Removed peer: {name}', name=name)

    def _adopt_peers(self):
        removed = {name for name, _ in self.registry.removed_peers()}
        known = {peer.name for peer in self.registry.peers()}
        for name, text in self.vpn.peer_files().items():
            if name not in known and name not in removed:
                try:
                    key, preshared, ipv6 = vpn_manager.parse_peer(text)
                    self.registry.add_peer(name, key, ipv6=ipv6, preshared_key=preshared)
                    self.emit('vpn', f'Adopted peer: {name} → {ipv6}', name=name)
                except (vpn_manager.VPNError, registry.RegistryError) as error:
                    self.vpn.complain(name, str(error))

    def _refuse_strangers(self):
        """Raise StartError if the first projection would cut off a peer that somebody else gave to wg0."""
        removed = {key for _, key in self.registry.removed_peers()}
        known = {peer.public_key for peer in self.registry.peers()}
        strangers = self.vpn.public_keys() - known - removed
        if strangers:
            raise StartError(
                f'{self.vpn.interface} has a peer that faasd does not know: {sorted(strangers)[0]}',
                f'give it a file in {self.vpn.peers_dir}, or remove it: wg set {self.vpn.interface} peer KEY remove',
            )

    def _welcome(self, peer):
        """The new peer's answer. Should wg0 be away, the peer is kept all the same and follows when it returns."""
        try:
            self.peers.sync()
        except (process.CommandError, OSError) as error:
            self.emit(
                'vpn',
                f'{peer.name} is registered and not yet on {self.vpn.interface}: {error}',
                name=peer.name,
                problem=True,
            )
        return self.vpn.create_client_config(peer.ipv6)

    def vpn_create(self, name, public_key, role='peer'):
        """A peer for somebody who may make one; returns the document's three fields and the peer's name."""
        peer = self.registry.add_peer(name, vpn_manager.check_key(public_key), role)
        self.emit('vpn', f'Created peer: {name} → {peer.ipv6}', name=name)
        return self._welcome(peer), peer.name

    def redeem(self, invite_id, nonce, proof, body):
        """A peer by an invite, whose request's HMAC is `proof`.

        Returns the answer's body with the document's three fields, the peer's name, and the answer's HMAC.
        """
        invite = self.registry.invite(invite_id)
        # An unknown invite costs as much time as a known one with a wrong proof.
        checked = (invite or registry.Invite('', secrets.token_bytes(32), None, '', 0)).proof(
            'faas1 request', invite_id, nonce, body
        )
        if not hmac.compare_digest(checked.encode(), proof.encode()) or not invite:
            raise registry.BadInvite
        fields = peer_fields(body)
        peer = self.registry.redeem(invite.id, fields['name'], vpn_manager.check_key(fields['public_key']))
        self.emit('vpn', f'Created peer: {peer.name} → {peer.ipv6} (invite {invite.id})', name=peer.name)
        answer = json.dumps(self._welcome(peer)).encode()
        return answer, peer.name, invite.proof('faas1 answer', invite_id, nonce, peer.name, answer)

    def vpn_remove(self, name, before_it_counts=lambda: None):
        """Lock a peer out. `before_it_counts` runs when the removal is certain and the tunnel still works."""
        self.registry.begin_peer_removal(name)
        try:
            before_it_counts()
        finally:
            self.peers.sync()

    def vpn_list(self):
        active = self.vpn.active()
        return [
            {
                'name': peer.name,
                'ipv6': peer.ipv6,
                'created': date(peer.created),
                'status': 'active' if peer.public_key in active else 'inactive',
            }
            for peer in self.registry.peers()
        ]

    def vpn_invite(self, name, lifetime_s, admin):
        host, _ = self._endpoint_parts()
        _, port = vpn_manager.split_endpoint(self.settings['enroll_bind'], WIREGUARD_PORT)
        with self._enroll_lock:  # held, or the guard would close what has no invite yet
            self._open_enroll()
            invite = self.registry.add_invite(name, 'admin' if admin else 'peer', lifetime_s)
        self.emit('vpn', f'Invited {name or "a peer"} ({invite.id}){" as admin" if admin else ""}')
        return {
            'token': invite.token(
                vpn_manager.join_endpoint(host, port), self.vpn.endpoint, self.vpn.get_server_public_key()
            ),
            'name': name,
            'expires': timestamp(invite.expires),
        }

    # The control API's listeners

    def _serve_api(self):
        path = f'{RUN}/faasd.sock'
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        os.fchmod(sock.fileno(), 0)  # bind() gives the file this mode: nobody gets in before it is what it must be
        sock.bind(path)
        with contextlib.suppress(KeyError):
            os.chown(path, 0, grp.getgrnam('faas').gr_gid)
        os.chmod(path, 0o660)
        self._stack.callback(files.remove_file, path)
        self._serve(sock, lambda address: Caller('local'), threads=16, timeout_s=60)
        tunnel = bound(registry.GATEWAY, CONTROL_PORT)
        self._serve(tunnel, self._peer_at, threads=32, timeout_s=30, deadline_s=60, most_each=8)
        self._enroll, self._enroll_socket, self._enroll_lock = None, None, threading.RLock()
        self._stack.callback(self._close_enroll, for_good=True)
        with contextlib.suppress(OSError):  # the first invite will say it
            self._bind_enroll()
        if self.settings['enroll'] == 'open':
            self.emit(
                'vpn',
                f'FAAS_ENROLL=open: whoever reaches {self.settings["enroll_bind"]} becomes a peer without an invite',
                problem=True,
            )
        self._guard_step('enroll', self._adjust_enroll)

    def _serve(self, *args, **options):
        server = ControlServer(*args, faasd=self, **options)
        self._stack.callback(server.close)
        return server

    def _peer_at(self, address):
        peer = self.registry.peer_at(address[0])
        return Caller(peer.role, peer.name) if peer else Caller('stranger')

    def _bind_enroll(self):
        """Keep the port from the start: it is of those that the kernel gives to outgoing connections."""
        if self._enroll_socket is None:
            self._enroll_socket = bound(*vpn_manager.split_endpoint(self.settings['enroll_bind'], WIREGUARD_PORT))

    def _open_enroll(self):
        with self._enroll_lock:
            if self._enroll is None:
                try:
                    self._bind_enroll()
                    self._enroll = ControlServer(
                        self._enroll_socket.dup(),
                        lambda address: Caller('newcomer'),
                        faasd=self,
                        threads=32,
                        timeout_s=5,
                        deadline_s=10,
                        most_each=4,
                    )
                except OSError as error:
                    raise RequestError(
                        503,
                        f'nobody could redeem it: tcp {self.settings["enroll_bind"]}: {error.strerror}',
                        'end what listens there, or set FAAS_ENROLL_BIND to another address',
                    ) from error
                self.emit('vpn', f'Invites can be redeemed at tcp {self.settings["enroll_bind"]}')

    def _close_enroll(self, for_good=False):
        with self._enroll_lock:
            if self._enroll is not None:
                self._enroll.close()
                self._enroll = None
                self._enroll_socket.shutdown(socket.SHUT_RD)  # it listens no more, and stays bound
                self.emit('vpn', f'Closed tcp {self.settings["enroll_bind"]}')
            if for_good and self._enroll_socket:
                self._enroll_socket.close()

    def _adjust_enroll(self):
        """Listen there while an invite is outstanding, and no longer."""
        with self._enroll_lock:
            if self.settings['enroll'] == 'open' or self.registry.invites_open_for_s():
                self._open_enroll()
            else:
                self._close_enroll()

    # Keeping it so

    def _ails(self, area, text):
        """Note what is wrong with an area, or None that it is well again; each change is told once."""
        if text != self._ailing.get(area):
            if text:
                self.emit(area, text, problem=True)
                self._ailing[area] = text
            else:
                del self._ailing[area]
                self.emit(area, 'is well again')

    def _watch(self):
        """Look after wg0, the table, the children and the enroll address, at once when the kernel tells of a change."""
        with (
            netlink.listen(socket.NETLINK_ROUTE, netlink.RTNLGRP_LINK, netlink.RTNLGRP_IPV6_IFADDR) as links,
            netlink.listen(netlink.NETLINK_NETFILTER, netlink.NFNLGRP_NFTABLES) as rules,
        ):
            for ticks in itertools.count():
                changed = select.select([links, rules, self._end], [], [], TICK_S)[0]
                if self._end in changed:
                    return
                for each in changed:
                    with contextlib.suppress(OSError):
                        while each.recv(65536, socket.MSG_DONTWAIT):
                            pass
                closely = ticks % CLOSELY_TICKS == 0
                if rules in changed or closely:
                    self._guard_step('rules', self._look_after_rules)
                self._guard_step('connections', self._look_at_connections)
                self._guard_step(self.vpn.interface, self._look_after_interface, links in changed or closely)
                if closely:
                    self._guard_step('registry', self.registry.abandon_stale)
                    self._guard_step('listener', self._open_others)
                self._guard_step('dns', self._look_after_children)
                self._guard_step('enroll', self._adjust_enroll)
                for name in ('peers', 'zone', 'addresses'):
                    if getattr(self, name).stale:
                        self._guard_step(name, getattr(self, name).sync)

    def _guard_step(self, area, function, *args):
        """Call it, and tell how the area is after that; when it returns False, that is not known."""
        try:
            if function(*args) is not False:
                self._ails(area, None)
        except (process.CommandError, OSError, vpn_manager.VPNError, sqlite3.Error, RequestError) as error:
            self._ails(area, str(error))
        except Exception:
            traceback.print_exc()

    def _look_at_connections(self):
        """Tell every pool what the kernel's table says of its address."""
        now, counts = time.monotonic(), collections.defaultdict(dict)
        for (address, uid), number in sock_diag.open_connections(FUNCTIONS, 80).items():
            counts[socket.inet_ntop(socket.AF_INET6, address)][uid] = number
        self.loop.call(self._spread, counts, now)

    def _spread(self, counts, now):
        for function, its_pool in list(self._pools.values()):
            of_its = counts.get(str(ipaddress.ip_address(function.ipv6)), {})
            self.loop.call(its_pool.look, of_its, now)  # apart: one's fault is not to keep the others from theirs

    def _look_after_rules(self):
        if self.firewall.is_loaded():
            return
        self.server.permit(False)
        self._ails(
            'rules', f'the nftables table inet {self.firewall.table} was taken away: nothing is handed out without it'
        )
        self.firewall.load()
        self.server.permit(True)

    def _look_after_interface(self, closely):
        interface = self.vpn.interface
        if not self.vpn.index():
            self._ails(interface, f'{interface} is gone: no function can be reached until it is back')
            if not self.standalone:
                return False
            child = self._children.pop('wireguard-go', None)
            if child:
                process.finish(child)
            self._make_interface()
        elif not closely:
            return False
        try:
            self.vpn.check_interface()
        except vpn_manager.VPNError as error:
            self._ails(interface, str(error))
            if not self.standalone:
                return False
            self.vpn.set_up()
            self.vpn.check_interface()
        self.addresses.sync()
        # `systemctl reload wg-quick@wg0` leaves only the peers of wg0.conf.
        if interface in self._ailing or self.vpn.public_keys() != {peer.public_key for peer in self.registry.peers()}:
            self.peers.sync()

    def _look_after_children(self):
        child = self._children.get('coredns')
        if child and child.poll() is not None:
            self._ails('dns', f'CoreDNS ended with exit code {child.returncode}')
            self._run_coredns()
            return False
        return True


def bound(host, port):
    """A TCP socket bound to (host, port); :: takes IPv4 as well."""
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, host != '::')
        sock.bind((host, port))
        return sock
    except BaseException:
        sock.close()
        raise


# The control API


class ControlServer(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Serves the API on a bound socket (consumed), at most `threads` connections at a time; more wait in the backlog.

    `caller(address)` says who asks. A connection that sends nothing for timeout_s is closed, any one after deadline_s,
    if given, unless it uploads. One address has at most `most_each` of them, if given.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, sock, caller, *, faasd, threads, timeout_s, deadline_s=None, most_each=None):
        super().__init__(None, ControlAPI, bind_and_activate=False)
        self.socket.close()
        self.socket, self.faasd, self.caller = sock, faasd, caller
        self.timeout_s, self.deadline_s = timeout_s, deadline_s
        self._most_each, self._open_from, self._count = most_each, collections.Counter(), threading.Lock()
        self._free, self._closing = threading.BoundedSemaphore(threads), False
        sock.listen(128)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()

    def verify_request(self, request, client_address):
        with self._count:
            return self._most_each is None or self._open_from[source(client_address)] < self._most_each

    def process_request(self, request, client_address):
        while not self._free.acquire(timeout=0.5):
            if self._closing:
                raise ConnectionAbortedError
        with self._count:
            self._open_from[source(client_address)] += 1
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._ended(client_address)
            raise

    def process_request_thread(self, request, client_address):
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._ended(client_address)

    def _ended(self, client_address):
        with self._count:
            self._open_from[source(client_address)] -= 1
            self._open_from += collections.Counter()  # without those that have none
        self._free.release()

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):
            traceback.print_exc()

    def close(self):
        self._closing = True
        self.shutdown()
        self.server_close()


def too_large(what, most):
    return RequestError(
        413,
        f'{what} more than FAAS_MAX_UPLOAD, {most}',
        'leave out what the function does not need, or raise the setting',
    )


class Chunks:
    """The body of a chunked request (RFC 9112 7.1), read from a buffered file. Raises RequestError, EOFError."""

    LINE, TRAILERS = 4096, 64

    def __init__(self, file):
        self._file, self._left, self._first, self._over = file, 0, True, False

    def read(self, most):
        """Some of what comes next, at most `most` bytes; b'' at the end."""
        if not self._left and not self._over:
            if not self._first and self._line():
                raise RequestError(400, 'a chunk is longer than it says')
            self._first = False
            size = re.fullmatch(rb'([0-9a-fA-F]{1,8})([ \t]*;[^\r]*)?', self._line())
            if not size:
                raise RequestError(400, 'a chunk has no size')
            self._left = int(size[1], 16)
            self._over = not self._left
            if self._over and all(self._line() for _ in range(self.TRAILERS)):
                raise RequestError(400, 'the last chunk has too many trailers')
        if self._over:
            return b''
        data = self._file.read1(min(most, self._left))
        if not data:
            raise EOFError
        self._left -= len(data)
        return data

    def _line(self):
        line = self._file.readline(self.LINE)
        if not line.endswith(b'\n') and len(line) < self.LINE:
            raise EOFError
        if not line.endswith(b'\r\n'):
            raise RequestError(400, 'a chunk has no end of line')
        return line[:-2]


def source(client_address):
    """Whom an address stands for: IPv6 networks are given out by the /64, and the unix socket has no addresses."""
    if not client_address:
        return None
    address = ipaddress.ip_address(client_address[0].partition('%')[0])
    v4 = address if address.version == 4 else address.ipv4_mapped
    return v4 or (address if client_address[0].startswith(registry.PEERS) else int(address) >> 64)


def peer_fields(body):
    """The document's two fields of a new peer. Raises RequestError."""
    fields = json_object(body)
    for key in ('name', 'public_key'):
        if not isinstance(fields.get(key), str):
            raise RequestError(
                400, f"the field '{key}' is missing or no text", 'send {"name": "laptop", "public_key": "…"}'
            )
    return fields


def json_object(body):
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, 'the body is not JSON') from error
    if not isinstance(fields, dict):
        raise RequestError(400, 'the body is no JSON object')
    return fields


class ControlAPI(http.server.BaseHTTPRequestHandler):
    """Parse, ask may(), call, answer."""

    protocol_version = 'HTTP/1.1'
    server_version, sys_version = 'faasd', ''

    ROUTES = {  # (method, path; * stands for a name): verb
        ('POST', '/api/new'): 'new',
        ('GET', '/api/list'): 'list',
        ('GET', '/api/health'): 'health',
        ('GET', '/api/ip/*'): 'ip',
        ('GET', '/api/logs/*'): 'logs',
        ('DELETE', '/api/remove/*'): 'remove',
        ('POST', '/api/vpn/create'): 'vpn_create',
        ('POST', '/api/vpn/invite'): 'vpn_invite',
        ('GET', '/api/vpn/list'): 'vpn_list',
        ('DELETE', '/api/vpn/remove/*'): 'vpn_remove',
    }

    def setup(self):
        self.timeout = self.server.timeout_s
        super().setup()
        self._deadline = threading.Timer(self.server.deadline_s or 0, self._cut)
        self._deadline.daemon = True
        if self.server.deadline_s:
            self._deadline.start()

    def finish(self):
        self._deadline.cancel()
        super().finish()

    def _cut(self):
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, form, *args):
        pass  # what happens is an event; a request as such is none

    def do_GET(self):
        self._unread, self._chunks = 0, None
        try:
            self._answer_request()
        except OSError as error:
            if isinstance(error, (ConnectionError, TimeoutError)):
                self.close_connection = True  # the client's end is gone
            else:
                self._refuse(error)
        except Exception as error:
            self._refuse(error)
        self._drain()

    do_POST = do_DELETE = do_PUT = do_PATCH = do_HEAD = do_OPTIONS = do_GET

    def _answer_request(self):
        try:
            url = urllib.parse.urlsplit(self.path)
            self._query = dict(urllib.parse.parse_qsl(url.query))
        except ValueError as error:
            raise RequestError(400, 'this is no path') from error
        path, name = url.path, None
        if not any(path == route for _, route in self.ROUTES):
            path, _, name = path.rpartition('/')
            path, name = f'{path}/*', urllib.parse.unquote(name)
        self._body_length(path)
        methods = [method for method, route in self.ROUTES if route == path]
        caller = self.server.caller(self.client_address)
        self._refuse_browsers(caller)
        if caller.role == 'newcomer' and (self.command, path) != ('POST', '/api/vpn/create'):
            raise RequestError(404, 'only invites are redeemed here')
        if not methods:
            raise RequestError(404, f'there is no {url.path[:200]}', 'docs/API.md lists what there is')
        if self.command not in methods:
            raise RequestError(405, f'{self.command} is not for {url.path[:200]}', f'use {" or ".join(methods)}')
        verb = self.ROUTES[self.command, path]
        if not may(caller, verb, name):
            hint = {
                'stranger': "on the server use its socket: 'sudo faas …'",
                'peer': 'ask for an admin invite: sudo faas vpn invite --admin',
            }
            raise RequestError(403, f'{caller.name or "this address"} may not do that', hint.get(caller.role))
        getattr(self, f'_{verb}')(caller, name)

    def _refuse_browsers(self, caller):
        """A page that a peer looks at must not speak for it: neither by requests of its own, nor by a rebound name."""
        ours = re.fullmatch(r'(\[[0-9a-fA-F:]+\]|ns\.faas)(:[0-9]+)?', self.headers.get('Host', ''))
        if 'Origin' in self.headers or (caller.role in ('peer', 'admin') and not ours):
            raise RequestError(403, 'this is no API for web pages')

    def _body_length(self, path):
        """Note how long the body is. Raises RequestError when that is not said as it must be."""
        lengths, codings = (self.headers.get_all(key, []) for key in ('Content-Length', 'Transfer-Encoding'))
        malformed = self.headers.get_payload()  # a line that is no header, and all after it
        if codings or malformed or len(lengths) > 1:  # where the next request begins, others may see otherwise
            self.close_connection = True
            self._unread = math.inf
        if malformed:
            raise RequestError(400, 'a header is malformed')
        if len(lengths) + len(codings) > 1:
            raise RequestError(400, 'the length of the body is said twice')
        if codings:
            if (self.command, path) != ('POST', '/api/new') or codings[0].lower() != 'chunked':
                raise RequestError(411, f'a body that is {codings[0][:40]} is not taken', 'send Content-Length')
            self._chunks = Chunks(self.rfile)
            return
        if not lengths and self.command == 'POST':
            self.close_connection = True  # what follows may be a body all the same, and no request
            raise RequestError(411, 'Content-Length is missing')
        if lengths and not re.fullmatch('[0-9]{1,18}', lengths[0]):
            self.close_connection = True
            raise RequestError(400, 'Content-Length is no number')
        self._unread = int(lengths[0]) if lengths else 0

    def _read(self, most):
        if self._chunks:
            return self._chunks.read(most)
        data = self.rfile.read1(min(most, self._unread))
        self._unread -= len(data)
        return data

    def _body(self):
        if self._unread > MOST_JSON:
            raise RequestError(413, f'the body is longer than {MOST_JSON} bytes')
        body = b''
        while self._unread:
            chunk = self._read(MOST_JSON)
            if not chunk:
                self._cut_off()
            body += chunk
        return body

    def _cut_off(self):
        self._unread, self.close_connection = 0, True
        end = 'last chunk' if self._chunks else 'Content-Length'
        raise RequestError(400, f'the body ended before its {end}', 'try again')

    def _drain(self):
        """Read what was not wanted, within reason.

        Closing on unread bytes would reset the connection under our answer.
        """
        if self._unread:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_WR)
                self.connection.settimeout(1)
                self._chunks = None  # whatever they are
                deadline = time.monotonic() + DRAIN_S
                while self._unread and time.monotonic() < deadline and self._read(image.CHUNK):
                    pass

    def _refuse(self, error):
        status = http_status(error)
        if status == 500:
            traceback.print_exception(error)
        text = str(error) if status != 500 else 'this is a fault of faasd; its log has more'
        first_line = text.splitlines()[0][:500] if text else type(error).__name__
        answer = {'error': first_line, 'hint': getattr(error, 'hint', None)}
        if isinstance(error, pool.StartFailed):
            answer |= {
                'error': f'the function does not start: {answer["error"]}',
                'log': [] if error.log == [first_line] else error.log,
                'hint': error.hint or 'nothing has changed on the server; correct the function and deploy it again',
            }
        with contextlib.suppress(OSError):
            self._answer(json.dumps(answer).encode(), status)

    def send_error(self, code, message=None, explain=None):
        """What http.server itself refuses, in the same form."""
        self._unread, self.close_connection = 0, True
        code = 405 if code == 501 else code  # of a method that http.server finds no do_… for
        self._answer(json.dumps({'error': message or self.responses[code][0], 'hint': None}).encode(), code)

    def _answer(self, body, status=200, content_type='application/json', headers=()):
        self.send_response(status)
        self.send_header('Content-Type', content_type)
        self.send_header('Content-Length', str(len(body)))
        if self._unread:
            self.send_header('Connection', 'close')
        for key, value in headers:
            self.send_header(key, value)
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def _json(self, value):
        self._answer(json.dumps(value).encode())

    # One method for each verb

    def _new(self, caller, _):
        self._deadline.cancel()
        self.connection.settimeout(PAUSE_S)
        name, reference = self._query.get('name', ''), self._query.get('image')
        read, length = self._read, self._unread
        if self._chunks:
            read, length = self._bounded(self.server.faasd.settings['max_upload']), None
        try:
            answer = self.server.faasd.new(name, read, length, reference, self._client_is_there)
        except EOFError:
            self._cut_off()
        self._unread = 0
        self._json(answer)

    def _client_is_there(self):
        """False when whoever asked has gone. One who has only ended his sending is there, if it is a unix socket."""
        gone = select.POLLHUP | (select.POLLRDHUP if self.connection.family != socket.AF_UNIX else 0)
        poll = select.poll()
        poll.register(self.connection, gone)
        return not poll.poll(0)

    def _bounded(self, most):
        """A read(n) for a body of which nobody has said how long it is."""

        def read(count):
            nonlocal most
            data = self._read(count)
            most -= len(data)
            if most < 0:
                raise too_large('the archive is', self.server.faasd.settings['max_upload'])
            return data

        return read

    def _list(self, caller, _):
        self._json(self.server.faasd.list())

    def _health(self, caller, _):
        answer = self.server.faasd.health(with_recent=caller.role in ('local', 'admin'))
        if pad := self._query.get('pad'):  # a client that tries whether full packets arrive, in both directions
            answer['pad'] = pad
        self._json(answer)

    def _ip(self, caller, name):
        self._json(self.server.faasd.ip(name))

    def _logs(self, caller, name):
        lines = self._query.get('lines', '100')
        if not lines.isascii() or not lines.isdigit() or len(lines) > 6:
            raise RequestError(400, "'lines' is no number")
        self._answer(self.server.faasd.logs(name, int(lines)), content_type='text/plain; charset=utf-8')

    def _remove(self, caller, name):
        self.server.faasd.remove(name)
        self._answer(b'')

    def _vpn_create(self, caller, _):
        body = self._body()
        invite_id = self.headers.get('Faas-Invite')
        if caller.role == 'newcomer' and (invite_id or self.server.faasd.settings['enroll'] != 'open'):
            answer, peer, proof = self.server.faasd.redeem(
                invite_id or '', self.headers.get('Faas-Nonce', ''), self.headers.get('Faas-Proof', ''), body
            )
            return self._answer(answer, headers=(('Faas-Peer', peer), ('Faas-Proof', proof)))
        fields = peer_fields(body)
        answer, peer = self.server.faasd.vpn_create(fields['name'], fields['public_key'])
        self._answer(json.dumps(answer).encode(), headers=(('Faas-Peer', peer),))

    def _vpn_remove(self, caller, name):
        if caller.name == name:  # its tunnel ends with it: first the answer, then the removal
            self.server.faasd.vpn_remove(name, before_it_counts=self._answer_and_wait)
        else:
            self.server.faasd.vpn_remove(name)
            self._answer(b'')

    def _answer_and_wait(self):
        self._answer(b'')
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and struct.unpack(
            'i', fcntl.ioctl(self.connection, termios.TIOCOUTQ, b'\0' * 4)
        ) != (0,):
            time.sleep(0.01)  # until the client has acknowledged every byte
        self.close_connection = True

    def _vpn_list(self, caller, _):
        self._json(self.server.faasd.vpn_list())

    def _vpn_invite(self, caller, _):
        fields = json_object(self._body())
        name, expires, admin = fields.get('name'), fields.get('expires', 3600), fields.get('admin', False)
        if type(expires) is not int or not 60 <= expires <= 30 * 86400:
            raise RequestError(400, "'expires' is no number of seconds from 60 to 2592000")
        if type(admin) is not bool or not isinstance(name, (str, type(None))):
            raise RequestError(400, "'name' is a text or null, 'admin' true or false")
        self._json(self.server.faasd.vpn_invite(name, expires, admin))


# The program


def prepare_process():
    """What the process needs of the kernel: orphans of runc as its children, and many descriptors."""
    import ctypes

    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise StartError('prctl(PR_SET_CHILD_SUBREAPER) failed')
    os.umask(0o022)  # a stricter one of root's would keep containers out of their root file system
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def termination():
    """A descriptor that can be read from when SIGTERM, SIGINT or SIGHUP comes.

    An Event that a handler sets would not do: a signal just before the wait for it begins does not interrupt that wait.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    return reader


def main():
    parser = argparse.ArgumentParser(prog='faasd.py', description='private functions on a server of your own')
    parser.add_argument(
        '--standalone', action='store_true', help='make keys, bring up wg0 and CoreDNS, take them down on exit'
    )
    parser.add_argument(
        '--prepare', action='store_true', help='only make what wg-quick needs: keys and wg0.conf, if wg0 can be ours'
    )
    arguments = parser.parse_args()
    ending = termination()
    try:
        with contextlib.closing(Events()) as events:
            run(arguments, ending, events)
    except (
        StartError,
        vpn_manager.VPNError,
        registry.RegistryError,
        process.CommandError,
        OSError,
        sqlite3.Error,
    ) as error:
        hint = getattr(error, 'hint', None)
        print(f'faasd: {error}{f" ({hint})" if hint else ""}', file=sys.stderr)
        return os.EX_CONFIG if isinstance(error, BadSettings) else 1
    return 0


def run(arguments, ending, events):
    """faasd from its start until `ending` can be read from."""
    if os.geteuid() != 0:
        raise StartError('faasd needs root', 'sudo python3 faasd.py')
    settings = read_settings(os.environ)
    needed = ['ip', 'wg', 'nft', settings['runtime']] + ['coredns'] * (arguments.standalone or arguments.prepare)
    missing = [program for program in needed if not process.installed(program)]
    if missing:
        raise StartError(f'not installed: {", ".join(missing)}', "'make deps' installs what is missing")
    prepare_process()
    faasd = Faasd(settings, arguments.standalone, events)
    if arguments.prepare:
        return faasd.prepare()
    faasd.start()
    systemd.notify('READY=1')
    os.read(ending, 1)
    # systemd's own limit knows nothing of FAAS_STOP_TIMEOUT.
    systemd.notify(f'STOPPING=1\nEXTEND_TIMEOUT_USEC={int((faasd.settings["stop_timeout"] + 60) * 1_000_000)}')
    faasd.stop(handover=systemd.is_restart())


if __name__ == '__main__':
    sys.exit(main())
