"""How a revision is started: what its folder or image asks for, checked."""

import json
import os
import re
import signal
from collections.abc import Callable
from typing import NamedTuple

from handlers.images import wants
from handlers.images.archive import MOST_LAYERS

NOBODY = 65534
MOST_WARNINGS, MOST_LINE = 32, 1000
DEFAULT_PORT = 80  # the value of $PORT, unless the ENV or EXPOSE of the image has another


class Spec(NamedTuple):
    """How a revision is started.

    kind is 'handler' (a handler.py), 'command' (args in a folder) or 'image' (args in `layers`: hex digests, the bottom
    one first). user is '' for root, else as the image has it. ports are the TCP ports that it says it serves.
    volumes are the paths that the image declares as such. warnings are for who deploys it.
    healthcheck is the HEALTHCHECK of the image: {'args', 'interval_s', 'timeout_s', 'retries'}.
    settings are the normalised wants (see wants.KEYS) of the folder or the image; of the Spec that an instance gets
    also those of the function, which its other fields have, too.
    """

    kind: str
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    cwd: str = '/function'
    user: str = ''
    ports: tuple[int, ...] = ()
    stop_signal: str = 'SIGTERM'
    layers: tuple[str, ...] = ()
    start_timeout_s: float | None = None
    concurrency: int | None = None
    settings: dict[str, object] = {}
    volumes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    healthcheck: dict[str, object] | None = None

    def effective(self, config: dict[str, object]) -> 'Spec':
        """With what `config`, the wants of flags and `faas config`, sets above those of the folder or the image."""
        found = wants.merged(self.settings, config)
        texts = {name: value for name, value in found.get('env', {}).items() if isinstance(value, str)}
        return self._replace(
            env=self.env | texts,
            ports=(found['port'],) if 'port' in found else self.ports,
            start_timeout_s=found.get('start_timeout', self.start_timeout_s),
            concurrency=found.get('concurrency', self.concurrency),
            settings=found,
        )

    @property
    def overlaps(self) -> bool:
        """True if two instances may have its volumes at the same time."""
        return self.settings.get('overlap', self.kind == 'handler')

    def excludes(self, other: 'Spec') -> bool:
        """True if no instance of this and none of the other may run at the same time: for the sake of a volume."""
        shared = self.settings.get('volumes', {}).keys() & other.settings.get('volumes', {}).keys()
        return bool(shared) and not (self.overlaps and other.overlaps)

    def to_json(self) -> str:
        return json.dumps(self._asdict(), indent=1) + '\n'

    @classmethod
    def from_json(cls, text: str) -> 'Spec':
        """The Spec in a JSON text. Raises ValueError unless every field is valid."""
        try:
            return cls.checked(json.loads(text))
        except RecursionError as error:
            raise ValueError('the spec is nested too deeply') from error

    @classmethod
    def checked(cls, said: object) -> 'Spec':
        """The Spec from the object that JSON had. Raises ValueError."""
        if not isinstance(said, dict) or said.keys() - set(cls._fields):
            raise ValueError('the spec is not an object of its fields')
        said = {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()}
        spec = cls(**{'kind': None, **said})
        texts = (*(spec.args if isinstance(spec.args, tuple) else ()), spec.cwd, spec.user)
        env = spec.env.items() if isinstance(spec.env, dict) else [(None, None)]
        for name, right in (
            ('kind', spec.kind in ('handler', 'command', 'image')),
            ('args', isinstance(spec.args, tuple) and all(map(is_text, texts))),
            ('env', all(is_text(key) and is_text(value) and key and '=' not in key for key, value in env)),
            ('cwd', is_text(spec.cwd) and spec.cwd.startswith('/') and '..' not in spec.cwd.split('/')),
            ('ports', is_tuple(spec.ports, lambda port: is_int(port, 1, 65535))),
            ('stop_signal', is_text(spec.stop_signal) and is_signal(spec.stop_signal)),
            ('layers', is_tuple(spec.layers, is_hex) and len(spec.layers) <= MOST_LAYERS),
            ('start_timeout_s', spec.start_timeout_s is None or is_number(spec.start_timeout_s, 0.1, 3600)),
            ('concurrency', spec.concurrency is None or is_int(spec.concurrency, 1, 100_000)),
            ('settings', are_wants(spec.settings)),
            ('volumes', is_tuple(spec.volumes, is_text) and len(spec.volumes) <= MOST_WARNINGS),
            ('healthcheck', spec.healthcheck is None or is_healthcheck(spec.healthcheck)),
            ('warnings', is_tuple(spec.warnings, is_line) and len(spec.warnings) <= MOST_WARNINGS),
        ):
            if not right:
                raise ValueError(f"the spec's {name} is not valid")
        if (spec.kind != 'handler' and not (spec.args and spec.args[0])) or (spec.kind == 'image') != bool(spec.layers):
            raise ValueError(f'the spec does not have what the kind {spec.kind} needs')
        return spec


