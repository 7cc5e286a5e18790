"""Runs the programs that faasd needs. No other module of the daemon starts a program."""

import contextlib
import ctypes
import errno
import os
import pathlib
import re
import select
import shutil
import signal
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Container, Mapping, Sequence
from typing import IO

from host.errors import FaasError

PIDFD_THREAD = os.O_EXCL  # Linux 6.9
PIDFD_GETFD = 438
WANTED_LOOK_S = 0.2  # how often run_while() asks
END_S = 1  # how long a program has to end after SIGTERM

libc = ctypes.CDLL(None, use_errno=True)

# Held while a program is started: until it runs, it has copies of our descriptors.
forking = threading.Lock()


class CommandError(FaasError):
    """A command failed: argv, exit_code (None: it never ran or was too slow), stdout, stderr, reason (one line)."""

    status = 503

    def __init__(
        self, argv: Sequence[str], reason: str, exit_code: int | None = None, stdout: str = '', stderr: str = ''
    ) -> None:
        self.argv, self.reason, self.exit_code, self.stdout, self.stderr = argv, reason, exit_code, stdout, stderr
        super().__init__(f'{argv[0]}: {reason}')


def forget_unsafe_folders() -> None:
    """Take out of PATH the folders in which others than root can put programs: each program is found by it."""
    os.environ['PATH'] = ':'.join(each for each in os.environ.get('PATH', os.defpath).split(':') if is_roots(each))


def is_roots(folder: str) -> bool:
    """True if root alone can put something there, or put something else in its place."""
    path = os.path.realpath(folder)
    for each in (path, *map(str, pathlib.PurePath(path).parents)):
        try:
            info = os.stat(each)
        except OSError:
            return False
        sticky = info.st_mode & stat.S_ISVTX and each != path
        if info.st_uid != 0 or (info.st_mode & 0o022 and not sticky):
            return False
    return os.path.isabs(folder)


def run(
    argv: Sequence[str],
    *,
    input: str | None = None,
    stdin: int | IO = subprocess.DEVNULL,
    ok: Container[int] = (0,),
    timeout_s: float = 30,
) -> subprocess.CompletedProcess[str]:
    """Run argv to its end; text in (or a file as `stdin`), text out.

    Secrets go in by `input`, never by argv.

    Raises CommandError when the program is missing, is too slow, or ends with a code that is not in `ok`; OSError when
    it cannot be started.
    """
    pipe = subprocess.PIPE
    stdin = stdin if input is None else pipe
    with popen(argv, stdin=stdin, stdout=pipe, stderr=pipe, text=True, errors='replace') as child:
        try:
            out, err = child.communicate(input, timeout_s)
        except BaseException as error:
            child.kill()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            raise CommandError(argv, f'no end after {timeout_s} s') from error
    if child.returncode not in ok:
        lines = (err or out).strip().splitlines()
        raise CommandError(argv, lines[-1] if lines else f'exit code {child.returncode}', child.returncode, out, err)
    return subprocess.CompletedProcess(argv, child.returncode, out, err)


def popen(argv: Sequence[str], **options: object) -> subprocess.Popen:
    """Start a program, with the options of subprocess.Popen. Raises CommandError, OSError."""
    try:
        with forking:
            return subprocess.Popen(argv, **options)
    except FileNotFoundError as error:
        raise CommandError(argv, 'not installed (make deps installs it)') from error


def run_while(
    is_wanted: Callable[[], bool], argv: Sequence[str], *, stdin: int | IO, timeout_s: float
) -> subprocess.CompletedProcess[str]:
    """Run argv to its end, as run() does, with any exit code. It is ended when it is not wanted any more.

    The program must end its own children at SIGTERM. Raises CommandError when it was ended; OSError.
    """
    deadline = time.monotonic() + timeout_s
    streams = {'stdin': stdin, 'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE}
    child = subprocess.Popen(argv, text=True, errors='replace', process_group=0, **streams)
    with child.stdout, child.stderr:
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    out, complaints = child.communicate(timeout=WANTED_LOOK_S)
                    return subprocess.CompletedProcess(argv, child.returncode, out, complaints)
                if not is_wanted():
                    raise CommandError(argv, 'nobody wants it any more')
                if time.monotonic() > deadline:
                    raise CommandError(argv, f'no end after {timeout_s} s')
        except BaseException:
            finish(child, END_S)
            reap_group(child.pid)  # what it could not end is ours
            raise


def start(argv: Sequence[str], *, output: bool = False, **environ: str) -> subprocess.Popen[bytes]:
    """Start a program that stays; with `output` its stdout and stderr are the process's `stdout`.

    It gets a session of its own: only faasd handles a Ctrl-C at the terminal. Raises CommandError, OSError.
    """
    streams = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT} if output else {}
    return popen(argv, stdin=subprocess.DEVNULL, start_new_session=True, env=os.environ | environ, **streams)


