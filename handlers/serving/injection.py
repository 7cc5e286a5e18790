"""Listener injection: an unmodified server's listen() is answered with the function's own listening socket.

The kernel asks for each listen() of a container by its seccomp notification descriptor (seccomp_unotify(2)), which the
OCI runtime sends at the start as the specification's linux.seccomp.listenerPath says. The answer to the right one puts
our socket at the caller's descriptor number; every other listen() goes on inside, where nobody else is.

Only listen() is asked for, not bind(): with the first connection accepted, the server is ready by its own word.
"""

import array
import contextlib
import ctypes
import errno
import fcntl
import ipaddress
import os
import re
import select
import socket
import struct
import threading
import time
import traceback

from handlers.images.spec import candidates
from handlers.serving.listeners import BACKLOG
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
BEST = (0, False)  # the first candidate, on IPv6: there is nothing to give back for
# A function that does nothing but listen() shall not keep the others waiting, nor the accept loop.
MANY_S, MANY, PAUSE_S = 1, 100, 0.005

libc = ctypes.CDLL(None, use_errno=True)


class EpollEvent(ctypes.Structure):
    _pack_ = 1 if os.uname().machine == 'x86_64' else 0
    _fields_ = [('events', ctypes.c_uint32), ('data', ctypes.c_uint64)]


def _ioctl(fd, request, form, *values):
    """The structure of that form after the kernel had it. Raises OSError."""
    structure = bytearray(struct.pack(form, *values))
    fcntl.ioctl(fd, request, structure, True)
    return structure


def flags_of(tid: int, fd: int) -> int:
    with open(f'/proc/{tid}/fdinfo/{fd}') as file:
        return int(re.search(r'flags:\s*(\d+)', file.read())[1], 8)


def registrations(tid: int, fd: int) -> list[tuple[int, int, int]]:
    """[(epoll descriptor there, events, data)] of the process's epoll instances that watch `fd`.

    What is past MOST_FDINFO is not looked at: a process may have millions of them for us to read.
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


class Injection:
    """Answers the listen() calls of one instance with `listener` (borrowed).

    `report(kind, family, port)` is called in the injector's thread: 'injected', or 'inside' for what went on there.
    """

    def __init__(self, spec, listener, report):
        self._listener, self._report = listener, report
        self._candidates, self._any = candidates(spec), not spec.ports
        self._originals = []
        self._best = None  # (rank, family) of what was injected, the lower the better

    def enough(self) -> None:
        """Let every listen() go on inside from now on: the instance serves in another way."""
        self._candidates, self._any = (), False

    def close(self) -> None:
        for original in self._originals:
            original.sock.close()

    def _rank(self, address, port):
        """How good a place that is to listen: the lower the better; None for one that does not count."""
        if port == 0 or _is_loopback(address):
            return None
        if port in self._candidates:
            return self._candidates.index(port)
        return len(self._candidates) if self._any else None

    def answer(self, notify: int) -> None:
        """Serve one notification of the seccomp descriptor `notify`."""
        try:
            raw = _ioctl(notify, NOTIF_RECV, '80x')
        except OSError as error:  # who asked is gone
            if error.errno in (errno.ENOENT, errno.EINTR):
                return
            raise
        # struct seccomp_notif: id, pid, flags, seccomp_data: nr, arch, instruction_pointer, args[6]
        ident, tid, _, _, _, _, fd, *_ = struct.unpack('QIIiIQ6Q', raw)
        try:
            carry_on = not self._injected(notify, ident, tid, fd & 0x7FFFFFFF)
        except (OSError, TypeError):  # it is gone, or listens on what is no socket: the kernel says it better
            carry_on = True
        with contextlib.suppress(OSError):
            # struct seccomp_notif_resp: id, val, error, flags
            _ioctl(notify, NOTIF_SEND, 'QqiI', ident, 0, 0, NOTIF_FLAG_CONTINUE if carry_on else 0)

    def _injected(self, notify, ident, tid, fd):
        """True if the caller has our socket now; False if its listen() is to go on inside."""
        original = socket_of(tid, fd)
        try:
            _ioctl(notify, NOTIF_ID_VALID, 'Q', ident)  # the thread of that number still is the one that asked
            if original.family not in (socket.AF_INET, socket.AF_INET6) or original.type != socket.SOCK_STREAM:
                return False
            if cookie(original) == cookie(self._listener):
                return True
            address, port = original.getsockname()[:2]
            rank = self._rank(address, port)
            # One that also listens on IPv6 wants its IPv6 clients there.
            mine = None if rank is None else (rank, original.family != socket.AF_INET6)
            if mine is None or (self._best is not None and mine > self._best):
                self._report('inside', original.family, (address, port))
                return False
            process = process_of(tid)
            if self._best is not None and mine < self._best:
                self._give_back(notify, ident, process)
            self._put(notify, ident, tid, fd, original, self._listener)
            self._best = mine
            if mine > BEST and len(self._originals) < MOST_ORIGINALS:
                self._originals.append(Original(process, fd, original, port))
                original = None
            self._report('injected', socket.AF_INET if mine[1] else socket.AF_INET6, (address, port))
            return True
        finally:
            if original:
                original.close()

    def _give_back(self, notify, ident, process):
        """Put the process's own sockets, which listen inside from now on, back in the place of ours."""
        for each in [each for each in self._originals if each.process == process]:
            self._originals.remove(each)
            with each.sock, contextlib.suppress(OSError), socket_of(process, each.fd) as there:
                if cookie(there) == cookie(self._listener):
                    each.sock.listen(BACKLOG)
                    self._put(notify, ident, process, each.fd, self._listener, each.sock)

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


