"""The faas zone: names become a zone file that CoreDNS serves, and the Corefile that makes it do so."""

import contextlib
import ipaddress
import os
import re
import secrets
import socket
import struct
import time

from host import files

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

TYPE_NS, TYPE_AAAA, CLASS_IN = 2, 28, 1


class DNSZoneManager:
    """Writes the zone file; CoreDNS reads it again when its serial differs.

    `next_serial(seen)` gives a serial above every earlier one and above `seen`; `emit(area, text, …)` takes what
    happened. `zone_server` is the address where every other zone is REFUSED, so that a resolver asks its next server.
    """

    def __init__(
        self,
        next_serial,
        emit,
        server,
        zone_server,
        zone_file='/var/lib/faasd/dns/faas.db',
        corefile='/etc/coredns/Corefile',
    ):
        self.zone_file, self.corefile, self.server, self.zone_server = zone_file, corefile, server, zone_server
        self._next_serial, self._emit = next_serial, emit
        self._records = {}

    def project(self, records):
        """Make the zone file hold just `records` ({name: ipv6}); a file that does already is left alone."""
        serial, served, text = self._read()
        self._records = dict(served)
        for name in served.keys() - records.keys():
            self.remove_record(name)
        for name, ipv6 in sorted(records.items() - served.items()):
            self.add_record(name, ipv6)
        if serial is None or text != self._render(serial):
            self._write_zone(serial)

    def add_record(self, name, ipv6):
        self._records[name] = ipv6
        self._emit('dns', f'Registered {name}.faas → {ipv6}', name=name)

    def remove_record(self, name):
        del self._records[name]
        self._emit('dns', f'Removed {name}.faas', name=name)

    def _write_zone(self, seen):
        os.makedirs(os.path.dirname(self.zone_file), mode=0o755, exist_ok=True)
        files.write_file(self.zone_file, self._render(self._next_serial(seen)))

    def _render(self, serial):
        lines = [f'{name:<15} IN  AAAA  {ipv6}\n' for name, ipv6 in sorted(self._records.items())]
        return ZONE.format(serial=serial, server=self.server, negative=NEGATIVE_TTL_S) + ''.join(lines)

    def _read(self):
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

    def write_corefile(self, forwarders):
        """Write the Corefile, unless a person made it theirs; without forwarders every other zone is REFUSED."""
        with contextlib.suppress(FileNotFoundError), open(self.corefile, encoding='utf-8') as file:
            if file.readline() != COREFILE_HEAD:
                return
        os.makedirs(os.path.dirname(self.corefile), exist_ok=True)
        text = COREFILE_HEAD + COREFILE.format(
            server=self.server, zone_server=self.zone_server, zone_file=self.zone_file
        )
        if forwarders:
            text += COREFILE_FORWARD.format(server=self.server, forwarders=' '.join(forwarders))
        files.write_file(self.corefile, text)

    def wait_served(self, name, ipv6, timeout_s=10):
        """True as soon as CoreDNS itself answers `name` with `ipv6`, False after timeout_s."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(OSError):
                if query(self.server, f'{name}.faas') == [ipaddress.IPv6Address(ipv6)]:
                    return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)


def query(server, name, kind=TYPE_AAAA, timeout_s=1):
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


def _addresses(message, offset, count):
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


def default_forwarders(resolv_conf='/etc/resolv.conf', own=()):
    """The document's two resolvers if one of them answers, else the host's own, less ourselves."""
    for address in DOCUMENT_FORWARDERS:
        with contextlib.suppress(OSError):
            query(address, '.', TYPE_NS)
            return list(DOCUMENT_FORWARDERS)
    try:
        with open(resolv_conf, encoding='utf-8', errors='replace') as file:
            nameservers = re.findall(r'^nameserver\s+(\S+)', file.read(), re.M)
    except OSError:
        return []
    return [address for address in nameservers if address not in own]
