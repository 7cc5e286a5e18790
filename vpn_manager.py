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
import time

from host import files, process
from host.errors import FaasError

RANGE = 'fd00:faa5::/32'
HANDSHAKE_FRESH_S = 180  # WireGuard's REJECT_AFTER_TIME: no session is older
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

class VPNError(FaasError):
    """WireGuard on this host is not as it must be."""

    status = 503


class BadKey(VPNError):
    """Text that is no WireGuard key."""

    status = 400


class BadPeerFile(VPNError):
    """A file in peers/ that cannot be used."""


def check_key(text):
    """Return `text` if it is a WireGuard key as wg(8) writes it.

    32 bytes in base64, not all zero; else raise BadKey.
    """
    try:
        key = base64.b64decode(text.encode('ascii'), validate=True)
    except (AttributeError, ValueError, binascii.Error):
        key = b''
    if len(key) != 32 or base64.b64encode(key).decode() != text:
        raise BadKey('this is no WireGuard key', "a key is 32 bytes in base64, 44 characters, as 'wg pubkey' prints it")
    if not any(key):
        raise BadKey('an all-zero key is no key', "make one: wg genkey | wg pubkey")
    return text


def parse_peer(text):
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
        raise BadPeerFile(f'has AllowedIPs that are no single IPv6 address: {found["allowedips"][:60]!r}') from error
    if network.prefixlen != 128:
        raise BadPeerFile('has AllowedIPs with more than one address')
    preshared = found.get('presharedkey')
    return check_key(found['publickey']), preshared and check_key(preshared), str(network.network_address)


def split_endpoint(text, default_port):
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
    raise VPNError(f'{text!r} is no endpoint', 'write host, host:port, an IPv4 address or [IPv6]:port')


def join_endpoint(host, port):
    return f'[{host}]:{port}' if ':' in host else f'{host}:{port}'


