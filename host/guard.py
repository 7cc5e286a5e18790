"""The socket guard: a function that is handed a socket can talk on it, and do nothing else with it.

A passed socket belongs to the host's network namespace, whoever holds it. The kernel asks the BPF programs of the
cgroup (version 2) in which a socket was *made*, and an accepted socket inherits that from its listener. So a process in
a cgroup of its own, socket_maker.py, makes the listeners. The programs let only root of the machine bind, connect or
set such a socket, but for the options that servers need. They live as long as such a socket does.

Not asked by the kernel: connect() with AF_UNSPEC, which is harmless alone, and listen(), which binds by itself: the
seccomp notification of injection.py refuses it. Linux 5.14, bpf(2); a program is a few instructions of linux/bpf.h.
"""

import contextlib
import ctypes
import os
import platform
import re
import secrets
import socket
import struct
import subprocess
import sys
import threading

from host import process
from host.errors import StartError

SYS_BPF = {'x86_64': 321, 'aarch64': 280}
BPF_PROG_LOAD, BPF_PROG_ATTACH, BPF_F_ALLOW_MULTI = 5, 8, 2
PROG_CGROUP_SOCK_ADDR, PROG_CGROUP_SOCKOPT = 18, 25
INET4_BIND, INET6_BIND, INET4_CONNECT, INET6_CONNECT, SETSOCKOPT = 8, 9, 10, 11, 22  # enum bpf_attach_type
GET_CURRENT_UID_GID = 15  # the real ids, in the initial user namespace: gid << 32 | uid
BUFFER_MAX = 1 << 20  # bytes that a function may ask for by SO_SNDBUF or SO_RCVBUF; without that the kernel chooses
ANSWER_MAX_S = 2  # how long the maker may take for one socket
HELD = b'held'  # the maker's word for a socket that the guard holds
LOG_SIZE = 1 << 16  # bytes of what the verifier says
HINT = 'FAAS_GUARD=table goes on with nftables alone; docs/SECURITY.md says what that leaves open'

# (level, option): who needs it, of a connection or of the function's listener. docs/HANDLERS.md has the same table.
FREE_OPTIONS = {
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE): 'Go, Java, gunicorn, Node',
    (socket.SOL_SOCKET, socket.SO_RCVTIMEO): 'uWSGI, HTTP::Daemon, libmicrohttpd',
    (socket.SOL_SOCKET, socket.SO_SNDTIMEO): 'the same',
    (socket.SOL_SOCKET, 66): 'SO_RCVTIMEO_NEW: the same, with 64 bits of time',
    (socket.SOL_SOCKET, 67): 'SO_SNDTIMEO_NEW',
    (socket.IPPROTO_TCP, socket.TCP_NODELAY): 'nearly every server',
    (socket.IPPROTO_TCP, socket.TCP_CORK): 'nginx, Apache, Puma',
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE): 'Go, Node, nginx',
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL): 'Go, nginx',
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT): 'Go, nginx',
    (socket.IPPROTO_TCP, socket.TCP_LINGER2): 'HAProxy',
    (socket.IPPROTO_TCP, socket.TCP_QUICKACK): 'HAProxy, Java, Netty',
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT): 'HAProxy, gRPC',
    (socket.IPPROTO_TCP, 25): 'TCP_NOTSENT_LOWAT: H2O, Envoy',
    (socket.IPPROTO_IPV6, socket.IPV6_TCLASS): 'HAProxy, Netty, OpenSSH',
    (socket.IPPROTO_IP, socket.IP_TOS): 'HAProxy, Netty, OpenSSH',
}
# Only with a value that is not 0: then nothing changes. Puma and others set it on the listener once more.
ON_OPTIONS = ((socket.SOL_SOCKET, socket.SO_REUSEADDR), (socket.SOL_SOCKET, socket.SO_REUSEPORT))
BUFFER_OPTIONS = ((socket.SOL_SOCKET, socket.SO_SNDBUF), (socket.SOL_SOCKET, socket.SO_RCVBUF))
# Only without a time: close() never waits then. Jetty switches it off; nginx and HAProxy reset with 0 s.
LINGER_OPTION = (socket.SOL_SOCKET, socket.SO_LINGER)

libc = ctypes.CDLL(None, use_errno=True)


class GuardUnavailable(StartError):
    """This host cannot load the programs. Another try would not help."""

    exit_code = os.EX_CONFIG


class Program:
    """Instructions of BPF. Jumps are to labels that come later."""

    def __init__(self) -> None:
        self._code: list[tuple] = []
        self._labels: dict[str, int] = {}

    def add(self, code: int, dst: int = 0, src: int = 0, off: int = 0, imm: int = 0, to: str | None = None) -> None:
        """One instruction: opcode, registers, offset, immediate value. `to` is the label of a jump."""
        self._code.append((code, dst | src << 4, off, imm, to))

    def label(self, name: str) -> None:
        self._labels[name] = len(self._code)

    def pack(self) -> bytes:
        """struct bpf_insn, one after another."""
        packed = b''
        for number, (code, registers, off, imm, to) in enumerate(self._code):
            packed += struct.pack('<BBhi', code, registers, self._labels[to] - number - 1 if to else off, imm)
        return packed


