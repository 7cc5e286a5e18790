"""What a function may ask for: in faas.toml, in LABELs of an image, in flags of `faas new` and `faas config`.

docs/HANDLERS.md has the table of KEYS; a test compares both.
"""

import re
import shlex
from collections.abc import Callable, Iterable
from typing import NamedTuple

from host import egress_rules
from host.errors import FaasError

LABEL_PREFIX = 'faas.'
MOST_VALUE = 16 << 10  # characters of one text
MOST_NAMES = 256  # in a table or a list
NAME = r'[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?'  # of a volume or a secret
SECRET = r'[A-Za-z0-9]([A-Za-z0-9._-]{0,62}[A-Za-z0-9])?'
VARIABLE = '[A-Za-z_][A-Za-z0-9_]*'
UNITS = {'K': 1 << 10, 'M': 1 << 20, 'G': 1 << 30, 'T': 1 << 40}


class BadWant(FaasError):
    """A function asks for something that there is not, or in a wrong way."""

    status = 400


class Key(NamedTuple):
    """`check(value)` returns the normalised value, which it also takes; raises ValueError. `what` says what it takes.

    `read(text)` makes the value of a label or a flag from its text; raises ValueError. Of a `table` each entry is a
    key of its own there: env.NAME=VALUE. Values of a `union` from several places are put together.
    """

    what: str
    check: Callable[[object], object]
    read: Callable[[str], object] = str
    table: bool = False
    union: bool = False
    only_folder: bool = False


# What a value may be


def number(least: float, most: float, whole: bool = True) -> Callable[[object], object]:
    def check(value: object) -> object:
        if type(value) is not int and (whole or type(value) is not float) or not least <= value <= most:
            raise ValueError
        return value

    return check


def size(least: int, most: int) -> Callable[[object], int]:
    def check(value: object) -> int:
        if isinstance(value, str):
            value = to_bytes(value)
        return number(least, most)(value)

    return check


def to_bytes(text: str) -> int:
    """Bytes from '300', '64K', '100M', '1.5G'. Raises ValueError."""
    found = re.fullmatch(r'([0-9]{1,18}(?:\.[0-9]{1,3})?)(?:([KMGT])(?:i?B)?)?', text.strip(), re.ASCII | re.I)
    if not found:
        raise ValueError(f'{text!r} is not a size')
    return int(float(found[1]) * UNITS.get((found[2] or '').upper(), 1))


def flag(value: object) -> bool:
    if type(value) is not bool:
        raise ValueError
    return value


def read_flag(text: str) -> bool:
    return {'true': True, 'yes': True, '1': True, 'false': False, 'no': False, '0': False}[text.lower()]


def text(pattern: str = r'[^\0]*') -> Callable[[object], str]:
    def check(value: object) -> str:
        if not isinstance(value, str) or len(value) > MOST_VALUE or not re.fullmatch(pattern, value, re.ASCII | re.S):
            raise ValueError
        value.encode()  # a lone surrogate is a ValueError
        return value

    return check


def texts(pattern: str) -> Callable[[object], list[str]]:
    def check(value: object) -> list[str]:
        if isinstance(value, str):
            value = read_list(value)
        if not isinstance(value, list) or len(value) > MOST_NAMES:
            raise ValueError
        return list(dict.fromkeys(map(text(pattern), value)))

    return check


def read_list(line: str) -> list[str]:
    return [each.strip() for each in line.split(',') if each.strip()]


def table(names: str, check: Callable[[object], object]) -> Callable[[object], dict]:
    def check_all(value: object) -> dict:
        if not isinstance(value, dict) or len(value) > MOST_NAMES:
            raise ValueError
        return {text(names)(name): check(each) for name, each in value.items()}

    return check_all


def command(value: object) -> list[str]:
    words = split(value) if isinstance(value, str) else value
    if not isinstance(words, list) or not words or not words[0]:
        raise ValueError
    return list(map(text(), words))


