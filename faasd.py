#!/usr/bin/env python3
"""faasd: private functions on one server.

Accepts each function's connections and hands the sockets to containers; see docs/.
"""

import argparse
import concurrent.futures
import contextlib
import ctypes
import functools
import grp
import os
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable
from typing import Any

import dns_manager
import registry
import vpn_manager
from control.access import Caller
from control.api import ControlAPI
from control.builds import Builds
from control.deployments import Deployments
from control.enroll import EnrollPort, bound
from control.events import Events, Refusals, attempt
from control.functions import Functions
from control.health import Health, Problems
from control.monitor import CLOSELY_S, Check, Monitor
from control.mounts import Mounts
from control.peers import Peers
from control.projection import Projection
from control.repairs import Repairs
from control.revisions import Revisions
from control.secrets import Secrets
from control.server import ControlServer, Verbs
from control.server import Limits as ServerLimits
from control.settings import read_settings
from control.storage import Storage
from control.supervisor import Supervisor
from control.volumes import Volumes
from handlers.containers.building import BuildLimits, Workshop
from handlers.containers.containers import Containers
from handlers.containers.limits import Limits
from handlers.containers.logs import LogCopier
from handlers.containers.private import Private
from handlers.images.layers import Layers
from handlers.serving.apart import Apart
from handlers.serving.injection import Injector
from handlers.serving.instance import Surroundings
from handlers.serving.loop import Loop
from handlers.serving.server import FaaSServer
from host import files, netlink, process, systemd
from host.egress import Egress
from host.errors import EXPECTED, StartError
from host.firewall import Firewall
from host.guard import Guard, GuardUnavailable, Unguarded
from host.version import VERSION

__all__ = ['ControlAPI', 'Daemon', 'FaaSServer']

STATE = '/var/lib/faasd'
RUN = '/run/faasd'
CONTROL_PORT = 8080
UNUSED_ADDRESS = 'fd00:faa5::'  # a port is taken there only by who listens on every address
OWN_PORTS_HINT = 'let it listen on addresses of its own, not on [::]'
PR_SET_CHILD_SUBREAPER = 36
OOM_SCORE_ADJ = -500  # of faasd, CoreDNS and wireguard-go, as Docker's; bundle.py has that of instances
DISK_LOOK_S = 10
FOREIGN_LOOK_S = 5  # how often the firewalls of others are looked at: programs are run for that
COPY_LOOK_S = 600
THREADS_LOOK_S = 1  # how often the main thread looks whether the others live

UNIX_LIMITS = ServerLimits(threads=16, idle_s=60)
TUNNEL_LIMITS = ServerLimits(threads=32, idle_s=30, whole_s=60, each_max=8)
ENROLL_LIMITS = ServerLimits(threads=32, idle_s=5, whole_s=10, each_max=4)