# Opcodes of linux/bpf_common.h and linux/bpf.h, by their names in the kernel's own listings.
CALL, EXIT, JA = 0x85, 0x95, 0x05
MOV, MOV_IMM, ADD_IMM, LSH_IMM, RSH_IMM, OR = 0xBF, 0xB7, 0x07, 0x67, 0x77, 0x4F
JEQ_IMM, JGT_IMM, JGT = 0x15, 0x25, 0x2D
LOAD_32, LOAD_64 = 0x61, 0x79


def _begin() -> Program:
    """A program that allows everything to root; what it decides for others comes next. r6 is the context."""
    program = Program()
    program.add(MOV, 6, 1)
    program.add(CALL, imm=GET_CURRENT_UID_GID)
    program.add(LSH_IMM, 0, imm=32)
    program.add(RSH_IMM, 0, imm=32)
    program.add(JEQ_IMM, 0, imm=0, to='allow')
    return program


def _end(program: Program) -> bytes:
    """Refuse (EPERM) what has come so far; and the place where allowed calls go."""
    for label, verdict in (('refuse', 0), ('allow', 1)):
        program.label(label)
        program.add(MOV_IMM, 0, imm=verdict)
        program.add(EXIT)
    return program.pack()


def root_only() -> bytes:
    """The program for bind() and connect()."""
    return _end(_begin())


def options_only() -> bytes:
    """The program for setsockopt(). struct bpf_sockopt: optval @8, optval_end @16, level @24, optname @28."""
    program = _begin()
    program.add(LOAD_32, 1, 6, 24)
    program.add(LOAD_32, 2, 6, 28)
    program.add(JGT_IMM, 1, imm=0xFF, to='refuse')
    program.add(JGT_IMM, 2, imm=0xFFFF, to='refuse')
    program.add(LSH_IMM, 1, imm=16)
    program.add(OR, 1, 2)  # r1 = level << 16 | optname
    program.add(LOAD_64, 3, 6, 8)
    program.add(LOAD_64, 4, 6, 16)
    program.add(MOV, 5, 3)
    program.add(ADD_IMM, 5, imm=4)
    program.add(JGT, 5, 4, to='refuse')  # it is shorter than an int
    program.add(LOAD_32, 7, 3)  # r7 = the int; of struct linger: is it on?
    for options, label in ((FREE_OPTIONS, 'allow'), (ON_OPTIONS, 'on'), (BUFFER_OPTIONS, 'buffer')):
        for level, option in options:
            program.add(JEQ_IMM, 1, imm=level << 16 | option, to=label)
    program.add(JEQ_IMM, 1, imm=LINGER_OPTION[0] << 16 | LINGER_OPTION[1], to='linger')
    program.add(JA, to='refuse')
    program.label('linger')
    program.add(JEQ_IMM, 7, imm=0, to='allow')
    program.add(ADD_IMM, 5, imm=4)
    program.add(JGT, 5, 4, to='refuse')
    program.add(LOAD_32, 7, 3, 4)  # the seconds
    program.add(JEQ_IMM, 7, imm=0, to='allow')
    program.add(JA, to='refuse')
    program.label('on')
    program.add(JEQ_IMM, 7, imm=0, to='refuse')
    program.add(JA, to='allow')
    program.label('buffer')
    program.add(JGT_IMM, 7, imm=BUFFER_MAX, to='refuse')
    program.add(JA, to='allow')
    return _end(program)


def _bpf(command: int, attributes: bytes) -> int:
    number = SYS_BPF.get(platform.machine())
    if number is None:
        raise GuardUnavailable(f'the socket guard is not made for {platform.machine()}', HINT)
    result = libc.syscall(number, command, ctypes.create_string_buffer(attributes, len(attributes)), len(attributes))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def load(kind: int, attach_type: int, code: bytes) -> int:
    """A descriptor (owned by the caller) of a program. Raises OSError, with the last line of the verifier."""
    instructions, log = ctypes.create_string_buffer(code, len(code)), ctypes.create_string_buffer(LOG_SIZE)
    license_text = ctypes.create_string_buffer(b'GPL')
    # union bpf_attr: prog_type insn_cnt insns license log_level log_size log_buf kern_version prog_flags prog_name
    # prog_ifindex expected_attach_type
    attributes = struct.pack(
        '<IIQQIIQII16sII', kind, len(code) // 8, ctypes.addressof(instructions), ctypes.addressof(license_text),
        1, LOG_SIZE, ctypes.addressof(log), 0, 0, b'faas', 0, attach_type,
    )  # fmt: skip
    try:
        return _bpf(BPF_PROG_LOAD, attributes)
    except OSError as error:
        said = log.value.decode(errors='replace').strip().splitlines()
        raise OSError(error.errno, f'bpf: {error.strerror}{f" ({said[-1]})" if said else ""}') from error


