"""WireGuard on the server: keys, wg0.conf, peers/*.conf, `wg syncconf` and the addresses on wg0."""

import base64
import binascii
import contextlib
import errno
import ipaddress
import json
import os
import re
import socket
import stat
import subprocess
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Protocol

from host import egress_rules, files, process
from host.errors import is_scarce
from host.projected_folder import ProjectedFolder
from host.wireguard import Interface, VPNError

RANGE = 'fd00:faa5::/32'
IPV6_FREEBIND = 78  # linux/in6.h
WG0_CONF = """\
[Interface]
Address = {gateway}/64
ListenPort = {port}
PrivateKey = {private_key}

# Client peers (dynamically managed by faasd)
# are in {peers_dir}/*.conf; faasd applies both files' peers by `wg syncconf`
"""

PEER_CONF = """\
# Client: {name}
[Peer]
PublicKey = {public_key}
{preshared}AllowedIPs = {ipv6}/128
"""

Emit = Callable[..., None]  # emit(area, text, name=…, problem=…)


class Peer(Protocol):
    """What is asked of a peer: a row of the registry has it."""

    name: str
    public_key: str
    preshared_key: str | None
    ipv6: str


class BadKey(VPNError):
    """Text that is not a WireGuard key."""

    status = 400


class BadPeerFile(VPNError):
    """A file in peers/ that cannot be used."""


def check_key(text: str) -> str:
    """Return `text` if it is a WireGuard key as wg(8) writes it.

    32 bytes in base64, not all zero; else raise BadKey.
    """
    try:
        key = base64.b64decode(text.encode('ascii'), validate=True)
    except (AttributeError, ValueError, binascii.Error):
        key = b''
    if len(key) != 32 or base64.b64encode(key).decode() != text:
        raise BadKey(
            'this is not a WireGuard key', "a key is 32 bytes in base64, 44 characters, as 'wg pubkey' prints it"
        )
    if not any(key):
        raise BadKey('an all-zero key is not a key', 'make one: wg genkey | wg pubkey')
    return text


def parse_peer(text: str) -> tuple[str, str | None, str]:
    """(public key, preshared key or None, IPv6 address) of a peer file in the document's form.

    Raises BadPeerFile, BadKey.
    """
    found, section = {}, None
    for line in text.splitlines():
        line = line.partition('#')[0].strip()
        if not line:
            continue
        if line.startswith('['):
            if section or line.lower() != '[peer]':
                raise BadPeerFile(f'has {line!r} where one [Peer] is expected')
            section = line
            continue
        key, equals, value = line.partition('=')
        key = key.strip().lower()
        if not section or not equals or key not in ('publickey', 'presharedkey', 'allowedips') or key in found:
            raise BadPeerFile(f'has a line that is not known there: {key[:40]!r}')
        found[key] = value.strip()
    if 'publickey' not in found or 'allowedips' not in found:
        raise BadPeerFile('needs PublicKey and AllowedIPs')
    try:
        network = ipaddress.IPv6Network(found['allowedips'])
    except ValueError as error:
        raise BadPeerFile(f'has AllowedIPs that are not a single IPv6 address: {found["allowedips"][:60]!r}') from error
    if network.prefixlen != 128:
        raise BadPeerFile('has AllowedIPs with more than one address')
    preshared = found.get('presharedkey')
    return check_key(found['publickey']), preshared and check_key(preshared), str(network.network_address)


def split_endpoint(text: str, default_port: int) -> tuple[str, int]:
    """(host, port) of 'host', 'host:port', an IPv4 or IPv6 address or '[IPv6]:port'; raises VPNError."""
    match = re.fullmatch(r'\[([0-9a-fA-F:.]+)\](?::([0-9]+))?|([^\s:\[\]/]+)(?::([0-9]+))?|([0-9a-fA-F:.]+)', text)
    host, port = (match[1] or match[3] or match[5], match[2] or match[4]) if match else (None, None)
    try:
        if ':' in (host or ''):
            ipaddress.IPv6Address(host)
        if host and 0 < int(port or default_port) < 65536:
            return host, int(port or default_port)
    except ValueError:
        pass
    raise VPNError(f'{text!r} is not an endpoint', 'write host, host:port, an IPv4 address or [IPv6]:port')