class Daemon:
    """The server as a whole: start() and stop() as named phases. The registry is the truth; the rest follows it."""

    # What the phases of start() make, in their order.
    registry: registry.Registry
    dns: dns_manager.DNSZoneManager
    zone: Projection
    addresses: Projection
    supervisor: Supervisor
    enroll: EnrollPort
    peers: Peers
    revisions: Revisions
    containers: Containers
    loop: Loop
    injector: Injector
    apart: Apart
    server: FaaSServer
    guard: Guard | Unguarded = Unguarded()
    functions: Functions | None = None
    monitor: Monitor

    def __init__(self, settings: dict[str, Any], standalone: bool, events: Events) -> None:
        self._settings, self._standalone, self._events = settings, standalone, events
        self._emit, self._undo = events.emit, contextlib.ExitStack()
        self._problems, self.refusals = Problems(self._emit), Refusals(self._emit)
        self._handover, self._forwarders = False, []
        self._storage = Storage(STATE, RUN, self._emit)
        self._threads = [events.thread]  # that must live while faasd does
        self.vpn = self._make_vpn()
        self.firewall = Firewall(
            settings['nft_table'], settings['wg_interface'], registry.GATEWAY, registry.ZONE_SERVER
        )

    def _make_vpn(self) -> vpn_manager.VPNManager:
        settings = self._settings
        endpoint = settings['vpn_endpoint']
        if not endpoint:
            endpoint = vpn_manager.default_address() or 'localhost'
            self._emit(
                'vpn', f'FAAS_VPN_ENDPOINT is not set: newcomers are told {endpoint}, the address of the default route'
            )
        return vpn_manager.VPNManager(
            self._emit, registry.GATEWAY, registry.ZONE_SERVER, endpoint, settings['wg_interface'], settings['wg_port']
        )

    # From start to end

    def start(self) -> None:
        """Bring everything up, phase by phase. Whatever fails is undone and raised."""
        try:
            self._storage.claim(self._undo)
            self._open_registry()
            self._bring_up_network()
            self._project_peers()
            left = self._prepare_containers()
            self._load_table()
            self._load_guard()
            self._start_serving(left)
            self._start_dns()
            self._start_api()
            self._start_monitor()
        except BaseException:
            self._undo.close()
            raise
        endpoint = vpn_manager.join_endpoint(*vpn_manager.split_endpoint(self.vpn.endpoint, self._settings['wg_port']))
        counts = f'{len(self.registry.functions())} functions, {len(self.registry.peers())} peers'
        self._emit('faasd', f'Ready: {counts}, endpoint {endpoint}')

    def stop(self, handover: bool = False) -> None:
        """Accept no more, let what runs finish within FAAS_STOP_TIMEOUT, take everything down.

        With `handover` what listens by itself goes on, with its address and the table, and the next faasd adopts it.
        """
        self._handover = handover
        self._emit('faasd', 'Stopping')
        self._undo.close()
        self._emit('faasd', 'Stopped')

    def prepare(self) -> None:
        """Make keys and wg0.conf, which wg-quick needs before faasd can run, also while it does. Raises as start()."""
        self._make_host_ready(moving=True)

    # The phases of a start

    def _open_registry(self) -> None:
        self.registry = self._storage.open_registry(self._undo)
        self.dns = dns_manager.DNSZoneManager(
            self.registry.next_serial, self._emit, registry.GATEWAY, registry.ZONE_SERVER
        )
        self.zone = Projection(
            lambda: self.dns.project(self._zone_records()), lambda: self.dns.is_current(self._zone_records())
        )
        self._storage.add([*self.dns.folders, *self.vpn.folders])
        self.addresses = Projection(lambda: self.vpn.project_addresses(self.registry.function_addresses()))

    def _zone_records(self) -> dict[str, str]:
        return {function.name: function.ipv6 for function in self.registry.functions()}

    def _make_host_ready(self, moving: bool = False) -> None:
        self.vpn.check_host(moving)
        for port in (53, 80, CONTROL_PORT):
            vpn_manager.refuse_taken(socket.SOCK_STREAM, UNUSED_ADDRESS, port, OWN_PORTS_HINT)
        vpn_manager.refuse_taken(socket.SOCK_DGRAM, UNUSED_ADDRESS, 53, OWN_PORTS_HINT)
        self.vpn.ensure_keys()
        self.vpn.write_wg0_conf()

    def _bring_up_network(self) -> None:
        self.supervisor = Supervisor(self.vpn, self.dns, f'{RUN}/children.json', self._emit, self._problems.report)
        self.supervisor.end_leftovers()
        self._make_host_ready()
        if self._standalone:
            self.supervisor.bring_up(self._undo)
        self.vpn.check_interface()
        self._undo.callback(self._unless_left, self.vpn.project_addresses, [])

    def _project_peers(self) -> None:
        self.enroll = EnrollPort(self._settings['enroll_bind'], self._invites_wanted, self._emit)
        openly = self._settings['enroll'] == 'open'
        self.peers = Peers(self.registry, self.vpn, self.enroll, self._emit, openly)
        self.peers.begin()

    def _invites_wanted(self) -> bool:
        return self.peers.enrolls_openly or self.registry.invites_open_for_s() > 0

    def _prepare_containers(self) -> list:
        """What a former faasd has left, and still serves its live revision."""
        settings = self._settings
        layers = Layers(f'{STATE}/layers')
        layers.prepare()
        layers_base = layers.id_base(settings['id_base'])
        self.revisions = Revisions(
            STATE, layers, layers_base, settings['max_unpacked'], settings['egress'], self._emit
        )
        self.secrets = Secrets(f'{STATE}/secrets')
        self.egress = Egress(
            settings['nft_table'], settings['egress_ipv4'], registry.GATEWAY, registry.ZONE_SERVER, self._emit
        )
        self.volumes = Volumes(f'{STATE}/volumes', RUN, self._emit)
        self._undo.callback(self.volumes.close)
        self.volumes.thaw()  # before the instances of a killed faasd are: a write that waits cannot be
        self._storage.add([self.secrets.folder, self.volumes.folder])
        self.containers = Containers(
            f'faas-{self.registry.instance}',
            Limits(settings['memory'], settings['pids'], settings['cpus']),
            RUN,
            settings['id_base'],
            settings['cgroup'],
            settings['runtime'],
            layers_base,
            Limits(settings['memory_max'], settings['pids_max'], settings['cpus_max']),
            Private(f'{RUN}/private', self.secrets, settings['mounts']),
            self.volumes,
            self.egress,
        )
        self.volumes.holders = self.containers.volume_holders
        self._undo.callback(self.containers.close)
        live = {function.name: function.revision for function in self.registry.functions()}
        return self.containers.prepare(lambda record: live.get(record['function']) == record['revision'])

    def _load_table(self) -> None:
        """Before the first listener, until after the last instance."""
        self.firewall.load()
        self._undo.callback(self._unless_left, self.firewall.remove)
        self.egress.begin()
        self._undo.callback(self._unless_left, self.egress.remove)
        self._undo.callback(self._unless_left, self.egress.foreign.close)

    def _load_guard(self) -> None:
        settings = self._settings
        guard = Guard(settings['cgroup'], f'faas-{self.registry.instance}', settings['id_base'])
        try:
            guard.start()
            self._undo.callback(guard.close)
            self.guard = guard
        except GuardUnavailable as error:
            if settings['guard'] != Unguarded.kind:
                raise
            self._emit('guard', f'{error}: FAAS_GUARD=table lets nftables alone hold passed sockets', problem=True)

    def _start_serving(self, left: list) -> None:
        settings = self._settings
        self.revisions.remove_strays(self.registry.functions())
        self.loop = Loop()
        self._undo.callback(self.loop.stop)
        workers = concurrent.futures.ThreadPoolExecutor(max_workers=4, thread_name_prefix='instances')
        self._undo.callback(workers.shutdown)
        self.server = FaaSServer(self.loop, self._emit, self.guard)
        copier, self.injector, self.apart = LogCopier(), Injector(), Apart()
        self._threads += [self.loop.thread, copier.thread, self.injector.thread, self.apart.thread]
        around = Surroundings(
            self.loop,
            self.containers,
            copier,
            workers,
            self._emit,
            settings['start_timeout'],
            self.injector,
            self.apart,
            self.revisions.forget,
            settings['stop_timeout'],
            settings['idle_timeout'],
            registry.GATEWAY,
            self.guard.kind == Guard.kind,
            most_connections=self.server.most_connections,
        )
        self.functions = Functions(
            self.registry,
            self.revisions,
            self.server,
            around,
            self.dns,
            self.addresses,
            self.zone,
            self._emit,
        )
        self.builds = self._make_builds()
        self.deployments = Deployments(
            self.functions,
            self.registry,
            self.revisions,
            self.addresses,
            self.containers,
            self.secrets,
            self.volumes,
            self.builds,
            settings['max_upload'],
            self._emit,
        )
        self.volumes.wanted = self.deployments.wanted
        self._undo.callback(lambda: self.functions.close(self._handover))
        self.addresses.sync()
        self.functions.open_all(left)

    def _make_builds(self) -> Builds:
        settings = self._settings
        limits = BuildLimits(*(settings[f'build_{name}'] for name in ('memory', 'cpus', 'timeout', 'disk', 'egress')))
        builds = Builds(f'{STATE}/builds', Workshop(self.containers, RUN, limits), self._emit)
        builds.begin({function.name for function in self.registry.functions()})
        return builds

    def _start_dns(self) -> None:
        self.zone.sync()
        self._forwarders = self._settings['dns_forward'] or dns_manager.default_forwarders(
            own=(registry.GATEWAY, registry.ZONE_SERVER)
        )
        self.dns.write_corefile(self._forwarders)
        if self._standalone:
            self.supervisor.start_coredns(self._undo, self._forwarders)

    def _start_api(self) -> None:
        health = Health(self._problems, self._events, self.functions.list, self.guard.kind)
        verbs = Verbs(self.functions, self.deployments, self.volumes, self.peers, health, self.refusals)
        self._undo.callback(self.refusals.tell)
        sock = unix_socket(f'{RUN}/faasd.sock')
        self._undo.callback(files.remove_file, f'{RUN}/faasd.sock')
        for name, socket_, caller, limits in (
            ('api', sock, lambda address: Caller('local'), UNIX_LIMITS),
            ('tunnel api', bound(registry.GATEWAY, CONTROL_PORT), self._peer_at, TUNNEL_LIMITS),
        ):
            server = ControlServer(socket_, caller, limits, verbs, name)
            self._undo.callback(server.close)
            self._threads.append(server.thread)
        self._undo.callback(self.enroll.close)
        newcomer = functools.partial(
            ControlServer, caller=lambda address: Caller('newcomer'), limits=ENROLL_LIMITS, verbs=verbs, name='enroll'
        )
        with contextlib.suppress(*EXPECTED):  # the monitor and the first invite say it
            self.enroll.begin(newcomer)
        if self.peers.enrolls_openly:
            where = self._settings['enroll_bind']
            text = f'FAAS_ENROLL=open: whoever reaches {where} becomes a peer without an invite'
            self._emit('vpn', text, problem=True)

    def _peer_at(self, address: tuple) -> Caller:
        peer = self.registry.peer_at(address[0])
        return Caller(peer.role, peer.name) if peer else Caller('stranger')

    def _unless_left(self, function: Callable[..., object], *args: object) -> None:
        """Call it, unless an instance lives on that needs what it takes away."""
        if not (self.functions and self.functions.left_behind):
            attempt(self._emit, function, *args)

    # Keeping it so

    def _start_monitor(self) -> None:
        links = netlink.listen(socket.NETLINK_ROUTE, netlink.RTNLGRP_LINK, netlink.RTNLGRP_IPV6_IFADDR)
        self._undo.callback(links.close)
        rules = netlink.listen(netlink.NETLINK_NETFILTER, netlink.NFNLGRP_NFTABLES)
        self._undo.callback(rules.close)
        egress_rules = netlink.listen(netlink.NETLINK_NETFILTER, netlink.NFNLGRP_NFTABLES)
        self._undo.callback(egress_rules.close)
        interface = self.vpn.interface
        repairs = Repairs(
            self.registry,
            self.vpn,
            self.firewall,
            self.server,
            self.peers,
            self.addresses,
            self.supervisor if self._standalone else None,
            self._problems,
        )
        checks = [
            Check('rules', repairs.table, CLOSELY_S, rules, self.egress.is_others),
            Check('egress', self.egress.heal, CLOSELY_S, egress_rules, self.egress.is_others),
            Check('names', self.egress.refresh),
            Check('firewalls', self.egress.look_at_foreign, FOREIGN_LOOK_S),
            Check('guard', self.guard.heal),
            Check('injector', self.injector.check),
            Check('apart', self.apart.check),
            Check('connections', self.functions.count_connections),
            Check('limits', self.functions.look_at_limits, CLOSELY_S),
            Check(interface, repairs.missing_interface),
            Check(interface, repairs.interface, CLOSELY_S, links, self.egress.is_elsewhere),
            Check('registry', self._storage.look_after_registry, CLOSELY_S),
            Check('disk', self._storage.look_at_disks, DISK_LOOK_S),
            Check('copy', self.registry.copy_daily, COPY_LOOK_S),
            Check('mounts', Mounts(self.functions, self.deployments, self._emit).look, CLOSELY_S),
            Check('listener', self.functions.open_others, CLOSELY_S),
            Check('dns', self.supervisor.look_after_coredns),
            Check('enroll', self.enroll.adjust),
            Check('addresses', self.addresses.sync_if_stale),
            Check('peers', self.peers.projection.sync_if_stale),
            Check('zone', self.zone.sync_if_stale),
            Check('peer files', self.peers.projection.heal, CLOSELY_S),
            Check('zone file', self.zone.heal, CLOSELY_S),
            Check('corefile', self._write_corefile, CLOSELY_S),
            Check('removals', self.peers.write_removals, CLOSELY_S),
            Check('refusals', self.refusals.tell, Refusals.PERIOD_S),
        ]
        self.monitor = Monitor(checks, self._problems.report)
        self.monitor.start()
        self._threads.append(self.monitor.thread)
        self._undo.callback(self.monitor.stop)

    def _write_corefile(self) -> None:
        self.dns.name_instances(self.egress.functions())
        self.dns.write_corefile(self._forwarders, self.egress.networks)

    def dead_thread(self) -> str | None:
        """The name of a thread that has ended and should not have, or None."""
        return next((thread.name for thread in self._threads if not thread.is_alive()), None)

    def abort(self, text: str) -> None:
        """End at once, as if killed: the next start repairs everything from the registry."""
        self._emit('faasd', text, problem=True)
        self.supervisor.kill()
        self._events.close()
        os._exit(os.EX_SOFTWARE)


