"""Programs that are not installed here, from Debian's packages: unpacked once into a cache, then into a host.

Nothing is installed on this machine, and no script of a package runs.
"""
import fcntl
import os
import pathlib
import subprocess
import tempfile
import unittest

CACHE = pathlib.Path('/var/cache/faasd-test/packages')
# The directories and links that the host has stay as they are (/sbin is a link on most).
COPY = 'tar -C "$1" -c . | tar -C / -x --keep-directory-symlink --no-overwrite-dir'


def unpacked(package):
    """The folder of an unpacked package. Raises SkipTest when it cannot be had."""
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = CACHE / package
    with open(CACHE / '.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as work:
                try:
                    subprocess.run(['apt-get', 'download', package], cwd=work, check=True, timeout=120, text=True,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
                    archive, = pathlib.Path(work).glob('*.deb')
                    subprocess.run(['dpkg-deb', '-x', archive, f'{work}/tree'], check=True)
                except (OSError, ValueError, subprocess.SubprocessError) as error:
                    said = (getattr(error, 'stderr', None) or str(error)).strip().splitlines()
                    raise unittest.SkipTest(f'the package {package} cannot be had: {said[-1]}') from None
                os.rename(f'{work}/tree', folder)
    return folder


def put(host, *packages):
    """Unpack packages into a host, as far as their files go: no script of theirs runs."""
    for package in packages:
        host.run(['sh', '-c', COPY, 'sh', unpacked(package)])
    host.run(['ldconfig'])
