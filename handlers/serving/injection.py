"""Listener injection: an unmodified server's listen() is answered with the function's own listening socket.

The kernel asks for each listen() of a container by its seccomp notification descriptor (seccomp_unotify(2)), which the
OCI runtime sends at the start as the specification's linux.seccomp.listenerPath says. The answer to the right one puts
our socket at the caller's descriptor number. For every other one faasd calls listen() itself, on a duplicate: inside,
where nobody else is. A socket of the host's own network namespace, such as an accepted connection, never listens.

Only listen() is asked for, not bind(): with the first connection accepted, the server is ready by its own word.
"""

import array
import contextlib
import ctypes
import errno
import fcntl
import functools
import ipaddress
import os
import re
import select
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

from handlers.images.spec import Spec, candidates
from handlers.serving.listeners import BACKLOG
from host.errors import FaasError
from host.process import copy_of, process_of, socket_of
from host.sock_diag import cookie

# linux/seccomp.h: _IOWR('!', 0, struct seccomp_notif), (1, _resp), _IOW('!', 2, u64), (3, struct seccomp_notif_addfd)
NOTIF_RECV, NOTIF_SEND, NOTIF_ID_VALID, NOTIF_ADDFD = 0xC0502100, 0xC0182101, 0x40082102, 0x40182103
NOTIF_FLAG_CONTINUE, ADDFD_FLAG_SETFD = 1, 1
CLONE_FILES = 0x400
EPOLL_CTL_ADD, EPOLL_CTL_DEL = 1, 2
MOST_ORIGINALS = 64  # sockets of an instance that are kept to be given back
MOST_FDINFO = 1 << 18  # letters about a process's epoll instances: thousands of registrations
MOST_STATE = 1 << 20  # bytes of the container's state that comes with the notification descriptor
SO_NETNS_COOKIE = 71  # asm-generic/socket.h, Linux 5.14
STUCK_S = 5  # how long an answer may take before that is a problem
NO_THREAD_PAUSE_S = 0.1
BEST = (0, False)  # the first candidate, on IPv6: there is nothing to give back for
# A function that does nothing but listen() shall not take the processor from the others.
MANY_S, MANY, PAUSE_S = 1, 100, 0.02
# An answer that takes more of the processor is followed by a rest that is so many times longer.
DEAR_S, REST, REST_MAX_S = 0.02, 9, 60

libc = ctypes.CDLL(None, use_errno=True)


class EpollEvent(ctypes.Structure):
    _pack_ = 1 if os.uname().machine == 'x86_64' else 0
    _fields_ = [('events', ctypes.c_uint32), ('data', ctypes.c_uint64)]


def _ioctl(fd, request, form, *values):
    """The structure of that form after the kernel had it. Raises OSError."""
    structure = bytearray(struct.pack(form, *values))
    fcntl.ioctl(fd, request, structure, True)
    return structure


def network_of(sock: socket.socket) -> bytes:
    """Tells the network namespaces of sockets from one another."""
    return sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)


@functools.cache
def own_network() -> bytes:
    with socket.socket(socket.AF_UNIX) as sock:
        return network_of(sock)


def flags_of(tid: int, fd: int) -> int:
    with open(f'/proc/{tid}/fdinfo/{fd}') as file:
        return int(re.search(r'flags:\s*(\d+)', file.read())[1], 8)


def registrations(tid: int, fd: int) -> list[tuple[int, int, int]]:
    """[(epoll descriptor there, events, data)] of the process's epoll instances that watch `fd`.

    What is past MOST_FDINFO is not looked at. The kernel renders all of them nevertheless: see DEAR_S.
    """
    found, left = [], MOST_FDINFO
    for number in os.listdir(f'/proc/{tid}/fd'):
        with contextlib.suppress(OSError):
            if os.readlink(f'/proc/{tid}/fd/{number}') == 'anon_inode:[eventpoll]':
                with open(f'/proc/{tid}/fdinfo/{number}') as file:
                    text = file.read(left)
                left -= len(text)
                lines = re.findall(r'tfd:\s*(\d+) events:\s*([0-9a-f]+) data:\s*([0-9a-f]+)', text)
                found += [
                    (int(number), int(events, 16), int(data, 16)) for target, events, data in lines if int(target) == fd
                ]
    return found


