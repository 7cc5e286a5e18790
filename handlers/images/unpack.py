"""The process that unpacks what strangers send, without any privilege on this machine.

staging.Staging runs it as a program, as root, with the archive on stdin and the path of an order (JSON) as the
argument. The process gives up all privileges and becomes root of a user namespace of its own. It unpacks into the
folder that the order names, and prints the result as JSON: {"spec": …, "layers": [digest of each new one, …],
"opaque": …, "blobs": …} or {"error": …, "hint": …}. One process fills one tree, and has that tree as its root folder:
no link in the tree leads out of it.
"""

import contextlib
import ctypes
import errno
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import tempfile
from collections.abc import Callable

if __name__ == '__main__':
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))  # -I leaves it out
from handlers.images import archive, streams
from handlers.images.folder import FOLDER_ENTRIES, do_folder, precompile
from handlers.images.streams import ImageError
from handlers.images.unpack_layer import MOST_ID, Bounds, Meter, do_layer

IMAGE_ENTRIES = 500_000
MOST_ANSWER = 1 << 20
CPU_LEAST_S, CPU_MOST_S, CPU_BYTES_A_SECOND = 10, 600, 100_000  # of each process; bytes as they were uploaded
MEMORY = 1 << 30  # of each process
AT_ONCE = os.cpu_count() or 1

CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x8000000, 0x10000000, 0x20000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CAPABILITY_VERSION = 0x20080522
CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SYS_CHROOT = 0, 1, 3, 4, 18  # needed to fill a tree of many owners

libc = ctypes.CDLL(None, use_errno=True)


def call(result: int) -> int:
    """The result of a C function. Raises OSError if that is -1."""
    if result == -1:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def side_by_side(jobs: list[Callable[[], object]]) -> list:
    """What the functions return. Each runs in a process of its own. Raises the ImageError or OSError of one."""
    answers, waiting, running = [None] * len(jobs), list(enumerate(jobs))[::-1], {}  # pipe → (place, what it said)
    poll = select.poll()
    while waiting or running:
        while waiting and len(running) < AT_ONCE:
            place, job = waiting.pop()
            reader, writer = os.pipe()
            if os.fork() == 0:
                answer_and_exit(job, writer)
            os.close(writer)
            running[reader] = place, bytearray()
            poll.register(reader, select.POLLIN)
        for reader, _ in poll.poll():
            place, said = running[reader]
            if chunk := os.read(reader, 65536):
                said += chunk
                continue
            poll.unregister(reader)
            os.close(reader)
            del running[reader]
            answers[place] = value_of(said)
    return answers


def answer_and_exit(job: Callable[[], object], writer: int) -> None:
    """Run job(), write what it returns or raises to `writer`, and end this process."""
    try:
        answer = {'value': job()}
    except BaseException as error:
        answer = said_of(error)
    with contextlib.suppress(OSError), open(writer, 'wb') as file:
        file.write(json.dumps(answer).encode())
    os._exit(0)  # the handlers and threads of the parent are not ours to end


def said_of(error: BaseException) -> dict:
    """An error as an object for JSON."""
    if isinstance(error, ImageError):
        return {'error': str(error), 'hint': error.hint}
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return {'full': True}
    if isinstance(error, MemoryError):
        return {'error': 'the archive needs too much memory to unpack', 'hint': None}
    if isinstance(error, RecursionError):
        return {'error': 'the archive is nested too deeply', 'hint': None}
    if isinstance(error, UnicodeError):
        return {'error': 'a text in the archive is not valid Unicode', 'hint': 'save the image again'}
    if isinstance(error, OSError):
        return {'error': f'the archive cannot be unpacked: {error.strerror or error}', 'hint': None}
    return {
        'error': f'the archive cannot be unpacked: {type(error).__name__}: {" ".join(str(error).split())[:200]}',
        'hint': None,
    }


