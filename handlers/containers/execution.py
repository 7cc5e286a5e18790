"""Runs a program in a container that runs."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
from collections.abc import Sequence

from host import process


def execute(runtime: Sequence[str], folder: str, args: Sequence[str], timeout_s: float) -> str | None:
    """Run a program to its end. None if it ends with 0, else what it did. It waits for it.

    `folder` is that of the container, whose last part is its id; process.json there is the `process` of its OCI
    configuration.
    """
    name, null = os.path.join(folder, f'exec-{secrets.token_hex(4)}'), subprocess.DEVNULL
    how = ['--pid-file', f'{name}.pid', '--process', f'{name}.json']
    run = [*runtime, 'exec', *how, os.path.basename(folder)]
    try:
        with open(os.path.join(folder, 'process.json')) as file:
            configuration = json.load(file) | {'args': list(args)}
        with open(os.open(f'{name}.json', os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), 'w') as file:
            json.dump(configuration, file)
        with process.popen(run, stdin=null, stdout=null, stderr=null) as child:
            try:
                code = child.wait(timeout_s)
                return None if code == 0 else f'exit code {code}'
            except subprocess.TimeoutExpired:
                with contextlib.suppress(OSError, ValueError), open(f'{name}.pid') as file:
                    os.kill(int(file.read()), signal.SIGKILL)  # the runtime alone would leave it there
                child.kill()
                return f'no end within {timeout_s:g} s'
    except (process.CommandError, OSError) as error:
        return str(error)
    finally:
        for end in ('pid', 'json'):
            with contextlib.suppress(OSError):
                os.unlink(f'{name}.{end}')
