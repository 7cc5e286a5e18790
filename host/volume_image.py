"""File systems in files: ext4 images on loop devices. A device goes with its last mount.

The lock of an image (flock) belongs to the device that has it: an image is never on two devices, whoever made them.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import time
from collections.abc import Iterator

from host import process
from host.errors import FaasError

BLOCK = 4096  # bytes: of the file system, and of the loop device for direct I/O
GOING_S = 1  # how long the device of one that is mounted no more may take to go
SETTLE_S = 10  # how long a device may take to come or to go
MAKE_S = 300

# linux/loop.h, linux/fs.h, ext4
LOOP_CTL_GET_FREE, LOOP_CONFIGURE, LOOP_GET_STATUS64, LOOP_SET_CAPACITY = 0x4C82, 0x4C0A, 0x4C05, 0x4C07
LO_FLAGS_AUTOCLEAR, LO_FLAGS_DIRECT_IO = 4, 16
INFO = '5Q4I64s64s32s2Q'  # struct loop_info64
FICLONE, FIFREEZE, FITHAW = 0x40049409, 0xC0045877, 0xC0045878
EXT4_IOC_RESIZE_FS = 0x40086610
MS_NOSUID, MS_NODEV, MS_NOATIME = 2, 4, 1024
FLAGS = MS_NOSUID | MS_NODEV | MS_NOATIME

libc = ctypes.CDLL(None, use_errno=True)


class NoLoopDevices(FaasError):
    """This server cannot mount file systems in files."""

    status = 503

    def __init__(self) -> None:
        super().__init__(
            'this server has no loop devices, which volumes need',
            'modprobe loop; a container needs /dev/loop-control and /dev/loop*',
        )


class InUse(FaasError):
    """The image is on a loop device."""

    status = 409


def make(path: str, size: int) -> None:
    """Make a file system of `size` bytes in the empty file `path`. Its room on the disk is taken now.

    A sparse file would fail the function when the server's disk is full, and is slower: each first write to a block
    changes the file's own tables, too. Raises FaasError, OSError.
    """
    allocate(path, size)
    # The journal is written now, not when it is first used: that would be slow as well.
    options = 'nodiscard,lazy_itable_init=0,lazy_journal_init=0,root_owner=0:0'
    form = ['-q', '-F', '-m', '0', '-b', str(BLOCK), '-e', 'remount-ro', '-E', options]
    process.run(['mkfs.ext4', *form, path], timeout_s=MAKE_S)


def allocate(path: str, size: int) -> None:
    """Give the file `size` bytes of the disk. Raises FaasError when it has less."""
    with open(path, 'r+b') as file:
        before = os.fstat(file.fileno()).st_size
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            os.ftruncate(file.fileno(), before)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            room = os.statvfs(path)
            free = room.f_bavail * room.f_frsize >> 20
            raise FaasError(
                f'the disk of the server has no room for {size >> 20} MiB: {free} are free',
                'ask for a smaller size, or remove volumes that nobody needs: faas volume list',
            ) from error
        os.fsync(file.fileno())


@contextlib.contextmanager
def locked(path: str, within_s: float = GOING_S) -> Iterator[None]:
    """No device gets the image meanwhile. Raises InUse when one has it after `within_s`, FileNotFoundError."""
    fd, deadline = os.open(path, os.O_RDWR | os.O_CLOEXEC), time.monotonic() + within_s
    try:
        while not _lock(fd):
            if time.monotonic() > deadline:
                raise InUse(f'{os.path.basename(path)} is mounted')
            time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def _lock(fd):
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False


@contextlib.contextmanager
def attached(path: str) -> Iterator[str]:
    """The loop device that has the image; it is there until the context ends, and as long as it is mounted.

    Raises NoLoopDevices, FileNotFoundError, OSError.
    """
    deadline = time.monotonic() + SETTLE_S
    while (found := _attach(path) or _find(path)) is None:
        if time.monotonic() > deadline:
            raise InUse(f'{os.path.basename(path)} is in use, and not by a loop device')
        time.sleep(0.01)  # a device with it is coming, or going
    fd, name = found
    try:
        yield name
    finally:
        os.close(fd)


def _attach(path):
    """(descriptor, name) of a new device. None: another has the image."""
    image = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        while _lock(image):
            control = _open('/dev/loop-control')
            try:
                name = f'/dev/loop{fcntl.ioctl(control, LOOP_CTL_GET_FREE)}'
            finally:
                os.close(control)
            device = _open(name)
            flags = LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO
            info = struct.pack(INFO, 0, 0, 0, 0, 0, 0, 0, 0, flags, os.fsencode(path)[-63:], b'', b'', 0, 0)
            try:
                fcntl.ioctl(device, LOOP_CONFIGURE, struct.pack('2I', image, BLOCK) + info + bytes(64))
                return device, name
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:  # somebody else was faster
                    raise
        return None
    finally:
        os.close(image)  # the device has it, and the lock


def _open(name):
    try:
        return os.open(name, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.EPERM, errno.EACCES):
            raise NoLoopDevices from error
        raise


def _find(path):
    """(descriptor, name) of the device that has the image. None: there is none."""
    wanted = os.stat(path)
    for entry in os.listdir('/sys/block'):
        if not entry.startswith('loop') or not os.path.exists(f'/sys/block/{entry}/loop'):
            continue
        with contextlib.suppress(OSError):
            device = os.open(f'/dev/{entry}', os.O_RDWR | os.O_CLOEXEC)
            try:
                status = fcntl.ioctl(device, LOOP_GET_STATUS64, bytes(struct.calcsize(INFO)))
                number, inode = struct.unpack_from('2Q', status)
                if (number, inode) == (in_kernel(wanted.st_dev), wanted.st_ino):
                    device, found = None, device
                    return found, f'/dev/{entry}'
            finally:
                if device is not None:
                    os.close(device)
    return None


def in_kernel(device: int) -> int:
    """The number of a device as the kernel writes it into lo_device; the C library's is another."""
    major, minor = os.major(device), os.minor(device)
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


