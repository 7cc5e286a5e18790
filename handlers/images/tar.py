"""Reads every form of tar from strangers (POSIX pax(1) and ustar, GNU tar's manual "Basic Tar Format").

Nothing here writes a file. Names are bytes, as in the archive.
"""

import struct
from collections.abc import Iterator
from typing import NamedTuple

from handlers.images.streams import ImageError, Reader, show

MOST_HEADER = 1 << 20  # of pax records and of GNU's long names
MOST_EXTRAS = 8  # headers that add to the next one
MOST_RECORDS = 256  # of one pax header
MOST_NAME = 4095  # of names and links: PATH_MAX without its NUL

BLOCK = 512
HINT = 'send a folder, or an image as docker save, podman save or skopeo copy write it'


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
    common, own, extras, first = {}, {}, 0, True
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
            extras += 1
            if extras > MOST_EXTRAS:
                raise ImageError(f'the archive has more than {MOST_EXTRAS} headers for one file')
            data = extra(reader, size)
            if kind == b'g':
                common.update(records(data))
            elif kind == b'x':
                own.update(records(data))
            else:
                own[b'path' if kind == b'L' else b'linkpath'] = data.split(b'\0', 1)[0]
            continue
        extras = 0
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
        if max(len(name), len(link)) > MOST_NAME:
            raise ImageError(f'{show(name)} has a name or a link of more than {MOST_NAME} bytes')
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
    said, at, count = {}, 0, 0
    try:
        while at < len(data):
            blank = data.index(b' ', at, at + 12)
            end = at + int(data[at:blank])
            if not blank < end <= len(data) or data[end - 1] != ord('\n'):
                raise ValueError
            equals = data.index(b'=', blank, end)
            key, value, at = data[blank + 1 : equals], data[equals + 1 : end - 1], end
            count += 1
            if count > MOST_RECORDS:
                raise ImageError(f'the archive has more than {MOST_RECORDS} pax records for one file')
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