def move_registrations(found: list[tuple[int, int, int]], fd: int, old: int, new: int) -> None:
    """Have the epoll instances (owned copies in `found`) watch the socket `new` at number `fd` in place of `old`.

    Epoll knows what it watches by open file and number, so a thread with a descriptor table of its own puts both there.
    """

    def work():
        libc.unshare(CLONE_FILES)
        kept = {name: os.dup(each) for name, each in (('old', old), ('new', new))}
        moved = [(fcntl.fcntl(epoll, fcntl.F_DUPFD, fd + 1), events, data) for epoll, events, data in found]
        for name, operation in (('old', EPOLL_CTL_DEL), ('new', EPOLL_CTL_ADD)):
            source = fcntl.fcntl(kept[name], fcntl.F_DUPFD, fd + 1)
            os.dup2(source, fd)
            for epoll, events, data in moved:
                libc.epoll_ctl(epoll, operation, fd, ctypes.byref(EpollEvent(events, data)))

    if found:
        thread = threading.Thread(target=work, name='epoll')
        thread.start()
        thread.join()


class Original:
    """A socket of the server's own in whose place it has ours: who, where, and on which port it wanted to listen."""

    def __init__(self, process, fd, sock, port):
        self.process, self.fd, self.sock, self.port = process, fd, sock, port


class Inside:
    """Answers the listen() calls of one instance of the function `name`: each socket listens inside, as it asks.

    The kernel is never told to go on by itself: another thread could have put another socket at that number since. All
    of this may wait for the function, and so belongs in a thread that only this function waits for.
    """

    def __init__(self, name: str, close: Callable[[socket.socket], object]) -> None:
        """`close` closes a socket of the instance (consumed) without waiting."""
        self.name, self._close = name, close
        self._since, self._count = 0.0, 0  # the listen() calls of this second

    def close(self) -> None:
        """The instance has ended."""

    def answer(self, notify: int) -> None:
        """Serve one notification of the seccomp descriptor `notify`. Raises OSError when it serves nobody any more."""
        try:
            raw = _ioctl(notify, NOTIF_RECV, '80x')
        except OSError as error:  # who asked is gone
            if error.errno in (errno.ENOENT, errno.EINTR):
                return
            raise
        began = time.thread_time()
        # struct seccomp_notif: id, pid, flags, seccomp_data: nr, arch, instruction_pointer, args[6]
        ident, tid, _, _, _, _, fd, backlog, *_ = struct.unpack('QIIiIQ6Q', raw)
        failed = 0
        try:
            self._listen(notify, ident, tid, fd & 0x7FFFFFFF, ctypes.c_int(backlog & 0xFFFFFFFF).value)
        except OSError as error:
            failed = error.errno or errno.EPERM
        with contextlib.suppress(OSError):
            # struct seccomp_notif_resp: id, val, error, flags
            _ioctl(notify, NOTIF_SEND, 'QqiI', ident, 0, -failed, 0)
        self._slow_down(time.thread_time() - began)

    def _listen(self, notify, ident, tid, fd, backlog):
        original = socket_of(tid, fd)
        try:
            _ioctl(notify, NOTIF_ID_VALID, 'Q', ident)  # the thread of that number still is the one that asked
            if self._is_ours(original):
                return
            if network_of(original) == own_network():
                raise PermissionError(errno.EPERM, 'a socket of the host')
            if original.family in (socket.AF_INET, socket.AF_INET6) and original.type == socket.SOCK_STREAM:
                original = self._listen_at_port(notify, ident, tid, fd, backlog, original)
            else:
                original.listen(backlog)
        finally:
            if original:
                self._close(original)

    def _is_ours(self, sock):
        """True if it listens already: it is what the instance was given."""
        return False

    def _listen_at_port(self, notify, ident, tid, fd, backlog, original):
        """Answer for a TCP socket. Returns `original`, or None when it is kept."""
        original.listen(backlog)
        return original

    def _slow_down(self, spent_s):
        now = time.monotonic()
        if now > self._since + MANY_S:
            self._since, self._count = now, 0
        self._count += 1
        if spent_s > DEAR_S:
            time.sleep(min(REST_MAX_S, REST * spent_s))
        elif self._count > MANY:
            time.sleep(PAUSE_S)


