"""This machine's programs as layers of images: a program, the libraries and the loader that it needs, trees.

    base = programs.Files().program('/usr/bin/node')
    app = programs.Files().put('/app/server.js', 'require("http")…')
    images.image([base.layer(), app.layer()], {'Cmd': ['node', '/app/server.js']})

What is not installed here comes from Debian's packages (see tests.packages); nothing is installed.
"""

import fcntl
import functools
import io
import os
import pathlib
import re
import shutil
import subprocess
import tarfile
import tempfile
import unittest

from tests import images, packages

FOLDERS = pathlib.Path('/var/cache/faasd-test/folders')
PATH = '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/usr/local/go/bin'
ACCOUNTS = """root:x:0:0:root:/root:/bin/sh
www-data:x:33:33:www-data:/var/www:/usr/sbin/nologin
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
GROUPS = 'root:x:0:\nwww-data:x:33:\nnogroup:x:65534:\n'


@functools.cache
def unpacked(package):
    """A folder with the package, and with those it needs that are not installed here; their Python is compiled.

    Raises SkipTest when it cannot be had.
    """
    try:
        tars = packages.tars(package)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise unittest.SkipTest(str(error)) from error
    FOLDERS.mkdir(parents=True, exist_ok=True)
    folder = FOLDERS / package
    with open(FOLDERS / '.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=FOLDERS) as work:
                new = f'{work}/new'
                os.mkdir(new, 0o755)
                for tar in tars:
                    subprocess.run(['tar', '-C', new, '-xf', tar], check=True)
                if os.path.isdir(python := f'{new}/usr/lib/python3'):
                    how = ['-m', 'compileall', '-q', '--invalidation-mode=unchecked-hash', '-s', new, '-p', '/']
                    subprocess.run(['/usr/bin/python3', '-I', '-S', *how, python])
                os.rename(new, folder)
    return folder


@functools.cache
def needed(package):
    """The installed packages of Python code that it needs."""
    command = ['apt-cache', 'depends', '--recurse', '--important', package]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = re.findall(r'^(python3-[\w.+-]+)$', said, re.M)
    status = ['dpkg-query', '--show', '--showformat', '${Status} ${Package}\n', *names]
    said = subprocess.run(status, capture_output=True, text=True).stdout if names else ''
    return re.findall(r'^install ok installed (\S+)$', said, re.M)


def find(program):
    """The path of a program of this machine. Raises SkipTest."""
    path = shutil.which(program, path=PATH) or shutil.which(program)
    if path is None:
        raise unittest.SkipTest(f'there is no {program} here')
    return path


TOP = [name for name in ('bin', 'sbin', 'lib', 'lib64') if os.path.islink(f'/{name}')]  # loaders are at /lib64


class Files:
    """The files of one layer. The methods that add to them return it."""

    def __init__(self):
        self._members = {}  # path without the first / → (path on this machine or content, mode)
        for name in TOP:
            self._members[name] = os.readlink(f'/{name}'), None

    def _add(self, path, content, mode):
        name, _, rest = os.path.normpath(path).strip('/').partition('/')
        if name not in TOP:
            self._members['/'.join(filter(None, (name, rest)))] = content, mode
        elif rest:
            self._members[f'{os.readlink(f"/{name}")}/{rest}'] = content, mode
        return self

    def put(self, path, content, mode=0o644):
        """A file with that text or bytes."""
        return self._add(path, content.encode() if isinstance(content, str) else content, mode)

    def folder(self, *paths, mode=0o755):
        for path in paths:
            self._add(path, None, mode)
        return self

    def link(self, path, target):
        return self._add(path, target, None)

    def copy(self, path, to=None):
        """A file of this machine; where it is a link, what that leads to."""
        to = to or os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
        return self._add(to, pathlib.Path(os.path.realpath(path)), None)

    def program(self, path, within=''):
        """A program of this machine, or of the folder `within` that packages were unpacked to, with its libraries."""
        self.copy(f'{within}{path}', path)
        for each in libraries(f'{within}{path}', within=within):
            self.copy(each, each.removeprefix(str(within)))
        return self

    def tree(self, folder, to=None, without=()):
        """A folder of this machine; `without` are names that are left out, wherever they are."""
        objects = []
        for where, folders, names in os.walk(folder, followlinks=True):
            folders[:] = sorted(set(folders) - set(without))
            place = os.path.normpath(os.path.join(to or folder, os.path.relpath(where, folder)))
            if place != '/':
                self.folder(place)
            for name in sorted(set(names) - set(without)):
                path = os.path.join(where, name)
                if os.path.isfile(path):
                    self.copy(path, os.path.join(place, name))
                    objects += [path] if '.so' in name else []
        for path in libraries(*objects):
            self.copy(path)
        return self

    def package(self, *names):
        """What Debian's packages hold, and what they need that is not installed here, but for the documentation."""
        for name in names:
            folder = str(unpacked(name))
            self.tree(folder, '/', without=('doc', 'man', 'lintian', 'doc-base', 'locale'))
            for each in needed(name):
                listed = subprocess.run(['dpkg', '-L', each], capture_output=True, text=True, check=True).stdout
                for path in listed.splitlines():
                    if '/dist-packages/' in path and os.path.isfile(path):
                        self.copy(path)
        return self

    def accounts(self):
        """What every distribution's image has: accounts, /tmp, a home."""
        self.put('/etc/passwd', ACCOUNTS).put('/etc/group', GROUPS).put('/etc/nsswitch.conf', 'passwd: files\n')
        return self.folder('/root', mode=0o700).folder('/run', '/var/log', '/var/www').folder('/tmp', mode=0o1777)

    def layer(self):
        """It as images.image() takes it, in memory."""
        out = io.BytesIO()
        self._write(out)
        return out.getvalue()

    def shared(self):
        """It as a layer for several images, in a file, until forget()."""
        layer = images.Layer(self._write, None)
        _files.append(layer.file)
        return layer

    def _write(self, out):
        with tarfile.open(fileobj=out, mode='w|', format=tarfile.PAX_FORMAT) as tar:
            for name, (content, mode) in self._whole().items():
                if isinstance(content, pathlib.Path):
                    status = content.stat()
                    info, _ = images.member(name, b'', mtime=int(status.st_mtime), size=status.st_size)
                    info.mode = 0o755 if status.st_mode & 0o111 else 0o644
                    with open(content, 'rb') as file:
                        tar.addfile(info, file)
                else:
                    info, data = images.member(name, content, **({} if mode is None else {'mode': mode}))
                    tar.addfile(info, io.BytesIO(data))

    def _whole(self):
        """The members with the folders above them, by name."""
        found = {}
        for name in self._members:
            for above in reversed(pathlib.PurePosixPath(name).parents):
                if str(above) != '.':
                    found.setdefault(str(above), (None, 0o755))
        return dict(sorted((found | self._members).items()))


