"""The row of `make bench` for builds: a redeploy whose requirements are as before, against a folder without any."""

import io
import tarfile
import time

from tests.wheels import wheel

ROW, BOUND = 'redeploy-requirements', 1.2
MODULES = 500  # as Flask has with what it needs, compiled ones counted once
HANDLER = """
def app(environ, start_response):
    start_response('200 OK', [('Content-Type', 'text/plain')])
    return [b'%d']
"""
SETTINGS = '[env]\nPIP_NO_INDEX = "1"\nPIP_FIND_LINKS = "/function/wheels"\n'


def folder(number, packed, **more):
    """The archive of the folder; its code is another each time."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as tar:
        files = {'handler.py': HANDLER % number, 'faas.toml': SETTINGS, f'wheels/{packed[0]}': packed[1], **more}
        for name, content in files.items():
            data = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(data), 0o644
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def rows(bench, wanted, check, compared):
    """The Row, if it is wanted; `check` and `compared` are the bench's."""
    if ROW not in wanted:
        return
    packed = wheel('many', '1.0', {f'many/m{number}.py': f'N = {number}\n' * 200 for number in range(MODULES)})
    needs = {'requirements.txt': 'many==1.0\n'}
    samples = {'with requirements': [], 'without any': []}
    with bench.faasd() as (_, server):
        for number in range(bench.size.deploys * 2 + 1):
            bench.tell(f'{ROW}: round {number} of {bench.size.deploys * 2}')
            for name, kind, more in (('needs', 'with requirements', needs), ('plain', 'without any', {})):
                archive, began = folder(number, packed, **more), time.monotonic()
                check(server.deploy(name, archive), f'deploying {name}')
                if number:  # the first is built
                    samples[kind].append(time.monotonic() - began)
    what = f'{MODULES} modules of packages, the code changes and the requirements do not'
    yield compared(ROW, what, samples, unit='s', better='less', bound=BOUND)