def are_wants(value: object) -> bool:
    try:
        return isinstance(value, dict) and wants.checked(value, '') == value
    except wants.BadWant:
        return False


def is_text(value: object) -> bool:
    """True if it is a text that can be an argument of a process."""
    try:
        return isinstance(value, str) and '\0' not in value and os.fsencode(value) is not None
    except UnicodeEncodeError:
        return False


def is_healthcheck(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {'args', 'interval_s', 'timeout_s', 'retries'}
        and isinstance(value['args'], list)
        and bool(value['args'] and value['args'][0])
        and all(map(is_text, value['args']))
        and is_number(value['interval_s'], 1, 86400)
        and is_number(value['timeout_s'], 1, 3600)
        and is_int(value['retries'], 1, 1000)
    )


def is_line(value: object) -> bool:
    return is_text(value) and len(value) <= MOST_LINE and value.isprintable()


def is_tuple(value: object, each: Callable[[object], bool]) -> bool:
    return isinstance(value, tuple) and all(map(each, value))


def is_int(value: object, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def is_number(value: object, least: float, most: float) -> bool:
    return type(value) in (int, float) and least <= value <= most


def is_hex(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch('[0-9a-f]{64}', value) is not None


def is_signal(name: str) -> bool:
    try:
        signal_number(name)
        return True
    except ValueError:
        return False


def signal_number(name: str) -> int:
    """The number of a stop_signal, such as SIGQUIT or SIGRTMIN+3. Raises ValueError."""
    found = re.fullmatch(r'(SIG[A-Z0-9]+)([+-][0-9]{1,2})?', name)
    if not found or found[1] not in signal.Signals.__members__:
        raise ValueError(f'there is no signal {name!r}')
    number = signal.Signals[found[1]] + int(found[2] or 0)
    if not 0 < number <= signal.SIGRTMAX:
        raise ValueError(f'there is no signal {name!r}')
    return number


def read_spec(folder: str) -> Spec:
    """The Spec of a revision's folder. A folder without spec.json is a handler.py of an older faasd.

    Raises ValueError, OSError.
    """
    try:
        with open(os.path.join(folder, 'spec.json')) as file:
            return Spec.from_json(file.read())
    except FileNotFoundError:
        os.stat(folder)
        return Spec('handler')


def tree(folder: str) -> str:
    """Where the files of a revision are that is not an image."""
    return os.path.join(folder, 'tree') if os.path.exists(os.path.join(folder, 'spec.json')) else folder


def candidates(spec: Spec) -> tuple[int, ...]:
    """The ports on which a server of this Spec may listen, the most likely first.

    With EXPOSE: its ports, $PORT first if it is one of them. Without: $PORT, and the caller takes any other port, too.
    """
    text = spec.env.get('PORT', '')
    port = int(text) if re.fullmatch('0{0,9}[1-9][0-9]{0,4}', text) and int(text) < 65536 else None
    if not spec.ports:
        return (port or DEFAULT_PORT,)
    first = port if port in spec.ports else DEFAULT_PORT if DEFAULT_PORT in spec.ports else min(spec.ports)
    return (first, *(each for each in sorted(spec.ports) if each != first))
