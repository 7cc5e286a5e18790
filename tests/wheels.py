"""Packages of Python and npm, for an index of the test's own."""

import io
import json
import tarfile
import zipfile


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
