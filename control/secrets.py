"""Secrets: values that functions read, and that nobody is shown."""

import contextlib
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
ENCRYPTED, PLAIN = b'systemd-creds\n', b'plain\n'


class NoSecret(FaasError):
    """There is no secret of that name."""

    status = 404


class SecretInUse(FaasError):
    """A function wants the secret."""

    status = 409


class Secrets:
    """One file for each in `folder`. Its first line says how the rest is to be read: PLAIN, or encrypted by CREDS.

    A file .NAME is there while not every function that wants the secret has the value.
    """

    def __init__(self, folder: str) -> None:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        os.chmod(folder, 0o700)
        self.folder, self._lock = folder, threading.Lock()
        self._known: dict[str, bytes] = {}  # decrypted: an instance must not wait for that

    def set(self, name: str, value: bytes) -> bool:
        """Keep `value`; False if the functions have it already. Raises BadWant, OSError.

        Call given() when the functions have it.
        """
        check(name)
        if not value or len(value) > MOST_VALUE:
            what = f'has more than {MOST_VALUE} bytes' if value else 'is empty'
            raise wants.BadWant(f'the value of {name} {what}', 'write the value to standard input')
        with self._lock:
            if self._is(name, value):
                return os.path.exists(self._pending(name))
            files.write_file(self._pending(name), b'', 0o600)
            files.write_file(os.path.join(self.folder, name), sealed(name, value), 0o600)
            self._known[name] = value
            return True

    def given(self, name: str) -> None:
        """Note that every function that wants the secret has its value."""
        files.remove_file(self._pending(name))

    def is_encrypted(self, name: str) -> bool:
        """Raises OSError."""
        with open(os.path.join(self.folder, name), 'rb') as file:
            return file.readline() != PLAIN

    def get(self, name: str) -> bytes:
        """The value. Raises NoSecret, FaasError, OSError."""
        with self._lock:
            return self._value(name)

    def names(self) -> dict[str, str]:
        """{name: when it was set}."""
        names = sorted(entry for entry in os.listdir(self.folder) if re.fullmatch(wants.SECRET, entry))
        return {name: date(int(os.stat(os.path.join(self.folder, name)).st_mtime)) for name in names}

    def remove(self, name: str) -> None:
        """Raises NoSecret."""
        with self._lock:
            if name not in self.names():
                raise missing(name)
            for path in (self._pending(name), os.path.join(self.folder, name)):
                files.remove_file(path)
            self._known.pop(name, None)

    def check(self, wanted: dict[str, object]) -> dict[str, bytes]:
        """{name: value} of the secrets that these wants name. Raises FaasError unless all can be given."""
        values = {name: self.get(name) for name in sorted(named(wanted))}
        for key, value in wanted.get('env', {}).items():
            if isinstance(value, dict):
                self.variable(key, value['secret'])
        return values

    def variable(self, key: str, name: str) -> str:
        """The value as that of an environment variable. Raises BadWant."""
        try:
            text = self.get(name).decode()
        except UnicodeDecodeError as error:
            raise wants.BadWant(f'env.{key}: the secret {name} is not UTF-8', 'read it from a file: secrets') from error
        if '\0' in text:
            raise wants.BadWant(f'env.{key}: the secret {name} holds a NUL', 'read it from a file: secrets')
        return text

    def _pending(self, name):
        return os.path.join(self.folder, f'.{name}')  # the name of no secret

    def _is(self, name, value):
        try:
            return self._value(name) == value
        except FaasError:  # there is none, or none that can be read
            return False

    def _value(self, name):
        if name not in self._known:
            if not re.fullmatch(wants.SECRET, name, re.ASCII):
                raise missing(name)
            try:
                with open(os.path.join(self.folder, name), 'rb') as file:
                    how, data = file.readline(), file.read()
            except FileNotFoundError as error:
                raise missing(name) from error
            self._known[name] = data if how == PLAIN else run_creds('decrypt', name, data)
        return self._known[name]


def sealed(name: str, value: bytes) -> bytes:
    """The content of the file: encrypted where the host can do that."""
    if shutil.which(CREDS):
        with contextlib.suppress(FaasError):  # it has no key, and can make none
            return ENCRYPTED + run_creds('encrypt', name, value)
    return PLAIN + value


def run_creds(verb: str, name: str, data: bytes) -> bytes:
    """What systemd-creds encrypt or decrypt makes of the data. Raises FaasError, OSError."""
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
        raise FaasError(f'{CREDS} {verb} failed for the secret {name}: {why[0]}', f"'faas secret set {name}' again")
    return out


def check(name: str) -> None:
    """Raise BadWant unless it can be the name of a secret."""
    if not re.fullmatch(wants.SECRET, name, re.ASCII):
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
