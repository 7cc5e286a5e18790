"""The process that unpacks what strangers send, without any privilege on this machine.

staging.Staging runs it as a program, as root, with the archive on stdin and the path of an order (JSON) as the
argument. The process gives up all privileges and becomes root of a user namespace of its own. It unpacks into the
folder that the order names, and prints the result as JSON: {"spec": …, "layers": [digest of each new one, …],
"opaque": …} or {"error": …, "hint": …}. One process fills one tree, and has that tree as its root folder: no link in
the tree leads out of it.
"""

import contextlib
import ctypes
import errno
import json
import mmap
import os
import re
import resource
import select
import shutil
import signal
import socket
import stat
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator

if __name__ == '__main__':
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))  # -I leaves it out
from handlers.images import archive
from handlers.images.archive import ImageError, parts, show
from handlers.images.folder import FOLDER_ENTRIES, do_folder

IMAGE_ENTRIES, IMAGE_DEPTH = 500_000, 128
MOST_ID = 65535
MOST_ANSWER = 1 << 20
CPU_S, MEMORY = 600, 1 << 30  # of each process
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


# Limits over all processes


class Bounds:
    """Counts the bytes and entries of `count` processes together."""

    def __init__(self, count: int, most_bytes: int, most_entries: int) -> None:
        self._most = most_bytes, most_entries
        self._shared = mmap.mmap(-1, 16 * count)
        self._totals = struct.Struct(f'{2 * count}Q')

    def meter(self, place: int) -> 'Meter':
        return Meter(self, place)

    def note(self, place: int, size: int, entries: int) -> None:
        """Take down what a process has so far. Raises ImageError when all have too much together."""
        struct.pack_into('2Q', self._shared, 16 * place, size, entries)
        totals, (most_bytes, most_entries) = self._totals.unpack(self._shared), self._most
        if sum(totals[0::2]) > most_bytes:
            raise ImageError(f'the archive unpacks to more than {most_bytes} bytes', 'leave out what it does not need')
        if sum(totals[1::2]) > most_entries:
            raise ImageError(f'more than {most_entries} files and folders', 'leave out what it does not need')


class Meter:
    """The counters of one process in Bounds."""

    OFTEN = 512  # entries between two checks of the sum

    def __init__(self, bounds: Bounds, place: int) -> None:
        self._bounds, self._place, self._bytes, self._entries = bounds, place, 0, 0

    def entry(self) -> None:
        self._entries += 1
        if self._entries % self.OFTEN == 0:
            self.check()

    def bytes(self, count: int) -> None:
        self._bytes += count
        self.check()

    def chunks(self, chunks: Iterable) -> Iterator:
        for chunk in chunks:
            self.bytes(len(chunk))
            yield chunk

    def check(self) -> None:
        self._bounds.note(self._place, self._bytes, self._entries)


# A layer


