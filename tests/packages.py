"""Programs that are not installed here, from Debian's packages: fetched once into a cache, unpacked in a host.

Nothing is installed on this machine, and no script of a package runs.
"""
import fcntl
import os
import pathlib
import subprocess
import tempfile

CACHE = pathlib.Path('/var/cache/faasd-test/tars')            # not packages: folders of older tests are there


def tars(package):
    """Tar files with what is in this package, and in those it needs that are not installed here.

    Raises RuntimeError when it cannot be had.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = CACHE / package
    with open(CACHE / '.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)                # whoever comes second finds it there
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as work:
                fetch(package, f'{work}/debs')
                os.mkdir(f'{work}/tars')
                for deb in pathlib.Path(work, 'debs').glob('*.deb'):
                    with open(f'{work}/tars/{deb.name}.tar', 'wb') as tar:
                        subprocess.run(['dpkg-deb', '--fsys-tarfile', deb], stdout=tar, check=True)
                os.rename(f'{work}/tars', folder)
    return sorted(folder.iterdir())


def fetch(package, folder):
    os.makedirs(f'{folder}/partial')
    command = ['apt-get', 'install', '-y', '--download-only', '--reinstall', '--no-install-recommends',
               '-o', f'Dir::Cache::archives={folder}', '-o', 'Debug::NoLocking=1', package]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:                                 # the lists may be older than what the mirror still has
        subprocess.run(['apt-get', 'update'], capture_output=True, timeout=120)
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode:
        raise RuntimeError(f'the package {package} cannot be had: {done.stderr.strip()[-200:]}')


def put(host, *packages):
    """Unpack packages into a host; the links that it has in place of folders (/lib) stay."""
    for tar in [tar for package in packages for tar in tars(package)]:
        with open(tar, 'rb') as file:
            unpack = host.popen(['tar', '-C', '/', '-x', '--keep-directory-symlink'], stdin=file)
        if unpack.wait(60):
            raise RuntimeError(f'{tar} cannot be unpacked')
    host.run(['ldconfig'])