def unix_socket(path: str) -> socket.socket:
    """The bound socket of the local admins. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    os.fchmod(sock.fileno(), 0)  # bind() gives the file this mode: nobody gets in before it is what it must be
    sock.bind(path)
    with contextlib.suppress(KeyError):
        os.chown(path, 0, grp.getgrnam('faas').gr_gid)
    os.chmod(path, 0o660)
    return sock


# The program


def prepare_process(standalone: bool) -> None:
    """What the process needs of the kernel: orphans of runc as its children, and many descriptors.

    With `standalone` also what faasd.service gives it: functions are ended first when the machine has no memory left.
    """
    if standalone:
        with contextlib.suppress(PermissionError), open('/proc/self/oom_score_adj', 'w') as file:
            file.write(str(OOM_SCORE_ADJ))
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        raise StartError('prctl(PR_SET_CHILD_SUBREAPER) failed')
    os.umask(0o022)  # a stricter one of root's would keep containers out of their root file system
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def termination() -> int:
    """A descriptor that can be read from when SIGTERM, SIGINT or SIGHUP comes.

    An Event that a handler sets would not do: a signal just before the wait for it begins does not interrupt that wait.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    os.set_blocking(reader, True)
    signal.set_wakeup_fd(writer)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    return reader


def main() -> int:
    parser = argparse.ArgumentParser(prog='faasd.py', description='private functions on a server of your own')
    parser.add_argument('--version', action='version', version=f'faasd {VERSION}')
    parser.add_argument(
        '--standalone', action='store_true', help='make keys, bring up wg0 and CoreDNS, take them down on exit'
    )
    parser.add_argument(
        '--prepare', action='store_true', help='only make what wg-quick needs: keys and wg0.conf, if wg0 can be ours'
    )
    arguments = parser.parse_args()
    ending = termination()
    if sys.stdout:  # the locale may know no arrow
        sys.stdout.reconfigure(errors='backslashreplace')
    try:
        with contextlib.closing(Events()) as events:
            run(arguments, ending, events)
    except EXPECTED as error:
        hint = getattr(error, 'hint', None)
        print(f'faasd: {error}{f" ({hint})" if hint else ""}', file=sys.stderr)
        return getattr(error, 'exit_code', 1)
    return 0


