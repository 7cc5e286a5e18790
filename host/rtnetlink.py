"""Links, addresses, routes and neighbours by rtnetlink (rtnetlink(7), veth(4)): in a tenth of the time of ip(8)."""

import contextlib
import ctypes
import errno
import ipaddress
import os
import socket
import struct
from collections.abc import Iterator

CLONE_NEWNET = 0x40000000
NLMSG_ERROR = 2
REQUEST, ACK, EXCL, CREATE = 1, 4, 0x200, 0x400
RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_NEWROUTE, RTM_NEWNEIGH = 16, 17, 20, 24, 28
IFF_UP, IFF_NOARP = 1, 0x80
IFA_F_NODAD, NUD_PERMANENT = 2, 0x80
RT_TABLE_MAIN, RTPROT_STATIC, RT_SCOPE_UNIVERSE, RT_SCOPE_LINK, RTN_UNICAST = 254, 4, 0, 253, 1
IFLA_ADDRESS, IFLA_IFNAME, IFLA_LINKINFO, IFLA_AF_SPEC, IFLA_NET_NS_FD = 1, 3, 18, 26, 28
IFLA_INFO_KIND, IFLA_INFO_DATA, VETH_INFO_PEER = 1, 2, 1
IFLA_INET6_ADDR_GEN_MODE, ADDR_GEN_MODE_NONE = 8, 1
IFA_ADDRESS, IFA_LOCAL = 1, 2
RTA_DST, RTA_OIF, RTA_GATEWAY = 1, 4, 5
NDA_DST, NDA_LLADDR = 1, 2

libc = ctypes.CDLL(None, use_errno=True)
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def attribute(kind: int, data: bytes) -> bytes:
    """One rtattr, padded."""
    return struct.pack('HH', len(data) + 4, kind) + data + b'\0' * (-len(data) % 4)


def link_message(name: str, mac: bytes, more: bytes) -> bytes:
    """An ifinfomsg with a name and an address of the link layer."""
    head = struct.pack('BxHiII', socket.AF_UNSPEC, 0, 0, 0, 0)
    return head + attribute(IFLA_IFNAME, name.encode() + b'\0') + attribute(IFLA_ADDRESS, mac) + more


class Routing:
    """Changes the network of the calling thread, as of the making of the object."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.settimeout(5)
        self._number = 0

    def __enter__(self) -> 'Routing':
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def _do(self, kind: int, body: bytes, flags: int = 0) -> None:
        """One request. Raises OSError."""
        self._number += 1
        head = struct.pack('IHHII', 16 + len(body), kind, REQUEST | ACK | flags, self._number, 0)
        self._socket.send(head + body)
        while True:
            data = self._socket.recv(65536)
            kind, number = struct.unpack_from('4xHxxI', data)
            if kind == NLMSG_ERROR and number == self._number:
                (code,) = struct.unpack_from('i', data, 16)
                if code:
                    raise OSError(-code, os.strerror(-code))
                return

    def add_veth(self, name: str, mac: bytes, peer: str, peer_mac: bytes, namespace: int) -> None:
        """A veth `name` here, whose other end is `peer` in the network `namespace` (a descriptor)."""
        there = link_message(peer, peer_mac, attribute(IFLA_NET_NS_FD, struct.pack('I', namespace)))
        data = attribute(IFLA_INFO_DATA, attribute(VETH_INFO_PEER, there))
        info = attribute(IFLA_LINKINFO, attribute(IFLA_INFO_KIND, b'veth') + data)
        self._do(RTM_NEWLINK, link_message(name, mac, info), CREATE | EXCL)

    def remove_link(self, name: str) -> None:
        """It may be gone already."""
        try:
            self._do(RTM_DELLINK, struct.pack('BxHiII', 0, 0, 0, 0, 0) + attribute(IFLA_IFNAME, name.encode() + b'\0'))
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise

    def up(self, name: str, noarp: bool = False) -> None:
        """The kernel makes no IPv6 address of its own. `noarp`: it neither asks nor answers who has an address."""
        flags = IFF_UP | (IFF_NOARP if noarp else 0)
        index = socket.if_nametoindex(name)
        mode = attribute(IFLA_INET6_ADDR_GEN_MODE, struct.pack('B', ADDR_GEN_MODE_NONE))
        spec = attribute(IFLA_AF_SPEC, attribute(socket.AF_INET6, mode))
        self._do(RTM_NEWLINK, struct.pack('BxHiII', 0, 0, index, 0, 0) + spec)
        self._do(RTM_NEWLINK, struct.pack('BxHiII', 0, 0, index, flags, flags))

    def add_address(self, index: int, address: Address) -> None:
        """An address without a network around it, in use at once."""
        version, packed = family(address), address.packed
        head = struct.pack('BBBBi', version, len(packed) * 8, IFA_F_NODAD, RT_SCOPE_UNIVERSE, index)
        self._do(RTM_NEWADDR, head + attribute(IFA_LOCAL, packed) + attribute(IFA_ADDRESS, packed), CREATE | EXCL)

    def add_route(self, index: int, target: Address | None, gateway: Address | None = None) -> None:
        """To `target`, or to everything by `gateway`, whose own route is there."""
        address = target or gateway
        scope, bits = (RT_SCOPE_UNIVERSE, 0) if gateway else (RT_SCOPE_LINK, len(address.packed) * 8)
        version = family(address)
        head = struct.pack('8BI', version, bits, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, scope, RTN_UNICAST, 0)
        where = attribute(RTA_GATEWAY if gateway else RTA_DST, address.packed)
        self._do(RTM_NEWROUTE, head + where + attribute(RTA_OIF, struct.pack('i', index)), CREATE | EXCL)

    def add_neighbour(self, index: int, address: Address, mac: bytes) -> None:
        """Who has the address. Nobody is asked for it."""
        head = struct.pack('BxxxiHBB', family(address), index, NUD_PERMANENT, 0, 0)
        self._do(RTM_NEWNEIGH, head + attribute(NDA_DST, address.packed) + attribute(NDA_LLADDR, mac), CREATE)


def family(address: Address) -> int:
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


@contextlib.contextmanager
def within(namespace: int) -> Iterator[None]:
    """Have the calling thread in that network namespace (a descriptor). Raises OSError."""
    own = os.open('/proc/thread-self/ns/net', os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(namespace, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), 'setns')
        try:
            yield
        finally:
            if libc.setns(own, CLONE_NEWNET):  # a thread in a network that is not ours must do nothing more
                os.abort()
    finally:
        os.close(own)
