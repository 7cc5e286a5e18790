"""Reads archives from strangers: every form of tar, packed with gzip or zstd, and docker's and OCI's images in them.

Nothing here writes a file. Names are bytes, as in the archive.
"""

import contextlib
import hashlib
import json
import os
import platform
import queue
import re
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from host.errors import FaasError

CHUNK = 1 << 20
MOST_JSON = 4 << 20
MOST_HEADER = 1 << 20  # of pax records and of GNU's long names
MOST_MEMBERS = 20_000  # of the archive itself, not of its layers
MOST_LAYERS = 127
MOST_NESTED = 4  # indexes in indexes, links to links

BLOCK = 512
HINT = 'send a folder, or an image as docker save, podman save or skopeo copy write it'
CPUS = {'x86_64': 'amd64', 'aarch64': 'arm64', 'armv7l': 'arm', 'armv6l': 'arm', 'i686': '386', 'i386': '386'}
CPU = CPUS.get(platform.machine(), platform.machine())

StartZstd = Callable[[], tuple[int, int, int]]  # the input, output and errors of a `zstd -dc` that was started


class ImageError(FaasError):
    """The archive cannot become a function."""

    status = 400


def show(name: bytes | str) -> str:
    """A name from an archive, quoted and cut for a line of text."""
    name = os.fsdecode(name)
    return repr(name if len(name) <= 120 else f'{name[:60]}…{name[-59:]}')


# Bytes in order


class Section(NamedTuple):
    """Bytes of a file that is open as `fd`."""

    fd: int
    at: int
    size: int

    def chunks(self) -> Iterator[bytes]:
        at, end = self.at, self.at + self.size
        while at < end:
            chunk = os.pread(self.fd, min(CHUNK, end - at), at)
            if not chunk:
                return
            at += len(chunk)
            yield chunk

    def packed(self) -> str | None:
        """How it is compressed: 'gzip', 'zstd' or None."""
        head = os.pread(self.fd, min(4, self.size), self.at)
        return 'gzip' if head[:2] == b'\x1f\x8b' else 'zstd' if head == b'\x28\xb5\x2f\xfd' else None


class Reader:
    """Reads an iterable of chunks. None of them may be empty."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._view = memoryview(b'')
        self.at = 0

    def _fill(self):
        self._view = memoryview(next(self._chunks, b''))
        return bool(self._view)

    def _pieces(self, size):
        """Views of the next `size` bytes, or of those that are left."""
        while size and (self._view or self._fill()):
            piece = self._view[:size]
            self._view = self._view[len(piece) :]
            self.at += len(piece)
            size -= len(piece)
            yield piece

    def read(self, size: int) -> bytes:
        """The next `size` bytes, or those that are left."""
        if size <= len(self._view):  # nearly always, and much faster
            piece = bytes(self._view[:size])
            self._view = self._view[size:]
            self.at += size
            return piece
        return b''.join(self._pieces(size))

    def skip(self, size: int) -> int:
        """Pass over `size` bytes, or those that are left. Returns how many."""
        return sum(map(len, self._pieces(size)))

    def copy(self, size: int, fd: int) -> None:
        """Write the next `size` bytes to `fd`. Raises ImageError when there are fewer."""
        for piece in self._pieces(size):
            size -= len(piece)
            while piece:
                piece = piece[os.write(fd, piece) :]
        if size:
            raise ImageError('the archive ends in the middle of a file', 'send it again')


class SectionReader(Reader):
    """Reads a section. Skipped bytes are never read; the kernel copies files that are not small."""

    SMALL, CHUNK = 1 << 14, 1 << 15

    def __init__(self, section: Section) -> None:
        super().__init__(())
        self._section = section

    def _fill(self):
        fd, start, size = self._section
        self._view = memoryview(os.pread(fd, min(self.CHUNK, size - self.at), start + self.at))
        return bool(self._view)

    def skip(self, size: int) -> int:
        size = min(size, self._section.size - self.at)
        self.at += size
        self._view = self._view[size:]
        return size

    def copy(self, size: int, fd: int) -> None:
        if size > self.SMALL:
            at, end = self._section.at + self.at, self._section.at + min(self.at + size, self._section.size)
            while at < end:
                done = os.sendfile(fd, self._section.fd, at, end - at)
                if not done:
                    break
                at += done
            size -= self.skip(at - self._section.at - self.at)
        super().copy(size, fd)


class Digest(threading.Thread):
    """Computes the SHA-256 of chunks in a thread."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        super().__init__(daemon=True)
        self._chunks, self._hash = chunks, hashlib.sha256()
        self.start()

    def run(self) -> None:
        for chunk in self._chunks:
            self._hash.update(chunk)

    def hex(self) -> str:
        """Wait for the last chunk. Returns the 64 hex digits."""
        self.join()
        return self._hash.hexdigest()