def join_endpoint(host: str, port: int) -> str:
    return f'[{host}]:{port}' if ':' in host else f'{host}:{port}'


class ServerKeys:
    """The server's key pair: server_private.key and server_public.key in `directory`."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.private_path = os.path.join(directory, 'server_private.key')
        self._public_path = os.path.join(directory, 'server_public.key')

    def ensure(self) -> bool:
        """Make the files that are missing; True if the pair is new. What is right is not written: a disk may be full.

        Raises BadKey, CommandError, OSError.
        """
        made = False
        try:
            mode = os.stat(self.private_path).st_mode
        except FileNotFoundError:  # only this says that there is no key yet
            files.write_file(self.private_path, process.run(['wg', 'genkey']).stdout, mode=0o600)
            made = True
        else:
            if stat.S_IMODE(mode) != 0o600:
                os.chmod(self.private_path, 0o600)
        derived = process.run(['wg', 'pubkey'], input=self.private() + '\n').stdout
        if _read_if_any(self._public_path) != derived:
            files.write_file(self._public_path, derived)
        return made

    def private(self) -> str:
        """Raises BadKey, OSError."""
        return check_key(_read(self.private_path).strip())

    def public(self) -> str:
        """Raises OSError."""
        return _read(self._public_path).strip()

    def is_private(self, key: str) -> bool:
        return key == (_read_if_any(self.private_path) or '').strip()

    def is_public(self, key: str) -> bool:
        return key == (_read_if_any(self._public_path) or '').strip()


class VPNManager(Interface):
    """Keeps wg0 and its files as the registry says. `emit(area, text, …)` takes what happened."""

    def __init__(
        self,
        emit: Emit,
        gateway: str,
        zone_server: str,
        endpoint: str,
        interface: str = 'wg0',
        port: int = 51820,
        directory: str | os.PathLike[str] = '/etc/wireguard',
    ) -> None:
        super().__init__(interface, gateway)
        self.zone_server, self.endpoint, self.port = zone_server, endpoint, port
        self.peers_dir = os.path.join(directory, 'peers')
        self.folders = [os.fspath(directory), self.peers_dir]  # where a killed write may leave a temporary file
        self._conf = os.path.join(directory, f'{interface}.conf')
        self._keys, self._files, self._emit = ServerKeys(directory), ProjectedFolder(self.peers_dir), emit
        self._complained: dict[str, str] = {}  # peer file → what was said of it, so that it is said once
        self._locked_out: set[str] = set()  # public keys
        self._own_key: str | None = None  # as the last project() found it
        self._lock = threading.Lock()  # of _locked_out

    # Keys and files

    def ensure_keys(self) -> None:
        """Make server_private.key (0600), server_public.key and peers/ where they are missing."""
        os.makedirs(self.peers_dir, mode=0o700, exist_ok=True)
        if self._keys.ensure():
            self._emit('vpn', f'Made the server keys in {os.path.dirname(self.peers_dir)}')

    def write_wg0_conf(self) -> None:
        """Write wg0.conf in the document's form if there is none. A file that faasd wrote gets the present port."""
        wanted = WG0_CONF.format(
            gateway=self.gateway, port=self.port, private_key=self._keys.private(), peers_dir=self.peers_dir
        )
        found = _read_if_any(self._conf) or ''
        ours = re.sub(r'^ListenPort = \d+$', f'ListenPort = {self.port}', found, flags=re.M) == wanted
        if found != wanted and (ours or not found):
            files.write_file(self._conf, wanted, mode=0o600)

    def get_server_public_key(self) -> str:
        return self._keys.public()

    def check_peer_key(self, text: str) -> str:
        """Return `text` if a peer can have it as its public key. Raises BadKey, OSError."""
        if self._keys.is_public(check_key(text)):
            raise BadKey("this is the server's own public key", 'each peer makes a key pair of its own')
        return text

    def create_client_config(self, ipv6: str) -> dict[str, str]:
        """What a new peer must know, in the document's fields.

        The peer makes its private key itself, and keeps it.
        """
        return {'ipv6': ipv6, 'server_public_key': self.get_server_public_key(), 'endpoint': self.endpoint}

    # Peers

    def lock_out(self, public_keys: Iterable[str]) -> None:
        """Take these peers off wg0 at once, whatever the disk and the registry say.

        They stay off it until project() is called without them: a removal may wait until the disk has room. That also
        holds when this raises CommandError or OSError, for instance because wg0 is away.
        """
        keys = list(public_keys)
        with self._lock:
            self._locked_out.update(keys)
        if keys:
            process.run(['wg', 'set', self.interface, *(word for key in keys for word in ('peer', key, 'remove'))])

    def locked_out(self) -> frozenset[str]:
        """The public keys that lock_out() named and that the peers of the last project() still had."""
        with self._lock:
            return frozenset(self._locked_out)

    def project(self, peers: Collection[Peer], removed: Iterable[str] = ()) -> None:
        """Make wg0, and then peers/, hold just `peers` (registry rows) and none of the names in `removed`.

        Peers that are locked out count as removed. Other files are left alone. WireGuard follows whatever the state of
        peers/. A file that cannot be written does not stop the other files; its OSError is raised at the end.

        Raises CommandError, BadKey, OSError.
        """
        with self._lock:
            self._locked_out &= {peer.public_key for peer in peers}
        self._own_key = self._keys.public()
        self._reload_wireguard(peers)
        self._files.make()
        live = {peer.name: peer for peer in self._admitted(peers)}
        failed = self._each(self.remove_peer, {*removed, *(peer.name for peer in peers)} - live.keys())
        names = self._files.differing({name: self._render(peer) for name, peer in live.items()})
        failed = self._each(self.add_peer, [live[name] for name in names]) or failed
        for name in (peer.name for peer in peers if peer.public_key == self._own_key):
            self.complain(name, "it has the server's own public key")
        if failed:
            raise failed

    @staticmethod
    def _each(step: Callable, items: Iterable) -> OSError | None:
        """Do a step for every item; return an error of those that failed."""
        failed = None
        for item in items:
            try:
                step(item)
            except OSError as error:
                failed = error
        return failed

    def _admitted(self, peers: Iterable[Peer]) -> list[Peer]:
        """Those that are not locked out. WireGuard passes over a peer with its own key: the server has got new keys."""
        barred = {*self.locked_out(), self._own_key}
        return [peer for peer in peers if peer.public_key not in barred]

    def files_changed(self, peers: Iterable[Peer]) -> bool:
        """True if peers/ is to be projected: a peer's file is missing or differs, or somebody put another one there.

        Cheap enough for every few seconds. Raises OSError when it cannot be told.
        """
        return self._files.changed({peer.name: self._render(peer) for peer in self._admitted(peers)})

    def holds(self, peers: Iterable[Peer]) -> bool:
        """True if wg0 has just these peers, less those that are not admitted. Raises CommandError, OSError."""
        return self.public_keys() == {peer.public_key for peer in self._admitted(peers)}

    def peer_files(self) -> dict[str, str]:
        """{name: text} of peers/*.conf. Raises OSError when they cannot be read."""
        return self._files.texts()

    def complain(self, name: str, why: str) -> None:
        """Name a peer file that is left out, once for each reason."""
        self._files.leave_out(name)
        if self._complained.get(name) != why:
            self._complained[name] = why
            self._emit('vpn', f'Left out {self.peers_dir}/{name}.conf: {why}', name=name, problem=True)

    def add_peer(self, peer: Peer) -> None:
        """Write the file of a peer. Raises OSError."""
        self._files.write(peer.name, self._render(peer))

    def remove_peer(self, name: str) -> None:
        """Remove the file of a peer, which may be gone already. Raises OSError."""
        self._complained.pop(name, None)
        self._files.remove(name)

    @staticmethod
    def _render(peer: Peer) -> str:
        preshared = f'PresharedKey = {peer.preshared_key}\n' if peer.preshared_key else ''
        return PEER_CONF.format(name=peer.name, public_key=peer.public_key, preshared=preshared, ipv6=peer.ipv6)

    def _reload_wireguard(self, peers: Iterable[Peer]) -> None:
        """Apply interface and peers as one complete file: `wg syncconf` takes away what it does not name."""
        text = f'[Interface]\nListenPort = {self.port}\nPrivateKey = {self._keys.private()}\n\n'
        text += '\n'.join(self._render(peer) for peer in self._admitted(peers))
        with private_file(text) as path:
            process.run(['wg', 'syncconf', self.interface, path])

    # The interface

    def check_host(self, moving: bool = False) -> None:
        """Raise VPNError if this host has no room for our wg0: somebody else's, a port or addresses in use, no IPv6.

        Changes nothing. What an interface with our key has is free when we are `moving` from it to another name.
        """
        with contextlib.suppress(FileNotFoundError):
            found = re.search(r'^\s*PrivateKey\s*=\s*(\S+)', _read(self._conf), re.I | re.M)
            if found and not self._keys.is_private(found[1]):
                raise self._foreign(f'{self._conf} has another key')
        if self.index():
            self._check_key()
        own = self._own_interfaces()
        if str(self.port) not in own.values():
            self.check_port()
        with contextlib.suppress(FileNotFoundError):
            if _read('/proc/sys/net/ipv6/conf/default/disable_ipv6').strip() == '0':
                return self._check_range(own if moving else {self.interface})
        raise VPNError('IPv6 is switched off on this host', 'sysctl -w net.ipv6.conf.default.disable_ipv6=0')

    def _own_interfaces(self) -> dict[str, str | None]:
        """{name: UDP port} of the interfaces that run with our key."""
        keys, ports = (
            dict(line.split() for line in process.run(['wg', 'show', 'all', what]).stdout.splitlines())
            for what in ('public-key', 'listen-port')
        )
        return {name: ports.get(name) for name, key in keys.items() if self._keys.is_public(key)}

    def _foreign(self, why: str) -> VPNError:
        return VPNError(
            f"{self.interface} is not faasd's: {why} than {self._keys.private_path} has",
            'set FAAS_WG_INTERFACE to another name, such as wg1',
        )

    def _check_key(self) -> None:
        try:
            key = self._show('public-key')
        except process.CommandError as error:
            if 'not supported' not in error.reason:  # by that interface, or by the kernel
                raise
            raise VPNError(
                f'{self.interface} is not a WireGuard interface', 'set FAAS_WG_INTERFACE to another name'
            ) from error
        if key == '(none)':
            raise VPNError(f'{self.interface} has no key yet', f'wg-quick@{self.interface} gives it one')
        if not self._keys.is_public(key):
            raise self._foreign('it runs with another key')

    def check_port(self) -> None:
        """Raise VPNError if the UDP port is taken."""
        for any_address in ('0.0.0.0', '::'):
            refuse_taken(socket.SOCK_DGRAM, any_address, self.port, 'end that program, or set FAAS_WG_PORT')

    def _check_range(self, own: Iterable[str]) -> None:
        show = [json.loads(process.run(['ip', '-json', '-6', *what]).stdout or '[]') for what in (
            ['address', 'show', 'to', RANGE], ['route', 'show', 'root', RANGE])]
        taken = {item['ifname']: item['addr_info'][0]['local'] for item in show[0] if item}
        taken |= {item['dev']: item['dst'] for item in show[1] if 'dev' in item}
        links = {interface for interface in taken if interface.startswith(egress_rules.LINKS)}
        for interface in taken.keys() - {*own, *links, 'lo'}:
            raise VPNError(
                f'{RANGE} is in use on this host: {interface} has {taken[interface]}',
                f"take {interface} down; if that was faasd's interface: FAAS_WG_INTERFACE={interface}",
            )

    def check_interface(self) -> None:
        """Raise VPNError unless wg0 is up, a WireGuard interface, with our key and port and the gateway address."""
        if not self.index():
            raise VPNError(
                f'there is no interface {self.interface}',
                f"bring it up (systemctl start wg-quick@{self.interface}), or run 'faasd.py --standalone', which does",
            )
        self._check_key()
        port = self._show('listen-port')
        if port != str(self.port):
            raise VPNError(
                f'{self.interface} listens on UDP port {port}, not on {self.port}',
                f'set FAAS_WG_PORT, or correct {self._conf} and restart wg-quick@{self.interface}',
            )
        up, addresses = self._link()
        if not up:
            raise VPNError(f'{self.interface} is down', f'ip link set up dev {self.interface}')
        if ipaddress.IPv6Address(self.gateway) not in addresses:
            raise VPNError(
                f'{self.interface} does not have the address {self.gateway}',
                f"add 'Address = {self.gateway}/64' to {self._conf}",
            )

    def bring_up(self) -> subprocess.Popen | None:
        """Make wg0 by the kernel, else by wireguard-go; return wireguard-go's process, or None.

        Raises VPNError, CommandError, OSError; nothing is left then.
        """
        self.check_port()
        child = self._make_interface()
        try:
            self._reload_wireguard([])
            self.set_up()
        except BaseException:
            self.take_down(child)
            raise
        return child

    def project_addresses(self, wanted: Iterable[str]) -> None:
        """Make wg0 hold just the function addresses `wanted` and the zone server's, beside its own."""
        functions = ipaddress.IPv6Network('fd00:faa5:1::/48')
        _, actual = self._link()
        wanted = {ipaddress.IPv6Address(text): text for text in [self.zone_server, *wanted]}
        surplus = {address for address in actual if address in functions} - wanted.keys()
        missing = wanted.keys() - actual
        lines = [f'address del {address}/128 dev {self.interface}\n' for address in sorted(surplus)]
        lines += [f'address add {address}/128 dev {self.interface} nodad\n' for address in sorted(missing)]
        if lines:
            process.run(['ip', '-6', '-batch', '-'], input=''.join(lines), timeout_s=120)
        for address in sorted(address for address in missing if address in functions):
            self._emit('listener', f'Configured {wanted[address]}/128 on {self.interface} interface')