def mount(path: str, where: str) -> None:
    """Mount the image at the folder `where`, in the mount namespace of this thread. Raises as attached() does."""
    with attached(path) as device:
        if libc.mount(device.encode(), os.fsencode(where), b'ext4', FLAGS, None):
            number = ctypes.get_errno()
            raise OSError(number, f'mount of {path}: {os.strerror(number)}')


def thaw(where: str) -> bool:
    """Let writes to the file system go on; False if they did."""
    with _folder(where) as fd:
        try:
            fcntl.ioctl(fd, FITHAW)
            return True
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return False


@contextlib.contextmanager
def frozen(where: str) -> Iterator[None]:
    """What the file system holds is on the disk, and nobody changes it. Raises OSError."""
    with _folder(where) as fd:
        fcntl.ioctl(fd, FIFREEZE)
        try:
            yield
        finally:
            fcntl.ioctl(fd, FITHAW)


def copy(path: str, target: str) -> bool:
    """Give the empty file `target` the content of an image; True if they share it, by a reflink.

    Raises FaasError, OSError.
    """
    with open(path, 'rb') as old, open(target, 'r+b') as new:
        with contextlib.suppress(OSError):
            fcntl.ioctl(new, FICLONE, old.fileno())
            return True
        size = os.fstat(old.fileno()).st_size
        allocate(target, size)
        end = 0
        while end < size:
            try:
                start = os.lseek(old.fileno(), end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # no more data
                    break
                raise
            end = os.lseek(old.fileno(), start, os.SEEK_HOLE)
            while start < end:
                start += os.copy_file_range(old.fileno(), new.fileno(), end - start, start, start) or end
    return False


def grow(path: str, size: int, where: str) -> None:
    """Make the file system larger, also while it is used. It is mounted at `where`. Raises FaasError, OSError."""
    former = os.stat(path).st_size
    with attached(path) as device, _folder(where) as fd:
        opened = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            allocate(path, size)
            fcntl.ioctl(opened, LOOP_SET_CAPACITY)
            fcntl.ioctl(fd, EXT4_IOC_RESIZE_FS, struct.pack('Q', size // BLOCK))
        except PermissionError:  # nothing has changed. After another error a part may be larger
            os.truncate(path, former)
            fcntl.ioctl(opened, LOOP_SET_CAPACITY)
            raise
        finally:
            os.close(opened)


@contextlib.contextmanager
def _folder(where):
    fd = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)