def libraries(*paths, within=''):
    """The shared libraries and loaders that these programs and libraries need, of `within` first."""
    if not paths:
        return []
    places = ':'.join(map(str, pathlib.Path(within).glob('**/lib/*-linux-gnu'))) if within else ''
    environment = {**os.environ, **({'LD_LIBRARY_PATH': places} if places else {})}
    said = subprocess.run(['ldd', *paths], capture_output=True, text=True, env=environment).stdout
    return sorted(set(re.findall(r'^\s+(?:\S+ => )?(/\S+) \(0x', said, re.M)))


# Layers that several images have in common

_files = []


def forget():
    """Let go of the layers that are shared."""
    for each in (python, node, busybox, java, nginx):
        each.cache_clear()
    while _files:
        _files.pop().close()


@functools.cache
def python():
    """Debian's Python as a layer."""
    without = (
        *('config-3.11-x86_64-linux-gnu', 'distutils', 'ensurepip', 'idlelib', 'lib2to3', 'pydoc_data', 'test'),
        *('tests', 'tkinter', 'turtledemo', 'venv', 'sitecustomize.py'),
    )
    version = os.path.realpath('/usr/bin/python3')
    files = Files().program(version).link('/usr/bin/python3', os.path.basename(version)).accounts()
    return files.tree(f'/usr/lib/{os.path.basename(version)}', without=without).shared()


