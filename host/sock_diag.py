"""The kernel's table of TCP sockets, read by one netlink dump (sock_diag(7))."""

import collections
import ipaddress
import os
import socket
import struct

NETLINK_SOCK_DIAG, SOCK_DIAG_BY_FAMILY = 4, 20
NLM_F_REQUEST, NLM_F_DUMP, NLMSG_ERROR, NLMSG_DONE = 1, 0x300, 2, 3
SO_COOKIE = 57  # asm-generic/socket.h
INET_DIAG_REQ_BYTECODE, INET_DIAG_BC_S_COND = 1, 7
# Bits by the states of net/tcp_states.h: ESTABLISHED, SYN_RECV, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING.
OPEN_STATES = sum(1 << state for state in (1, 3, 4, 5, 8, 9, 11))


def open_connections(network: str, port: int) -> collections.Counter[tuple[bytes, int]]:
    """Counter of (local address packed, uid): the connections to `port` below `network` that are open.

    The uid is that of the process that accepted the connection, as the host sees it; 0 before that. Raises OSError.
    """
    net = ipaddress.IPv6Network(network)
    # struct inet_diag_hostcond, behind struct inet_diag_bc_op: to its end when it holds, past it when not.
    condition = struct.pack('BBxxi16s', socket.AF_INET6, net.prefixlen, port, net.network_address.packed)
    size = 4 + len(condition)
    code = struct.pack('BBH', INET_DIAG_BC_S_COND, size, size + 4) + condition
    attribute = struct.pack('HH', 4 + len(code), INET_DIAG_REQ_BYTECODE) + code
    body = struct.pack('BBBxI48x', socket.AF_INET6, socket.IPPROTO_TCP, 0, OPEN_STATES) + attribute
    head = struct.pack('IHHII', 16 + len(body), SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, 1, 0)
    found = collections.Counter()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG) as netlink:
        netlink.send(head + body)
        while True:
            data = netlink.recv(1 << 18)
            while data:
                length, kind = struct.unpack_from('IH', data)
                if kind == NLMSG_DONE:
                    return found
                if kind == NLMSG_ERROR:
                    number = -struct.unpack_from('i', data, 16)[0]
                    raise OSError(number, f'sock_diag: {os.strerror(number)}')
                # struct inet_diag_msg: family state timer retrans | sport dport src[16] dst[16] if cookie[2] | expires
                # rqueue wqueue uid inode
                (uid,) = struct.unpack_from('I', data, 16 + 64)
                found[data[24:40], uid] += 1
                data = data[length + 3 & ~3 :]


def cookie(sock: socket.socket) -> int:
    """The number by which the kernel knows a socket, whoever holds it: eight bytes as int."""
    return struct.unpack('Q', sock.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8))[0]


def listening_inodes(port: int) -> set[str]:
    """{'socket:[INODE]', …} of this network namespace's TCP sockets for IPv6 that listen at `port` (proc(5))."""
    with open('/proc/self/net/tcp6') as file:
        lines = [line.split() for line in file][1:]
    return {f'socket:[{each[9]}]' for each in lines if each[3] == '0A' and each[1].endswith(f':{port:04X}')}