def run_with_fds(argv: Sequence[str], fds: Mapping[int, int], timeout_s: float = 30) -> int:
    """Run argv to its end with `fds`, {number there: descriptor here}, and no others; return its exit code."""
    actions = [(os.POSIX_SPAWN_OPEN, 0, '/dev/null', os.O_RDONLY, 0)]
    actions += [(os.POSIX_SPAWN_DUP2, fds[number], number) for number in sorted(fds)]
    try:
        environ = {'PATH': os.environ.get('PATH', os.defpath)}
        with forking:
            pid = os.posix_spawnp(argv[0], argv, environ, file_actions=actions, setpgroup=0)
    except FileNotFoundError as error:
        raise CommandError(argv, 'not installed (make deps installs it)') from error
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:  # no descriptor is left: nothing would tell its end
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise
    try:
        ended = select.poll()
        ended.register(pidfd, select.POLLIN)
        if not ended.poll(timeout_s * 1000):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise CommandError(argv, f'no end after {timeout_s} s')
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        reap_group(pid)
        return code
    finally:
        os.close(pidfd)


def user_namespace(mapping: str, owner: int = 0, timeout_s: float = 5) -> int:
    """A descriptor (owned by the caller) of a new user namespace with this uid_map and gid_map (user_namespaces(7)).

    The kernel counts what is used in it (inotify instances, signals that wait, namespaces …) as `owner`'s, too.
    """
    argv = ['unshare', '--user', 'cat']
    if owner:  # some hosts let only those with CAP_SYS_ADMIN make one
        ids = [f'--reuid={owner}', f'--regid={owner}', '--clear-groups']
        argv = ['setpriv', *ids, '--inh-caps=+sys_admin', '--ambient-caps=+sys_admin', *argv]
    process = popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        path = f'/proc/{process.pid}/ns/user'
        own, deadline = os.readlink('/proc/self/ns/user'), time.monotonic() + timeout_s
        while os.readlink(path) == own:
            if process.poll() is not None or time.monotonic() > deadline:
                raise CommandError(process.args, 'made no user namespace')
            time.sleep(0.0005)
        for kind in ('uid_map', 'gid_map'):
            with open(f'/proc/{process.pid}/{kind}', 'w') as file:
                file.write(mapping)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    finally:
        process.communicate()


def reap_group(group: int) -> None:
    """Reap what a program forked and did not wait for, as crun does. A subreaper inherits it a moment later."""
    with contextlib.suppress(ChildProcessError):  # nobody is left
        for _ in range(10):
            if os.waitid(os.P_PGID, group, os.WEXITED | os.WNOHANG) is None:
                time.sleep(0.005)


def installed(program: str) -> bool:
    return shutil.which(program) is not None


def start_time(pid: int) -> int | None:
    """Clock ticks since boot at which `pid` started (proc(5), stat field 22): with it a pid is unique.

    None if there is no such process. Raises OSError when that cannot be told.
    """
    try:
        with open(f'/proc/{pid}/stat') as file:
            return int(file.read().rpartition(')')[2].split()[19])
    except (FileNotFoundError, ProcessLookupError):  # before the file was open, or after that
        return None


def finish(process: subprocess.Popen, timeout_s: float = 5) -> None:
    """End and reap what `start` started: SIGTERM, then SIGKILL. Needs no descriptor: one may not be left."""
    process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end(pid: int, started: int | None, timeout_s: float = 5) -> bool:
    """End process `pid` if it still is the one with that start time: SIGTERM, then SIGKILL. True if it was.

    Raises OSError when it cannot be told whether it is.
    """
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if start_time(pid) != started:
            return False
        ended = select.poll()
        ended.register(pidfd, select.POLLIN)
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)
            if ended.poll(timeout_s * 1000):
                break
        return True
    finally:
        os.close(pidfd)


def process_of(tid: int) -> int:
    """The process id of a thread. Raises OSError when the thread is gone."""
    with open(f'/proc/{tid}/status') as file:
        return int(re.search(r'^Tgid:\s*(\d+)', file.read(), re.MULTILINE)[1])


def copy_of(tid: int, fd: int) -> int:
    """A descriptor (owned) of the open file that thread `tid` has at `fd`. Raises OSError."""
    try:
        pidfd = os.pidfd_open(tid, PIDFD_THREAD)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        # A kernel before 6.9. Threads of one process nearly always share their descriptors.
        pidfd = os.pidfd_open(process_of(tid))
    try:
        copy = libc.syscall(PIDFD_GETFD, pidfd, fd, 0)
        if copy < 0:
            raise OSError(ctypes.get_errno(), 'pidfd_getfd')
        os.set_inheritable(copy, False)
        return copy
    finally:
        os.close(pidfd)


def socket_of(tid: int, fd: int) -> socket.socket:
    """The socket (owned) that thread `tid` has at `fd`. Raises OSError."""
    copy = copy_of(tid, fd)
    try:
        return socket.socket(fileno=copy)
    except BaseException:
        os.close(copy)
        raise