class VPNManager:
    """Keeps wg0, its files and its table as the registry says. `emit(area, text, …)` takes what happened."""

    def __init__(
        self,
        emit,
        gateway,
        zone_server,
        endpoint,
        interface='wg0',
        port=51820,
        directory='/etc/wireguard',
    ):
        self.gateway, self.zone_server, self.endpoint = gateway, zone_server, endpoint
        self.interface, self.port = interface, port
        self.peers_dir = os.path.join(directory, 'peers')
        self._directory, self._emit = directory, emit
        self._complained = {}  # peer file → what was said of it, so that it is said once

    # Keys and files

    def ensure_keys(self):
        """Make server_private.key (0600) and server_public.key where they are missing."""
        os.makedirs(self.peers_dir, mode=0o700, exist_ok=True)
        private, public = self._path('server_private.key'), self._path('server_public.key')
        if not os.path.exists(private):
            files.write_file(private, process.run(['wg', 'genkey']).stdout, mode=0o600)
            self._emit('vpn', f'Made the server keys in {self._directory}')
        os.chmod(private, 0o600)
        derived = process.run(['wg', 'pubkey'], input=self._private_key() + '\n').stdout
        with contextlib.suppress(FileNotFoundError):
            if _read(public) == derived:
                return
        files.write_file(public, derived)

    def write_wg0_conf(self):
        """Write wg0.conf in the document's form if there is none; one that we wrote gets the port of now."""
        wanted = WG0_CONF.format(
            gateway=self.gateway, port=self.port, private_key=self._private_key(), peers_dir=self.peers_dir
        )
        try:
            found = _read(self._conf)
        except FileNotFoundError:
            found = ''
        ours = re.sub(r'^ListenPort = \d+$', f'ListenPort = {self.port}', found, flags=re.M) == wanted
        if found != wanted and (ours or not found):
            files.write_file(self._conf, wanted, mode=0o600)

    def get_server_public_key(self):
        return _read(self._path('server_public.key')).strip()

    def create_client_config(self, ipv6):
        """What a new peer must know, in the document's fields.

        Its private key is made on its own side and stays there.
        """
        return {'ipv6': ipv6, 'server_public_key': self.get_server_public_key(), 'endpoint': self.endpoint}

    def _private_key(self):
        return check_key(_read(self._path('server_private.key')).strip())

    def _path(self, name):
        return os.path.join(self._directory, name)

    @property
    def _conf(self):
        return self._path(f'{self.interface}.conf')

    # Peers

    def peer_files(self):
        """{name: text} of the peers/*.conf that can be read."""
        files = {}
        for entry in os.scandir(self.peers_dir):
            if entry.name.endswith('.conf') and entry.is_file(follow_symlinks=False):
                files[entry.name.removesuffix('.conf')] = _read(entry.path)
        return files

    def complain(self, name, why):
        """Name a peer file that is left out, once for each reason."""
        if self._complained.get(name) != why:
            self._complained[name] = why
            self._emit('vpn', f'Left out {self.peers_dir}/{name}.conf: {why}', name=name, problem=True)

    def project(self, peers, removed=()):
        """Make peers/ and wg0 hold just `peers` (registry rows) and none of the names in `removed`.

        Other files are left alone.
        """
        self._reload_wireguard(peers)  # first: who is removed is locked out, whatever the disk says
        files = self.peer_files()
        for name in removed:
            if name in files:
                self.remove_peer(name)
        for peer in peers:
            if files.get(peer.name) != self._render(peer):
                self.add_peer(peer)

    def add_peer(self, peer):
        files.write_file(os.path.join(self.peers_dir, f'{peer.name}.conf'), self._render(peer), mode=0o600)

    def remove_peer(self, name):
        self._complained.pop(name, None)
        files.remove_file(os.path.join(self.peers_dir, f'{name}.conf'))

    @staticmethod
    def _render(peer):
        preshared = f'PresharedKey = {peer.preshared_key}\n' if peer.preshared_key else ''
        return PEER_CONF.format(name=peer.name, public_key=peer.public_key, preshared=preshared, ipv6=peer.ipv6)

    def _reload_wireguard(self, peers):
        """Apply interface and peers as one complete file: `wg syncconf` takes away what it does not name."""
        text = f'[Interface]\nListenPort = {self.port}\nPrivateKey = {self._private_key()}\n\n'
        text += '\n'.join(self._render(peer) for peer in peers)
        with private_file(text) as path:
            process.run(['wg', 'syncconf', self.interface, path])

    def public_keys(self):
        """Those of the peers on wg0."""
        return set(self._show('peers').split())

    def active(self):
        """The public keys of the peers with a fresh handshake; none when wg0 is away."""
        try:
            stamps = [line.split('\t') for line in self._show('latest-handshakes').splitlines()]
        except process.CommandError:
            return set()
        return {key for key, stamp in stamps if time.time() - int(stamp) < HANDSHAKE_FRESH_S}

    def _show(self, what):
        return process.run(['wg', 'show', self.interface, what]).stdout.strip()

    # The interface

    def index(self):
        """The interface's number, 0 if there is none."""
        with contextlib.suppress(OSError):
            return socket.if_nametoindex(self.interface)
        return 0

    def check_host(self, moving=False):
        """Raise VPNError if this host has no room for our wg0: somebody else's, a port or addresses in use, no IPv6.

        Changes nothing. What an interface with our key has is free when we are `moving` from it to another name.
        """
        with contextlib.suppress(FileNotFoundError):
            found = re.search(r'^\s*PrivateKey\s*=\s*(\S+)', _read(self._conf), re.I | re.M)
            if found and found[1] != self._own_key('server_private.key'):
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

    def _own_interfaces(self):
        """{name: UDP port} of the interfaces that run with our key."""
        keys, ports = (
            dict(line.split() for line in process.run(['wg', 'show', 'all', what]).stdout.splitlines())
            for what in ('public-key', 'listen-port')
        )
        own = self._own_key('server_public.key')
        return {name: ports.get(name) for name, key in keys.items() if key == own}

    def _own_key(self, name):
        try:
            return _read(self._path(name)).strip()
        except FileNotFoundError:
            return None

    def _foreign(self, why):
        return VPNError(
            f"{self.interface} is not faasd's: {why} than {self._path('server_private.key')} has",
            'set FAAS_WG_INTERFACE to another name, such as wg1',
        )

    def _check_key(self):
        try:
            key = self._show('public-key')
        except process.CommandError as error:
            raise VPNError(
                f'{self.interface} is no WireGuard interface', 'set FAAS_WG_INTERFACE to another name'
            ) from error
        if key == '(none)':
            raise VPNError(f'{self.interface} has no key yet', f'wg-quick@{self.interface} gives it one')
        if key != self._own_key('server_public.key'):
            raise self._foreign('it runs with another key')

    def check_port(self):
        """Raise VPNError if the UDP port is taken."""
        for any_address in ('0.0.0.0', '::'):
            refuse_taken(socket.SOCK_DGRAM, any_address, self.port, 'end that program, or set FAAS_WG_PORT')

    def _check_range(self, own):
        show = [json.loads(process.run(['ip', '-json', '-6', *what]).stdout or '[]') for what in (
            ['address', 'show', 'to', RANGE], ['route', 'show', 'root', RANGE])]
        taken = {item['ifname']: item['addr_info'][0]['local'] for item in show[0] if item}
        taken |= {item['dev']: item['dst'] for item in show[1] if 'dev' in item}
        for interface in taken.keys() - {*own, 'lo'}:
            raise VPNError(
                f'{RANGE} is in use on this host: {interface} has {taken[interface]}',
                f"take {interface} down; if that was faasd's interface: FAAS_WG_INTERFACE={interface}",
            )

    def check_interface(self):
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

    def bring_up(self):
        """Make wg0 by the kernel, else by wireguard-go; return wireguard-go's process, or None. Raises VPNError."""
        child = None
        self.check_port()
        try:
            process.run(['ip', 'link', 'add', self.interface, 'type', 'wireguard'])
        except process.CommandError as error:
            if not process.installed('wireguard-go'):
                raise VPNError(
                    f'the kernel has no WireGuard ({error.reason}) and wireguard-go is not installed',
                    "'make deps' installs what is missing",
                ) from error
            # As -f does, but without its banner about kernels.
            child = process.start(['wireguard-go', self.interface], WG_PROCESS_FOREGROUND='1', LOG_LEVEL='silent')
            deadline = time.monotonic() + 10
            while not self._answers():
                if child.poll() is not None or time.monotonic() > deadline:
                    child.kill()
                    raise VPNError('wireguard-go does not start', 'it needs /dev/net/tun and root') from error
                time.sleep(0.01)
        try:
            self._reload_wireguard([])
            self.set_up()
        except process.CommandError:
            self.take_down(child)
            raise
        return child

    def set_up(self):
        """Give wg0 its address and bring it up, also if both is so already."""
        process.run(['ip', '-6', 'address', 'replace', f'{self.gateway}/64', 'dev', self.interface, 'nodad'])
        process.run(['ip', 'link', 'set', 'mtu', '1420', 'up', 'dev', self.interface])

    def _answers(self):
        return self.index() and process.run(['wg', 'show', self.interface], ok=(0, 1)).returncode == 0

    def take_down(self, child=None):
        """Remove wg0 and end its wireguard-go, if any; both may be gone already."""
        process.run(['ip', 'link', 'delete', self.interface], ok=(0, 1))
        if child is not None:
            process.finish(child)

    def _link(self):
        """(True if wg0 is up, the IPv6 addresses on it)."""
        (link,) = json.loads(process.run(['ip', '-json', 'address', 'show', 'dev', self.interface]).stdout)
        addresses = {ipaddress.IPv6Address(i['local']) for i in link['addr_info'] if i['family'] == 'inet6'}
        return 'UP' in link['flags'], addresses

    def project_addresses(self, wanted):
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