def attach_all(folder: str) -> None:
    """Attach the programs to a cgroup. Raises OSError."""
    cgroup = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        programs = [(PROG_CGROUP_SOCK_ADDR, each, root_only()) for each in (INET4_BIND, INET6_BIND)]
        programs += [(PROG_CGROUP_SOCK_ADDR, each, root_only()) for each in (INET4_CONNECT, INET6_CONNECT)]
        for kind, attach_type, code in [*programs, (PROG_CGROUP_SOCKOPT, SETSOCKOPT, options_only())]:
            program = load(kind, attach_type, code)
            try:
                _bpf(BPF_PROG_ATTACH, struct.pack('<IIII', cgroup, program, attach_type, BPF_F_ALLOW_MULTI))
            finally:
                os.close(program)
    finally:
        os.close(cgroup)


def hierarchy() -> str | None:
    """Where the cgroup hierarchy of version 2 is mounted, also on hosts that use version 1; None if it is not."""
    with open('/proc/self/mounts') as file:
        found = re.search(r'^\S+ (\S+) cgroup2 ', file.read(), re.MULTILINE)
    return found[1] if found else None


class Unguarded:
    """In the place of a Guard on a host that has none: the mark and the nftables table stand alone."""

    kind = 'table'

    def make(self) -> socket.socket:
        return socket.socket(socket.AF_INET6, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)

    def holds(self, sock: socket.socket) -> bool:
        return True

    def heal(self) -> None:
        pass


class Guard:
    """Makes guarded sockets. `cgroup` is the path of the new cgroup's parent; `prefix` tells one server's from others'.

    `uid` is what the maker runs as: an id that no other process has.
    """

    kind = 'bpf'

    def __init__(self, cgroup: str, prefix: str, uid: int) -> None:
        self._cgroup, self._prefix, self._uid = cgroup, f'{prefix}-listeners-', uid
        self._folder: str | None = None
        self._maker: subprocess.Popen | None = None
        self._channel: socket.socket | None = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Load the programs and start the maker. Raises GuardUnavailable when this host cannot, OSError."""
        root = hierarchy()
        if root is None:
            raise GuardUnavailable('the socket guard needs cgroups of version 2, and none are mounted', HINT)
        parent = root + self._cgroup
        try:
            os.makedirs(parent, exist_ok=True)
            for name in os.listdir(parent):
                if name.startswith(self._prefix):
                    with contextlib.suppress(OSError):  # of a killed faasd, whose maker is about to end
                        os.rmdir(os.path.join(parent, name))
            folder = os.path.join(parent, self._prefix + secrets.token_hex(4))
            os.mkdir(folder)
        except OSError as error:
            raise GuardUnavailable(f'the socket guard gets no cgroup in {parent}: {error.strerror}', HINT) from error
        self._folder = folder
        try:
            attach_all(folder)
            self._start_maker()
            self.make().close()
        except OSError as error:
            self.close()
            raise GuardUnavailable(f'the socket guard cannot be loaded: {error.strerror}', HINT) from error

    def _start_maker(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            program = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'socket_maker.py')
            argv = [sys.executable, '-I', '-S', program, str(theirs.fileno()), self._folder, str(self._uid)]
            self._maker = process.popen(
                argv, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True
            )
        ours.settimeout(ANSWER_MAX_S)
        self._channel = ours

    def make(self) -> socket.socket:
        """A new TCP socket for IPv6 (owned by the caller) that the guard has been seen to hold. Raises OSError."""
        said, fds = self._ask()
        if not fds:
            raise ConnectionError(None, said.decode() or 'the maker of sockets has ended')
        os.set_inheritable(fds[0], False)
        os.fchown(fds[0], 0, 0)  # the sockets of one address must have one owner
        return socket.socket(socket.AF_INET6, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=fds[0])

    def holds(self, sock: socket.socket) -> bool:
        """True if a guard made `sock` (borrowed and bound), also that of a former faasd. Raises OSError."""
        return self._ask(sock)[0] == HELD

    def _ask(self, *sent: socket.socket) -> tuple[bytes, list[int]]:
        with self._lock:
            if self._channel is None:
                raise ConnectionError(None, 'the maker of sockets does not run')
            socket.send_fds(self._channel, [b'?'], [sock.fileno() for sock in sent])
            said, fds, _, _ = socket.recv_fds(self._channel, 256, 1)
            return said, fds

    def heal(self) -> None:
        """Start the maker again if it has ended. For the monitor. Raises OSError."""
        if self._maker and self._maker.poll() is not None:
            with self._lock:
                self._channel.close()
                self._start_maker()
            self.make().close()

    def close(self) -> None:
        """End the maker. The programs go on for the sockets that were made."""
        if self._maker:
            with contextlib.suppress(OSError):
                self._channel.shutdown(socket.SHUT_RDWR)  # it ends by itself then
            self._channel.close()
            self._maker.wait()
            self._maker = self._channel = None
        if self._folder:
            with contextlib.suppress(OSError):
                os.rmdir(self._folder)