def _read(path: str) -> str:
    with open(path, encoding='utf-8', errors='replace') as file:
        return file.read()


def _read_if_any(path: str) -> str | None:
    try:
        return _read(path)
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def private_file(text: str) -> Iterator[str]:
    """The path, for children, of a file without a name that holds `text` for as long as the context lasts."""
    with open(os.memfd_create('wg', os.MFD_CLOEXEC), 'w') as file:
        file.write(text)
        file.flush()
        yield f'/proc/{os.getpid()}/fd/{file.fileno()}'


def refuse_taken(kind: int, address: str, port: int, hint: str) -> None:
    """Raise VPNError if `port` of that kind (SOCK_STREAM, SOCK_DGRAM) is taken; `address` may not be here yet.

    Raises OSError when it cannot be told.
    """
    family = socket.AF_INET6 if ':' in address else socket.AF_INET
    with socket.socket(family, kind | socket.SOCK_CLOEXEC) as sock:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_FREEBIND, 1)
        if kind == socket.SOCK_STREAM:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what has ended does not count
        try:
            sock.bind((address, port))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                return
            if error.errno != errno.EADDRINUSE:
                raise
            name = 'TCP' if kind == socket.SOCK_STREAM else 'UDP'
            holders = process.run(['ss', '-Hlnp', f'--{name.lower()}', f'sport = :{port}'], ok=range(256)).stdout
            holder = re.search(r'\(\("([^"]+)"', holders)
            raise VPNError(f'{name} port {port} is in use{f" by {holder[1]}" if holder else ""}', hint) from error


def default_address() -> str | None:
    """The address that the default route leaves from (IPv4 before IPv6), or None if there is no such route.

    Nothing is sent: connect() on UDP only looks it up. Raises OSError when it cannot be told.
    """
    for family, far in ((socket.AF_INET, '192.0.2.1'), (socket.AF_INET6, '2001:db8::1')):
        try:
            with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.connect((far, 9))
                return sock.getsockname()[0]
        except OSError as error:
            if is_scarce(error):
                raise
    return None