def _read(path):
    with open(path, encoding='utf-8', errors='replace') as file:
        return file.read()


@contextlib.contextmanager
def private_file(text):
    """The path, for children, of a file without a name that holds `text` for as long as the context lasts."""
    with open(os.memfd_create('wg', os.MFD_CLOEXEC), 'w') as file:
        file.write(text)
        file.flush()
        yield f'/proc/{os.getpid()}/fd/{file.fileno()}'


def refuse_taken(kind, address, port, hint):
    """Raise VPNError if `port` of that kind (SOCK_STREAM, SOCK_DGRAM) is taken; `address` may not be here yet."""
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
            if error.errno != errno.EADDRINUSE:
                return
            name = 'TCP' if kind == socket.SOCK_STREAM else 'UDP'
            holders = process.run(['ss', '-Hlnp', f'--{name.lower()}', f'sport = :{port}'], ok=range(256)).stdout
            holder = re.search(r'\(\("([^"]+)"', holders)
            raise VPNError(f'{name} port {port} is in use{f" by {holder[1]}" if holder else ""}', hint) from error


def default_address():
    """The address that the default route leaves from (IPv4 before IPv6), or None.

    Nothing is sent: connect() on UDP only looks it up.
    """
    for family, far in ((socket.AF_INET, '192.0.2.1'), (socket.AF_INET6, '2001:db8::1')):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((far, 9))
            return sock.getsockname()[0]
    return None