@functools.cache
def node():
    path = os.path.realpath(shutil.which('node', path=PATH) or '/')
    within = '' if path.startswith('/usr/bin/') else unpacked('nodejs')
    files = Files().program(path if within == '' else '/usr/bin/node', within=within)
    if os.path.isdir(builtin := f'{within}/usr/share/nodejs'):      # Debian's node loads parts of itself from there
        files.tree(builtin, '/usr/share/nodejs')
    return files.accounts().shared()


def static_busybox():
    """The path of a busybox that needs no library, this machine's or an unpacked one. Raises SkipTest."""
    path = shutil.which('busybox', path=PATH)
    if path is None or libraries(path):
        path = next(unpacked('busybox-static').glob('**/bin/busybox'))
    return pathlib.Path(path)


@functools.cache
def busybox():
    """A busybox that needs no library, and a shell."""
    return Files().copy(str(static_busybox()), '/usr/bin/busybox').link('/usr/bin/sh', 'busybox').accounts().shared()


@functools.cache
def nginx():
    """nginx as Debian's packages and their scripts leave it, its logs as in the image of nginx's makers."""
    folder, common = unpacked('nginx'), unpacked('nginx-common')
    files = Files().program('/usr/sbin/nginx', within=folder).accounts()
    files.tree(f'{common}/etc/nginx', '/etc/nginx')
    files.link('/etc/nginx/sites-enabled/default', '/etc/nginx/sites-available/default')
    files.put('/var/www/html/index.nginx-debian.html', '<h1>Welcome to nginx!</h1>\n')
    files.folder('/usr/share/nginx', '/var/lib/nginx', '/var/cache/nginx', '/var/log/nginx')
    files.link('/var/log/nginx/access.log', '/dev/stdout').link('/var/log/nginx/error.log', '/dev/stderr')
    return files.shared()


@functools.cache
def java():
    """Java without its compiler."""
    home = java_home()
    files = Files().program(f'{home}/bin/java').link('/usr/bin/java', f'{home}/bin/java').accounts()
    return files.tree(f'{home}/conf').tree(f'{home}/lib', without=('src.zip', 'ct.sym', 'jfr')).shared()


def java_home():
    return os.path.dirname(os.path.dirname(os.path.realpath(find('java'))))


def compiled_java(name, source):
    """{file: bytes} of the classes in NAME.java. Raises SkipTest where there is no compiler."""
    compiler = f'{java_home()}/bin/javac'
    if not os.path.exists(compiler):
        raise unittest.SkipTest('there is a java here, but no javac beside it')
    with tempfile.TemporaryDirectory() as work:
        pathlib.Path(work, f'{name}.java').write_text(source)
        subprocess.run([compiler, f'{name}.java'], cwd=work, check=True)
        return {each.name: each.read_bytes() for each in pathlib.Path(work).glob('*.class')}


def compiled_go(folder, out):
    """Build the static program `out` of main.go in `folder`. Raises SkipTest without a Go."""
    environment = {
        **{'HOME': os.path.expanduser('~'), **os.environ},
        **{'CGO_ENABLED': '0', 'GOFLAGS': '', 'GOTOOLCHAIN': 'local'},
    }
    command = [find('go'), 'build', '-ldflags=-s -w', '-o', out, 'main.go']
    subprocess.run(command, cwd=folder, env=environment, check=True)