class Tap:
    """Passes chunks on and computes their digest."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks, self._fed = chunks, queue.Queue(4)
        self._digest = Digest(iter(self._fed.get, None))

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self._fed.put(chunk)
            yield chunk
        self._fed.put(None)

    def hex(self) -> str:
        """The 64 hex digits, after all chunks have been read."""
        return self._digest.hex()


def unpacked(section: Section, how: str, start_zstd: StartZstd) -> Iterator[bytes]:
    """The content of a section that is packed with 'gzip' or 'zstd', in chunks. Reading them raises ImageError."""
    return gunzip(section.chunks()) if how == 'gzip' else unzstd(section.chunks(), start_zstd)


def gunzip(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The content of gzip members, in chunks. Raises ImageError."""
    unpacker = zlib.decompressobj(31)
    try:
        for chunk in chunks:
            while chunk:
                if unpacker.eof:
                    chunk = chunk.lstrip(b'\0')  # padding of tapes and such
                    if not chunk:
                        break
                    unpacker = zlib.decompressobj(31)
                if data := unpacker.decompress(chunk, CHUNK):
                    yield data
                chunk = unpacker.unconsumed_tail or unpacker.unused_data
        if data := unpacker.flush():
            yield data
    except zlib.error as error:
        raise ImageError(f'the gzip data is damaged: {error}', 'send it again') from error
    if not unpacker.eof:
        raise ImageError('the gzip data ends early', 'send it again')


def unzstd(chunks: Iterable[bytes], start: StartZstd) -> Iterator[bytes]:
    """The content of zstd frames, in chunks. Raises ImageError."""
    into, out, errors = start()

    def feed():
        with contextlib.suppress(BrokenPipeError), open(into, 'wb', buffering=0) as file:
            for chunk in chunks:
                view = memoryview(chunk)
                while view:
                    view = view[file.write(view) :]

    threading.Thread(target=feed, daemon=True).start()
    with open(out, 'rb', buffering=0) as file, open(errors, 'rb', buffering=0) as complaints:
        while data := file.read(CHUNK):
            yield data
        if lines := complaints.read(4096).decode(errors='replace').split('\n')[0]:
            if 'not installed' in lines:
                raise ImageError(
                    'the archive is packed with zstd, which is not installed here', 'on the server: install zstd'
                )
            if 'premature end' in lines:
                raise ImageError('the zstd data ends early', 'send it again')
            raise ImageError(f'the zstd data is damaged: {lines!r}', 'send it again')


# Tar (POSIX pax(1) and ustar, GNU tar's manual "Basic Tar Format")


class Member(NamedTuple):
    """One entry of a tar. kind is 'file', 'folder', 'symlink', 'link' (hard), 'fifo', 'device' or another word."""

    name: bytes
    kind: str
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    link: bytes


KINDS = {
    **dict.fromkeys((b'0', b'\0', b'7'), 'file'),
    b'1': 'link',
    b'2': 'symlink',
    b'3': 'device',
    b'4': 'device',
    b'5': 'folder',
    b'6': 'fifo',
    b'S': 'sparse file',
}
HEADER = struct.Struct('100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12x')
ZEROS = bytes(BLOCK)
MOST_SECONDS = 1 << 33  # of an mtime; what a filesystem does with more differs


