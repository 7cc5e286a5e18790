"""Packages of Python and npm, for an index of the test's own: made here, or fetched once into a cache."""

import fcntl
import io
import json
import os
import re
import subprocess
import tarfile
import tempfile
import zipfile

from tests import packages

CACHE = packages.CACHE.parent


def wheel(name, version, files, more=''):
    """(its file name, a wheel) with {path: text}; `more` is lines of its metadata."""
    info = f'{name}-{version}.dist-info'
    files = files | {
        f'{info}/METADATA': f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{more}',
        f'{info}/WHEEL': 'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n',
    }
    files[f'{info}/RECORD'] = ''.join(f'{each},,\n' for each in [*files, f'{info}/RECORD'])
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w') as pack:
        for path, text in files.items():
            pack.writestr(path, text)
    return f'{name}-{version}-py3-none-any.whl', out.getvalue()


def npm_package(name, version, script):
    """The .tgz of a package with one script."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w:gz') as tar:
        for path, text in {'package.json': json.dumps({'name': name, 'version': version}), 'index.js': script}.items():
            info = tarfile.TarInfo(f'package/{path}')
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
    return out.getvalue()


def fetched(name, command):
    """The folder into which the command, run there, has put packages: once, then it is kept. Raises RuntimeError."""
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = CACHE / name
    with open(CACHE / f'.{name}.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=CACHE) as work:
                os.mkdir(f'{work}/new')
                done = subprocess.run(command, cwd=f'{work}/new', capture_output=True, text=True, timeout=300)
                if done.returncode:
                    raise RuntimeError(f'{name} cannot be had: {done.stderr.strip()[-200:]}')
                os.rename(f'{work}/new', folder)
    return folder


def put_in_index(folder, top):
    """Offer the wheels in the folder in an index of Python packages at `top`/simple."""
    for path in folder.glob('*.whl'):
        place = top / 'simple' / re.sub(r'[-_.]+', '-', path.name.split('-')[0]).lower()
        place.mkdir(parents=True, exist_ok=True)
        (place / path.name).write_bytes(path.read_bytes())
        with open(place / 'index.html', 'a') as file:
            file.write(f'<a href="{path.name}">{path.name}</a>\n')