class Injection(Inside):
    """The same for an instance that may serve `listener` (borrowed): the right socket is replaced by it.

    `report(kind, family, port)` is called in the injector's threads: 'injected', or 'inside' for what listens there.
    """

    def __init__(self, name: str, close: Callable, spec: Spec, listener: socket.socket, report: Callable) -> None:
        super().__init__(name, close)
        self._listener, self._report = listener, report
        self._candidates, self._any = candidates(spec), not spec.ports
        self._originals = []
        self._best = None  # (rank, family) of what was injected, the lower the better
        self._choice, self._given, self._over = threading.Lock(), False, False

    def enough(self) -> bool:
        """The instance serves in another way: every listen() goes on inside. False if it has the listener already."""
        with self._choice:
            self._over = not self._given
            return self._over

    def _may_give(self):
        with self._choice:
            self._given = not self._over
            return self._given

    def close(self) -> None:
        with contextlib.suppress(IndexError):
            while True:
                self._close(self._originals.pop().sock)

    def _rank(self, address, port):
        """How good a place that is to listen: the lower the better; None for one that does not count."""
        if port == 0 or _is_loopback(address):
            return None
        if port in self._candidates:
            return self._candidates.index(port)
        return len(self._candidates) if self._any else None

    def _is_ours(self, sock):
        return cookie(sock) == cookie(self._listener)

    def _listen_at_port(self, notify, ident, tid, fd, backlog, original):
        address, port = original.getsockname()[:2]
        rank = self._rank(address, port)
        # One that also listens on IPv6 wants its IPv6 clients there.
        mine = None if rank is None else (rank, original.family != socket.AF_INET6)
        if mine is None or (self._best is not None and mine > self._best) or not self._may_give():
            original.listen(backlog)
            self._report('inside', original.family, (address, port))
            return original
        process = process_of(tid)
        if self._best is not None and mine < self._best:
            self._give_back(notify, ident, process)
        self._put(notify, ident, tid, fd, original, self._listener)
        self._best = mine
        if mine > BEST and len(self._originals) < MOST_ORIGINALS:
            self._originals.append(Original(process, fd, original, port))
            original = None
        self._report('injected', socket.AF_INET if mine[1] else socket.AF_INET6, (address, port))
        return original

    def _give_back(self, notify, ident, process):
        """Put the process's own sockets, which listen inside from now on, back in the place of ours."""
        for each in [each for each in self._originals if each.process == process]:
            self._originals.remove(each)
            with contextlib.suppress(OSError):
                there = socket_of(process, each.fd)
                try:
                    if cookie(there) == cookie(self._listener):
                        each.sock.listen(BACKLOG)
                        self._put(notify, ident, process, each.fd, self._listener, each.sock)
                finally:
                    self._close(there)
            self._close(each.sock)

    def _put(self, notify, ident, tid, fd, old, new):
        """Replace `old`, which thread `tid` has at `fd`, by `new`, as non-blocking and inheritable as the caller's."""
        flags = flags_of(tid, fd)
        fcntl.fcntl(new, fcntl.F_SETFL, os.O_RDWR | flags & os.O_NONBLOCK)  # shared by all holders of the open file
        found = [(copy_of(tid, number), events, data) for number, events, data in registrations(tid, fd)]
        try:
            # struct seccomp_notif_addfd: id, flags, srcfd, newfd, newfd_flags
            number = new.fileno()
            _ioctl(notify, NOTIF_ADDFD, 'QIIII', ident, ADDFD_FLAG_SETFD, number, fd, flags & os.O_CLOEXEC)
            move_registrations(found, fd, old.fileno(), number)
        finally:
            for epoll, _, _ in found:
                os.close(epoll)


def _is_loopback(address):
    parsed = ipaddress.ip_address(address.partition('%')[0])
    return (getattr(parsed, 'ipv4_mapped', None) or parsed).is_loopback