def number(field: bytes) -> int:
    """A number of a tar header: octal digits, or GNU's base 256. Raises ValueError."""
    if field[0] & 0x80:
        value = int.from_bytes(field, 'big') & ((1 << (8 * len(field) - 1)) - 1)
        return value - (1 << (8 * len(field) - 1)) if field[0] & 0x40 else value
    return int(field.rstrip(b' \0') or b'0', 8)


def members(reader: Reader) -> Iterator[Member]:
    """Each Member of the tar. Its data may be read before the next one is asked for. Raises ImageError.

    The last member may lack padding, and the tar its end mark: umoci writes such tars.
    """
    common, own, first = {}, {}, True
    while block := reader.read(BLOCK):
        if len(block) < BLOCK and (first or block.strip(b'\0')):
            raise ImageError(*(('it is not a tar archive', HINT) if first else ('the archive is cut', 'send it again')))
        if not block[0] and not block.strip(b'\0'):
            return
        try:
            name, mode, uid, gid, size, mtime, check, kind, link, magic, _, _, _, _, _, prefix = HEADER.unpack(block)
            if number(check) != sum(block) - sum(check) + 8 * ord(' '):
                raise ValueError
            mode, uid, gid, size, mtime_ns = map(number, (mode, uid, gid, size, mtime))
            mtime_ns *= 1_000_000_000
        except ValueError as error:
            if first:
                raise ImageError('it is not a tar archive', HINT) from error
            raise ImageError(f'the archive is damaged at byte {reader.at - BLOCK}', 'send it again') from error
        first = False
        name, link = name.split(b'\0', 1)[0], link.split(b'\0', 1)[0]
        if magic == b'ustar\0' and prefix[0]:
            name = prefix.split(b'\0', 1)[0] + b'/' + name
        if kind in b'xgLK':
            data = extra(reader, size)
            if kind == b'g':
                common.update(records(data))
            elif kind == b'x':
                own.update(records(data))
            else:
                own[b'path' if kind == b'L' else b'linkpath'] = data.split(b'\0', 1)[0]
            continue
        kind = KINDS.get(kind) or f'entry of type {kind!r}'
        if common or own:
            said, own = common | own, {}
            name, link = said.get(b'path', name), said.get(b'linkpath', link)
            uid, gid, size = (said.get(key, value) for key, value in ((b'uid', uid), (b'gid', gid), (b'size', size)))
            mtime_ns = said.get(b'mtime', mtime_ns)
            if b'sparse' in said:
                kind = 'sparse file'
        if kind == 'file' and name.endswith(b'/'):  # before ustar there was no other way
            kind = 'folder'
        if not name or b'\0' in name or b'\0' in link or min(uid, gid, size) < 0:
            raise ImageError(f'the archive is damaged at byte {reader.at - BLOCK}', 'send it again')
        if kind in ('folder', 'symlink', 'link', 'fifo', 'device'):
            size = 0
        most_ns = MOST_SECONDS * 1_000_000_000
        end = reader.at + size
        yield Member(name, kind, mode, uid, gid, size, max(-most_ns, min(mtime_ns, most_ns)), link)
        left = end - reader.at
        if reader.skip(left) < left:
            raise ImageError(f'the archive ends in the middle of {show(name)}', 'send it again')
        pad(reader, size)
    if first:
        raise ImageError('it is not a tar archive', HINT)


def pad(reader: Reader, size: int) -> None:
    """Skip what fills the last block of `size` bytes. Only at the end of the archive it may be missing."""
    if reader.skip(-size % BLOCK) not in (0, -size % BLOCK):
        raise ImageError('the archive is cut', 'send it again')


def extra(reader: Reader, size: int) -> bytes:
    """The data of an entry that adds to the header of the next member."""
    if not 0 <= size <= MOST_HEADER:
        raise ImageError(f'the archive has a header of {size} bytes')
    data = reader.read(size)
    if len(data) < size:
        raise ImageError('the archive is cut', 'send it again')
    pad(reader, size)
    return data


