"""Archives to stage, and what stages them on a file system in memory."""

import io
import os
import pathlib
import shutil
import tarfile

from handlers.images import layers, staging
from handlers.images.spec import read_spec
from handlers.images.streams import ImageError
from host import process
from tests import images, inside

RUN = {'Cmd': ['/run']}
HANDLER = ('handler.py', 'def handle(connection, address):\n    pass\n')


def entry(name, content=b'', kind=tarfile.REGTYPE, mode=0o644, link='', **more):
    info = tarfile.TarInfo(name)
    content = content.encode() if isinstance(content, str) else content
    info.size, info.type, info.mode, info.linkname = len(content), kind, mode, link
    for key, value in more.items():
        setattr(info, key, value)
    return info, content


def archive(*entries, format=tarfile.PAX_FORMAT):
    """The bytes of a tar; an entry is (name, content) or what entry() gives."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w', format=format) as tar:
        for each in entries:
            info, content = each if isinstance(each[0], tarfile.TarInfo) else entry(*each)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


BASE = images.layer(('run', b'#!', {'mode': 0o755}), ('etc/', None))


def written(files):
    out = io.BytesIO()
    images.write(files, out)
    return out.getvalue()


class Staged(inside.InHost):
    """Stages archives on a filesystem in memory."""

    DISK = '/var/lib/disk'
    ID_BASE = 3_000_000

    def disk(self, options='size=1g'):
        """A fresh disk, with no revisions and no layers."""
        os.makedirs(self.DISK, exist_ok=True)
        process.run(['mount', '-t', 'tmpfs', '-o', options, 'disk', self.DISK])
        self.stack.callback(process.run, ['umount', '--lazy', self.DISK])
        self.functions, self.layers = f'{self.DISK}/functions', layers.Layers(f'{self.DISK}/layers')
        self.layers.prepare()

    def staging(self, most_bytes=256 << 20, reference=None):
        return staging.Staging(
            self.functions, self.layers, id_base=self.ID_BASE, most_bytes=most_bytes, reference=reference
        )

    def stage(self, data, length=-1, **more):
        """Stage an archive and keep it as 1/1; its folder. The Spec is self.spec."""
        if not os.path.ismount(self.DISK):
            self.disk()
        with self.staging(**more) as staging:
            self.spec = staging.receive(io.BytesIO(data).read, len(data) if length == -1 else length)
            staging.keep(f'{self.functions}/1/1')
        self.assertEqual(['1'], os.listdir(self.functions))
        self.assertEqual(self.spec, read_spec(f'{self.functions}/1/1'))
        return pathlib.Path(self.functions, '1', '1')

    def worker_with(self, **constants):
        """The path of an unpacker with other constants."""
        path = pathlib.Path('/tmp/worker.py')
        root = inside.lab.REPO
        lines = [f'import sys; sys.path.insert(0, {str(root)!r})', 'from handlers.images import unpack']
        lines += [f'unpack.{name} = {value!r}' for name, value in constants.items()]
        path.write_text('\n'.join([*lines, 'sys.exit(unpack.main(sys.argv[1]))']))
        return str(path)

    def refuse(self, data, pattern, error=ImageError, **more):
        with self.assertRaisesRegex(error, pattern) as caught:
            self.stage(data, **more)
        self.assertEqual([], os.listdir(self.functions), 'something remains')
        self.assertEqual([], os.listdir(self.layers.folder), 'a layer remains')
        self.assertNotIn('\n', str(caught.exception))
        return caught.exception


class StagedImages(Staged):
    """Stages images."""

    def image(self, *layers, config=RUN, **more):
        """Stage an image; the folders of its layers, from the bottom."""
        options = {key: more.pop(key) for key in ('most_bytes', 'reference', 'length') if key in more}
        self.stage(images.image(layers, config, **more), **options)
        return [pathlib.Path(self.layers.path(digits)) for digits in self.spec.layers]

    def refuse_image(self, pattern, *layers, config=RUN, **more):
        options = {key: more.pop(key) for key in ('most_bytes', 'reference') if key in more}
        return self.refuse(images.image(layers or [BASE], config, **more), pattern, **options)

    def clean(self):
        shutil.rmtree(f'{self.functions}/1')
        self.layers.collect(set)
