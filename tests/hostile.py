"""What the worst function would send, from inside the network of an instance and with every right there.

    python3 tests/hostile.py send OTHER4 OTHER6     raw packets, each with a name in it; then one that may pass
    python3 tests/hostile.py flood                  router advertisements, and neighbours that do not exist
    python3 tests/hostile.py watch INTERFACE        the names in the packets that arrive, until the one that may
"""

import ipaddress
import json
import os
import re
import socket
import struct
import subprocess
import sys

CONTROL = 'control'
OUTSIDE4, OUTSIDE6 = '203.0.113.5', '2001:db8:f::5'
IPV4, IPV6, ARP, VLAN, LOCAL = 0x0800, 0x86DD, 0x0806, 0x8100, 0x88B5
ICMP, TCP, UDP, FRAGMENT, ICMPV6 = 1, 6, 17, 44, 58


def packed(address):
    return ipaddress.ip_address(address).packed


def checksum(data):
    total = sum(struct.unpack(f'!{(len(data) + 1) // 2}H', data + b'\0' * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def ipv4(source, target, kind, body, fragment=0):
    head = struct.pack('!BBHHHBBH', 0x45, 0, 20 + len(body), 7, fragment, 64, kind, 0) + packed(source) + packed(target)
    return head[:10] + struct.pack('!H', checksum(head)) + head[12:] + body


def ipv6(source, target, kind, body, hops=255):
    return struct.pack('!IHBB', 6 << 28, len(body), kind, hops) + packed(source) + packed(target) + body


def with_sum(source, target, kind, body, at):
    """The body with its checksum at that place."""
    pseudo = packed(source) + packed(target) + struct.pack('!II', len(body), kind)
    return body[:at] + struct.pack('!H', checksum(pseudo + body)) + body[at + 2 :]


def udp(source, target, text, port=80):
    body = struct.pack('!HHHH', 4000, port, 8 + len(text), 0) + text
    return with_sum(source, target, UDP, body, 6)


def icmpv6(source, target, body):
    return ipv6(source, target, ICMPV6, with_sum(source, target, ICMPV6, body, 2))


class Wire:
    """eth0 of the instance."""

    def __init__(self):
        said = json.loads(subprocess.check_output(['ip', '-j', 'address', 'show', 'dev', 'eth0']))[0]
        addresses = [info['local'] for info in said['addr_info']]
        self.ipv4 = next(each for each in addresses if ':' not in each)
        self.ipv6 = next(each for each in addresses if each.startswith('fd00:faa5'))
        mac = bytes.fromhex(said['address'].replace(':', ''))
        self.macs = mac[:3] + b'\0' + mac[4:] + mac
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        self.socket.bind(('eth0', 0))

    def send(self, kind, packet, to_all=False):
        macs = b'\xff' * 6 + self.macs[6:] if to_all else self.macs
        self.socket.send(macs + struct.pack('!H', kind) + packet)


def attacks(mine4, mine6, other4, other6):
    """(name, ethertype, a function that makes the packet of a text)."""
    for name, source, target in (
        ('a source that nobody has', '198.18.0.99', OUTSIDE4),
        ('a source of the LAN', '192.168.1.77', OUTSIDE4),
        ('a source of this server', '192.168.1.1', OUTSIDE4),
        ('a source of another instance', other4, OUTSIDE4),
        ('the LAN', mine4, '192.168.1.2'),
        ('the broadcast of the LAN', mine4, '192.168.1.255'),
        ('multicast', mine4, '224.0.0.251'),
        ('metadata', mine4, '169.254.169.254'),
        ('carrier-grade NAT', mine4, '100.64.0.1'),
        ('a private network behind the router', mine4, '10.9.9.9'),
    ):
        yield name, IPV4, lambda text, s=source, t=target: ipv4(s, t, UDP, udp(s, t, text))
    for name, source, target in (
        ('a source that nobody has, IPv6', 'fd00:faa5:0:200::99', OUTSIDE6),
        ('a source of another instance, IPv6', other6, OUTSIDE6),
        ('a source of this server, IPv6', '2001:db8:1::1', OUTSIDE6),
        ('a source of the link', 'fe80::1', OUTSIDE6),
        ('no source', '::', OUTSIDE6),
        ('the LAN, IPv6', mine6, '2001:db8:1::2'),
        ('a private network behind the router, IPv6', mine6, 'fd99::9'),
        ('multicast, IPv6', mine6, 'ff02::1'),
        ('an IPv4-mapped address', mine6, '::ffff:192.168.1.2'),
        ('a 6to4 address', mine6, '2002:c0a8:102::1'),
        ('a NAT64 address', mine6, '64:ff9b::c0a8:102'),
    ):
        yield name, IPV6, lambda text, s=source, t=target: ipv6(s, t, UDP, udp(s, t, text))
    lan, away = '192.168.1.2', OUTSIDE4
    yield 'a fragment without a port', IPV4, lambda text: ipv4(mine4, lan, UDP, text, 100)
    yield 'a first fragment', IPV4, lambda text: ipv4(mine4, lan, UDP, udp(mine4, lan, text.ljust(64)), 0x2000)
    yield 'a fragment that never gets a first one', IPV4, lambda text: ipv4(mine4, away, UDP, text, 100)
    yield 'TCP without flags', IPV4, lambda text: ipv4(
        mine4, away, TCP, with_sum(mine4, away, TCP, struct.pack('!HHIIHHHH', 5, 80, 1, 1, 0x5000, 9, 0, 0) + text, 16)
    )  # fmt: skip
    error = struct.pack('!BBHI', 3, 1, 0, 0) + ipv4(away, mine4, UDP, udp(away, mine4, b''))
    yield 'an error for what nobody sent', IPV4, lambda text: ipv4(
        mine4, away, ICMP, error[:2] + struct.pack('!H', checksum(error + text)) + error[4:] + text
    )
    yield 'a frame with a tag', VLAN, lambda text: struct.pack('!HH', 1, IPV4) + ipv4(
        mine4, lan, UDP, udp(mine4, lan, text)
    )
    yield 'raw ethernet', LOCAL, lambda text: text
    yield 'ARP for the LAN', ARP, lambda text: (
        struct.pack('!HHBBH', 1, IPV4, 6, 4, 1) + bytes(6) + packed(mine4) + bytes(6) + packed(lan) + text
    )


def send(other4, other6):
    wire = Wire()
    for name, kind, make in attacks(wire.ipv4, wire.ipv6, other4, other6):
        for to_all in (False, True):
            wire.send(kind, make(f'<<{name}>>'.encode()), to_all)
        print(name)
    # Twice: the first may be the one for which the neighbour is looked up.
    for target in (OUTSIDE6, OUTSIDE4):
        with socket.socket(socket.AF_INET6 if ':' in target else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(f'<<{CONTROL} {target}>>'.encode(), (target, 80))


def flood():
    wire = Wire()
    prefix = struct.pack('!BBBBIII', 3, 4, 64, 0xC0, 9000, 9000, 0) + packed('2001:db8:bad::')
    advertised = struct.pack('!BBHBBHII', 134, 0, 0, 64, 0, 9000, 0, 0) + prefix
    for source in ('fe80::bad', wire.ipv6):
        wire.send(IPV6, icmpv6(source, 'ff02::1', advertised), to_all=True)
    for number in range(3000):
        source = str(ipaddress.ip_address('fd00:faa5:0:200::') + 0x10000 + number)
        for who in (source, f'fe80::1:{number:x}', wire.ipv6):
            asked = struct.pack('!BBHI', 135, 0, 0, 0) + packed('fd00:faa5:0:200::1') + b'\1\1' + os.urandom(6)
            wire.send(IPV6, icmpv6(who, 'fd00:faa5:0:200::1', asked), to_all=True)
        said = struct.pack('!BBHI', 136, 0, 0, 0x60000000) + packed(source) + b'\2\1' + os.urandom(6)
        wire.send(IPV6, icmpv6(wire.ipv6, 'ff02::1', said), to_all=True)
        pair = packed(f'198.18.{2 + number // 250}.{1 + number % 250}') + bytes(6) + packed('198.18.0.1')
        wire.send(ARP, struct.pack('!HHBBH', 1, IPV4, 6, 4, 1) + os.urandom(6) + pair, to_all=True)
    print('done')


def watch(interface):
    seen = set()
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.bind((interface, 3))
        sock.settimeout(20)
        print('watching', flush=True)
        while not any(OUTSIDE4 in name for name in seen):
            data = sock.recv(2048)
            seen |= {name.decode() for name in re.findall(rb'<<(.+?)>>', data)}
    print(json.dumps(sorted(seen)))


if __name__ == '__main__':
    {'send': send, 'flood': flood, 'watch': watch}[sys.argv[1]](*sys.argv[2:])
