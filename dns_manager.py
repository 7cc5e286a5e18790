"""The faas zone: names become a zone file that CoreDNS serves, and the Corefile that makes it do so."""

import contextlib
import ipaddress
import os
import re
import secrets
import socket
import struct
import time
from collections.abc import Callable, Collection, Mapping, Sequence

from host import files
from host.disk import Signature, signature
from host.errors import is_scarce

# Both bound how long a client keeps NXDOMAIN (RFC 2308 section 5: the lesser of the two). The document's 60 would keep
# a name that was asked for too early away for a minute. The records themselves keep the document's 60.
NEGATIVE_TTL_S = 1
DOCUMENT_FORWARDERS = ('2001:4860:4860::8888', '2606:4700:4700::1111')

ZONE = """\
$ORIGIN faas.
$TTL 60

@   {negative}   IN  SOA ns.faas. admin.faas. (
            {serial} ; Serial
            3600    ; Refresh
            1800    ; Retry
            604800  ; Expire
            {negative} )     ; Minimum TTL

@       IN  NS  ns.faas.
ns      IN  AAAA  {server}

; Function IPv6 records (auto-managed by faasd)
"""

COREFILE_HEAD = '# Written by faasd. It is yours once you delete this line.\n'
COREFILE = """\
faas:53 {{
    bind {server} {zone_server}

    file {zone_file} {{
        reload 200ms
    }}

    reload 2s 1s
    log
    errors
}}
"""
COREFILE_FORWARD = """
# Forward all other queries
.:53 {{
    bind {server}
    forward . {forwarders}
    log
    errors
}}
"""

COREFILE_REVERSE = """
# Whose an address is that others see an instance by
{blocks} {{
    bind {server}
    hosts {hosts_file} {zones} {{
        ttl 5
        reload 2s
    }}
    errors
}}
"""

TYPE_NS, TYPE_AAAA, CLASS_IN = 2, 28, 1


