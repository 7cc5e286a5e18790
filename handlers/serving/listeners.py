"""The listening sockets of one function's address, and which of them the kernel gives the next connection.

They are one SO_REUSEPORT group, whose sockets the kernel numbers in the order of their listen(). A classic BPF program
names the number that gets everything. A group never has more than two: the current one, and the next or the former.
"""

import contextlib
import ctypes
import pathlib
import socket
import struct

from host.guard import Guard, Unguarded

SO_ATTACH_REUSEPORT_CBPF = 51
MIGRATE = '/proc/sys/net/ipv4/tcp_migrate_req'
BACKLOG = 4096
# linux/filter.h; negative offsets reach back to the IPv6 header, whatever the program otherwise sees.
BPF_LD_W_ABS, BPF_LD_H_ABS, BPF_JEQ_K, BPF_RET_K = 0x20, 0x28, 0x15, 0x06
SKF_NET_OFF = 0xFFF00000
SOURCE_END, SOURCE_PORT = SKF_NET_OFF + 20, SKF_NET_OFF + 40
QUEUED_OFFSET = 24  # of tcpi_unacked in struct tcp_info, which for a listener is the length of its queue


def bound(ipv6: str, mark: int, guard: Guard | Unguarded) -> socket.socket:
    """A marked and guarded TCP socket bound to [ipv6]:80, which does not listen yet. Raises OSError."""
    sock = guard.make()
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


def share(sock: socket.socket) -> None:
    """Let others of ours be bound to its address, too."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)


def queued(listener: socket.socket) -> int:
    """How many connections wait to be accepted."""
    return struct.unpack_from('I', listener.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), QUEUED_OFFSET)[0]


def migrates() -> bool:
    """True once the kernel moves what waits at a closed listener to another of its group (ip-sysctl: tcp_migrate_req).

    It is switched on here.
    """
    try:
        if pathlib.Path(MIGRATE).read_text().strip() != '1':
            pathlib.Path(MIGRATE).write_text('1')
        return True
    except OSError:  # a container whose /proc/sys is read-only
        return False


def listens(listener: socket.socket) -> bool:
    """False after somebody who shares the socket has shut it down."""
    return bool(listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def steering(number: int, probe: tuple[int, int, int] | None = None) -> bytes:
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


def attach(listener: socket.socket, program: bytes) -> None:
    buffer = ctypes.create_string_buffer(program)
    sock_fprog = struct.pack('HxxxxxxP', len(program) // 8, ctypes.addressof(buffer))
    listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_REUSEPORT_CBPF, sock_fprog)


class ListenerGroup:
    """The listeners of one address. `current` gets new connections; `former` got them before.

    Not for more than one thread. It owns its sockets, and lends them.
    """

    def __init__(self, ipv6: str, mark: int, guard: Guard | Unguarded, adopted: socket.socket | None = None) -> None:
        """Listen; or go on with `adopted` (consumed), what a faasd that is no more listened with. Raises OSError."""
        self.ipv6, self._mark, self._guard = ipv6, mark, guard
        self.current = adopted or bound(ipv6, mark, guard)
        self.former: socket.socket | None = None
        self._former_is_done = False
        self._next: socket.socket | None = None
        self._order = [self.current]  # as the kernel numbers them
        try:
            self._reclaim()
            self.current.listen(BACKLOG)
            self._attach()
        except BaseException:
            self.current.close()
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
        attach(self.current, steering(self._order.index(self.current), probe))

    @property
    def has_room(self) -> bool:
        """True when a next listener can be added: the former one, if there is one, has nothing to do any more."""
        return self._next is None and (self.former is None or self._former_is_done)

    def add(self) -> socket.socket:
        """A next listener. It gets no connection, but for a probe, until it is cut over to. Raises OSError."""
        self.close_former()
        self._reclaim()
        sock = bound(self.ipv6, self._mark, self._guard)
        try:
            sock.listen(BACKLOG)
        except BaseException:
            sock.close()
            raise
        self._next = sock
        self._order.append(sock)
        return sock

    def steer_probe(self, sock: socket.socket, end: int, port: int) -> None:
        """Connections from a source address with that last word, and that port, go to `sock`, if it is the next."""
        if sock is self._next:
            self._attach((end, port))

    def remove_next(self, sock: socket.socket | None) -> None:
        """Close the next listener, if it is `sock`; also if somebody still has it."""
        if sock and sock is self._next:
            self._next = None
            with contextlib.suppress(OSError):
                self._attach()
            self._end(sock)

    def cut_over(self, sock: socket.socket) -> None:
        """Make the next listener `sock` the current one. What waits at the former one stays there.

        Raises OSError; nothing has changed then.
        """
        if sock is not self._next:
            raise ValueError('that is not the next listener')
        attach(self.current, steering(self._order.index(sock)))
        self.former, self._former_is_done, self.current, self._next = self.current, False, sock, None

    def take_over(self, sock: socket.socket) -> None:
        """Make the next listener `sock` the current one, and have the kernel move there what waits at the former one.

        Raises OSError. It needs migrates().
        """
        self.cut_over(sock)
        self.close_former()

    def former_is_done(self) -> None:
        """The former listener may be closed as soon as there is need for its place."""
        self._former_is_done = True

    def close_former(self) -> None:
        """Close the former listener, also if somebody still has it."""
        if self.former:
            former, self.former = self.former, None
            self._end(former)

    def _end(self, sock):
        # Of two, the other is alone then: the kernel takes it whatever number the program names, until it is right.
        end(sock)
        self._order.remove(sock)
        with contextlib.suppress(OSError):
            self._attach()

    def queued(self) -> int:
        """How many connections wait at the current listener."""
        return queued(self.current)

    def former_queued(self) -> int:
        """How many connections wait at the former listener."""
        return queued(self.former) if self.former else 0

    def accept_former(self) -> socket.socket:
        """A connection that waits at the former listener. Raises OSError."""
        self.former.setblocking(False)  # a server that shared it may have wanted it otherwise
        return self.former.accept()[0]

    def revive(self) -> None:
        """Listen again at the current listener, if a function has shut it down. Raises OSError."""
        if listens(self.current):
            return
        self._reclaim()
        self.current.listen(BACKLOG)
        self._order.remove(self.current)  # the shutdown took it out of the group
        self._order.append(self.current)
        self._attach()

    def detach(self) -> None:
        """Close our copy of the current listener; whoever else has it goes on.

        The former one stays until its instance has ended: a server may take its shutdown for its own end.
        """
        self.remove_next(self._next)
        self.current.close()

    def refuse(self) -> None:
        """Listen no more, but for the former listener, whose instance may be finishing its work."""
        self.remove_next(self._next)
        end(self.current)

    def close(self) -> None:
        """Close what is left. After the end of every instance."""
        for sock in self._order:
            end(sock)


def end(sock: socket.socket) -> None:
    """Close a listening socket so that it listens no more, whoever else holds it."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:  # somebody has done so
        pass
    sock.close()