def records(data: bytes) -> dict:
    """Of pax records: path, linkpath, size, uid, gid, mtime (in ns), and True under 'sparse' for a sparse file."""
    said = {}
    try:
        while data:
            digits = data.split(b' ', 1)[0]
            record, data = data[len(digits) + 1 : int(digits)], data[int(digits) :]
            key, value = record.split(b'=', 1)
            if not value.endswith(b'\n') or int(digits) < 0:
                raise ValueError
            value = value[:-1]
            if key in (b'path', b'linkpath'):
                said[key] = value
            elif key in (b'size', b'uid', b'gid'):
                said[key] = int(value)
            elif key == b'mtime':
                seconds, _, fraction = value.partition(b'.')
                said[key] = int(seconds[:20]) * 1_000_000_000 + int(fraction[:9].ljust(9, b'0'))
            elif key.startswith(b'GNU.sparse.'):
                said[b'sparse'] = True
    except ValueError as error:
        raise ImageError('the archive has malformed pax records', 'send it again') from error
    return said


def parts(name: bytes, why: str = 'leads out of the image') -> list[bytes]:
    """The parts of a path, after `.` and `..` are resolved in the text. Raises ImageError for one above the root."""
    found = []
    for part in name.split(b'/'):
        if part == b'..':
            if not found:
                raise ImageError(f'{show(name)} {why}')
            found.pop()
        elif part and part != b'.':
            found.append(part)
    return found


# Images (https://github.com/opencontainers/image-spec, and docker's image/spec/v1.2.md)


class Archive:
    """An index of the members of a tar, in a file that is open as `fd` (borrowed)."""

    def __init__(self, fd: int) -> None:
        self.whole = Section(fd, 0, os.fstat(fd).st_size)
        self._members = {}
        reader = SectionReader(self.whole)
        for count, member in enumerate(members(reader)):
            if count >= MOST_MEMBERS:
                raise ImageError(f'more than {MOST_MEMBERS} files and folders', 'leave out what it does not need')
            with contextlib.suppress(ImageError):  # an image does not need it, and unpacking a folder refuses it
                self._members[b'/'.join(parts(member.name))] = member, Section(fd, reader.at, member.size)

    def __contains__(self, name: str) -> bool:
        return name.encode() in self._members

    def is_image(self) -> bool:
        return 'manifest.json' in self or ('oci-layout' in self and 'index.json' in self)

    def section(self, name: str, what: str) -> Section:
        """The content of the file `name`, which may be a link to another. Raises ImageError when it is missing."""
        path = os.fsencode(name)
        for _ in range(MOST_NESTED):
            member, section = self._members.get(path, (None, None))
            if member is None:
                break
            if member.kind == 'file':
                return section
            if member.kind == 'link':
                path = b'/'.join(parts(member.link))
            elif member.kind == 'symlink':
                path = b'/'.join(parts(os.path.dirname(path) + b'/' + member.link))
            else:
                break
        raise ImageError(f'{what} is not in the archive: {show(name)} is missing', 'save the image again')

    def json(self, name: str, what: str, digest: str | None = None, size: int | None = None) -> object:
        """What the JSON file `name` holds, after a check of digest and size. Raises ImageError."""
        section = self.section(name, what)
        if size is not None and section.size != size:
            raise ImageError(f'{what} has {section.size} bytes, not {size}', 'save the image again')
        if section.size > MOST_JSON:
            raise ImageError(f'{what} has {section.size} bytes, more than {MOST_JSON}')
        data = b''.join(section.chunks())
        if digest and hashlib.sha256(data).hexdigest() != digest:
            raise ImageError(f'{what} has another digest than {digest}', 'save the image again')
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ImageError(f'{what} is not JSON', 'save the image again') from error


class Layer(NamedTuple):
    """A layer in an archive: the digest of the unpacked content, that of the blob (or None), and where the blob is."""

    diff_id: str
    blob: str | None
    section: Section