class Watched(NamedTuple):
    """A descriptor that the injector waits at, and what it does when that can be read from."""

    fd: int
    owner: object  # of the descriptor: a socket (borrowed), or None: the injector itself
    inside: Inside
    do: Callable[['Watched'], None]


class Stuck(FaasError):
    """An answer to a function waits for that function."""


class Injector:
    """Answers for all instances of a server. Its thread waits at their descriptors, and does nothing else.

    Each answer has a thread: what it looks at is shared with the function, which can make it wait. A descriptor is
    heard again after its answer, so one function has no more threads than descriptors.
    """

    def __init__(self) -> None:
        self._epoll, self._watched = select.epoll(), {}
        self._busy: dict[Watched, float] = {}  # what is being answered, and since when
        self._lock = threading.Lock()
        self.thread = threading.Thread(target=self._run, name='injector', daemon=True)
        self.thread.start()

    def add(self, notifier: socket.socket, inside: Inside) -> None:
        """Answer by `inside` what comes from the containers that connect to `notifier` (both borrowed)."""
        self._watch(Watched(notifier.fileno(), notifier, inside, self._accept))

    def remove(self, inside: Inside) -> None:
        """Answer no more for an instance that has ended; its descriptors are closed. It does not wait."""
        with self._lock:
            mine = [watched for watched in self._watched.values() if watched.inside is inside]
            for watched in mine:
                self._unwatch(watched)
        inside.close()

    def check(self) -> None:
        """Raises Stuck when an answer takes long. For the monitor."""
        late = time.monotonic() - STUCK_S
        with self._lock:
            names = sorted({watched.inside.name for watched, since in self._busy.items() if since < late})
        if names:
            raise Stuck(f'a listen() of {", ".join(names)} is not answered: it waits for the function')

    def _watch(self, watched):
        with self._lock:
            self._watched[watched.fd] = watched
            self._epoll.register(watched.fd, select.EPOLLIN | select.EPOLLONESHOT)

    def _unwatch(self, watched):
        del self._watched[watched.fd]
        self._epoll.unregister(watched.fd)
        if watched not in self._busy:
            self._close(watched)

    @staticmethod
    def _close(watched: Watched) -> None:
        if watched.owner is None:
            os.close(watched.fd)

    def _run(self):
        while True:
            for fd, events in self._epoll.poll():
                with self._lock:
                    watched = self._watched.get(fd)
                    if watched is None:
                        continue
                    self._busy[watched] = time.monotonic()
                try:
                    threading.Thread(target=self._serve, args=(watched, events), name='answer', daemon=True).start()
                except RuntimeError:  # no thread is left
                    time.sleep(NO_THREAD_PAUSE_S)
                    self._served(watched, ended=False)

    def _serve(self, watched, events):
        ended = not events & select.EPOLLIN  # every process that it was for has ended
        try:
            if not ended:
                watched.do(watched)
        except OSError:
            ended = watched.owner is None
        except Exception:
            traceback.print_exc()
        self._served(watched, ended)

    def _served(self, watched, ended):
        with self._lock:
            del self._busy[watched]
            known = self._watched.get(watched.fd) is watched
            if known and ended:
                self._unwatch(watched)
            elif known:
                self._epoll.modify(watched.fd, select.EPOLLIN | select.EPOLLONESHOT)
            else:  # remove() has left this to us
                self._close(watched)
        if not known:
            watched.inside.close()

    def _accept(self, watched):
        """The OCI runtime brings a notification descriptor: at the start, and for each `runc exec`."""
        connection, _ = watched.owner.accept()
        with connection:
            connection.settimeout(1)
            fds = array.array('i')
            _, ancillary, _, _ = connection.recvmsg(MOST_STATE, socket.CMSG_SPACE(4 * 4), socket.MSG_CMSG_CLOEXEC)
            for level, kind, data in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        for fd in fds:
            self._watch(Watched(fd, None, watched.inside, self._answer))

    @staticmethod
    def _answer(watched: Watched) -> None:
        watched.inside.answer(watched.fd)
