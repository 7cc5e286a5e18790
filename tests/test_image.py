"""Archives from strangers: what becomes a revision, what is refused, and that nothing remains of what was."""

import contextlib
import io
import os
import pathlib
import shutil
import stat
import tarfile
import unittest

import shell
from handlers import image
from tests import inside

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


class Inside(unittest.TestCase):
    """Paths alone, without a root."""

    def test_what_stays_in_the_folder(self):
        for path in ('a', 'a/b', './a', 'a/../b', 'a//b', '..a', 'a..', '/'.join('x' * image.MOST_DEPTH)):
            image.inside(path, path)

    def test_what_leads_out_of_it_or_too_deep(self):
        for path in ('..', '../a', 'a/../../b', '/a', '//a', './..', 'a\0b', '/'.join('x' * (image.MOST_DEPTH + 1))):
            with self.subTest(path), self.assertRaises(image.ImageError):
                image.inside(path, path)


class Stage(inside.InHost):
    FOLDER = '/var/lib/functions'

    def receive(self, data, folder=FOLDER, length=None):
        """Stage an archive and keep it as 1/1; the folder."""
        with image.Staging(folder) as staging:
            staging.receive(io.BytesIO(data).read, len(data) if length is None else length)
            staging.keep(f'{folder}/1/1')
        self.assertEqual(['1'], os.listdir(folder))
        self.stack.callback(shutil.rmtree, folder)
        return pathlib.Path(folder, '1', '1')

    def refuse(self, data, pattern, error=image.ImageError, folder=FOLDER, **more):
        with self.assertRaisesRegex(error, pattern) as caught:
            self.receive(data, folder, **more)
        self.assertEqual([], os.listdir(folder), 'something remains')
        self.assertNotIn('\n', str(caught.exception))
        return caught.exception

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
        for where, folders, names in os.walk(folder):
            for name in (*folders, *names):
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
        self.assertEqual('found\n', shell.run(['/usr/bin/python3', str(folder / 'handler.py')]).stdout)
        (more,) = (folder / 'lib').rglob('more.*.pyc')
        code = 'import marshal, sys; print(marshal.loads(open(sys.argv[1], "rb").read()[16:]).co_filename)'
        self.assertEqual('/function/lib/more.py\n', shell.run(['/usr/bin/python3', '-c', code, str(more)]).stdout)

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
        self.assertFalse(os.path.exists(f'{self.FOLDER}/../x'))

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
            self.assertEqual([], os.listdir(self.FOLDER))
        self.assertFalse(os.path.exists('/var/lib/evil'))
        self.assertFalse(os.path.exists(f'{self.FOLDER}/evil'))

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
        folders = (entry(f'd{number}', kind=tarfile.DIRTYPE) for number in range(image.MOST_ENTRIES + 1))
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
        for bad in (b'', b'PK\3\4' + bytes(600), os.urandom(5000), whole[:3000], whole[:700], b'x' * 511):
            with self.subTest(len(bad)):
                self.refuse(bad, '.')

    @inside.inside
    def test_a_body_that_ends_early_leaves_nothing(self):
        whole = archive(HANDLER)
        self.refuse(whole[:-100], '', error=EOFError, length=len(whole))
        self.refuse(b'', '', error=EOFError, length=5)

    @inside.inside
    def test_no_more_is_read_than_was_announced(self):
        stream = io.BytesIO(archive(HANDLER) + b'the next request')
        with image.Staging(self.FOLDER) as staging:
            staging.receive(stream.read, len(archive(HANDLER)))
        self.assertEqual(b'the next request', stream.read())
        self.assertEqual([], os.listdir(self.FOLDER))

    @inside.inside
    def test_a_full_disk_is_named_and_nothing_remains(self):
        small = '/var/lib/small'
        os.mkdir(small)
        shell.run(['mount', '-t', 'tmpfs', '-o', 'size=1m,nr_inodes=64', 'small', small])
        self.stack.callback(shell.run, ['umount', small])
        folder = f'{small}/functions'
        for data in (
            archive(HANDLER, ('big', bytes(2 << 20))),  # while it arrives
            archive(HANDLER, ('half', bytes(600 << 10))),  # while it is unpacked
            archive(HANDLER, *((f'f{number}', 'x') for number in range(100))),  # no room for one file more
        ):
            error = self.refuse(data, 'no space left on the disk', error=image.DiskFull, folder=folder)
            self.assertTrue(error.hint)
        with contextlib.suppress(OSError):
            for number in range(1000):
                pathlib.Path(small, f'fill{number}').touch()
        with self.assertRaises(image.DiskFull):
            image.Staging(folder)
        self.assertEqual([], os.listdir(folder))

    @inside.inside
    def test_a_kept_revision_takes_the_place_of_a_leftover(self):
        leftover = pathlib.Path(self.FOLDER, '1', '1', 'old')
        leftover.parent.mkdir(parents=True)
        leftover.touch()
        folder = self.receive(archive(HANDLER))
        self.assertEqual({'handler.py', '__pycache__'}, set(os.listdir(folder)))

    @inside.inside
    def test_the_worker_holds_nothing_that_is_not_its_own(self):
        """What runs on a stranger's bytes: another user, no capability, no way back to the host's files."""
        probe = '/var/lib/probe'
        os.mkdir(probe)
        code = (
            'import os, sys; sys.path.insert(0, sys.argv[1]); import image\n'
            'def unpack(archive):\n'
            '    print(os.getresuid(), os.getgroups(), os.listdir("/"), os.listdir("../.."))\n'
            'status = open("/proc/self/status")\n'  # opened before: there is no /proc behind chroot
            'image.unpack = unpack\nimage.worker(sys.argv[2])\n'
            'print([l.split()[1] for l in status if l.startswith(("CapEff", "CapPrm", "NoNewPrivs"))])\n'
        )
        handlers = os.path.dirname(os.path.abspath(image.__file__))
        out = shell.run(['/usr/bin/python3', '-I', '-S', '-c', code, handlers, probe]).stdout.splitlines()
        self.assertEqual('(65534, 65534, 65534) [] [] []', out[0])
        self.assertEqual("['0000000000000000', '0000000000000000', '1']", out[1])


if __name__ == '__main__':
    unittest.main()
