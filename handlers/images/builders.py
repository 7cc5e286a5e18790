"""What a folder needs built, by the files in it: packages of pip and npm, a Go program, a command of its own."""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import subprocess
import tomllib
from typing import NamedTuple

from handlers.images.folder import PROGRAM
from handlers.images.spec import Spec
from host import process
from host.errors import FaasError

PATH = '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/go/bin:/usr/lib/go/bin'
PYTHON = '.faas/python'  # where packages are in a folder
NOTHING = 'none'  # the value of `build` for a folder that brings all it needs
MOST_FILE = 8 << 20  # bytes of a file that is read here, such as a package-lock.json
MOST_PLAIN = 1 << 20  # bytes of one that is parsed
PLAIN_REQUIREMENT = re.compile(
    r'(#.*|--hash[= ].*|(-i|--index-url|--extra-index-url)[= ]https?://\S+|--no-binary.*|--only-binary.*'
    r'|[A-Za-z0-9][\w.-]*\s*(\[[\w., -]*\])?\s*([<>=!~;(#\\].*)?)?',
    re.ASCII,
)
PIP = (
    '/usr/bin/python3 -I -m pip install --disable-pip-version-check --no-input --no-warn-script-location'
    f' --progress-bar=off --target={PYTHON}'
)
INSTALL = {'pip': 'python3-pip', 'npm': 'npm', 'go': 'golang-go'}  # the packages of Debian and Ubuntu
NEEDED_BY = {'pip': 'requirements.txt or pyproject.toml', 'npm': 'package.json', 'go': 'go.mod'}


class CannotBuild(FaasError):
    """A folder cannot be built, or not here."""

    status = 422


class Plan(NamedTuple):
    """A build: `lines` for the shell in the folder, the `programs` that the server needs, what the build makes.

    `results` are files or folders in the folder, None all of it. `key` is the same for the same input, and `spec` says
    how the built folder is started.
    """

    lines: tuple[str, ...]
    programs: tuple[str, ...]
    results: tuple[str, ...] | None
    key: str
    spec: Spec


def plan(tree: str, spec: Spec) -> Plan | None:
    """The build of the folder `tree`, None when it needs none. Nothing in it may change meanwhile.

    Raises CannotBuild, OSError.
    """
    command = spec.settings.get('build')
    if command == NOTHING or spec.kind == 'image':
        return None
    lines, programs, results, inputs = [], [], [], {'faas.toml'}
    for look in (_pip, _npm, _go):
        if found := look(tree, spec):
            line, program, result, read = found
            if program == 'go' and command:
                continue
            lines.append(line)
            programs.append(program)
            results.append(result)
            inputs = inputs and read and inputs | read  # None: all of the folder
    if command:
        lines.append(command)
        results = inputs = None
    if not lines:
        return None
    env = {name: text for name, text in spec.settings.get('env', {}).items() if isinstance(text, str)}
    stamps = [_stamp(program) for program in programs]
    digest = hashlib.sha256(json.dumps([lines, results, sorted(env.items()), stamps]).encode())
    for name in sorted(inputs - {'faas.toml'}) if inputs is not None else ():
        digest.update(json.dumps([name, _read(tree, name, MOST_FILE)]).encode())
    if inputs is None:
        digest.update(_digest(tree).encode())
    return Plan(tuple(lines), tuple(programs), results and tuple(results), digest.hexdigest(), built(spec, programs))


def built(spec: Spec, programs: list[str]) -> Spec:
    """The Spec of a folder in which these have built."""
    own = spec.settings.get('env', {})
    env = {}
    if 'pip' in programs:
        theirs = own.get('PYTHONPATH')
        env['PYTHONPATH'] = ':'.join(filter(None, (theirs if isinstance(theirs, str) else None, f'/function/{PYTHON}')))
    path = own.get('PATH') if isinstance(own.get('PATH'), str) else '/usr/local/bin:/usr/bin:/bin'
    first = [f'/function/{PYTHON}/bin'] * ('pip' in programs) + ['/function/node_modules/.bin'] * ('npm' in programs)
    if first:
        env['PATH'] = ':'.join([*first, path])
    settings = spec.settings
    if changed := {name: text for name, text in env.items() if name in own}:
        settings = settings | {'env': own | changed}
    return spec._replace(env=spec.env | env, settings=settings)