class DNSZoneManager:
    """Writes the zone file; CoreDNS reads it again when its serial differs.

    `next_serial(seen)` gives a serial above every earlier one and above `seen`; `emit(area, text, …)` takes what
    happened. `zone_server` is the address where every other zone is REFUSED, so that a resolver asks its next server.
    """

    def __init__(
        self,
        next_serial: Callable[[int | None], int],
        emit: Callable[..., None],
        server: str,
        zone_server: str,
        zone_file: str = '/var/lib/faasd/dns/faas.db',
        corefile: str = '/etc/coredns/Corefile',
    ) -> None:
        self.zone_file, self.corefile, self.server, self.zone_server = zone_file, corefile, server, zone_server
        self.folders = [os.path.dirname(zone_file), os.path.dirname(corefile)]  # a killed write may leave a file there
        self.hosts_file = os.path.join(os.path.dirname(zone_file), 'instances.hosts')
        self.reverse, self._functions = False, {}  # whether instances have names, and which
        self._next_serial, self._emit = next_serial, emit
        self._records: dict[str, str] = {}
        self._current: tuple[Signature, dict[str, str]] | None = None  # a zone file that is right, and its records

    def project(self, records: Mapping[str, str]) -> None:
        """Make the zone file hold just `records` ({name: ipv6}); a file that does already is left alone.

        Raises OSError.
        """
        serial, served, text = self._read()
        self._records = dict(served)
        for name in served.keys() - records.keys():
            self.remove_record(name)
        for name, ipv6 in sorted(records.items() - served.items()):
            self.add_record(name, ipv6)
        if serial is None or text != self._render(serial, self._records):
            self._write_zone(serial)

    def is_current(self, records: Mapping[str, str]) -> bool:
        """True if the zone file holds just `records`; else a projection is due. Raises OSError when it cannot be told.

        Cheap enough for every few seconds: the file is read again only when its signature differs.
        """
        found = signature(self.zone_file)  # first: a change after it has another signature
        if found is None:
            return False
        if self._current != (found, records):
            serial, _, text = self._read()
            if serial is None or text != self._render(serial, records):
                return False
            self._current = found, dict(records)
        return True

    def add_record(self, name: str, ipv6: str) -> None:
        self._records[name] = ipv6
        self._emit('dns', f'Registered {name}.faas → {ipv6}', name=name)

    def remove_record(self, name: str) -> None:
        del self._records[name]
        self._emit('dns', f'Removed {name}.faas', name=name)

    def _write_zone(self, seen: int | None) -> None:
        os.makedirs(os.path.dirname(self.zone_file), mode=0o755, exist_ok=True)
        files.write_file(self.zone_file, self._render(self._next_serial(seen), self._records))

    def _render(self, serial: int, records: Mapping[str, str]) -> str:
        lines = [f'{name:<15} IN  AAAA  {ipv6}\n' for name, ipv6 in sorted(records.items())]
        return ZONE.format(serial=serial, server=self.server, negative=NEGATIVE_TTL_S) + ''.join(lines)

    def _read(self) -> tuple[int | None, dict[str, str], str]:
        """(serial, {name: ipv6}, text) of the zone file; serial None if there is none that can be read."""
        try:
            with open(self.zone_file, encoding='utf-8', errors='replace') as file:
                text = file.read()
        except FileNotFoundError:
            return None, {}, ''
        serial = re.search(r'^\s*(\d{1,10}) ; Serial$', text, re.M)
        records = dict(re.findall(r'^([a-z0-9-]+) +IN  AAAA  (\S+)$', text, re.M))
        records.pop('ns', None)
        return int(serial[1]) & 0xFFFFFFFF if serial else None, records, text

    # CoreDNS

    def name_instances(self, functions: Mapping[str, str]) -> None:
        """Have CoreDNS answer for {address of an instance: function} (RFC 1035 3.5). Raises OSError.

        The next write_corefile() makes it do so. CoreDNS looks at the file every two seconds.
        """
        if functions != self._functions:
            self.reverse |= bool(functions)
            lines = [f'{address} {name}.faas\n' for address, name in sorted(functions.items())]
            files.write_file(self.hosts_file, ''.join(lines))
            self._functions = dict(functions)

    def write_corefile(self, forwarders: Sequence[str], networks: Sequence[str] = ()) -> None:
        """Write the Corefile, unless it is so already or a person made it theirs.

        `networks` are those of instances. Without forwarders every other zone is REFUSED. To be called every few
        seconds: a file that was changed, cut or deleted is written again. Raises OSError.
        """
        text = COREFILE_HEAD + COREFILE.format(
            server=self.server, zone_server=self.zone_server, zone_file=self.zone_file
        )
        if forwarders:
            text += COREFILE_FORWARD.format(server=self.server, forwarders=' '.join(forwarders))
        if self.reverse and networks:
            zones = [reverse_zone(network) for network in networks]
            text += COREFILE_REVERSE.format(
                blocks=' '.join(f'{zone}:53' for zone in zones),
                server=self.server,
                hosts_file=self.hosts_file,
                zones=' '.join(['faas', *zones]),
            )
        try:
            with open(self.corefile, encoding='utf-8', errors='replace') as file:
                found = file.read()
        except FileNotFoundError:
            found = ''
        # A person deletes the first line. A cut in that line leaves its beginning, or nothing.
        ours = found.startswith(COREFILE_HEAD) or COREFILE_HEAD.startswith(found)
        if ours and found != text:
            os.makedirs(os.path.dirname(self.corefile), exist_ok=True)
            files.write_file(self.corefile, text)

    def wait_served(self, name: str, ipv6: str, timeout_s: float = 10) -> bool:
        """True as soon as CoreDNS itself answers `name` with `ipv6`, False after timeout_s."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(OSError):
                if query(self.server, f'{name}.faas') == [ipaddress.IPv6Address(ipv6)]:
                    return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)


def reverse_zone(network: str) -> str:
    """'18.198.in-addr.arpa' for '198.18.0.0/16' (RFC 1035 3.5), the same for IPv6 (RFC 3596 2.5).

    The zone is that of the whole octets or nibbles of the prefix.
    """
    of = ipaddress.ip_network(network)
    labels = of.network_address.reverse_pointer.split('.')
    return '.'.join(labels[-2 - of.prefixlen // (8 if of.version == 4 else 4) :])


def query(
    server: str, name: str, kind: int = TYPE_AAAA, timeout_s: float = 1
) -> list[ipaddress.IPv6Address]:
    """The IPv6 addresses that `server` answers for `name` over UDP ([] for NXDOMAIN or none).

    OSError: no usable answer in time.
    """
    ident = secrets.randbits(16)
    labels = b''.join(bytes((len(label),)) + label.encode() for label in name.split('.') if label)
    question = labels + b'\0' + struct.pack('!HH', kind, CLASS_IN)
    family = socket.AF_INET6 if ':' in server else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(timeout_s)
        sock.connect((server, 53))  # the kernel drops what comes from elsewhere
        sock.send(struct.pack('!6H', ident, 0x0100, 1, 0, 0, 0) + question)
        answer = sock.recv(4096)
    try:
        got, flags, _, answers, _, _ = struct.unpack_from('!6H', answer)
        if (
            got != ident
            or flags & 0x8000 == 0
            or flags & 0xF not in (0, 3)
            or answer[12 : 12 + len(question)] != question
        ):
            raise OSError('no answer to this question')
        return _addresses(answer, 12 + len(question), answers)
    except (struct.error, IndexError, ValueError) as error:
        raise OSError('a broken answer') from error


def _addresses(message: bytes, offset: int, count: int) -> list[ipaddress.IPv6Address]:
    """The AAAA records among `count` resource records from `offset` (RFC 1035 section 4.1.3)."""
    found = []
    for _ in range(count):
        while 0 < message[offset] < 0xC0:
            offset += message[offset] + 1
        offset += 1 if message[offset] == 0 else 2
        kind, _, _, length = struct.unpack_from('!HHIH', message, offset)
        offset += 10
        if kind == TYPE_AAAA and length == 16:
            found.append(ipaddress.IPv6Address(message[offset : offset + 16]))
        offset += length
    return found


def default_forwarders(resolv_conf: str = '/etc/resolv.conf', own: Collection[str] = ()) -> list[str]:
    """The document's two resolvers if one of them answers, else the host's own, less ourselves.

    Raises OSError when it cannot be told which.
    """
    for address in DOCUMENT_FORWARDERS:
        try:
            query(address, '.', TYPE_NS)
            return list(DOCUMENT_FORWARDERS)
        except OSError as error:
            if is_scarce(error):
                raise
    try:
        with open(resolv_conf, encoding='utf-8', errors='replace') as file:
            nameservers = re.findall(r'^nameserver\s+(\S+)', file.read(), re.M)
    except OSError as error:
        if is_scarce(error):
            raise
        return []
    return [address for address in nameservers if address not in own and is_address(address)]


def is_address(text: str) -> bool:
    """True if CoreDNS can forward to it. One line of resolv.conf that is broken must not keep CoreDNS from starting."""
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(text)
        return re.fullmatch('[0-9a-fA-F:.]+(%[A-Za-z0-9_.-]{1,15})?', text) is not None
    return False