class Injector:
    """One thread that answers for all instances of a server."""

    def __init__(self):
        self._epoll, self._watched = select.epoll(), {}  # fd → (owner of the descriptor, Injection, what to do)
        self._lock = threading.Lock()
        self.thread = threading.Thread(target=self._run, name='injector', daemon=True)
        self.thread.start()

    def add(self, notifier: socket.socket, injection: Injection) -> None:
        """Answer by `injection` what comes from the containers that connect to `notifier` (both borrowed)."""
        self._watch(notifier, injection, self._accept)

    def remove(self, injection: Injection) -> None:
        """Answer no more for an instance that has ended; its descriptors are closed."""
        with self._lock:
            for fd, (owner, watched_for, do) in list(self._watched.items()):
                if watched_for is injection:
                    del self._watched[fd]
                    self._epoll.unregister(fd)
                    if do == self._answer:
                        os.close(owner)
            injection.close()

    def _watch(self, owner, injection, do):
        fd = owner if isinstance(owner, int) else owner.fileno()
        with self._lock:
            self._watched[fd] = owner, injection, do
            self._epoll.register(fd, select.EPOLLIN)

    def _run(self):
        since, count = 0, 0
        while True:
            for fd, events in self._epoll.poll():
                if time.monotonic() > since + MANY_S:
                    since, count = time.monotonic(), 0
                count += 1
                if count > MANY:
                    time.sleep(PAUSE_S)
                with self._lock:
                    if fd not in self._watched:
                        continue
                    owner, injection, do = self._watched[fd]
                    try:
                        if events & select.EPOLLIN:
                            do(owner, injection)
                        else:  # every process that it was for has ended
                            self._drop(fd, owner)
                    except OSError:
                        if do == self._answer:
                            self._drop(fd, owner)
                    except Exception:
                        traceback.print_exc()

    def _drop(self, fd, owner):
        del self._watched[fd]
        self._epoll.unregister(fd)
        os.close(owner)

    def _accept(self, notifier, injection):
        """The OCI runtime brings a notification descriptor: at the start, and for each `runc exec`."""
        connection, _ = notifier.accept()
        with connection:
            connection.settimeout(1)
            fds = array.array('i')
            _, ancillary, _, _ = connection.recvmsg(MOST_STATE, socket.CMSG_SPACE(4 * 4), socket.MSG_CMSG_CLOEXEC)
            for level, kind, data in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        for fd in fds:
            self._watched[fd] = fd, injection, self._answer
            self._epoll.register(fd, select.EPOLLIN)

    @staticmethod
    def _answer(notify: int, injection: Injection) -> None:
        injection.answer(notify)