def split(line: str) -> list[str]:
    """The words of a command line. Raises BadWant."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise BadWant(str(error)) from error
    if not words or not words[0] or '\0' in line:
        raise BadWant('is not a command')
    return words


def variable(value: object) -> str | dict:
    """A text, or the value of a secret."""
    if isinstance(value, dict) and value.keys() == {'secret'}:
        return {'secret': text(SECRET)(value['secret'])}
    return text()(value)


def volume(value: object) -> dict:
    if isinstance(value, str):
        path, colon, much = value.partition(':')
        value = {'path': path, **({'size': much} if colon else {})}
    if not isinstance(value, dict) or value.keys() - {'path', 'size'}:
        raise ValueError
    much = value.get('size')
    return {'path': place(value.get('path')), 'size': None if much is None else size(1 << 20, 1 << 44)(much)}


def place(value: object) -> str:
    """An absolute path without a part that leads elsewhere."""
    path = text(r'(/[^/\0]+)+')(value)
    if {'.', '..'} & set(path.split('/')) or len(path) > 1024:
        raise ValueError
    return path


def egress(value: object) -> list[str]:
    found = texts('[!-~]+')(value)
    for each in found:
        egress_rules.parse(each)
    return found


def inside(path: str, folder: str) -> bool:
    """True if that is the folder itself, or a path below it."""
    return f'{path}/'.startswith(f'{folder}/')


def mounts(value: object) -> dict[str, str]:
    if not isinstance(value, dict) or len(value) > MOST_NAMES:
        raise ValueError
    return {place(path): text('ro|rw')(how) for path, how in value.items()}


KEYS = {
    'command': Key('a text or a list of texts', command, only_folder=True),
    'build': Key('a text', text(r'[^\0]+'), only_folder=True),
    'env': Key(
        'a table of texts, or of { secret = "NAME" }', table(VARIABLE, variable), table=True, union=True
    ),
    'secrets': Key('a list of names of secrets', texts(SECRET), read_list, union=True),
    'volumes': Key(
        'a table of paths, or of { path = "/data", size = "1G" }', table(NAME, volume), table=True, union=True
    ),
    'egress': Key(
        'a list of functions, internet, host:PORT, NAME[:PORT], NETWORK[:PORT]', egress, read_list
    ),
    'mounts': Key('a table of "/path" = "ro" or "rw"', mounts, table=True, union=True),
    'memory': Key('a size from 16M to 1P, such as 512M', size(16 << 20, 1 << 50)),
    'cpus': Key('a number from 0.01 to 4096', number(0.01, 4096, whole=False), float),
    'pids': Key('a number from 8 to 1048576', number(8, 1 << 20), int),
    'writable': Key('a size from 64K to 1P, such as 100M', size(64 << 10, 1 << 50)),
    'log': Key('a size from 64K to 1G, such as 10M', size(64 << 10, 1 << 30)),
    'port': Key('a number from 1 to 65535', number(1, 65535), int),
    'start_timeout': Key('a number of seconds from 0.1 to 3600', number(0.1, 3600, whole=False), float),
    'idle': Key('a number of seconds from 0 to 1000000000', number(0, 1e9, whole=False), float),
    'concurrency': Key('a number from 1 to 100000', number(1, 100_000), int),
    'max_instances': Key('a number from 1 to 64', number(1, 64), int),
    'ready': Key('"tcp" or a path such as "/health"', text(r'tcp|/[!-~]{0,1000}')),
    'exec_tmp': Key('true or false', flag, read_flag),
    'overlap': Key('true or false', flag, read_flag),
}


def quoted(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 120 else f'{shown[:119]}…'


def checked(wants: object, where: str, only_folder: bool = True) -> dict[str, object]:
    """The normalised wants. A key may have - for _. Raises BadWant, whose text begins with `where`."""
    if not isinstance(wants, dict):
        raise BadWant(f'{where} is not a table')
    names = {key: key.replace('-', '_') if isinstance(key, str) else '' for key in wants}
    known = [key for key, kind in KEYS.items() if only_folder or not kind.only_folder]
    unknown = sorted(quoted(key) for key, name in names.items() if name not in known)
    hint = f'there is: {", ".join(known)}'
    if unknown:
        raise BadWant(f'{where}: there is no setting {", ".join(unknown[:9])}', hint)
    answer = {}
    for given, name in names.items():
        if name in answer:
            raise BadWant(f'{where}: {name} stands there twice', hint)
        answer[name] = _one(name, lambda: KEYS[name].check(wants[given]), where, hint)  # noqa: B023
    return answer


def _one(name, make, where, hint):
    try:
        return make()
    except BadWant as error:
        raise BadWant(f'{where}: {name}: {error}', hint) from error
    except (ValueError, TypeError, KeyError) as error:
        raise BadWant(f'{where}: {name} must be {KEYS[name].what}', hint) from error


def from_texts(pairs: Iterable[tuple[str, str]], where: str) -> dict[str, object]:
    """The normalised wants from (key, text): ('memory', '512M'), ('env.NAME', 'text'), ('env.NAME.secret', 'KEY').

    Raises BadWant, whose text begins with `where`.
    """
    wants = {}
    for key, value in pairs:
        name, entry = parts(key, where)
        if not isinstance(value, str):
            raise BadWant(f'{where}: {name} is not a text')
        if entry is None:
            read = KEYS[name].read
            wants[name] = _one(name, lambda: read(value), where, None)  # noqa: B023
        else:
            variable, dot, secret = entry.rpartition('.')
            if name == 'env' and dot and secret == 'secret':
                entry, value = variable, {'secret': value}
            wants.setdefault(name, {})[entry] = value
    return checked(wants, where, only_folder=False)


def parts(key: str, where: str) -> tuple[str, str | None]:
    """('memory', None) of 'memory', ('env', 'NAME') of 'env.NAME'. Raises BadWant."""
    given, dot, entry = key.partition('.')
    name = given.replace('-', '_')
    known = [key for key, kind in KEYS.items() if not kind.only_folder]
    if name not in known:
        raise BadWant(f'{where}: there is no setting {quoted(given)}', f'there is: {", ".join(known)}')
    if KEYS[name].table != bool(dot and entry):
        form = f'{name}.NAME=VALUE' if KEYS[name].table else f'{name}=VALUE'
        raise BadWant(f'{where}: {quoted(key)} is not a setting', f'write {form}')
    return name, entry or None


def from_labels(labels: dict[str, str]) -> dict[str, object]:
    """The wants in the LABELs faas.KEY of an image. Raises BadWant."""
    ours = {key: value for key, value in labels.items() if key.startswith(LABEL_PREFIX)}
    return from_texts(((key.removeprefix(LABEL_PREFIX), value) for key, value in ours.items()), 'the LABELs faas.*')


def merged(below: dict[str, object], above: dict[str, object]) -> dict[str, object]:
    """Both together; `above` counts where both have a value."""
    answer = {**below, **above}
    for name in below.keys() & above.keys():
        if KEYS[name].table:
            answer[name] = below[name] | above[name]
        elif KEYS[name].union:
            answer[name] = list(dict.fromkeys([*below[name], *above[name]]))
    return answer


def without(wants: dict[str, object], keys: Iterable[str], where: str) -> dict[str, object]:
    """The wants without those keys: 'memory', 'env.NAME'; 'env' is all of it. Raises BadWant for what is not there."""
    answer = {name: value.copy() if isinstance(value, dict) else value for name, value in wants.items()}
    for key in keys:
        name, _, entry = key.partition('.')
        name = name.replace('-', '_')
        entry = entry.removesuffix('.secret') if name == 'env' else entry
        try:
            if entry:
                del answer[name][entry]
                if not answer[name]:
                    del answer[name]
            else:
                del answer[name]
        except (KeyError, TypeError) as error:
            have = ', '.join(key for key, _ in lines(wants)) or 'nothing'
            raise BadWant(f'{where}: {quoted(key)} is not set', f'set by flags or faas config is: {have}') from error
    return answer


def lines(wants: dict[str, object]) -> list[tuple[str, str]]:
    """The wants as from_texts() takes them, in the order of KEYS, to be shown."""
    answer = []
    for name in sorted(wants, key=list(KEYS).index):
        value = wants[name]
        if not KEYS[name].table:
            answer.append((name, shown(name, value)))
            continue
        for entry, each in value.items():
            if isinstance(each, dict) and 'secret' in each:
                answer.append((f'{name}.{entry}.secret', each['secret']))
            elif isinstance(each, dict):
                much = f':{to_text(each["size"])}' if each['size'] else ''
                answer.append((f'{name}.{entry}', f'{each["path"]}{much}'))
            else:
                answer.append((f'{name}.{entry}', each))
    return answer


def shown(name: str, value: object) -> str:
    """The text of a value that is not a table."""
    if isinstance(value, list):
        return shlex.join(value) if name == 'command' else ','.join(value)
    if isinstance(value, bool):
        return str(value).lower()
    if name in ('memory', 'writable', 'log'):
        return to_text(value)
    return f'{value:g}' if isinstance(value, float) else str(value)


def to_text(count: int) -> str:
    """A number of bytes with the largest unit that divides it."""
    unit = next((unit for unit, factor in reversed(UNITS.items()) if count and not count % factor), '')
    return f'{count // UNITS.get(unit, 1)}{unit}'
