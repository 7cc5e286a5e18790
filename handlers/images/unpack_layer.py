"""Unpacks one layer of an image into the root folder of this process, within limits that all layers share."""

import contextlib
import errno
import mmap
import os
import shutil
import stat
import struct
import sys
from collections.abc import Container, Iterable, Iterator

from handlers.images import streams, tar
from handlers.images.archive import Layer
from handlers.images.streams import ImageError, show
from handlers.images.tar import parts

IMAGE_DEPTH = 128
MOST_ID = 65535
MOST_TOLD = 4  # devices of a layer that are named
MOST_OPAQUE = 10_000  # in one layer: the daemon marks each


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


class Root:
    """The root folder of this process, while a layer fills it. A later entry replaces an earlier one.

    What the layer removes from the layers below is written as overlayfs reads it: a character device 0:0. `opaque` has
    the folders that hide those of the same name below. The daemon marks them, since that takes privileges. Devices are
    left out: each instance gets a /dev.
    """

    def __init__(self, meter: Meter) -> None:
        self._meter, self.opaque, self._marks = meter, set(), 0
        self.devices = []  # that were left out
        # Mode and time of folders are set at the end: the mode may forbid to write.
        self._folders = {}  # path → (member, how many folders were removed before it)
        self._removed, self._removals = {}, 0  # path → its number among the folders that were removed, from 1

    def fill(self, reader: streams.Reader) -> None:
        os.umask(0)
        for member in tar.members(reader):
            self._meter.entry()
            path = self._path(member)
            try:
                self._put(path, member, reader)
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise ImageError(f'{show(member.name)}: {error.strerror}') from error
        for path, (member, removed) in self._folders.items():
            if not self._removed or self._stays(path, removed):
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
            self._folders[path] = member, self._removals
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
            if len(self.devices) < MOST_TOLD:
                self.devices.append(show(member.name))
        else:
            raise ImageError(f'{show(member.name)} is a {kind}, which an image cannot hold')

    def _stays(self, path, removals):
        """True unless the folder, or one above it, was removed after the first `removals` removals."""
        while path:
            if self._removed.get(path, 0) > removals:
                return False
            path = path.rpartition(b'/')[0]
        return True

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
            self._removals += 1
            self._removed[path] = self._removals

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
        self._marks += 1
        if self._marks > MOST_OPAQUE:
            raise ImageError(f'more than {MOST_OPAQUE} opaque folders', 'build it with fewer steps')
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fchdir(fd)  # the path without links: much faster than realpath()
            self.opaque.add(os.getcwd())
        finally:
            os.chdir('/')
            os.close(fd)


def do_layer(
    layer: Layer, name: str, start_zstd: streams.StartZstd, meter: Meter, verified: Container[str] | None
) -> dict:
    """Check the digests of a layer, and unpack it as the folder `name` here unless it is stored already.

    `verified` has the digests of the blobs that were found to hold a stored layer; None for one that is not stored.
    The content is hashed, or that of its blob: who knows the digest of a stored layer may not have the layer.
    Returns its `opaque` folders, and the digest of the `blob` if that is packed. Raises ImageError.
    """
    root, packed = Root(meter), layer.section.packed()
    blob = content = streams.Digest(layer.section.chunks())
    if packed:
        if verified and blob.hex() in verified and layer.blob in (None, blob.hex()):
            return {'opaque': [], 'devices': [], 'blob': blob.hex()}
        content = streams.Tap(meter.chunks(streams.unpacked(layer.section, packed, start_zstd)))
        reader = streams.Reader(content)
    else:
        reader = streams.SectionReader(layer.section)
        meter.bytes(layer.section.size if verified is None else 0)
    if verified is None:
        os.mkdir(name, 0o755)
        os.chroot(name)
        os.chdir('/')
        root.fill(reader)
    reader.skip(sys.maxsize)  # to the end: the digest includes what follows the tar
    for what, digest, expected in (('blob', blob, layer.blob), ('content', content, layer.diff_id)):
        if expected and digest.hex() != expected:
            raise ImageError(f'the {what} has another digest than sha256:{expected}', 'save the image again')
    return {'opaque': sorted(root.opaque), 'devices': root.devices, 'blob': packed and blob.hex()}