def find_image(archive: Archive, reference: str | None = None) -> tuple[dict, list[Layer]]:
    """(config, [Layer, …] from the bottom) of the image of that name, or of the only one. Raises ImageError."""
    find = docker_image if 'manifest.json' in archive else oci_image
    config, blobs = find(archive, reference)
    check_platform(of(config, dict, 'the config'))
    if len(blobs) > MOST_LAYERS:
        raise ImageError(f'the image has {len(blobs)} layers, more than {MOST_LAYERS}', 'build it with fewer steps')
    rootfs = of(config.get('rootfs'), dict, "the config's rootfs")
    what = "the config's diff_ids"
    ids = [hex_of(each, what) for each in of(rootfs.get('diff_ids') or [], list, what)]
    if not blobs:
        raise ImageError('the image has no layers')
    if len(ids) != len(blobs):
        raise ImageError(
            f'the image has {len(blobs)} layers, the config names {len(ids)}: one is missing or foreign',
            'save the image again',
        )
    return config, [Layer(diff_id, blob, section) for diff_id, (blob, section) in zip(ids, blobs, strict=True)]


def of(value: object, kind: type, what: str) -> object:
    """`value`, if it is of that type. Raises ImageError, which calls it `what`."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {dict: 'an object', list: 'a list', str: 'a text', int: 'a number'}
        raise ImageError(f'{what} is not {names[kind]}', 'save the image again')
    return value


def hex_of(digest: object, what: str) -> str:
    """The hex digits of a digest. Raises ImageError."""
    if not re.fullmatch(r'sha256:[0-9a-f]{64}', of(digest, str, what)):
        raise ImageError(f'{what}: {show(digest)} is not a SHA-256 digest', 'save the image again')
    return digest.removeprefix('sha256:')


def check_platform(config: dict) -> None:
    """Raise ImageError unless the image is for this kind of machine."""
    system, cpu = config.get('os') or 'linux', config.get('architecture') or CPU
    if system != 'linux':
        raise ImageError(f'the image is for {show(of(system, str, "os"))[1:-1]}, this server runs linux')
    if cpu != CPU:
        cpu = show(of(cpu, str, 'architecture'))[1:-1]
        raise ImageError(f'the image is for {cpu}, this server is {CPU}', f'build it with --platform linux/{CPU}')


def choose(images: list[tuple[list[str], object]], reference: str | None) -> object:
    """The image of [(names, image), …] that has the name `reference`, or the only one. Raises ImageError."""
    found = [image for names, image in images if reference is None or same_name(names, reference)]
    if len(found) == 1:
        return found[0]
    listed = ', '.join(show(names[0])[1:-1] for names, _ in images[:50])
    if not found and images and reference is not None:
        raise ImageError(f'the archive holds no {show(reference)[1:-1]}, but {listed}', 'say which: --image REF')
    if not found:
        raise ImageError('the archive holds no image', HINT)
    raise ImageError(f'the archive holds {len(images)} images: {listed}', 'say which: --image REF')


def same_name(names: list[str], reference: str) -> bool:
    """True if one of the names means `reference`, with or without the default registry and tag."""

    def plain(name):
        for prefix in ('docker.io/', 'library/', 'localhost/'):
            name = name.removeprefix(prefix)
        return name if ':' in name.rpartition('/')[2] else f'{name}:latest'

    return any(plain(name) == plain(reference) for name in names)


def docker_image(archive: Archive, reference: str | None) -> tuple[dict, list[tuple[str | None, Section]]]:
    """(config, [(blob digest or None, Section), …]) of an image that `docker save` wrote. Raises ImageError."""
    images = []
    for entry in of(archive.json('manifest.json', 'manifest.json'), list, 'manifest.json'):
        config = of(of(entry, dict, 'manifest.json').get('Config'), str, "manifest.json's Config")
        names = [of(each, str, 'RepoTags') for each in of(entry.get('RepoTags') or [], list, 'RepoTags')]
        images.append((names or [f'sha256:{os.path.basename(config)[:12]}'], entry))
    entry = choose(images, reference)
    named = re.fullmatch(r'(?:([0-9a-f]{64})\.json|blobs/sha256/([0-9a-f]{64}))', entry['Config'])
    config = archive.json(entry['Config'], 'the config', digest=named and (named[1] or named[2]))
    names = [of(each, str, 'Layers') for each in of(entry.get('Layers') or [], list, 'Layers')]
    return config, [(None, archive.section(name, f'layer {at + 1}')) for at, name in enumerate(names)]


def oci_image(archive: Archive, reference: str | None) -> tuple[dict, list[tuple[str | None, Section]]]:
    """(config, [(blob digest, Section), …]) of an image in an OCI image layout. Raises ImageError."""
    groups = {}  # (names, or what else tells images apart) → manifests for several platforms
    index = of(archive.json('index.json', 'index.json'), dict, 'index.json')
    for names, descriptor in manifests(archive, index):
        platform_ = descriptor.get('platform')
        key = names or ('' if platform_ else hex_of(descriptor.get('digest'), 'index.json'))
        groups.setdefault(key, []).append(descriptor)
    images = {}  # digest → (names, manifests): one image may have several names
    for key, group in groups.items():
        digest = hex_of(group[0].get('digest'), 'index.json')
        names = list(key) if isinstance(key, tuple) else [f'sha256:{digest[:12]}']
        images.setdefault(digest, ([], group))[0].extend(names)
    group = choose(list(images.values()), reference)
    descriptor = next(filter(fits, group), None)
    if descriptor is None:
        cpus = ', '.join(sorted({show(str(each['platform'].get('architecture')))[1:-1] for each in group}))
        raise ImageError(f'the image is for {cpus}, this server is {CPU}', f'build it with --platform linux/{CPU}')
    manifest = of(blob_json(archive, descriptor, 'the manifest'), dict, 'the manifest')
    config = blob_json(archive, of(manifest.get('config'), dict, "the manifest's config"), 'the config')
    layers = []
    for at, layer in enumerate(of(manifest.get('layers') or [], list, "the manifest's layers")):
        what = f'layer {at + 1}'
        digest = hex_of(of(layer, dict, what).get('digest'), what)
        name = f'blobs/sha256/{digest}'
        if layer.get('urls') and name not in archive:
            raise ImageError(f'{what} is foreign: it is not in the archive', 'save the image with all its layers')
        section = archive.section(name, what)
        if section.size != of(layer.get('size'), int, f"{what}'s size"):
            raise ImageError(f'{what} has {section.size} bytes, not {layer["size"]}', 'save the image again')
        layers.append((digest, section))
    return config, layers


def blob_json(archive: Archive, descriptor: dict, what: str) -> object:
    """What the JSON blob of a descriptor holds. Raises ImageError."""
    digest = hex_of(descriptor.get('digest'), what)
    size = of(descriptor.get('size'), int, f"{what}'s size")
    return archive.json(f'blobs/sha256/{digest}', what, digest, size)


def fits(descriptor: dict) -> bool:
    """True if the manifest is for this kind of machine, or for any."""
    platform_ = descriptor.get('platform')
    return not platform_ or (platform_.get('os'), platform_.get('architecture')) == ('linux', CPU)


def manifests(archive: Archive, index: dict, names: tuple = (), nested: int = 0) -> Iterator[tuple[tuple, dict]]:
    """(names, descriptor) of each image's manifest for a platform, in an index and the indexes in it."""
    if nested > MOST_NESTED:
        raise ImageError(f'more than {MOST_NESTED} indexes in each other')
    for descriptor in of(index.get('manifests') or [], list, 'the index'):
        annotations = of(of(descriptor, dict, 'the index').get('annotations') or {}, dict, 'annotations')
        platform_ = of(descriptor.get('platform') or {}, dict, 'platform')
        if platform_.get('architecture') == 'unknown' or 'vnd.docker.reference.type' in annotations:
            continue  # an attestation
        keys = ('io.containerd.image.name', 'org.opencontainers.image.ref.name')
        said = tuple(of(annotations[key], str, key) for key in keys if key in annotations)
        if 'index' in str(descriptor.get('mediaType')) or 'manifest.list' in str(descriptor.get('mediaType')):
            inner = of(blob_json(archive, descriptor, 'the index'), dict, 'the index')
            digest = hex_of(descriptor.get('digest'), 'the index')
            yield from manifests(archive, inner, names or said or (f'sha256:{digest[:12]}',), nested + 1)
        else:
            yield names or said, descriptor