def run(arguments: argparse.Namespace, ending: int, events: Events) -> None:
    """faasd from its start until `ending` can be read from."""
    if os.geteuid() != 0:
        raise StartError('faasd needs root', 'sudo python3 faasd.py')
    process.forget_unsafe_folders()
    settings = read_settings(os.environ)
    needed = ['ip', 'wg', 'nft', settings['runtime']] + ['coredns'] * (arguments.standalone or arguments.prepare)
    missing = [program for program in needed if not process.installed(program)]
    if missing:
        raise StartError(f'not installed: {", ".join(missing)}', "'make deps' installs what is missing")
    prepare_process(arguments.standalone)
    if arguments.prepare:
        return Daemon(settings, arguments.standalone, events).prepare()
    events.emit('faasd', f'faasd {VERSION}')
    daemon = Daemon(settings, arguments.standalone, events)
    daemon.start()
    systemd.notify('READY=1')
    wait_for_end(daemon, ending)
    # systemd's own limit knows nothing of FAAS_STOP_TIMEOUT.
    systemd.notify(f'STOPPING=1\nEXTEND_TIMEOUT_USEC={int((settings["stop_timeout"] + 60) * 1_000_000)}')
    daemon.stop(handover=systemd.is_restart())


def wait_for_end(daemon: Daemon, ending: int) -> None:
    """Return when `ending` can be read from. A thread that must live and does not ends faasd, to be started again."""
    poll = select.poll()
    poll.register(ending, select.POLLIN)
    while not poll.poll(THREADS_LOOK_S * 1000):
        if name := daemon.dead_thread():
            daemon.abort(f'the thread {name} has ended, and faasd with it')


if __name__ == '__main__':
    sys.exit(main())
