"""Secrets: values that functions read, and that nobody is shown."""

import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterable

from control.events import date
from handlers.images import wants
from host import files, process
from host.errors import FaasError

MOST_VALUE = 64 << 10  # bytes
CREDS = 'systemd-creds'  # systemd-creds(1); the file it writes is text, base64
CREDS_S = 30
# Without a TPM: what it encrypts must be readable after the disk was moved to another machine, with this key.
KEY = '--with-key=host'


class NoSecret(FaasError):
    """There is no secret of that name."""

    status = 404


class SecretInUse(FaasError):
    """A function wants the secret."""

    status = 409


class Secrets:
    """One file for each in `folder`: NAME.cred encrypted with the host's key, or NAME where the host has none."""

    def __init__(self, folder: str) -> None:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        os.chmod(folder, 0o700)
        self.folder, self._lock = folder, threading.Lock()
        self._known: dict[str, bytes] = {}  # decrypted: an instance must not wait for that

    def set(self, name: str, value: bytes) -> bool:
        """Keep `value`; True if it is another than before. Raises BadWant, FaasError, OSError."""
        check(name)
        if not value or len(value) > MOST_VALUE:
            what = f'has more than {MOST_VALUE} bytes' if value else 'is empty'
            raise wants.BadWant(f'the value of {name} {what}', 'write the value to standard input')
        with self._lock:
            if name in self._names() and self._value(name) == value:
                return False
            plain, encrypted = (os.path.join(self.folder, name + end) for end in ('', '.cred'))
            if shutil.which(CREDS):
                made = self._creds('encrypt', name, value)
                files.write_file(encrypted, made, 0o600)
                files.remove_file(plain)
            else:
                files.write_file(plain, value, 0o600)
                files.remove_file(encrypted)
            self._known[name] = value
            return True

    def get(self, name: str) -> bytes:
        """The value. Raises NoSecret, FaasError, OSError."""
        with self._lock:
            return self._value(name)

    def names(self) -> dict[str, str]:
        """{name: when it was set}."""
        with self._lock:
            return {name: date(int(os.stat(path).st_mtime)) for name, path in sorted(self._names().items())}

    def remove(self, name: str) -> None:
        """Raises NoSecret."""
        with self._lock:
            names = self._names()
            if name not in names:
                raise missing(name)
            files.remove_file(names[name])
            self._known.pop(name, None)

    def check(self, wanted: dict[str, object]) -> None:
        """Raise FaasError unless every secret that these wants name is there and can be given."""
        for name in named(wanted):
            self.get(name)
        for key, value in wanted.get('env', {}).items():
            if isinstance(value, dict):
                self.variable(key, value['secret'])

    def variable(self, key: str, name: str) -> str:
        """The value as that of an environment variable. Raises BadWant."""
        try:
            text = self.get(name).decode()
        except UnicodeDecodeError as error:
            raise wants.BadWant(f'env.{key}: the secret {name} is not UTF-8', 'read it from a file: secrets') from error
        if '\0' in text:
            raise wants.BadWant(f'env.{key}: the secret {name} holds a NUL', 'read it from a file: secrets')
        return text

    def _names(self):
        names = {}
        for entry in os.scandir(self.folder):
            name = entry.name.removesuffix('.cred')
            if re.fullmatch(wants.SECRET, name):
                names[name] = entry.path
        return names

    def _value(self, name):
        if name not in self._known:
            path = self._names().get(name)
            if path is None:
                raise missing(name)
            with open(path, 'rb') as file:
                data = file.read()
            self._known[name] = self._creds('decrypt', name, data) if path.endswith('.cred') else data
        return self._known[name]

    def _creds(self, verb, name, data):
        argv = [CREDS, verb, *([KEY] if verb == 'encrypt' else []), f'--name={name}', '-', '-']
        pipe = subprocess.PIPE
        with process.popen(argv, stdin=pipe, stdout=pipe, stderr=pipe) as child:
            try:
                out, said = child.communicate(data, CREDS_S)
            except subprocess.TimeoutExpired:
                child.kill()
                out, said = b'', b'it does not end'
        if child.returncode:
            why = said.decode(errors='replace').strip().splitlines()[-1:] or [f'exit code {child.returncode}']
            raise FaasError(f'{CREDS} {verb} failed for the secret {name}: {why[0]}', 'set the secret again')
        return out


def check(name: str) -> None:
    """Raise BadWant unless it can be the name of a secret."""
    if not re.fullmatch(wants.SECRET, name, re.ASCII) or name.endswith('.cred'):
        raise wants.BadWant(
            f'{name[:80]!r} is not a name of a secret', 'use letters, digits, . _ and - inside, at most 64 characters'
        )


def missing(name: str) -> NoSecret:
    return NoSecret(f'there is no secret {name}', f"'faas secret set {name}' reads its value from standard input")


def named(wanted: dict[str, object]) -> set[str]:
    """The names of the secrets in a function's wants."""
    variables = (value for value in wanted.get('env', {}).values() if isinstance(value, dict))
    return {*wanted.get('secrets', ()), *(value['secret'] for value in variables)}


def users(name: str, wanted: Iterable[tuple[str, dict[str, object]]]) -> list[str]:
    """The functions that want the secret, of (function, wants)."""
    return [function for function, wants_ in wanted if name in named(wants_)]
