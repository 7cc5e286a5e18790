"""Bytes of an archive in order: read from a file, unpacked from gzip or zstd, digested."""

import contextlib
import hashlib
import os
import queue
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from host.errors import FaasError

CHUNK, SMALL_CHUNK = 1 << 20, 1 << 14
MOST_GZIP_MEMBERS = 1_000_000  # eStargz has one for each file
MOST_ZSTD_FRAMES = 250_000  # zstd:chunked has one for each file; zstd takes 20 µs for an empty one
ZSTD_MAGICS = b'\x28\xb5\x2f\xfd', b'\x2a\x4d\x18'  # of a frame, and of one that is skipped

StartZstd = Callable[[], tuple[int, int, int]]  # the input, output and errors of a `zstd -dc` that was started


class ImageError(FaasError):
    """The archive cannot become a function."""

    status = 400


def show(name: bytes | str) -> str:
    """A name from an archive, quoted and cut for a line of text."""
    name = os.fsdecode(name)
    return repr(name if len(name) <= 120 else f'{name[:60]}…{name[-59:]}')


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
    unpacker, count, most = zlib.decompressobj(31), 1, CHUNK
    try:
        for chunk in chunks:
            at = 0
            while at < len(chunk):
                fed = chunk[at : at + most]
                if unpacker.eof:
                    at += len(fed) - len(fed.lstrip(b'\0'))  # padding of tapes and such
                    fed = fed.lstrip(b'\0')
                    if not fed:
                        continue
                    unpacker, count = zlib.decompressobj(31), count + 1
                    if count > MOST_GZIP_MEMBERS:
                        raise ImageError(f'the gzip data has more than {MOST_GZIP_MEMBERS} members')
                if data := unpacker.decompress(fed, CHUNK):
                    yield data
                at += len(fed) - len(unpacker.unconsumed_tail or unpacker.unused_data)
                # zlib copies what it is fed and does not use: members may be tiny.
                most = SMALL_CHUNK if unpacker.eof else min(2 * most, CHUNK)
        if data := unpacker.flush():
            yield data
    except zlib.error as error:
        raise ImageError(f'the gzip data is damaged: {error}', 'send it again') from error
    if not unpacker.eof:
        raise ImageError('the gzip data ends early', 'send it again')


def unzstd(chunks: Iterable[bytes], start: StartZstd) -> Iterator[bytes]:
    """The content of zstd frames, in chunks. Raises ImageError."""
    into, out, errors = start()
    frames = 0

    def feed():
        nonlocal frames
        with contextlib.suppress(BrokenPipeError), open(into, 'wb', buffering=0) as file:
            for chunk in chunks:
                frames += sum(map(chunk.count, ZSTD_MAGICS))
                if frames > MOST_ZSTD_FRAMES:
                    return
                view = memoryview(chunk)
                while view:
                    view = view[file.write(view) :]

    threading.Thread(target=feed, daemon=True).start()
    with open(out, 'rb', buffering=0) as file, open(errors, 'rb', buffering=0) as complaints:
        while data := file.read(CHUNK):
            yield data
        if frames > MOST_ZSTD_FRAMES:
            raise ImageError(f'the zstd data has more than {MOST_ZSTD_FRAMES} frames', 'pack it with fewer')
        if lines := complaints.read(4096).decode(errors='replace').split('\n')[0]:
            if 'not installed' in lines:
                raise ImageError(
                    'the archive is packed with zstd, which is not installed here', 'on the server: install zstd'
                )
            if 'premature end' in lines:
                raise ImageError('the zstd data ends early', 'send it again')
            raise ImageError(f'the zstd data is damaged: {lines!r}', 'send it again')