def value_of(said: bytes) -> object:
    """The value that answer_and_exit() wrote. Raises the error that it wrote."""
    if not said:
        raise ImageError('the archive takes too long or too much memory to unpack', 'leave out what it does not need')
    answer = json.loads(said)
    if 'full' in answer:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if 'error' in answer:
        raise ImageError(answer['error'], answer['hint'])
    return answer['value']


def zstd_starter() -> streams.StartZstd:
    """Fork a process that starts `zstd -dc` on request. The function returned works after a chroot, too."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        keep_capabilities()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
        while True:
            _, fds, _, _ = socket.recv_fds(theirs, 1, 3)
            if not fds:
                os._exit(0)
            if os.fork() == 0:
                for number, fd in enumerate(fds):
                    os.dup2(fd, number)
                try:
                    os.execvp('zstd', ['zstd', '-dcq'])
                except OSError:
                    os.write(2, b'not installed')
                os._exit(1)
            for fd in fds:
                os.close(fd)
    theirs.close()

    def start():
        pipes = [os.pipe() for _ in range(3)]
        (reads, into), (out, writes), (errors, complains) = pipes
        socket.send_fds(ours, [b'x'], [reads, writes, complains])
        for fd in (reads, writes, complains):
            os.close(fd)
        return into, out, errors

    return start


def do_archive(order: dict, fd: int, start_zstd: streams.StartZstd) -> dict:
    """Unpack the archive that is open as `fd` into this folder. Returns the answer. Raises ImageError."""
    packed = streams.Section(fd, 0, os.fstat(fd).st_size)
    if how := packed.packed():
        chunks = streams.unpacked(packed, how, start_zstd)
        bounds = Bounds(1, order['most_bytes'], 1)
        with tempfile.TemporaryFile(dir='.') as file:
            for chunk in bounds.meter(0).chunks(chunks):
                file.write(chunk)
            fd = os.dup(file.fileno())
        os.ftruncate(packed.fd, 0)
    opened = archive.Archive(fd)
    if opened.is_image():
        answer = do_image(opened, order, start_zstd)
    else:
        meter = Bounds(1, order['most_bytes'], FOLDER_ENTRIES).meter(0)
        (spec,) = side_by_side([lambda: do_folder(opened.whole, 'tree', meter.bytes)])
        with contextlib.suppress(ImageError):  # it took too long
            side_by_side([lambda: precompile('tree')])
        answer = {'spec': spec, 'layers': [], 'opaque': {}, 'blobs': {}}
    os.ftruncate(fd, 0)  # or syncfs() would write it to the disk
    here = os.open('.', os.O_RDONLY)
    call(libc.syncfs(here))
    return answer


def do_image(opened: archive.Archive, order: dict, start_zstd: streams.StartZstd) -> dict:
    config, layers = archive.find_image(opened, order['reference'])
    spec = archive.image_spec(config, [layer.diff_id for layer in layers])
    stored, jobs, written = order['stored'], {}, []
    bounds = Bounds(len(layers), order['most_bytes'], IMAGE_ENTRIES)
    for place, layer in enumerate(layers):
        if layer in jobs:
            continue
        verified = stored.get(layer.diff_id)
        if verified is None:
            stored[layer.diff_id] = []
            written.append(layer.diff_id)
        jobs[layer] = layer_job(layer, place, start_zstd, bounds.meter(place), verified)
    opaque, blobs, devices = {}, {}, []
    for layer, done in zip(jobs, side_by_side(list(jobs.values())), strict=True):
        opaque.setdefault(layer.diff_id, []).extend(done['opaque'])
        devices += done['devices']
        blobs.setdefault(layer.diff_id, []).extend([done['blob']] if done['blob'] else [])
    if devices:
        names = ', '.join(devices[:3]) + ', …' * (len(devices) > 3)
        spec['warnings'].append(f'left out the devices {names}: each instance gets a /dev')
    return {'spec': spec, 'layers': written, 'opaque': opaque, 'blobs': blobs}


def layer_job(
    layer: archive.Layer, place: int, start_zstd: streams.StartZstd, meter: Meter, verified: list[str] | None
) -> Callable:
    def job():
        try:
            return do_layer(layer, layer.diff_id, start_zstd, meter, verified)
        except ImageError as error:
            raise ImageError(f'layer {place + 1}: {error}', error.hint) from error

    return job


def confine(order: dict, tell: int, heard: int) -> streams.StartZstd:
    """Become root of unused ids, without network, in the folder of the order. The parent writes the id maps."""
    folder = os.open(order['folder'], os.O_RDONLY | os.O_DIRECTORY)
    if libc.unshare(CLONE_NEWUSER):
        raise ImageError(
            'this server allows no user namespaces', 'on the server: sysctl user.max_user_namespaces=10000'
        )
    os.write(tell, b'x')
    if not os.read(heard, 1):
        os._exit(1)
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    call(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))  # after it: a change of ids clears it
    parent = select.poll()
    parent.register(heard, 0)
    if parent.poll(0):  # it has ended before that
        os._exit(1)
    call(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    cpu_s = min(CPU_MOST_S, CPU_LEAST_S + os.fstat(0).st_size // CPU_BYTES_A_SECOND)
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    start_zstd = zstd_starter()
    ''.encode('latin-1'), ''.encode('ascii')  # Python imports codecs at first use, and cannot after chroot
    os.fchdir(folder)
    os.close(folder)
    os.chroot('.')
    keep_capabilities(CHOWN, DAC_OVERRIDE, FOWNER, FSETID, SYS_CHROOT)
    return start_zstd


def keep_capabilities(*kept: int) -> None:
    """Give up all others. After chroot a process cannot get them back in another user namespace."""
    bits = sum(1 << each for each in kept)
    header = struct.pack('Ii', CAPABILITY_VERSION, 0)
    call(libc.capset(header, struct.pack('6I', bits, bits, 0, 0, 0, 0)))


def run(order: dict, work: Callable[[streams.StartZstd], object]) -> object:
    """What work(start_zstd) returns in a confined process. That process and its children end with this one."""
    call(libc.unshare(CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC))
    heard, told = os.pipe(), os.pipe()
    reader, writer = os.pipe()
    os.chown(order['folder'], order['id_base'], order['id_base'])
    child = os.fork()
    if child == 0:

        def job():
            for fd in (heard[0], told[1], reader):
                os.close(fd)
            null = os.open('/dev/null', os.O_WRONLY)  # the answer goes to `writer`, and has a limit there
            os.dup2(null, 1)
            os.dup2(null, 2)
            return work(confine(order, heard[1], told[0]))

        answer_and_exit(job, writer)
    try:
        for fd in (heard[1], told[0], writer):
            os.close(fd)
        if os.read(heard[0], 1):
            for name in ('uid_map', 'gid_map'):
                with open(f'/proc/{child}/{name}', 'w') as file:
                    file.write(f'0 {order["id_base"]} {MOST_ID + 1}\n')
            os.write(told[1], b'x')
        said = b''
        while len(said) < MOST_ANSWER and (chunk := os.read(reader, 65536)):
            said += chunk
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)  # the child is PID 1 of the others
    if len(said) >= MOST_ANSWER:
        raise ImageError("the image's command and settings are too long")
    return value_of(said)


def main(path: str) -> int:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        with open(path) as file:
            order = json.load(file)
        call(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))  # nobody waits for the rest if faasd is killed
        if os.getppid() != order['parent']:
            return 1
        answer = run(order, lambda start_zstd: do_archive(order, 0, start_zstd))
    except (ImageError, OSError) as error:
        answer = said_of(error)
    json.dump(answer, sys.stdout)
    return errno.ENOSPC if 'full' in answer else 1 if 'error' in answer else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1]))
