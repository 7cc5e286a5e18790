"""The listening sockets of one function's address, and which of them the kernel gives the next connection.

They are one SO_REUSEPORT group, whose sockets the kernel numbers in the order of their listen(). A classic BPF program
names the number that gets everything. A group never has more than two: the front, and the one that is about to be it,
or has been.
"""

import contextlib
import ctypes
import socket
import struct

SO_ATTACH_REUSEPORT_CBPF = 51
BACKLOG = 4096
# linux/filter.h; negative offsets reach back to the IPv6 header, whatever the program otherwise sees.
BPF_LD_W_ABS, BPF_LD_H_ABS, BPF_JEQ_K, BPF_RET_K = 0x20, 0x28, 0x15, 0x06
SKF_NET_OFF = 0xFFF00000
SOURCE_END, SOURCE_PORT = SKF_NET_OFF + 20, SKF_NET_OFF + 40
QUEUED_OFFSET = 24  # of tcpi_unacked in struct tcp_info, which for a listener is the length of its queue


def bound(ipv6, mark):
    """A marked TCP socket bound to [ipv6]:80, which does not listen yet. Raises OSError."""
    sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        share(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
        # What is accepted inherits these, and the mark. A client that vanished is noticed after two minutes.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 60)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
        sock.bind((ipv6, 80, 0, 0))
    except BaseException:
        sock.close()
        raise
    return sock


def share(sock):
    """Let others of ours be bound to its address, too."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def queued(listener):
    """How many connections wait to be accepted."""
    return struct.unpack_from('I', listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), QUEUED_OFFSET)[0]


def listens(listener):
    """False after somebody who shares the socket has shut it down."""
    return bool(listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def steering(number, probe=None):
    """The program that chooses socket `number`; `probe`: (end of a source address, source port, number for these)."""
    code = []
    if probe:
        end, port, other = probe
        code = [
            (BPF_LD_W_ABS, 0, 0, SOURCE_END),
            (BPF_JEQ_K, 0, 3, end),
            (BPF_LD_H_ABS, 0, 0, SOURCE_PORT),
            (BPF_JEQ_K, 0, 1, port),
            (BPF_RET_K, 0, 0, other),
        ]
    code.append((BPF_RET_K, 0, 0, number))
    return b''.join(struct.pack('HBBI', *instruction) for instruction in code)


def attach(listener, program):
    buffer = ctypes.create_string_buffer(program)
    sock_fprog = struct.pack('HxxxxxxP', len(program) // 8, ctypes.addressof(buffer))
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, sock_fprog)


class Front:
    """The group of one address; `sock` is its front, `former` the one before it. Not for more than one thread."""

    def __init__(self, ipv6, mark, adopted=None):
        """Listen; or go on with `adopted` (consumed), the front of a faasd that is no more. Raises OSError."""
        self.ipv6, self._mark = ipv6, mark
        self.sock, self.former, self.former_is_empty = adopted or bound(ipv6, mark), None, False
        self._next = None
        self._order = [self.sock]  # as the kernel numbers them
        try:
            self._reclaim()
            self.sock.listen(BACKLOG)
            self._attach()
        except BaseException:
            self.sock.close()
            raise

    def _reclaim(self):
        """Undo what an instance may have done to the options of the sockets that it shares.

        Without them no other could be bound beside it, for a next instance or for the end of this one.
        """
        for sock in self._order:
            share(sock)

    def _attach(self, probe=None):
        if probe:
            probe = (*probe, self._order.index(self._next))
        attach(self.sock, steering(self._order.index(self.sock), probe))

    @property
    def may_fork(self):
        """True when there is room for a next front: the one before this has nothing any more."""
        return self._next is None and (self.former is None or self.former_is_empty)

    def fork(self):
        """A socket that listens too, and gets nothing before it is the front, but for a probe. Raises OSError."""
        self.retire()
        self._reclaim()
        sock = bound(self.ipv6, self._mark)
        try:
            sock.listen(BACKLOG)
        except BaseException:
            sock.close()
            raise
        self._next = sock
        self._order.append(sock)
        return sock

    def probe(self, end, port):
        """Connections from a source address with that last word, and that port, go to the fork meanwhile."""
        if self._next:
            self._attach((end, port))

    def drop(self, sock):
        """Close a fork that will not be the front; also if somebody still has it."""
        if sock and sock is self._next:
            self._next = None
            with contextlib.suppress(OSError):
                self._attach()
            self._end(sock)

    def steer(self, sock):
        """Make the fork `sock` the front. What waits at the former one stays there, until `retire`."""
        self.former, self.former_is_empty, self.sock, self._next = self.sock, False, sock, None
        self._attach()

    def retire(self):
        """Close the former front, also if somebody still has it."""
        if self.former:
            former, self.former = self.former, None
            self._end(former)

    def _end(self, sock):
        # Of two, the other is alone then: the kernel takes it whatever number the program names, until it is right.
        end(sock)
        self._order.remove(sock)
        with contextlib.suppress(OSError):
            self._attach()

    def revive(self):
        """Listen again after a function has shut the front down, which left the group by that."""
        self._reclaim()
        self.sock.listen(BACKLOG)
        self._order.remove(self.sock)
        self._order.append(self.sock)
        self._attach()

    def leave(self):
        """Close what is ours of the front; who else has it goes on."""
        self.drop(self._next)
        self.retire()
        self.sock.close()

    def close(self):
        for sock in self._order:
            end(sock)


def end(sock):
    """Close a listening socket so that it listens no more, whoever else holds it."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:  # somebody has done so
        pass
    sock.close()