class Root:
    """The root folder of this process, while a layer fills it. A later entry replaces an earlier one.

    What the layer removes from the layers below is written as overlayfs reads it: a character device 0:0. `opaque` has
    the folders that hide those of the same name below. The daemon marks them, since that takes privileges.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter, self.opaque = meter, set()
        self._folders = {}  # path → member: mode and time are set at the end, the mode may forbid to write

    def fill(self, reader: archive.Reader) -> None:
        os.umask(0)
        for member in archive.members(reader):
            self._meter.entry()
            path = self._path(member)
            try:
                self._put(path, member, reader)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise ImageError(f'{show(member.name)}: {error.strerror}') from error
        for path, member in self._folders.items():
            self._finish(path, member)
        self._meter.check()

    def _path(self, member):
        found = parts(member.name)
        if len(found) > IMAGE_DEPTH:
            raise ImageError(f'{show(member.name)} lies more than {IMAGE_DEPTH} folders deep')
        if max(member.uid, member.gid) > MOST_ID:
            raise ImageError(
                f'{show(member.name)} belongs to {member.uid}:{member.gid}, above {MOST_ID}',
                f'build it with ids up to {MOST_ID}',
            )
        return b'/'.join(found)

    def _put(self, path, member, reader):
        name, kind = path.rpartition(b'/')[2], member.kind
        if name.startswith(b'.wh.'):
            self._white_out(path, name)
        elif kind == 'file' and path:
            fd = self._make(path, lambda: os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, member.mode & 0o777))
            try:
                reader.copy(member.size, fd)
                self._dress(fd, member)
            finally:
                os.close(fd)
        elif kind == 'folder':
            if path:
                self._folder(path)
            self._folders[path] = member
        elif kind == 'symlink' and path:
            if b'..' in member.link and member.link[:1] != b'/':
                parts(os.path.dirname(path) + b'/' + member.link, f'links out of the image: {show(member.name)}')
            self._make(path, lambda: os.symlink(member.link, path))
            os.chown(path, member.uid, member.gid, follow_symlinks=False)
            os.utime(path, ns=(member.mtime_ns, member.mtime_ns), follow_symlinks=False)
        elif kind == 'link' and path:
            self._link(path, member)
        elif kind == 'fifo' and path:
            self._make(path, lambda: os.mkfifo(path, member.mode & 0o777))
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            try:
                self._dress(fd, member)
            finally:
                os.close(fd)
        elif kind == 'device':
            raise ImageError(f'{show(member.name)} is a device', 'leave devices out: each instance gets a /dev')
        else:
            raise ImageError(f'{show(member.name)} is a {kind}, which an image cannot hold')

    def _dress(self, fd, member):
        """Set owner, mode and time of a new file, which belongs to 0:0 and has the lower bits of the mode."""
        if member.uid or member.gid:
            os.fchown(fd, member.uid, member.gid)
        if member.mode & 0o7000:
            os.fchmod(fd, member.mode & 0o7777)
        os.utime(fd, ns=(member.mtime_ns, member.mtime_ns))

    def _finish(self, path, member):
        try:
            fd = os.open(path or b'.', os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):  # removed by what came later
                return
            raise
        try:
            os.fchown(fd, member.uid, member.gid)
            os.fchmod(fd, member.mode & 0o7777)
            os.utime(fd, ns=(member.mtime_ns, member.mtime_ns))
        finally:
            os.close(fd)

    def _make(self, path, create):
        """What create() returns. Missing folders above `path` are made, and what is at `path` is removed."""
        for _ in range(3):
            try:
                return create()
            except FileNotFoundError:
                if not self._parents(path):
                    raise
            except FileExistsError:
                self._remove(path)
        raise ImageError(f'{show(path)} cannot be made')

    def _parents(self, path):
        """Make the folders above `path` that are missing; False if none was."""
        found, made = path.split(b'/'), False
        for count in range(1, len(found)):
            with contextlib.suppress(FileExistsError):
                os.mkdir(b'/'.join(found[:count]), 0o755)
                self._meter.entry()
                made = True
        return made

    def _remove(self, path):
        try:
            os.unlink(path)
        except IsADirectoryError:
            shutil.rmtree(path)
            for each in [each for each in self._folders if each == path or each.startswith(path + b'/')]:
                del self._folders[each]

    def _folder(self, path):
        try:
            return os.mkdir(path, 0o755)
        except FileNotFoundError:
            self._parents(path)
        except FileExistsError:
            status = os.lstat(path)
            if stat.S_ISDIR(status.st_mode):
                return None
            self._remove(path)
            if stat.S_ISCHR(status.st_mode):  # the layer has removed the folder below before it adds this one
                os.mkdir(path, 0o755)
                return self._make_opaque(path)
        return os.mkdir(path, 0o755)

    def _link(self, path, member):
        target = b'/'.join(parts(member.link, f'is linked to from {show(member.name)}, out of the image'))
        if target != path:
            with contextlib.suppress(FileNotFoundError):
                os.lstat(target)
                return self._make(path, lambda: os.link(target, path, follow_symlinks=False))
        raise ImageError(f'{show(member.name)} is a hard link to {show(member.link)}, which is not in its layer')

    def _white_out(self, path, name):
        folder = path[: -len(name)]
        if name == b'.wh..wh..opq':
            if folder and not os.path.isdir(folder):
                self._parents(path)
            return self._make_opaque(folder or b'.')
        hidden = name[len(b'.wh.') :]
        if hidden.startswith(b'.wh.'):
            return None  # aufs keeps its own data under such names
        if hidden in (b'', b'.', b'..'):
            raise ImageError(f'{show(path)} leads out of the image')
        return self._make(folder + hidden, lambda: os.mknod(folder + hidden, stat.S_IFCHR, 0))

    def _make_opaque(self, folder):
        self.opaque.add(os.fsdecode(os.path.realpath(folder)))


def do_layer(layer: archive.Layer, name: str, start_zstd: archive.StartZstd, meter: Meter, write: bool) -> list[str]:
    """Check the digests of a layer, and unpack it as the folder `name` here if `write`. Returns its opaque folders.

    Raises ImageError.
    """
    root = Root(meter)
    packed = layer.section.packed()
    blob = archive.Digest(layer.section.chunks()) if layer.blob or not packed else None
    if not packed:
        content, reader = blob, archive.SectionReader(layer.section)
        meter.bytes(layer.section.size if write else 0)
    elif write or not blob:
        unpacked = archive.unpacked(layer.section, packed, start_zstd)
        content = archive.Tap(meter.chunks(unpacked))
        reader = archive.Reader(content)
    else:
        content = reader = None
    if write:
        os.mkdir(name, 0o755)
        os.chroot(name)
        os.chdir('/')
        root.fill(reader)
    if reader:
        reader.skip(sys.maxsize)  # to the end: the digest includes what follows the tar
    for what, digest, expected in (('blob', blob, layer.blob), ('content', content, layer.diff_id)):
        if digest and expected and digest.hex() != expected:
            raise ImageError(f'the {what} has another digest than sha256:{expected}', 'save the image again')
    return sorted(root.opaque)


# An image


def image_spec(config: dict, layers: list[str]) -> dict:
    """The fields of a spec.Spec, from the config of an image. Raises ImageError."""
    of = archive.of
    inner = of(config.get('config') or {}, dict, "the config's config")
    args = [*texts(inner, 'Entrypoint'), *texts(inner, 'Cmd')]
    if not args or not args[0]:
        raise ImageError('the image has no command', 'give it an ENTRYPOINT or a CMD')
    env = {}
    for text in texts(inner, 'Env'):
        name, equals, value = text.partition('=')
        if not name or not equals:
            raise ImageError(f"the config's Env: {show(text)} is not NAME=VALUE")
        env[name] = value
    ports = set()
    for port in of(inner.get('ExposedPorts') or {}, dict, "the config's ExposedPorts"):
        found = re.fullmatch(r'([0-9]{1,5})(?:/(tcp|udp|sctp))?', port)
        if not found or not 1 <= int(found[1]) <= 65535:
            raise ImageError(f"the config's ExposedPorts: {show(port)} is not a port")
        if found[2] in (None, 'tcp'):
            ports.add(int(found[1]))
    return {
        'kind': 'image',
        'args': args,
        'env': env,
        'cwd': '/' + '/'.join(map(os.fsdecode, parts(os.fsencode(text_of(inner, 'WorkingDir'))))),
        'user': text_of(inner, 'User'),
        'ports': sorted(ports),
        'stop_signal': signal_name(text_of(inner, 'StopSignal') or 'SIGTERM'),
        'layers': layers,
    }


def text_of(config: dict, key: str) -> str:
    """A text of the config, '' if it is missing. Raises ImageError."""
    text = archive.of(config.get(key) or '', str, f"the config's {key}")
    if '\0' in text:
        raise ImageError(f"the config's {key} holds a NUL")
    return text


def texts(config: dict, key: str) -> list[str]:
    """A list of texts of the config, [] if it is missing. Raises ImageError."""
    found = archive.of(config.get(key) or [], list, f"the config's {key}")
    for text in found:
        if '\0' in archive.of(text, str, f"the config's {key}"):
            raise ImageError(f"the config's {key} holds a NUL")
    return found


def signal_name(text: str) -> str:
    """The name of a signal: SIGTERM for 'TERM' and for '15', SIGRTMIN+3 for 'rtmin+3'. Raises ImageError."""
    name = text.upper()
    if re.fullmatch('[0-9]{1,2}', name):
        with contextlib.suppress(ValueError):
            return signal.Signals(int(name)).name
    name = name if name.startswith('SIG') else f'SIG{name}'
    if name in signal.Signals.__members__ or re.fullmatch(r'SIGRT(MIN\+|MAX-)([0-9]|[12][0-9]|30)', name):
        return name
    raise ImageError(f"the config's StopSignal: there is no signal {show(text)}")


# Processes


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


def zstd_starter() -> archive.StartZstd:
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


def do_archive(order: dict, fd: int, start_zstd: archive.StartZstd) -> dict:
    """Unpack the archive that is open as `fd` into this folder. Returns the answer. Raises ImageError."""
    packed = archive.Section(fd, 0, os.fstat(fd).st_size)
    if how := packed.packed():
        chunks = archive.unpacked(packed, how, start_zstd)
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
        answer = {'spec': spec, 'layers': [], 'opaque': {}}
    os.ftruncate(fd, 0)  # or syncfs() would write it to the disk
    here = os.open('.', os.O_RDONLY)
    call(libc.syncfs(here))
    return answer


def do_image(opened: archive.Archive, order: dict, start_zstd: archive.StartZstd) -> dict:
    config, layers = archive.find_image(opened, order['reference'])
    spec = image_spec(config, [layer.diff_id for layer in layers])
    stored, jobs, written = set(order['stored']), {}, []
    bounds = Bounds(len(layers), order['most_bytes'], IMAGE_ENTRIES)
    for place, layer in enumerate(layers):
        if layer in jobs:
            continue
        new = layer.diff_id not in stored
        if new:
            stored.add(layer.diff_id)
            written.append(layer.diff_id)
        jobs[layer] = layer_job(layer, place, start_zstd, bounds.meter(place), new)
    opaque = dict(zip((layer.diff_id for layer in jobs), side_by_side(list(jobs.values())), strict=True))
    return {'spec': spec, 'layers': written, 'opaque': opaque}


def layer_job(layer: archive.Layer, place: int, start_zstd: archive.StartZstd, meter: Meter, new: bool) -> Callable:
    def job():
        try:
            return do_layer(layer, layer.diff_id, start_zstd, meter, new)
        except ImageError as error:
            raise ImageError(f'layer {place + 1}: {error}', error.hint) from error

    return job


def confine(order: dict, tell: int, heard: int) -> archive.StartZstd:
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
    call(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S))  # it compiles the Python files of strangers
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


def run(order: dict, work: Callable[[archive.StartZstd], object]) -> object:
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
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)  # the child is PID 1 of the others
    if len(said) >= MOST_ANSWER:
        raise ImageError("the image's command and settings are too long")
    return value_of(said)


def main(path: str) -> int:
    try:
        with open(path) as file:
            order = json.load(file)
        answer = run(order, lambda start_zstd: do_archive(order, 0, start_zstd))
    except (ImageError, OSError) as error:
        answer = said_of(error)
    json.dump(answer, sys.stdout)
    return errno.ENOSPC if 'full' in answer else 1 if 'error' in answer else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1]))
