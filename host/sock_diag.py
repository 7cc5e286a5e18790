"""The kernel's table of TCP sockets, read by one netlink dump (sock_diag(7))."""

import collections
import contextlib
import ipaddress
import os
import socket
import struct
from typing import NamedTuple

NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY, SOCK_DESTROY = 4, 20, 21
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP, NLMSG_ERROR, NLMSG_DONE = 1, 4, 0x300, 2, 3
LISTEN = 10  # net/tcp_states.h
SO_COOKIE = 57  # asm-generic/socket.h
INET_DIAG_REQ_BYTECODE, INET_DIAG_BC_S_COND, INET_DIAG_SKMEMINFO = 1, 7, 7
# Bits by the states of net/tcp_states.h: ESTABLISHED, SYN_RECV, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING.
OPEN_STATES = sum(1 << state for state in (1, 3, 4, 5, 8, 9, 11))
HEAD, ATTRIBUTE, UID, MEMORY = (struct.Struct(form) for form in ('IH', 'HH', 'I', '8i'))


class Connections(NamedTuple):
    """The open connections of some addresses, which are packed."""

    counts: collections.Counter[tuple[bytes, int]]  # by (local address, uid)
    memory: collections.Counter[bytes]  # by local address: bytes that the kernel has for them, sent and received


def open_connections(network: str, port: int) -> Connections:
    """The connections to `port` below `network` that are open.

    The uid is that of the process that accepted the connection, as the host sees it; 0 before that. Raises OSError.
    """
    counts, memory = collections.Counter(), collections.Counter()
    for data, start, end in _dump(network, port):
        address = data[start + 24 : start + 40]
        counts[address, *UID.unpack_from(data, start + 80)] += 1
        memory[address] += _memory(data, start, end)
    return Connections(counts, memory)


def heaviest(address: str, port: int) -> list[tuple[int, bytes]]:
    """[(bytes of memory, what end() needs)] of the open connections to [address]:port, the most first.

    Raises OSError.
    """
    found = _dump(f'{address}/128', port)
    return sorted(((_memory(*each), each[0][each[1] + 20 : each[1] + 68]) for each in found), reverse=True)


def end(ident: bytes) -> None:
    """End a connection of heaviest(): both ends see a reset. Raises OSError: EOPNOTSUPP when the kernel cannot."""
    body = struct.pack('BBBxI', socket.AF_INET6, socket.IPPROTO_TCP, 0, OPEN_STATES) + ident
    with contextlib.suppress(FileNotFoundError):  # it has ended by itself
        for _ in _ask(SOCK_DESTROY, NLM_F_ACK, body):
            pass


def _dump(network, port):
    """(messages, begin and end of one of them) for each open connection to `port` below `network`."""
    net = ipaddress.IPv6Network(network)
    # struct inet_diag_hostcond, behind struct inet_diag_bc_op: to its end when it holds, past it when not.
    condition = struct.pack('BBxxi16s', socket.AF_INET6, net.prefixlen, port, net.network_address.packed)
    size = 4 + len(condition)
    code = struct.pack('BBH', INET_DIAG_BC_S_COND, size, size + 4) + condition
    attribute = struct.pack('HH', 4 + len(code), INET_DIAG_REQ_BYTECODE) + code
    wanted = 1 << INET_DIAG_SKMEMINFO - 1
    body = struct.pack('BBBxI48x', socket.AF_INET6, socket.IPPROTO_TCP, wanted, OPEN_STATES) + attribute
    return _ask(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, body)


def _ask(kind, flags, body):
    """(messages, begin and end of one of them) for each answer. Raises OSError."""
    head = struct.pack('IHHII', 16 + len(body), kind, NLM_F_REQUEST | flags, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG) as netlink:
        netlink.send(head + body)
        while True:
            data, start = netlink.recv(1 << 18), 0
            while start < len(data):
                length, kind = HEAD.unpack_from(data, start)
                if kind == NLMSG_DONE:
                    return
                if kind == NLMSG_ERROR:
                    number = -struct.unpack_from('i', data, start + 16)[0]
                    if number == 0:  # done, as was asked for
                        return
                    raise OSError(number, f'sock_diag: {os.strerror(number)}')
                # struct inet_diag_msg: family state timer retrans | sport dport src[16] dst[16] if cookie[2] | expires
                # rqueue wqueue uid inode
                yield data, start, start + length
                start += length + 3 & ~3


def _memory(data, start, end):
    """Of the attributes of a connection INET_DIAG_SKMEMINFO: what is received, reserved, sent, of options, new."""
    start += 16 + 72
    while start < end:
        size, kind = ATTRIBUTE.unpack_from(data, start)
        if kind == INET_DIAG_SKMEMINFO:
            received, _, _, _, reserved, sent, options, new = MEMORY.unpack_from(data, start + 4)
            return received + max(0, reserved) + sent + options + new
        start += size + 3 & ~3
    return 0


def listening_addresses(port: int) -> list[str]:
    """Where TCP sockets of this network namespace listen at `port`. Raises OSError."""
    found = set()
    for family, size in ((socket.AF_INET, 4), (socket.AF_INET6, 16)):
        body = struct.pack('BBBxI', family, socket.IPPROTO_TCP, 0, 1 << LISTEN) + struct.pack('!H46x', port)
        for data, start, _ in _ask(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, body):
            found.add(socket.inet_ntop(family, data[start + 24 : start + 24 + size]))
    return sorted(found)


def cookie(sock: socket.socket) -> int:
    """The number by which the kernel knows a socket, whoever holds it: eight bytes as int."""
    return struct.unpack('Q', sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))[0]


def listening_inodes(port: int) -> set[str]:
    """{'socket:[INODE]', …} of this network namespace's TCP sockets for IPv6 that listen at `port` (proc(5))."""
    with open('/proc/self/net/tcp6') as file:
        lines = [line.split() for line in file][1:]
    return {f'socket:[{each[9]}]' for each in lines if each[3] == '0A' and each[1].endswith(f':{port:04X}')}
