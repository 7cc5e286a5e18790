"""The folder of a function: unpacks it from a tar, and reads from faas.toml, Procfile or handler.py how it starts."""

import contextlib
import json
import os
import pathlib
import py_compile
import re
import resource
import tomllib
from collections.abc import Callable

from handlers.images import wants
from handlers.images.streams import ImageError, Reader, Section, SectionReader, show
from handlers.images.tar import Member, members

COMPILE_S, COMPILE_BYTES_A_SECOND = 3, 50_000  # of one processor; it takes a tenth of that
FOLDER_ENTRIES, FOLDER_DEPTH = 20_000, 32
PROGRAM = '.faas/program'  # what go build makes for a folder without a command
MOST_SETTINGS = 16 << 10  # bytes of a faas.toml or a Procfile: tomllib takes time by the square of a key's length


def check_inside(path: str, name: str) -> None:
    """Raise ImageError unless the text of `path` stays in the folder."""
    found = os.path.normpath(path).split('/')
    if os.path.isabs(path) or found[0] == '..' or len(found) > FOLDER_DEPTH or '\0' in path:
        raise ImageError(f'{show(name)} leads out of the folder, or too deep into it', FOLDER_HINT)


FOLDER_HINT = 'send a tar of the folder that holds handler.py, faas.toml or a Procfile'
ENTRY_HINT = 'put a handler.py, a faas.toml with `command = […]` or a Procfile into it'
ALMOST = {  # what a folder without an entry has instead, and what it needs then
    'Dockerfile': 'build the image and send that: docker save IMAGE | faas new NAME',
    'package.json': 'add a start script to it, or a faas.toml with the line: command = ["node", "server.js"]',
    'requirements.txt': 'add a handler.py, or a faas.toml with the line: command = ["python3", "server.py"]',
}


def fill_folder(reader: Reader) -> None:
    """Unpack a tar into the current folder: files, folders, and links that stay inside. Raises ImageError."""
    made = set()
    for member in members(reader):
        given = os.fsdecode(member.name)
        name = os.path.normpath(given)
        if name == '.' and member.kind == 'folder':
            continue
        check_inside(given, given)
        made.update((name, *map(str, pathlib.PurePath(name).parents)))
        if len(made) > FOLDER_ENTRIES:
            raise ImageError(f'more than {FOLDER_ENTRIES} files and folders', FOLDER_HINT)
        try:
            put_in_folder(name, member, reader)
        except FileExistsError as error:
            raise ImageError(f'{show(given)} exists already', FOLDER_HINT) from error


def put_in_folder(name: str, member: Member, reader: Reader) -> None:
    """Make one member of the tar as `name`. Raises ImageError, FileExistsError."""
    folder = os.path.dirname(name)
    if os.path.realpath(folder) != os.path.join('/', folder):  # else it may be deeper than the limit
        raise ImageError(f'{show(name)} goes through a link', FOLDER_HINT)
    os.makedirs(folder or '.', mode=0o755, exist_ok=True)
    if member.kind == 'folder':
        os.makedirs(name, mode=0o755, exist_ok=True)
    elif member.kind == 'symlink':
        link = os.fsdecode(member.link)
        if os.path.isabs(link):
            raise ImageError(f'{show(name)} links to {show(link)}, out of the folder', FOLDER_HINT)
        check_inside(os.path.join(folder, link), name)
        os.symlink(link, name)
    elif member.kind == 'file':
        fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o755 if member.mode & 0o111 else 0o644)
        try:
            reader.copy(member.size, fd)
        finally:
            os.close(fd)
    else:
        raise ImageError(f'{show(name)} is neither file, folder nor symbolic link', FOLDER_HINT)


def precompile(name: str) -> None:
    """Compile the Python files of the folder `name` here. Tracebacks show /function, where the container sees them.

    It takes no longer than their size allows: the compiler takes much longer for some files. What is not compiled then
    is compiled at each start.
    """
    os.chroot(name)
    os.chdir('/')
    os.umask(0o022)
    paths = [os.path.join(where, each) for where, _, names in os.walk('.') for each in names if each.endswith('.py')]
    most_s = COMPILE_S + sum(os.lstat(path).st_size for path in paths) // COMPILE_BYTES_A_SECOND
    resource.setrlimit(resource.RLIMIT_CPU, (most_s, most_s))
    for path in paths:
        with contextlib.suppress(Exception):  # running it reports the error better
            py_compile.compile(
                path,
                dfile=os.path.join('/function', os.path.relpath(path)),
                doraise=True,
                invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
            )


