"""Egress: a veth, addresses and rules for each instance that may reach something."""

import contextlib
import ipaddress
import json
import os
import re
import socket
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple

from host import egress_rules, process, rtnetlink, sock_diag
from host.egress_names import KEPT_S, Names
from host.egress_rules import Place, Target
from host.errors import FaasError
from host.foreign_firewalls import ForeignFirewalls
from host.maker import Maker

NETWORK6 = ipaddress.ip_network('fd00:faa5:0:200::/64')
FIRST, LAST = 16, 0xFFF0  # numbers of instances; the host has number 1
INSIDE = 'eth0'
FIRST_LOOKUP_S = 2  # how long the start of an instance waits for the addresses of its names
IPV6_UPLINKS = '/proc/sys/net/ipv6/conf'


class EgressError(FaasError):
    """An instance cannot get what it may reach."""

    status = 503


class Link(NamedTuple):
    """The way out of one instance. `namespace` (owned) is its network, None after an adoption."""

    function: str
    number: int
    name: str
    ipv4: str
    ipv6: str
    targets: tuple[Target, ...]
    hosts: str  # the path of its /etc/hosts
    namespace: int | None = None


class Egress:
    """What instances may reach: veths, and the nftables table `table` beside the main one."""

    def __init__(
        self,
        table: str,
        network4: str,
        gateway: str,
        zone_server: str,
        emit: Callable,
    ) -> None:
        """`network4` is where instances get their IPv4 addresses from; `gateway` and `zone_server` are CoreDNS."""
        self._network4, self._emit = ipaddress.ip_network(network4), emit
        self.place = Place(f'{table}_egress', gateway, zone_server, str(self._network4[1]), str(NETWORK6[1]))
        self._host6 = NETWORK6[1].packed
        self._lock, self._maker = threading.RLock(), Maker()
        self._links: dict[str, Link] = {}  # by the id of the container
        self._next = FIRST
        self._names = Names()
        self._warned: set[tuple[str, int]] = set()
        self._local: list = []
        self._forwarding = self._loaded = False
        self.foreign = ForeignFirewalls(emit)
        self._changes = 0  # of the table, by us

    # For containers

    def attach(self, ident: str, function: str, texts: Iterable[str], users: int, hosts: str) -> Link:
        """A way out for the container `ident`, whose user namespace is `users` (a descriptor).

        The names that it may reach are added to the file `hosts`. Raises EgressError, OSError, CommandError; nothing is
        left then.
        """
        targets = tuple(map(egress_rules.parse, texts))
        self._names.need({target.what for target in targets if target.kind == 'name'}, FIRST_LOOKUP_S)
        self.foreign.open()
        with contextlib.ExitStack() as undo:
            with self._lock:
                if not self._loaded:
                    self.load()
                link = self._link(function, self._free_number(), targets, hosts)
                undo.callback(self.detach, ident)
                self._changes += 1

                def connect(namespace):
                    self._links[ident] = link._replace(namespace=namespace)
                    self._connect(self._links[ident])

                if self._maker.make(users, self._rules(link), connect):
                    self.load()  # the table was taken away; or the kernel cannot, which is told
                else:
                    self._fill(link)
            link = self._links[ident]
            self._write_hosts(link)
            undo.pop_all()
        self._emit('egress', f'{function} is seen by others as {link.ipv6} and {link.ipv4}', name=function)
        self._warn(link)
        return link

    def record(self, ident: str, texts: Iterable[str]) -> dict:
        """What adopt() takes, as JSON has it."""
        link = self._links[ident]
        return {'function': link.function, 'number': link.number, 'targets': list(texts), 'hosts': link.hosts}

    def adopt(self, ident: str, record: dict) -> None:
        """A container of a former faasd goes on; `record` is what record() said of it. Before begin()."""
        targets = tuple(map(egress_rules.parse, record['targets']))
        self._links[ident] = self._link(record['function'], record['number'], targets, record['hosts'])

    def detach(self, ident: str) -> None:
        """The container has ended; its veth went with its network."""
        with self._lock:
            link = self._links.pop(ident, None)
            if link and self._loaded:
                self._changes += 1
                with contextlib.suppress(FaasError, OSError):
                    # What is wrong: the table was taken away. load() makes it without.
                    self._maker.change(egress_rules.without(self.place, link.name, link.targets))
        if link and link.namespace is not None:
            with contextlib.suppress(OSError):
                os.close(link.namespace)

    def address_of(self, ident: str) -> str | None:
        """The IPv6 address that others see the container by."""
        link = self._links.get(ident)
        return link.ipv6 if link else None

    @property
    def networks(self) -> list[str]:
        """Where the addresses of instances are from."""
        return [str(NETWORK6), str(self._network4)]

    def functions(self) -> dict[str, str]:
        """{address: function} of the instances."""
        return {address: link.function for link in list(self._links.values()) for address in (link.ipv4, link.ipv6)}

    def _free_number(self):
        used = {link.number for link in self._links.values()}
        last = min(LAST, self._network4.num_addresses - 2)
        for _ in range(FIRST, last + 1):  # an address is used again as late as possible
            number, self._next = self._next, self._next + 1 if self._next < last else FIRST
            if number not in used:
                return number
        raise EgressError('all addresses for egress are in use', 'give FAAS_EGRESS_IPV4 a larger network')

    def _link(self, function, number, targets, hosts, namespace=None):
        ipv4, ipv6 = str(self._network4[number]), str(NETWORK6[number])
        return Link(function, number, f'{egress_rules.LINKS}{number}', ipv4, ipv6, targets, hosts, namespace)

    def _connect(self, link):
        """Lay the veth. The addresses of both ends are known to each other: nothing is asked by ARP or ND."""
        ours, theirs = (bytes([2, 0xFA, 0xA5, end]) + link.number.to_bytes(2, 'big') for end in (0, 1))
        pairs = [(self.place.host4, link.ipv4), (self.place.host6, link.ipv6)]
        pairs = [tuple(map(ipaddress.ip_address, pair)) for pair in pairs]
        with rtnetlink.Routing() as routing:
            routing.remove_link(link.name)
            routing.add_veth(link.name, ours, INSIDE, theirs, link.namespace)
            for key, value in (
                ('ipv6', 'accept_ra=0 accept_redirects=0 forwarding=1'),
                ('ipv4', 'accept_redirects=0 send_redirects=0 arp_ignore=8 rp_filter=1 forwarding=1'),
            ):
                for text in value.split():
                    name, _, digit = text.partition('=')
                    write_sysctl(f'net/{key}/conf/{link.name}/{name}', digit)
            if any(target.kind == 'host' for target in link.targets):
                write_sysctl(f'net/ipv4/conf/{link.name}/route_localnet', '1')
            routing.up(link.name, noarp=True)
            index = socket.if_nametoindex(link.name)
            for host, instance in pairs:
                routing.add_address(index, host)
                routing.add_route(index, instance)
                routing.add_neighbour(index, instance, theirs)
        with rtnetlink.within(link.namespace), rtnetlink.Routing() as routing:
            routing.up('lo')
            write_sysctl(f'net/ipv6/conf/{INSIDE}/accept_ra', '0')
            routing.up(INSIDE)
            index = socket.if_nametoindex(INSIDE)
            for host, instance in pairs:
                routing.add_address(index, instance)
                routing.add_route(index, host)
                routing.add_neighbour(index, host, ours)
                routing.add_route(index, None, host)
        if any(target.kind in ('internet', 'network', 'name') for target in link.targets):
            self._forward()

    def _warn(self, link):
        """Say, once, which ports of this host are not at 127.0.0.1, where the function is led to."""
        for port in {target.port for target in link.targets if target.kind == 'host'}:
            with contextlib.suppress(OSError):
                listening = sock_diag.listening_addresses(port)
                if (
                    listening
                    and not {'127.0.0.1', '0.0.0.0', '::'}.intersection(listening)
                    and (link.function, port) not in self._warned
                ):
                    self._warned.add((link.function, port))
                    where = ' and '.join(listening)
                    text = f'host:{port} is not reached: it listens at {where} alone, not at 127.0.0.1'
                    self._emit('egress', text, name=link.function, problem=True)

    def _forward(self):
        """Have the host forward packets. Its own default route may come from router advertisements: keep that."""
        if self._forwarding:
            return
        for path in os.listdir(IPV6_UPLINKS):
            with contextlib.suppress(OSError):
                if read_sysctl(f'net/ipv6/conf/{path}/accept_ra') == '1':
                    write_sysctl(f'net/ipv6/conf/{path}/accept_ra', '2')
        switched = []
        for name in ('net/ipv6/conf/all/forwarding', 'net/ipv4/ip_forward'):
            if read_sysctl(name) == '0':
                write_sysctl(name, '1')
                switched.append(name.replace('/', '.'))
        if switched:
            self._emit('egress', f'Switched on {" and ".join(switched)}: a function may reach what is not on this host')
        self._forwarding = True

    # The table

    def load(self) -> None:
        """Put the whole table in place, with the rules of all instances. Raises EgressError."""
        with self._lock:
            self._changes += 1
            self._local = local_networks()
            text = egress_rules.base(self.place, self._local)
            text += ''.join(map(self._rules, self._links.values()))
            self._nft(text)
            self._loaded = True
            for link in self._links.values():
                self._fill(link)

    def _rules(self, link):
        return egress_rules.chains(self.place, link.name, link.ipv4, link.ipv6, link.targets)

    def _nft(self, text):
        try:
            process.run(['nft', '-f', '-'], input=text)
        except process.CommandError as error:
            found = re.search(r'Error: (.*)', error.stderr)
            raise EgressError(
                f'the nftables table inet {self.place.table} cannot be changed: {found[1] if found else error.reason}',
                'install nftables (make deps), and a kernel with nft_masq, nft_nat and nft_connlimit',
            ) from error

    def heal(self) -> bool:
        """Load the table again when it is not as it should be. False when there is nothing to look at."""
        with self._lock:
            links, changes = list(self._links.values()), self._changes
        if not self._loaded or not links:
            return False
        whole, moved = self._is_whole(links), local_networks() != self._local  # no start of an instance waits for that
        with self._lock:
            if changes != self._changes or whole and not moved:  # of what we change the kernel tells, too
                return True
            self.load()
            if whole:
                return True
        raise EgressError('the nftables table of egress was changed by somebody: it is loaded again')

    def look_at_foreign(self) -> bool:
        """Keep our veths open in the firewalls of others while an instance has one. Raises Shut."""
        return self.foreign.look(bool(self._links))

    def is_others(self, message: bytes) -> bool:
        """True if the message of NETLINK_NETFILTER tells of what faasd did not do for an instance."""
        return not self._maker.is_author(message)

    def is_elsewhere(self, message: bytes) -> bool:
        """True if the message of NETLINK_ROUTE is not of a veth of an instance."""
        return egress_rules.LINKS.encode() not in message and self._host6 not in message

    def _is_whole(self, links):
        try:
            said = process.run(['nft', '--json', 'list', 'table', 'inet', self.place.table]).stdout
            things = json.loads(said)['nftables']
        except (process.CommandError, ValueError, KeyError):
            return False
        counts = {}
        for thing in things:
            if rule := thing.get('rule'):
                counts[rule['chain']] = counts.get(rule['chain'], 0) + 1
        text = egress_rules.base(self.place, []) + ''.join(map(self._rules, links))
        maps = {thing['map']['name']: len(thing['map'].get('elem', [])) for thing in things if 'map' in thing}
        return counts == expected_counts(text) and set(maps.values()) == {len(links)}

    def begin(self) -> None:
        """Load the table for what was adopted; without that, take away what a killed faasd has left."""
        if self._links:
            self.load()
        else:
            self.remove()

    def remove(self) -> None:
        """Take the table away; it may be gone already. Raises CommandError."""
        self._maker.close()
        table = self.place.table
        process.run(['nft', '-f', '-'], input=f'table inet {table}\ndelete table inet {table}\n')

    # Names

    def refresh(self) -> bool:
        """Look up the names again when it is time, in a thread of its own. False: this tells nothing."""
        links = list(self._links.values())
        self._names.refresh({each.what for link in links for each in link.targets if each.kind == 'name'}, self._seen)
        return False

    def _seen(self):
        with self._lock:
            for link in self._links.values():
                with contextlib.suppress(EgressError, OSError):
                    self._fill(link)
                    self._write_hosts(link)

    def _reachable(self, link, target):
        """The addresses of a name that may be reached, with the seconds for which they may be, the latest first.

        They are public ones, and those of networks that are named as well.
        """
        named = [each.what for each in link.targets if each.kind == 'network' and each.port in (None, target.port)]
        for address, left_s in self._names.addresses(target.what):
            is_named, is_local = (any(address in network for network in networks) for networks in (named, self._local))
            if is_named or (egress_rules.is_public(address) and not is_local):
                yield address, left_s

    def _fill(self, link):
        lines = []
        for target in link.targets:
            for address, left_s in self._reachable(link, target) if target.kind == 'name' else ():
                kind = egress_rules.set_name(link.name, address.version, target.port)
                where = f'element inet {self.place.table} {kind} {{ {address}'
                lines += [f'add {where} timeout {KEPT_S}s }}', f'delete {where} }}']  # it may be there, or not
                lines.append(f'add {where} timeout {left_s}s }}')
        if lines:
            self._nft('\n'.join(lines) + '\n')

    def _write_hosts(self, link):
        """Add to /etc/hosts inside: the same file each time, for it is mounted. At no time is it empty."""
        with open(link.hosts) as file:
            lines = [line for line in file.read().splitlines() if line.partition(' ')[0] in ('127.0.0.1', '::1')]
        if any(target.kind == 'host' for target in link.targets):
            lines.append(f'{self.place.host4} host.faas')
        for target in link.targets:
            if target.kind == 'name':
                lines += [f'{address} {target.what}' for address, _ in self._reachable(link, target)]
        text = ('\n'.join(dict.fromkeys(lines)) + '\n').encode()
        with open(os.open(link.hosts, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), 'r+b', buffering=0) as file:
            if file.read() != text:
                os.pwrite(file.fileno(), text, 0)
                file.truncate(len(text))
                os.fchmod(file.fileno(), 0o644)

    def resolv_conf(self, link: Link) -> str:
        """The text of /etc/resolv.conf inside, '' without DNS."""
        kinds = {target.kind for target in link.targets}
        server = self.place.gateway if 'internet' in kinds else self.place.zone_server if 'functions' in kinds else None
        return f'nameserver {server}\noptions timeout:2\n' if server else ''


def expected_counts(text: str) -> dict[str, int]:
    """{chain: number of its rules} of a table as egress_rules writes it."""
    counts, chain = {}, None
    for line in map(str.strip, text.splitlines()):
        if found := re.match(r'chain (\w+) \{', line):
            chain = found[1]
        elif line == '}':
            chain = None
        elif chain:
            counts[chain] = counts.get(chain, 0) + 1
    return counts


def local_networks() -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """The public networks in which this host has an address. The others are never the internet."""
    networks = set()
    for link in json.loads(process.run(['ip', '-j', 'address']).stdout or '[]'):
        for info in link.get('addr_info', ()):
            if egress_rules.is_public(ipaddress.ip_address(info['local'])):
                networks.add(ipaddress.ip_network(f'{info["local"]}/{info["prefixlen"]}', strict=False))
    return sorted(networks, key=str)


def read_sysctl(name: str) -> str:
    with open(f'/proc/sys/{name}') as file:
        return file.read().strip()


def write_sysctl(name: str, value: str) -> None:
    with open(f'/proc/sys/{name}', 'w') as file:
        file.write(value)