def lacking(programs: tuple[str, ...]) -> CannotBuild | None:
    """The error if this server lacks one of these programs."""
    for program in programs:
        if not _is_there(program):
            return CannotBuild(
                f'the server has no {program}, which {NEEDED_BY[program]} needs',
                f'install it there: apt install {INSTALL[program]}; or bring what it makes, and say build = "none" in '
                'faas.toml',
            )
    return None


def _is_there(program):
    if program != 'pip':
        return shutil.which(program, path=PATH) is not None
    return not process.run(['/usr/bin/python3', '-I', '-c', 'import pip'], ok=range(256)).returncode


def _stamp(program):
    """What is another after an upgrade of the program on this server."""
    found = '/usr/bin/python3' if program == 'pip' else shutil.which(program, path=PATH)
    if not found:
        return program
    path = os.path.realpath(found)
    info = os.stat(path)
    return [path, info.st_size, info.st_mtime_ns]


# Each of these: (line of the shell, program, what it makes, the files that it reads or None for all), or None


def _pip(tree, spec):
    text = _read(tree, 'requirements.txt')
    if text is not None:
        lines = [line.strip() for line in text.splitlines()]
        if not any(line and not line.startswith('#') for line in lines):
            return None
        plain = all(map(PLAIN_REQUIREMENT.fullmatch, lines))
        return f'{PIP} -r requirements.txt', 'pip', PYTHON, {'requirements.txt'} if plain else None
    if (text := _read(tree, 'pyproject.toml')) is None:
        return None
    try:
        project = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise CannotBuild(f'pyproject.toml is not TOML: {" ".join(str(error).split())[:200]}') from error
    return (f'{PIP} .', 'pip', PYTHON, None) if {'project', 'build-system'} & project.keys() else None


def _npm(tree, spec):
    text = _read(tree, 'package.json')
    if text is None or os.path.lexists(os.path.join(tree, 'node_modules')):
        return None
    package = read_package(text)
    depends = [package.get(key) for key in ('dependencies', 'optionalDependencies', 'devDependencies', 'workspaces')]
    if not any(depends):
        return None
    locks = [name for name in ('npm-shrinkwrap.json', 'package-lock.json') if _read(tree, name, MOST_FILE) is not None]
    dev = '' if 'build' in spec.settings else ' --omit=dev'
    line = f'npm {"ci" if locks else "install --no-package-lock"}{dev} --no-audit --no-fund --no-update-notifier'
    scripts = package.get('scripts')
    runs = isinstance(scripts, dict) and scripts.keys() & {'preinstall', 'install', 'postinstall', 'prepare'}
    here = any('file:' in str(each) or 'link:' in str(each) for each in depends) or package.get('workspaces')
    return line, 'npm', 'node_modules', None if runs or here else {'package.json', '.npmrc', *locks}


def _go(tree, spec):
    if _read(tree, 'go.mod') is None:
        return None
    target = os.path.normpath(spec.args[0]) if spec.args else PROGRAM
    if '/' not in (spec.args or (f'./{PROGRAM}',))[0] or target.startswith(('/', '..')):
        return None  # its command is a program of the server
    if os.path.lexists(os.path.join(tree, target)) and target != PROGRAM:
        return None  # it was built elsewhere
    return f'go build -o {_quoted(target)} .', 'go', target, None


def _quoted(text):
    return "'" + text.replace("'", "'\\''") + "'"


def read_package(text: str) -> dict:
    """The object in a package.json. Raises CannotBuild."""
    try:
        package = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CannotBuild('package.json is not JSON') from error
    if not isinstance(package, dict):
        raise CannotBuild('package.json is not an object')
    return package


def _read(tree, name, most=MOST_PLAIN):
    """The text of a file at the top of the folder, None without one. Raises CannotBuild."""
    try:
        fd = os.open(os.path.join(tree, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise CannotBuild(f'{name} is a link', 'put the file there') from error
    with open(fd, 'rb') as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        data = file.read(most + 1)
    if len(data) > most:
        raise CannotBuild(f'{name} has more than {most} bytes')
    return data.decode(errors='replace')


def _digest(tree):
    """Of all files of the folder, but what is compiled of them anew each time."""
    pack = ['tar', '-C', tree, '--sort=name', '--mtime=@0', '--owner=0', '--group=0', '--exclude=__pycache__']
    with process.popen([*pack, '-cf', '-', '.'], stdout=subprocess.PIPE) as tar:
        digest = hashlib.file_digest(tar.stdout, 'sha256').hexdigest()
    if tar.returncode:
        raise OSError(errno.EIO, 'the folder cannot be read')
    return digest