def do_folder(section: Section, name: str, count: Callable[[int], None]) -> dict:
    """Unpack a folder as `name` here and read its settings. Returns the fields of its spec. Raises ImageError.

    count() is told how many bytes that are, and raises ImageError when they are too many.
    """
    os.mkdir(name, 0o755)
    os.chroot(name)
    os.chdir('/')
    os.umask(0o022)
    count(section.size)
    fill_folder(SectionReader(section))
    return folder_spec()


def folder_spec() -> dict:
    """The fields of a spec.Spec, for the function in the current folder. Raises ImageError."""
    settings = faas_toml()
    command, warnings = settings.pop('command', None), []
    if command is None:
        command, warnings = procfile()
    if command is None and not os.path.isfile('handler.py'):
        command = built_program() or npm_start()
    if command is None and not os.path.isfile('handler.py'):
        seen = next(filter(os.path.isfile, ALMOST), None)
        raise ImageError(
            'there is no handler.py in the folder, no command in a faas.toml, and no Procfile',
            f'there is a {seen}: {ALMOST[seen]}' if seen else ENTRY_HINT,
        )
    return {
        'kind': 'command' if command else 'handler',
        'args': command or [],
        'cwd': '/function',
        'settings': settings,
        'warnings': warnings,
    }


def built_program() -> list[str] | None:
    """The command of a folder that has a Go program and no other command."""
    return [f'./{PROGRAM}'] if os.path.isfile('go.mod') else None


def npm_start() -> list[str] | None:
    """The command that `npm start` runs, None without one. Raises ImageError."""
    text = read_settings('package.json', 1 << 20)
    if text is None:
        return None
    try:
        package = json.loads(text)
        scripts = package.get('scripts') or {}
        start = scripts.get('start')
        if start is None:
            return ['node', 'server.js'] if os.path.isfile('server.js') else None
        if re.fullmatch(r'[\w@%+=:,./\s-]+', start, re.ASCII) and '=' not in start.split()[0]:
            return start.split()
        return ['sh', '-c', wants.text(r'[^\0]+')(start)]
    except (ValueError, RecursionError, AttributeError, TypeError, IndexError) as error:
        raise ImageError('package.json is not an object with scripts of text') from error


def read_settings(name: str, most: int = MOST_SETTINGS) -> str | None:
    """The text of a small file here, or None if there is none. Raises ImageError."""
    if not os.path.isfile(name):
        if os.path.lexists(name):
            raise ImageError(f'{name} is not a file')
        return None
    with open(name, 'rb') as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ImageError(f'{name} has more than {most} bytes')
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ImageError(f'{name} is not UTF-8 text') from error


def faas_toml() -> dict:
    """The normalised wants in faas.toml, {} without one. Raises ImageError."""
    text = read_settings('faas.toml') or ''
    try:
        settings = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        why = ' '.join(str(error).split())[:200]
        raise ImageError(f'faas.toml is not TOML: {why}', 'such as: command = ["node", "server.js"]') from error
    try:
        return wants.checked(settings, 'faas.toml')
    except wants.BadWant as error:
        raise ImageError(str(error), error.hint) from error


def procfile() -> tuple[list[str] | None, list[str]]:
    """(the command in a Procfile, or None without one; warnings): that of the type `web`, or the only one.

    Raises ImageError.
    """
    text = read_settings('Procfile')
    if text is None:
        return None, []
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith('#')]
    types = {}
    for line in lines:
        name, colon, command = line.partition(':')
        named = colon and re.fullmatch(r'[A-Za-z0-9_-]+', name)
        types[name if named else ''] = command if named else line
    chosen = 'web' if 'web' in types else next(iter(types), None)
    if chosen is None or (len(lines) > 1 and chosen != 'web'):
        raise ImageError(f'the Procfile has {len(lines)} lines, and none begins with web:', 'name the one that serves')
    others = [name or types[name] for name in types if name != chosen]
    warnings = [f'the Procfile: left out {", ".join(map(show, others[:9]))}'] if others else []
    try:
        return wants.split(types[chosen]), warnings
    except wants.BadWant as error:
        raise ImageError(f'the Procfile: {error}') from error
