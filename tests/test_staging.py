"""Archives from strangers: what becomes a revision, what is refused, and that nothing remains of what was."""

import contextlib
import hashlib
import io
import itertools
import json
import os
import pathlib
import shutil
import stat
import subprocess
import tarfile
import threading
import unittest
import unittest.mock

from handlers.images import folder as folders
from handlers.images import layers, unpack
from handlers.images import spec as specs
from handlers.images import staging as image
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


class Inside(unittest.TestCase):
    """Paths alone, without a root."""

    def test_what_stays_in_the_folder(self):
        for path in ('a', 'a/b', './a', 'a/../b', 'a//b', '..a', 'a..', '/'.join('x' * folders.FOLDER_DEPTH)):
            folders.inside(path, path)

    def test_what_leads_out_of_it_or_too_deep(self):
        too_deep = '/'.join('x' * (folders.FOLDER_DEPTH + 1))
        for path in ('..', '../a', 'a/../../b', '/a', '//a', './..', 'a\0b', too_deep):
            with self.subTest(path), self.assertRaises(image.ImageError):
                folders.inside(path, path)


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
        return image.Staging(
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
        self.assertEqual(self.spec, specs.read_spec(f'{self.functions}/1/1'))
        return pathlib.Path(self.functions, '1', '1')

    def refuse(self, data, pattern, error=image.ImageError, **more):
        with self.assertRaisesRegex(error, pattern) as caught:
            self.stage(data, **more)
        self.assertEqual([], os.listdir(self.functions), 'something remains')
        self.assertEqual([], os.listdir(self.layers.folder), 'a layer remains')
        self.assertNotIn('\n', str(caught.exception))
        return caught.exception


class Folders(Staged):
    def receive(self, data, **more):
        """The files of a folder that was staged."""
        folder = self.stage(data, **more)
        self.stack.callback(shutil.rmtree, folder.parent, ignore_errors=True)
        self.assertEqual(str(folder / 'tree'), specs.tree(folder))
        return folder / 'tree'

    @inside.inside
    def test_a_folder_arrives_as_it_was(self):
        folder = self.receive(
            archive(
                entry('.', kind=tarfile.DIRTYPE),
                HANDLER,
                ('./data/deep/er.txt', 'text'),
                entry('empty', kind=tarfile.DIRTYPE),
                entry('link', kind=tarfile.SYMTYPE, link='data/deep'),
                entry('data/up', kind=tarfile.SYMTYPE, link='../handler.py'),
                ('ümläut.txt', b'\0\xff'),
            )
        )
        self.assertEqual(HANDLER[1], (folder / 'handler.py').read_text())
        self.assertEqual('text', (folder / 'link/er.txt').read_text())
        self.assertEqual(HANDLER[1], (folder / 'data/up').read_text())
        self.assertEqual(b'\0\xff', (folder / 'ümläut.txt').read_bytes())
        self.assertTrue((folder / 'empty').is_dir())

    @inside.inside
    def test_modes_and_owners_are_the_platforms(self):
        folder = self.receive(
            archive(
                entry(*HANDLER, mode=0o600, uid=1000, gid=1000, uname='someone'),
                entry('run', 'x', mode=0o700, uid=1000),
                entry('suid', 'x', mode=0o6777),
                entry('none', 'x', mode=0),
                entry('closed', kind=tarfile.DIRTYPE, mode=0),
                ('closed/within', 'x'),
                entry('open', kind=tarfile.DIRTYPE, mode=0o1777),
                entry('link', kind=tarfile.SYMTYPE, link='run'),
            )
        )
        modes = {}
        for where, dirs, names in os.walk(folder):
            for name in (*dirs, *names):
                status = os.lstat(os.path.join(where, name))
                self.assertEqual((0, 0), (status.st_uid, status.st_gid), name)
                modes[name] = stat.S_IMODE(status.st_mode)
        self.assertEqual((0, 0o755), (os.stat(folder).st_uid, stat.S_IMODE(os.stat(folder).st_mode)))
        for name, mode in (('handler.py', 0o644), ('run', 0o755), ('suid', 0o755), ('none', 0o644)):
            self.assertEqual(mode, modes[name], name)
        for name in ('closed', 'open', '__pycache__'):
            self.assertEqual(0o755, modes[name], name)
        self.assertEqual(0o644, modes['within'])

    @inside.inside
    def test_python_is_compiled_for_the_place_where_it_runs(self):
        folder = self.receive(
            archive(
                ('handler.py', 'import lib.more\nprint(lib.more.what)'),
                ('lib/__init__.py', ''),
                ('lib/more.py', 'what = "found"'),
                ('lib/broken.py', 'def'),
            )
        )
        compiled = sorted(str(each.relative_to(folder)).split('.cpython')[0] for each in folder.rglob('*.pyc'))
        self.assertEqual(['__pycache__/handler', 'lib/__pycache__/__init__', 'lib/__pycache__/more'], compiled)
        for source in (folder / 'lib').glob('[!b]*.py'):
            source.write_text('raise SystemExit("the source was read")')  # unchecked: the compiled one is trusted
        self.assertEqual('found\n', process.run(['/usr/bin/python3', str(folder / 'handler.py')]).stdout)
        (more,) = (folder / 'lib').rglob('more.*.pyc')
        code = 'import marshal, sys; print(marshal.loads(open(sys.argv[1], "rb").read()[16:]).co_filename)'
        self.assertEqual('/function/lib/more.py\n', process.run(['/usr/bin/python3', '-c', code, str(more)]).stdout)

    @inside.inside
    def test_names_and_links_that_lead_out_are_refused(self):
        for bad in (
            ('../x', 'x'),
            ('/etc/x', 'x'),
            ('a/../../x', 'x'),
            ('..', 'x'),
            entry('out', kind=tarfile.SYMTYPE, link='..'),
            entry('out', kind=tarfile.SYMTYPE, link='/etc'),
            entry('a/out', kind=tarfile.SYMTYPE, link='../../etc'),
            entry('out', kind=tarfile.SYMTYPE, link='a/../../b'),
            ('/'.join('d' * 40), 'x'),
        ):
            with self.subTest(bad):
                error = self.refuse(archive(HANDLER, bad), 'out of the folder|too deep')
                self.assertIn('handler.py', error.hint)
        self.assertFalse(os.path.exists(f'{self.DISK}/x'))

    @inside.inside
    def test_a_link_is_no_way_out_for_what_follows_it(self):
        """Each is inside by its text; together they would lead out. The worker has no other root to reach."""
        data = archive(
            HANDLER,
            entry('a/b', kind=tarfile.SYMTYPE, link='.'),
            entry('a/c', kind=tarfile.SYMTYPE, link='b/..'),
            entry('out', kind=tarfile.SYMTYPE, link='a/c/../../x'),
            ('a/c/../evil', 'x'),
        )
        try:
            self.receive(data)
        except image.ImageError:
            self.assertEqual([], os.listdir(self.functions))
        self.assertFalse(os.path.exists(f'{self.DISK}/evil'))
        self.assertFalse(os.path.exists(f'{self.functions}/evil'))

    @inside.inside
    def test_a_file_is_not_written_through_a_link_or_twice(self):
        for name in ('link', 'handler.py'):
            first = entry('link', kind=tarfile.SYMTYPE, link='handler.py')
            self.refuse(archive(HANDLER, first, (name, 'other')), 'exists')

    @inside.inside
    def test_what_is_no_file_folder_or_symbolic_link_is_refused(self):
        for kind in (tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
            bad = entry('bad', kind=kind, link='handler.py', devmajor=1, devminor=3)
            with self.subTest(kind):
                self.refuse(archive(HANDLER, bad), "'bad' is neither file, folder nor symbolic link")

    @inside.inside
    def test_too_many_files_are_refused(self):
        folders = (entry(f'd{number}', kind=tarfile.DIRTYPE) for number in range(unpack.FOLDER_ENTRIES + 1))
        self.refuse(archive(*folders), 'more than 20000 files')

    @inside.inside
    def test_without_handler_py_it_is_no_function(self):
        self.refuse(archive(('main.py', 'x')), 'there is no handler.py')
        self.refuse(archive(('sub/handler.py', 'x')), 'there is no handler.py')
        self.refuse(archive(entry('handler.py', kind=tarfile.DIRTYPE)), 'there is no handler.py')
        self.refuse(archive(entry('handler.py', kind=tarfile.SYMTYPE, link='gone.py')), 'there is no handler.py')
        self.refuse(archive(), 'there is no handler.py')

    @inside.inside
    def test_what_is_no_tar_or_was_cut_is_refused(self):
        whole = archive(HANDLER, ('big', bytes(100_000)))
        for bad in (b'', b'PK\3\4' + bytes(600), os.urandom(5000), whole[:3000], whole[:700], whole[:512], b'x' * 511):
            with self.subTest(len(bad)):
                self.refuse(bad, '.')

    @inside.inside
    def test_a_body_that_ends_early_leaves_nothing(self):
        whole = archive(HANDLER)
        self.refuse(whole[:-100], '', error=EOFError, length=len(whole))
        self.refuse(b'', '', error=EOFError, length=5)

    @inside.inside
    def test_no_more_is_read_than_was_announced(self):
        self.disk()
        stream = io.BytesIO(archive(HANDLER) + b'the next request')
        with self.staging() as staging:
            staging.receive(stream.read, len(archive(HANDLER)))
        self.assertEqual(b'the next request', stream.read())
        self.assertEqual([], os.listdir(self.functions))

    @inside.inside
    def test_a_full_disk_is_named_and_nothing_remains(self):
        self.disk('size=1m,nr_inodes=64')
        for data in (
            archive(HANDLER, ('big', bytes(2 << 20))),  # while it arrives
            archive(HANDLER, ('half', bytes(600 << 10))),  # while it is unpacked
            archive(HANDLER, *((f'f{number}', 'x') for number in range(100))),  # no room for one file more
            images.packed(archive(HANDLER, ('big', bytes(2 << 20))), 'gzip'),
            images.image([images.layer(('half', os.urandom(600 << 10)))], RUN),
            images.image([images.layer(('much', bytes(2 << 20)))], RUN, pack='gzip'),
            images.image([images.layer(*((f'f{number}', b'x') for number in range(100)))], RUN),
        ):
            error = self.refuse(data, 'no space left on the disk', error=image.DiskFull)
            self.assertTrue(error.hint)
        with contextlib.suppress(OSError):
            for number in range(1000):
                pathlib.Path(self.DISK, f'fill{number}').touch()
        with self.assertRaises(image.DiskFull):
            self.staging()
        self.assertEqual([], os.listdir(self.functions))

    @inside.inside
    def test_a_kept_revision_takes_the_place_of_a_leftover(self):
        self.disk()
        leftover = pathlib.Path(self.functions, '1', '1', 'old')
        leftover.parent.mkdir(parents=True)
        leftover.touch()
        folder = self.stage(archive(HANDLER))
        self.assertEqual({'tree', 'spec.json'}, set(os.listdir(folder)))

    @inside.inside
    def test_a_revision_of_an_older_version_is_read(self):
        self.disk()
        folder = f'{self.functions}/1/1'
        os.makedirs(folder)
        self.assertEqual((specs.Spec('handler'), folder), (specs.read_spec(folder), specs.tree(folder)))
        with self.assertRaises(FileNotFoundError):
            specs.read_spec(f'{self.functions}/1/2')

    @inside.inside
    def test_a_folder_may_be_packed(self):
        for how in ('gzip', 'zstd'):
            folder = self.receive(images.packed(archive(HANDLER, ('a', 'b')), how), length=None)
            self.assertEqual('b', (folder / 'a').read_text())
            shutil.rmtree(folder.parent.parent)

    @inside.inside
    def test_a_folder_says_its_command(self):
        self.receive(archive(HANDLER))
        self.assertEqual(specs.Spec('handler'), self.spec)
        toml = """
            command = ["node", "server.js"]
            port = 3000
            start_timeout = 2.5
            concurrency = 8
            [env]
            A = "b c"
        """
        for files, expected in (
            ((('faas.toml', toml),), ('command', ('node', 'server.js'), {'A': 'b c'}, (3000,), 2.5, 8)),
            ((('faas.toml', 'command = "node \'a b\'"'),), ('command', ('node', 'a b'), {}, (), None, None)),
            ((HANDLER, ('faas.toml', 'start_timeout = 1')), ('handler', (), {}, (), 1, None)),
            ((HANDLER, ('faas.toml', '[env]\nA="1"')), ('handler', (), {'A': '1'}, (), None, None)),
            ((HANDLER, ('Procfile', '# one\n\nweb: node a.js\n')), ('command', ('node', 'a.js'), {}, (), None, None)),
            ((('Procfile', 'ruby a.rb -p 80:80'),), ('command', ('ruby', 'a.rb', '-p', '80:80'), {}, (), None, None)),
            ((('Procfile', 'a\nb'), ('faas.toml', 'command = "c"')), ('command', ('c',), {}, (), None, None)),
        ):  # fmt: skip
            with self.subTest(files):
                shutil.rmtree(f'{self.functions}/1')
                self.receive(archive(*files))
                spec = self.spec
                said = (spec.kind, spec.args, spec.env, spec.ports, spec.start_timeout_s, spec.concurrency)
                self.assertEqual((expected, '/function', ''), (said, spec.cwd, spec.user))

    @inside.inside
    def test_a_faas_toml_with_what_it_cannot_have_is_refused_by_name(self):
        for text, pattern in (
            ('comand = "x"', "no setting 'comand'"),
            ('command = []', 'command must be'),
            ('command = [1]', 'command must be'),
            ('command = ["a\\u0000"]', 'command must be'),
            ('command = "\'"', 'command: No closing quotation'),
            ('command = " "', 'command is no command'),
            ('port = 0', 'port must be a number from 1 to 65535'),
            ('port = true', 'port must be'),
            ('port = "80"', 'port must be'),
            ('start_timeout = nan', 'start_timeout must be'),
            ('start_timeout = 4000', 'start_timeout must be'),
            ('concurrency = 1.5', 'concurrency must be'),
            ('env = "A=b"', 'env must be'),
            ('[env]\nA = 1', 'env must be'),
            ('[env]\n"A-B" = "1"', 'env must be'),
            ('port 80', 'faas.toml is not TOML'),
            ('x = ' + '[' * 5000, 'faas.toml is not TOML'),
            (b'\xff', 'not UTF-8'),
            ('#' * 70_000, 'more than 65536 bytes'),
        ):
            with self.subTest(text[:20]):
                error = self.refuse(archive(HANDLER, ('faas.toml', text)), pattern)
                if 'no setting' in pattern:
                    self.assertEqual('there is: command, port, start_timeout, concurrency, env', error.hint)
        self.refuse(archive(HANDLER, entry('faas.toml', kind=tarfile.DIRTYPE)), 'faas.toml is no file')

    @inside.inside
    def test_a_procfile_has_one_line(self):
        for text, pattern in (('', '0 lines'), ('web: a\nworker: b', '2 lines'), ('web:', 'no command'), ('"', 'quot')):
            self.refuse(archive(HANDLER, ('Procfile', text)), pattern)

    @inside.inside
    def test_the_worker_holds_nothing_that_is_not_its_own(self):
        """What runs on a stranger's bytes: ids that are nobody's, no way back to the host's files, no network."""
        self.disk()
        os.mkdir(f'{self.DISK}/probe')
        code = """
import os, socket, sys
sys.path.insert(0, sys.argv[1])
from handlers.images import unpack
proc = os.open('/proc', os.O_RDONLY)  # there is none behind chroot
def probe(start_zstd):
    status = open(os.open('self/status', os.O_RDONLY, dir_fd=proc)).read().splitlines()
    caps = [line.split()[1] for line in status if line.startswith(('CapEff', 'CapPrm', 'NoNewPrivs'))]
    here = os.listdir('/'), os.listdir('../..')
    return [os.getresuid(), os.getgroups(), *here, os.getpid(), socket.if_nameindex(), caps]
order = {'folder': sys.argv[2], 'id_base': 3000000}
print(*unpack.run(order, probe), sep='\\n')
"""
        out = process.run(['/usr/bin/python3', '-I', '-S', '-c', code, inside.lab.REPO, f'{self.DISK}/probe']).stdout
        *rest, capabilities = out.splitlines()
        self.assertEqual(['[0, 0, 0]', '[]', '[]', '[]', '1', "[[1, 'lo']]"], rest)
        self.assertEqual("['000000000004001b', '000000000004001b', '1']", capabilities)
        self.assertEqual(self.ID_BASE, os.stat(f'{self.DISK}/probe').st_uid)

    @inside.inside
    def test_the_workers_processes_end_with_it(self):
        """A killed unpacker leaves nobody who writes on."""
        self.disk()
        os.mkdir(f'{self.DISK}/probe')
        code = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from handlers.images import unpack
def work(start_zstd):
    os.fork()
    os.write(int(sys.argv[3]), b'up')
    time.sleep(1000)
unpack.run({'folder': sys.argv[2], 'id_base': 3000000}, work)
"""
        reader, writer = os.pipe()
        argv = ['/usr/bin/python3', '-I', '-S', '-c', code, inside.lab.REPO, f'{self.DISK}/probe', str(writer)]
        with subprocess.Popen(argv, pass_fds=(writer,)) as child, open(reader, 'rb') as said:
            os.close(writer)
            self.assertEqual(b'upup', said.read(4))
            child.kill()
            self.assertEqual(b'', said.read())  # nobody holds the other end

    @inside.inside
    def test_no_file_is_written_through_a_link(self):
        up = entry('a/b', kind=tarfile.SYMTYPE, link='../c')
        self.refuse(archive(HANDLER, ('c/x', ''), up, ('a/b/y', '')), "'a/b/y' goes through a link")


class Images(Staged):
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

    @inside.inside
    def test_both_forms_however_packed_are_the_same_image(self):
        for form, pack, outer in itertools.product(
            ('docker', 'oci', 'both'), (None, 'gzip', 'zstd'), (None, 'gzip', 'zstd')
        ):
            with self.subTest((form, pack, outer)):
                base, top = self.image(
                    BASE, images.layer(('b', b'top')), form=form, pack=pack, outer=outer, length=None
                )
                self.assertEqual((b'#!', b'top'), ((base / 'run').read_bytes(), (top / 'b').read_bytes()))
                self.assertEqual([hashlib.sha256(BASE).hexdigest(), top.name], [base.name, top.name])
                self.assertEqual(['spec.json'], os.listdir(f'{self.functions}/1/1'))
                self.clean()

    @inside.inside
    def test_other_ways_to_write_an_archive(self):
        for how in (
            {'last': True},
            {'links': True},
            {'last': True, 'links': True},
            {'ref': None},
            {'form': 'oci', 'ref': None},
        ):
            with self.subTest(how):
                (layer,) = self.image(BASE, **how)
                self.assertTrue((layer / 'run').exists())
                self.clean()
        files = {f'./{name}': content for name, content in images.files_of([BASE], RUN).items()}
        out = io.BytesIO()
        for form in (tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT):
            out = io.BytesIO()
            images.write(files, out, format=form)
            self.stage(out.getvalue())
            self.clean()

    @inside.inside
    def test_tars_without_padding_are_read(self):
        bare = images.layer(('a', b'1'), ('b', b'22'), padded=False)
        self.assertNotEqual(0, len(bare) % 512)
        (layer,) = self.image(bare)
        self.assertEqual(b'22', (layer / 'b').read_bytes())
        self.clean()
        files = images.files_of([BASE], RUN)
        data = images.layer(
            *((name, each.data if isinstance(each, images.Layer) else each) for name, each in files.items()),
            padded=False,
        )
        self.stage(data)
        self.assertEqual(('/run',), self.spec.args)

    @inside.inside
    def test_long_names_in_every_form(self):
        name = '/'.join(['folder' * 8] * 5 + ['ümläut'])
        for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            (layer,) = self.image(images.layer((name, b'x'), ('l', name), ('h', images.Hard(name)), format=form))
            self.assertEqual(b'x', (layer / 'l').read_bytes())
            self.assertEqual(b'x', (layer / 'h').read_bytes())
            self.clean()
        name = name[:200]  # ustar splits it at a slash
        (layer,) = self.image(images.layer((name, b'x'), format=tarfile.USTAR_FORMAT))
        self.assertEqual(b'x', (layer / name).read_bytes())

    @inside.inside
    def test_owners_modes_and_times_are_kept(self):
        (layer,) = self.image(
            images.layer(
                ('.', None, {'mode': 0o700, 'uid': 7, 'gid': 8, 'mtime': 5}),
                ('closed', None, {'mode': 0o555, 'uid': 1, 'mtime': 1000}),
                ('closed/in', b'x', {'mode': 0o100755, 'uid': 65535, 'gid': 65535, 'mtime': 1.5}),
                ('none', None, {'mode': 0}),
                ('none/in', b'x'),
                ('suid', b'x', {'mode': 0o6755, 'uid': 33, 'mtime': 3}),
                ('tmp', None, {'mode': 0o1777}),
                ('pipe', b'', {'type': tarfile.FIFOTYPE, 'mode': 0o622, 'gid': 5}),
                ('link', 'suid', {'uid': 9, 'mtime': 4}),
                ('twin', images.Hard('suid')),
                ('implied/by/this', b'x'),
            )
        )
        for name, uid, gid, mode, mtime in (
            ('.', 7, 8, 0o40700, 5),
            ('closed', 1, 0, 0o40555, 1000),
            ('closed/in', 65535, 65535, 0o100755, 1.5),
            ('none', 0, 0, 0o40000, 0),
            ('none/in', 0, 0, 0o100644, 0),
            ('suid', 33, 0, 0o106755, 3),
            ('twin', 33, 0, 0o106755, 3),
            ('tmp', 0, 0, 0o41777, 0),
            ('pipe', 0, 5, 0o10622, 0),
            ('link', 9, 0, 0o120777, 4),
            ('implied', 0, 0, 0o40755, None),
            ('implied/by/this', 0, 0, 0o100644, 0),
        ):
            status = os.lstat(layer / name)
            with self.subTest(name):
                self.assertEqual((uid, gid), (status.st_uid - self.ID_BASE, status.st_gid - self.ID_BASE))
                self.assertEqual(oct(mode), oct(status.st_mode))
                if mtime is not None:
                    self.assertEqual(mtime, status.st_mtime)
        self.assertEqual(2, os.stat(layer / 'twin').st_nlink)

    @inside.inside
    def test_what_an_archive_says_of_xattrs_is_dropped(self):
        info = {'pax_headers': {'SCHILY.xattr.security.capability': '\x01\x00\x00\x02', 'SCHILY.xattr.user.a': 'b'}}
        (layer,) = self.image(images.layer(('ping', b'x', info)))
        self.assertEqual([], os.listxattr(layer / 'ping'))

    @inside.inside
    def test_whiteouts_are_what_overlayfs_reads(self):
        (layer,) = self.image(
            images.layer(
                ('etc/.wh.gone', b''),
                ('was', b'x'),
                ('.wh.was', b''),
                ('opaque/', None),
                ('opaque/.wh..wh..opq', b''),
                ('opaque/new', b'x'),
                ('deep/er/.wh..wh..opq', b''),
                ('.wh..wh.plnk', b''),
                ('.wh.back', b''),
                ('back/', None),
            )
        )
        for name in ('etc/gone', 'was'):
            status = os.lstat(layer / name)
            self.assertEqual((True, 0), (stat.S_ISCHR(status.st_mode), status.st_rdev), name)
        for name, opaque in (('opaque', True), ('deep/er', True), ('back', True), ('etc', False), ('deep', False)):
            self.assertEqual(['trusted.overlay.opaque'] if opaque else [], os.listxattr(layer / name), name)
        self.assertEqual(['new'], os.listdir(layer / 'opaque'))
        self.assertEqual({'etc', 'was', 'opaque', 'deep', 'back'}, set(os.listdir(layer)))

    @inside.inside
    def test_overlayfs_shows_the_image(self):
        below, above = self.image(
            images.layer(('etc/', None), ('etc/a', b'1'), ('etc/b', b'1'), ('old/', None), ('old/x', b'1')),
            images.layer(
                ('etc/a', b'2'), ('etc/.wh.b', b''), ('old/', None), ('old/.wh..wh..opq', b''), ('old/y', b'2')
            ),
        )
        target = f'{self.DISK}/mounted'
        os.mkdir(target)
        process.run(['mount', '-t', 'overlay', '-o', f'ro,lowerdir={above}:{below}', 'overlay', target])
        self.stack.callback(process.run, ['umount', target])
        self.assertEqual((['a'], ['y']), (os.listdir(f'{target}/etc'), os.listdir(f'{target}/old')))
        self.assertEqual('2', pathlib.Path(target, 'etc/a').read_text())

    @inside.inside
    def test_what_comes_later_takes_the_place(self):
        (layer,) = self.image(
            images.layer(
                ('a', b'1'),
                ('a', b'22'),
                ('d/x', b'1'),
                ('d', b'now a file'),
                ('f', b'1'),
                ('f/', None),
                ('f/in', b'1'),
                ('real/', None),
                ('real/x', b'1'),
                ('real/', None, {'mode': 0o700}),
                ('way', 'real'),
                ('way/through', b'1'),
                ('link', 'a'),
                ('link', b'not through it'),
            )
        )
        self.assertEqual(b'22', (layer / 'a').read_bytes())
        self.assertEqual(b'now a file', (layer / 'd').read_bytes())
        self.assertEqual(['in'], os.listdir(layer / 'f'))
        self.assertEqual({'x', 'through'}, set(os.listdir(layer / 'real')))
        self.assertEqual(0o700, stat.S_IMODE(os.stat(layer / 'real').st_mode))
        self.assertEqual(b'not through it', (layer / 'link').read_bytes())
        self.assertFalse((layer / 'link').is_symlink())

    @inside.inside
    def test_links_lead_nowhere_else(self):
        """Absolute ones are the image's; what is written through them stays in the layer."""
        base, _ = self.image(
            BASE,
            images.layer(
                ('etc/', None),
                ('abs', '/etc'),
                ('abs/passwd', b'x'),
                ('loop', 'loop'),
                ('up', 'a/../etc'),
                ('/rooted', b'x'),
                ('tricky', '/../../..'),
                ('tricky/evil', b'x'),
                ('other', '/' + hashlib.sha256(BASE).hexdigest()),
            ),
        )
        self.assertEqual(b'#!', (base / 'run').read_bytes())
        self.assertEqual({'layers', 'functions'}, set(os.listdir(self.DISK)))
        self.assertFalse(os.path.exists('/evil'))

    @inside.inside
    def test_a_tree_deeper_than_python_recurses_is_removed(self):
        chain = [('x/' * 100 + 'f', b'')]
        for number in range(15):
            chain += [(f'l{number}', f'/l{number - 1}/' + 'x/' * 100 if number else 'x/' * 100)]
            chain += [(f'l{number}/' + 'x/' * 100 + 'f', b'')]
        self.image(images.layer(*chain))
        self.clean()
        self.assertEqual([], os.listdir(self.layers.folder))
        self.refuse_image('out of the image', images.layer(*chain, ('../x', b'')))

    @inside.inside
    def test_what_leads_out_or_cannot_be_is_refused(self):
        for pattern, *member in (
            ('leads out of the image', '../x', b'x'),
            ('leads out of the image', 'a/../../x', b'x'),
            ('leads out of the image', '/../x', b'x'),
            ('leads out of the image', 'a/.wh...', b''),
            ('leads out of the image', '.wh..', b''),
            ('links out of the image', 'l', '../x'),
            ('links out of the image', 'a/l', '../../etc/passwd'),
            ('out of the image', 'h', images.Hard('../../etc/passwd')),
            ('not in its layer', 'h', images.Hard('etc/passwd')),
            ('not in its layer', 'h', images.Hard('h')),
            ('is a device', 'd', b'', {'type': tarfile.CHRTYPE, 'devmajor': 1, 'devminor': 3}),
            ('is a device', 'd', b'', {'type': tarfile.BLKTYPE}),
            ('is a device', 'd', b'', {'type': tarfile.CHRTYPE}),  # a whiteout by hand
            ('is a sparse file', 's', b'', {'type': tarfile.GNUTYPE_SPARSE}),
            ('cannot hold', 'd', b'', {'type': b'Z'}),
            ('belongs to 65536:0', 'a', b'', {'uid': 65536}),
            ('belongs to 0:70000000', 'a', b'', {'gid': 70_000_000}),
            ('folders deep', '/'.join('x' * 129), b''),
            ('Not a directory', 'run/x', b''),
            ('too long', 'x' * 300, b''),
        ):
            with self.subTest(member):
                error = self.refuse_image(pattern, images.layer(('run', b'x'), tuple(member)))
                self.assertRegex(str(error), '^layer 1: ')

    @inside.inside
    def test_bombs_are_refused_as_they_come(self):
        zeros = images.layer(('zeros', bytes(40 << 20)))
        small = {'most_bytes': 16 << 20}
        for more in ({}, {'form': 'oci'}, {'pack': 'gzip'}, {'pack': 'zstd'}, {'outer': 'gzip'}, {'outer': 'zstd'}):
            with self.subTest(more):
                self.refuse_image('more than 16777216 bytes', zeros, **small, **more)
        halves = [images.layer((name, bytes(10 << 20))) for name in ('a', 'b')]  # together
        self.refuse_image('more than 16777216 bytes', *halves, pack='gzip', **small)
        self.refuse(images.packed(archive(HANDLER, ('z', bytes(40 << 20))), 'gzip'), 'more than 16777216', **small)
        end = images.layer() + bytes(40 << 20)  # behind the end of the tar
        self.refuse_image('more than 16777216 bytes', end, pack='gzip', **small)
        deep = images.layer(*((f'{"/".join("x" * 120)}/{number}/{"/".join("y" * 5)}/z', b'') for number in range(100)))
        with unittest.mock.patch.object(image, 'WORKER', self.worker_with(IMAGE_ENTRIES=300)):
            self.refuse_image('more than 300 files and folders', deep)
            self.refuse_image(
                'more than 300 files and folders',
                *[images.layer(*((f'{n}{k}', b'') for n in range(200))) for k in 'ab'],
            )

    def worker_with(self, **constants):
        """The path of an unpacker with other constants."""
        path = pathlib.Path('/tmp/worker.py')
        root = inside.lab.REPO
        lines = [f'import sys; sys.path.insert(0, {str(root)!r})', 'from handlers.images import unpack']
        lines += [f'unpack.{name} = {value!r}' for name, value in constants.items()]
        path.write_text('\n'.join([*lines, 'sys.exit(unpack.main(sys.argv[1]))']))
        return str(path)

    @inside.inside
    def test_nested_json_and_huge_json_are_refused(self):
        for name in ('manifest.json', 'index.json'):
            for text, pattern in (
                (b'', 'is not JSON'),
                (b'{', 'is not JSON'),
                (b'\xff\xfe', 'is not JSON'),
                (b'[' * 100_000, 'is not JSON'),
                (b'"' + b'x' * (5 << 20) + b'"', 'more than 4194304'),
                (b'7', 'that is no'),
                (b'[7]', 'that is no'),
                (b'[]', 'holds no image|that is no'),
                (b'{}', 'holds no image|that is no'),
            ):
                with self.subTest((name, text[:10])):
                    files = images.files_of([BASE], RUN, form='docker' if name == 'manifest.json' else 'oci')
                    self.refuse(written({**files, name: text}), pattern)

    @inside.inside
    def test_a_config_that_is_none_is_refused(self):
        for config, pattern in (
            ({}, 'has no command'),
            (None, 'has no command'),
            ({'Cmd': []}, 'has no command'),
            ({'Cmd': ['']}, 'has no command'),
            ({'Cmd': 'sh'}, 'Cmd: that is no list'),
            ({'Entrypoint': 'sh'}, 'Entrypoint: that is no list'),
            ({'Cmd': [1]}, 'Cmd: that is no text'),
            ({'Cmd': ['a\0b']}, 'Cmd holds a NUL'),
            ({**RUN, 'Env': {'A': 'b'}}, 'Env: that is no list'),
            ({**RUN, 'Env': ['A']}, "Env: 'A' is not NAME=VALUE"),
            ({**RUN, 'User': 5}, 'User: that is no text'),
            ({**RUN, 'WorkingDir': '/a/../..'}, 'leads out'),
            ({**RUN, 'WorkingDir': []}, None),
            ({**RUN, 'WorkingDir': ['a']}, 'WorkingDir: that is no text'),
            ({**RUN, 'ExposedPorts': ['80']}, 'ExposedPorts: that is no object'),
            ({**RUN, 'ExposedPorts': {'http': {}}}, "'http' is no port"),
            ({**RUN, 'ExposedPorts': {'70000/tcp': {}}}, 'is no port'),
            ({**RUN, 'StopSignal': 'SIGNOT'}, "no signal 'SIGNOT'"),
            ({**RUN, 'StopSignal': '99'}, "no signal '99'"),
            ([], None),
            (['x'], 'that is no object'),
        ):
            if pattern:
                with self.subTest(config):
                    self.refuse_image(pattern, config=config)
        for edit, pattern in (
            ({'rootfs': None}, 'rootfs: that is no object'),
            ({'rootfs': {'diff_ids': ['sha256:x']}}, 'is no SHA-256 digest'),
            ({'rootfs': {'diff_ids': ['sha512:' + 'a' * 128]}}, 'is no SHA-256 digest'),
            ({'rootfs': {'diff_ids': []}}, '1 layers, its config names 0: one is missing or foreign'),
            ({'os': 'windows'}, 'for windows, this server runs linux'),
            ({'architecture': 's390x'}, f'for s390x, this server is {images.CPU}'),
            ({'architecture': 7}, 'architecture: that is no text'),
        ):
            for form in ('docker', 'oci'):
                with self.subTest((form, edit)):
                    self.refuse_image(pattern, form=form, **edit)

    @inside.inside
    def test_what_the_image_says_is_honoured(self):
        config = {
            'Entrypoint': ['/entry', '-x'],
            'Cmd': ['serve', ''],
            'Env': ['PATH=/bin', 'EMPTY=', 'A=b=c', 'A=d'],
            'WorkingDir': 'srv/./app/',
            'User': 'www-data:101',
            'ExposedPorts': {'8080': {}, '80/tcp': {}, '53/udp': {}},
            'StopSignal': 'quit',
            'Healthcheck': {'Test': ['NONE']},
            'Volumes': {'/data': {}},
        }
        self.image(BASE, BASE, config=config)
        digits = hashlib.sha256(BASE).hexdigest()
        self.assertEqual(
            specs.Spec(
                'image',
                ('/entry', '-x', 'serve', ''),
                {'PATH': '/bin', 'EMPTY': '', 'A': 'd'},
                '/srv/app',
                'www-data:101',
                (80, 8080),
                'SIGQUIT',
                (digits, digits),
            ),
            self.spec,
        )
        for text, name, number in (('15', 'SIGTERM', 15), ('SIGRTMIN+3', 'SIGRTMIN+3', 37), (None, 'SIGTERM', 15)):
            shutil.rmtree(f'{self.functions}/1')
            self.image(BASE, config={**RUN, 'StopSignal': text})
            self.assertEqual((name, number, '/'), (self.spec.stop_signal, specs.signal_number(name), self.spec.cwd))

    @inside.inside
    def test_layers_that_lie_or_are_not_there_are_refused(self):
        other = images.Layer(images.layer(('other', b'x')), None)
        for form in ('docker', 'oci'):
            what = form

            def swap(files, content):
                return {name: content if isinstance(each, images.Layer) else each for name, each in files.items()}

            files = images.files_of([BASE], RUN, form=form)
            with self.subTest(form):
                self.refuse(written(swap(files, other)), 'another digest|bytes, not')
                files_without = {name: each for name, each in files.items() if not isinstance(each, images.Layer)}
                self.refuse(written(files_without), 'layer 1 is not in the archive')
                same_size = images.Layer(BASE.replace(b'#!', b'!#'), None)
                self.refuse(written(swap(files, same_size)), 'layer 1: its (blob|content) has another digest')
                self.refuse(written(swap(files, images.Layer(b'x' * len(BASE), None))), 'layer 1: it is no tar')

            def extra(kind, said, what=what):
                if kind == what == 'docker':
                    said[0]['Layers'] *= 2
                elif kind == what == 'oci':
                    said['layers'] *= 2

            self.refuse_image('2 layers, its config names 1: one is missing or foreign', form=form, edit=extra)
        wrong = {'rootfs': {'type': 'layers', 'diff_ids': ['sha256:' + 'a' * 64]}}
        for form, pack in itertools.product(('docker', 'oci'), (None, 'gzip', 'zstd')):
            with self.subTest((form, pack)):
                self.refuse_image('layer 1: its content has another digest', form=form, pack=pack, **wrong)

        def foreign(kind, said):
            if kind == 'oci':
                said['layers'][0] |= {'urls': ['https://example.com/'], 'digest': 'sha256:' + 'a' * 64}

        self.refuse_image('layer 1 is foreign', form='oci', edit=foreign)
        self.refuse(images.image([], RUN), 'the image has no layers')
        self.refuse(images.image([images.layer((str(n), b'')) for n in range(128)], RUN), 'more than 127')

    @inside.inside
    def test_blobs_that_lie_are_refused(self):
        for form in ('docker', 'oci'):
            files = images.files_of([BASE], RUN, form=form)
            config = next(name for name, each in files.items() if isinstance(each, bytes) and b'rootfs' in each)
            self.refuse(
                written({**files, config: files[config].replace(b'/run', b'/ruN')}), 'its config has another digest'
            )
            del files[config]
            self.refuse(written(files), 'its config is not in the archive')
        files = images.files_of([BASE], RUN, form='oci')
        manifest = next(
            name
            for name, each in files.items()
            if isinstance(each, bytes) and b'layers"' in each and b'rootfs' not in each
        )
        self.refuse(written({**files, manifest: b'{}'}), 'its manifest has 2 bytes, not')
        self.refuse(written({**files, manifest: files[manifest][:-1] + b' '}), 'its manifest has another digest')

        def size(kind, said):
            if kind == 'oci':
                said['layers'][0]['size'] += 1

        self.refuse_image('layer 1 has .* bytes, not', form='oci', edit=size)

    @inside.inside
    def test_links_in_the_archive_stay_in_it(self):
        digits = hashlib.sha256(BASE).hexdigest()
        files = images.files_of([BASE], RUN, links=True)
        name = f'{0:064}/layer.tar'
        for link, pattern in (
            ('../../../etc/passwd', 'leads out'),
            ('/etc/passwd', 'not in the archive'),
            ('layer.tar', 'not in the archive'),
            ('..', 'not in the archive'),
        ):
            with self.subTest(link):
                self.refuse(written({**files, name: link}), pattern)
        self.stage(written({**files, name: images.Hard(f'blobs/sha256/{digits}')}))

    @inside.inside
    def test_packed_data_that_is_damaged_or_cut(self):
        for how in ('gzip', 'zstd'):
            data = images.packed(BASE, how)
            for bad in (data[:-9], data[:20] + b'xxxx' + data[24:], data[:10]):
                with self.subTest((how, len(bad))):
                    self.refuse(images.packed(archive(HANDLER, ('x', os.urandom(9999))), how)[:-99], 'data|cut|ends')
                    layer = images.Layer(BASE, how)
                    layer.data, layer.size, layer.digest = bad, len(bad), images.sha256(bad)
                    self.refuse(images.image([layer], RUN), 'layer 1: it')
        both = images.packed(BASE[:1000], 'gzip') + images.packed(BASE[1000:], 'gzip')  # as pigz and others do
        layer = images.Layer(BASE, 'gzip')
        layer.data, layer.size, layer.digest = both, len(both), images.sha256(both)
        self.stage(images.image([layer], RUN, form='oci'))

    @inside.inside
    def test_without_zstd_it_says_so(self):
        self.disk()
        few = pathlib.Path('/tmp/few')
        few.mkdir()
        (few / 'rm').symlink_to(shutil.which('rm'))
        self.stack.enter_context(unittest.mock.patch.dict(os.environ, {'PATH': str(few)}))
        for data in (images.ZSTD_MAGIC + bytes(99), images.image([images.ZSTD_MAGIC + bytes(99)], RUN)):
            error = self.refuse(data, 'packed by zstd, which this server lacks')
            self.assertIn('install zstd', error.hint)

    @inside.inside
    def test_no_descriptor_leaks(self):
        self.stage(images.image([BASE], RUN))
        before = os.listdir('/proc/self/fd')
        for data in (images.image([BASE], RUN), images.image([BASE], {}), b'x'):
            for _ in range(5):
                with contextlib.suppress(image.ImageError):
                    self.stage(data)
        self.assertEqual(len(before), len(os.listdir('/proc/self/fd')))

    @inside.inside
    def test_an_interrupted_upload_leaves_nothing(self):
        data = images.image([BASE], RUN)
        self.refuse(data[:-100], '', error=EOFError, length=len(data))
        for cut in (len(data) // 2, 1000, 700):
            self.refuse(data[:cut], '', length=None)

        def read(size):
            raise ConnectionError('gone')

        with self.assertRaises(ConnectionError), self.staging() as staging:
            staging.receive(read, None)
        self.assertEqual([], os.listdir(self.functions))

    @inside.inside
    def test_several_images_in_one_archive(self):
        for form in ('docker', 'oci'):
            several = [
                images.files_of([BASE], {'Cmd': [ref]}, form=form, ref=ref)
                for ref in ('docker.io/library/a:1', 'localhost/b:latest')
            ]
            data = written(images.joined(*several))
            with self.subTest(form):
                error = self.refuse(data, 'holds 2 images: docker.io/library/a:1, localhost/b:latest')
                self.assertEqual('say which: --image REF', error.hint)
                error = self.refuse(data, 'no c:1, but docker.io/library/a:1, localhost/b:latest', reference='c:1')
                for reference, expected in (('a:1', 0), ('docker.io/library/a:1', 0), ('b', 1), ('localhost/b', 1)):
                    self.stage(data, reference=reference)
                    self.assertEqual((('docker.io/library/a:1', 'localhost/b:latest')[expected],), self.spec.args)
                    self.clean()
        self.refuse_image('no x, but t:1', reference='x')

    @inside.inside
    def test_an_index_for_several_platforms(self):
        ours = images.files_of([BASE], RUN, form='oci', ref=None)
        theirs = images.files_of([BASE], {'Cmd': ['other']}, form='oci', ref=None, architecture='s390x')
        manifests = []
        for files, cpu in ((theirs, 's390x'), (ours, images.CPU)):
            (descriptor,) = json.loads(files['index.json'])['manifests']
            manifests.append({**descriptor, 'platform': {'os': 'linux', 'architecture': cpu}})
        attestation = {**manifests[1], 'platform': {'os': 'unknown', 'architecture': 'unknown'}}
        inner = json.dumps({'schemaVersion': 2, 'manifests': [*manifests, attestation]}).encode()
        outer = {'manifests': [images.descriptor(inner, images.INDEX, annotations={images.REF_NAME: 'x:1'})]}
        nested = {**theirs, **ours, f'blobs/sha256/{images.sha256(inner)}': inner}
        for index in (outer, json.loads(inner)):
            self.stage(written({**nested, 'index.json': json.dumps(index).encode()}))
            self.assertEqual(('/run',), self.spec.args)
            self.clean()
        foreign = json.dumps({'manifests': manifests[:1]}).encode()
        self.refuse(written({**nested, 'index.json': foreign}), f'for s390x, this server is {images.CPU}')
        self.refuse(written({**nested, 'index.json': b'{"manifests": []}'}), 'holds no image')

    @inside.inside
    def test_layers_keep_the_ids_that_they_were_unpacked_with(self):
        stored = layers.Layers('/var/lib/some-layers')
        stored.prepare()
        self.assertEqual(1000000, stored.id_base(1000000))
        self.assertEqual(2000000, stored.id_base(2000000))
        os.mkdir(stored.path('0' * 64))
        self.assertEqual(2000000, stored.id_base(1000000))

    @inside.inside
    def test_shared_layers_are_stored_once_and_go_with_the_last(self):
        top = images.layer(('top', b'x'))
        base, _ = self.image(BASE, top)
        first = os.stat(base).st_ino
        with self.staging() as staging:
            staging.receive(io.BytesIO(images.image([BASE], RUN, form='oci', pack='gzip')).read, None)
            self.assertEqual([], os.listdir(f'{staging._folder}/work'), 'it was unpacked again')
            self.layers.collect(set)
            self.assertEqual({base.name}, self.layers.present(), 'the staging needs it')
            staging.keep(f'{self.functions}/2/1')
        self.assertEqual(first, os.stat(base).st_ino)
        self.layers.collect(lambda: {base.name})
        self.assertEqual({base.name}, self.layers.present())
        self.layers.collect(set)
        self.assertEqual([], os.listdir(self.layers.folder))

    @inside.inside
    def test_a_stored_layer_is_still_checked(self):
        self.image(BASE)
        lie = images.files_of([BASE], RUN, form='oci')
        lie = {
            name: images.Layer(BASE.replace(b'#!', b'!#'), None) if isinstance(each, images.Layer) else each
            for name, each in lie.items()
        }
        with self.assertRaisesRegex(image.ImageError, 'has another digest'), self.staging() as staging:
            staging.receive(io.BytesIO(written(lie)).read, None)

    @inside.inside
    def test_two_who_bring_the_same_layer(self):
        self.disk()
        data = images.image([BASE], RUN)
        with self.staging() as one, self.staging() as other:
            threads = [
                threading.Thread(target=each.receive, args=(io.BytesIO(data).read, None)) for each in (one, other)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            one.keep(f'{self.functions}/1/1')
            self.layers.collect(set)
            other.keep(f'{self.functions}/2/1')
        self.assertEqual({hashlib.sha256(BASE).hexdigest()}, self.layers.present())
        self.assertEqual({'1', '2'}, set(os.listdir(self.functions)))

    @inside.inside
    def test_what_a_killed_run_left_is_removed(self):
        self.disk()
        os.makedirs(f'{self.layers.folder}/.{"a" * 64}/x')
        os.makedirs(f'{self.layers.folder}/{"b" * 64}/x')
        os.symlink('/etc', f'{self.layers.folder}/{"b" * 64}/link')
        self.layers.prepare()
        self.assertEqual(['b' * 64], os.listdir(self.layers.folder))
        self.layers.collect(set)
        self.assertEqual([], os.listdir(self.layers.folder))
        self.assertTrue(os.path.exists('/etc/passwd'))

    @inside.inside
    def test_an_unpacker_that_lies_is_not_believed(self):
        self.disk()
        good = {'kind': 'command', 'args': ['x']}
        digits = 'a' * 64
        for answer in (
            '',
            '[]',
            '{}',
            '[' * 100_000,
            json.dumps({'spec': good, 'layers': []}),  # without a tree
            json.dumps({'spec': good, 'layers': ['../../x']}),
            json.dumps({'spec': {'kind': 'image', 'args': ['x'], 'layers': [digits]}, 'layers': []}),
            json.dumps({'spec': {'kind': 'image', 'args': ['x'], 'layers': [digits]}, 'layers': [digits]}),
            json.dumps({'spec': {'kind': 'image', 'args': ['x'], 'layers': [digits]}, 'layers': digits}),
            json.dumps({'error': 'two\nlines', 'hint': 7}),
        ):
            path = pathlib.Path('/tmp/liar.py')
            path.write_text(f'print({answer!r})')
            with self.subTest(answer[:40]), unittest.mock.patch.object(image, 'WORKER', str(path)):
                self.refuse(b'x', 'cannot be unpacked|two lines')


class Specs(unittest.TestCase):
    """What is read from a spec.json."""

    def test_there_and_back(self):
        spec = specs.Spec('image', ('a', 'b'), {'A': 'b'}, '/', 'u', (1, 2), 'SIGHUP', ('a' * 64,), 1.5, 3)
        self.assertEqual(spec, specs.Spec.from_json(spec.to_json()))

    def test_every_field_is_checked(self):
        good = specs.Spec('image', ('a',), {'A': 'b'}, '/', 'u', (1,), 'SIGHUP', ('a' * 64,), 1.5, 3)._asdict()
        for change in (
            {'kind': 'other'},
            {'kind': None},
            {'kind': 'command'},
            {'args': 'a'},
            {'args': []},
            {'args': [1]},
            {'args': ['']},
            {'args': ['\0']},
            {'args': ['\ud800']},
            {'env': []},
            {'env': {'A': 1}},
            {'env': {'': 'x'}},
            {'env': {'A=': 'x'}},
            {'cwd': 'a'},
            {'cwd': '/../a'},
            {'cwd': None},
            {'user': 0},
            {'ports': [0]},
            {'ports': [True]},
            {'ports': 80},
            {'stop_signal': 'TERM'},
            {'stop_signal': 15},
            {'layers': ['../x']},
            {'layers': ['a' * 64] * 128},
            {'layers': []},
            {'start_timeout_s': 'x'},
            {'start_timeout_s': 0},
            {'concurrency': 0},
            {'concurrency': 1.0},
            {'more': 1},
        ):
            with self.subTest(change), self.assertRaises(ValueError):
                specs.Spec.from_json(json.dumps({**good, **change}))
        for text in ('', '[]', '7', '[' * 100_000):
            with self.subTest(text[:5]), self.assertRaises(ValueError):
                specs.Spec.from_json(text)


class OtherTools(Staged):
    """What podman and skopeo write."""

    @inside.inside
    def test_podman_and_skopeo(self):
        for program in ('podman', 'skopeo'):
            if not process.installed(program):
                self.skipTest(f'{program} is not installed (./deps.sh test installs it)')
        self.disk()
        work = pathlib.Path(self.DISK, 'work')
        work.mkdir()
        (work / 'run').write_text('#!')
        (work / 'Containerfile').write_text(
            'FROM scratch\nCOPY run /bin/run\nCOPY --chown=33:34 run /srv/x\n'
            'ENV A=b\nUSER 33\nWORKDIR /srv\nEXPOSE 8080\nSTOPSIGNAL SIGQUIT\nENTRYPOINT ["/bin/run"]\nCMD ["x"]\n'
        )
        podman = ['podman', '--root', f'{work}/store', '--runroot', f'{work}/run-root', '--storage-driver', 'vfs']
        podman += ['--cgroup-manager', 'cgroupfs']
        process.run([*podman, 'build', '--isolation=chroot', '-t', 'made:1', str(work)], timeout_s=120)
        process.run([*podman, 'save', '-o', f'{work}/docker.tar', 'made:1'], timeout_s=60)
        process.run([*podman, 'save', '--format', 'oci-archive', '-o', f'{work}/oci.tar', 'made:1'], timeout_s=60)
        copied = f'oci-archive:{work}/copied.tar:made:1'
        process.run(['skopeo', '--insecure-policy', 'copy', f'docker-archive:{work}/docker.tar', copied], timeout_s=60)
        for name in ('docker.tar', 'oci.tar', 'copied.tar'):
            with self.subTest(name):
                self.stage((work / name).read_bytes(), reference='made:1')
                spec = self.spec
                self.assertEqual(
                    (('/bin/run', 'x'), 'b', '/srv', '33', (8080,), 'SIGQUIT'),
                    (spec.args, spec.env['A'], spec.cwd, spec.user, spec.ports, spec.stop_signal),
                )
                found = [pathlib.Path(self.layers.path(digits), 'srv/x') for digits in spec.layers]
                (found,) = [path for path in found if path.exists()]
                self.assertEqual((self.ID_BASE + 33, self.ID_BASE + 34), os.stat(found)[4:6])
                shutil.rmtree(f'{self.functions}/1')
                self.layers.collect(set)

    @inside.inside
    def test_they_read_what_the_tests_write(self):
        if not process.installed('skopeo'):
            self.skipTest('skopeo is not installed (./deps.sh test installs it)')
        self.disk()
        for form, kind in (('docker', 'docker-archive'), ('oci', 'oci-archive')):
            path = images.image([BASE], RUN, path=f'{self.DISK}/{form}.tar', form=form, pack='gzip')
            out = f'dir:{self.DISK}/{form}'
            process.run(['skopeo', '--insecure-policy', 'copy', f'{kind}:{path}', out], timeout_s=60)


if __name__ == '__main__':
    unittest.main()
