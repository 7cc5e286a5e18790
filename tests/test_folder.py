"""A folder from a stranger: what becomes a function, what is refused, and that nothing remains of it."""

import os
import shutil
import stat
import tarfile
import unittest

from handlers.images import unpack
from handlers.images.folder import FOLDER_DEPTH, check_inside
from handlers.images.spec import Spec, tree
from handlers.images.streams import ImageError
from host import process
from tests import images, inside
from tests.staged import HANDLER, Staged, archive, entry


class Inside(unittest.TestCase):
    """Paths alone, without a root."""

    def test_what_stays_in_the_folder(self):
        for path in ('a', 'a/b', './a', 'a/../b', 'a//b', '..a', 'a..', '/'.join('x' * FOLDER_DEPTH)):
            check_inside(path, path)

    def test_what_leads_out_of_it_or_too_deep(self):
        too_deep = '/'.join('x' * (FOLDER_DEPTH + 1))
        for path in ('..', '../a', 'a/../../b', '/a', '//a', './..', 'a\0b', too_deep):
            with self.subTest(path), self.assertRaises(ImageError):
                check_inside(path, path)


class Folders(Staged):
    def receive(self, data, **more):
        """The files of a folder that was staged."""
        folder = self.stage(data, **more)
        self.stack.callback(shutil.rmtree, folder.parent, ignore_errors=True)
        self.assertEqual(str(folder / 'tree'), tree(folder))
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
        except ImageError:
            self.assertEqual([], os.listdir(self.functions))
        self.assertFalse(os.path.exists(f'{self.DISK}/evil'))
        self.assertFalse(os.path.exists(f'{self.functions}/evil'))

    @inside.inside
    def test_a_file_is_not_written_through_a_link_or_twice(self):
        for name in ('link', 'handler.py'):
            first = entry('link', kind=tarfile.SYMTYPE, link='handler.py')
            self.refuse(archive(HANDLER, first, (name, 'other')), 'exists')

    @inside.inside
    def test_no_file_is_written_through_a_link(self):
        up = entry('a/b', kind=tarfile.SYMTYPE, link='../c')
        self.refuse(archive(HANDLER, ('c/x', ''), up, ('a/b/y', '')), "'a/b/y' goes through a link")

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
    def test_a_folder_says_its_command(self):
        self.receive(archive(HANDLER))
        self.assertEqual(Spec('handler'), self.spec)
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
                spec = self.spec.effective({})
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
            ('command = " "', 'command: is not a command'),
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
            ('#' * 70_000, 'more than 16384 bytes'),
        ):
            with self.subTest(text[:20]):
                error = self.refuse(archive(HANDLER, ('faas.toml', text)), pattern)
                if 'no setting' in pattern:
                    self.assertTrue(error.hint.startswith('there is: command, build, env, '), error.hint)
        self.refuse(archive(HANDLER, entry('faas.toml', kind=tarfile.DIRTYPE)), 'faas.toml is not a file')

    @inside.inside
    def test_a_procfile_says_which_one_serves(self):
        for text, pattern in (('', '0 lines'), ('a: b\nworker: b', '2 lines'), ('web:', 'command'), ('"', 'quot')):
            self.refuse(archive(HANDLER, ('Procfile', text)), pattern)
        self.receive(archive(('Procfile', 'release: x\nweb: gunicorn -b :$PORT app\nworker: y\n')))
        self.assertEqual(('gunicorn', '-b', ':$PORT', 'app'), self.spec.args)
        self.assertEqual(("the Procfile: left out 'release', 'worker'",), self.spec.warnings)

    @inside.inside
    def test_a_folder_may_be_packed(self):
        for how in ('gzip', 'zstd'):
            folder = self.receive(images.packed(archive(HANDLER, ('a', 'b')), how), length=None)
            self.assertEqual('b', (folder / 'a').read_text())
            shutil.rmtree(folder.parent.parent)

    @inside.inside
    def test_what_is_no_tar_or_was_cut_is_refused(self):
        whole = archive(HANDLER, ('big', bytes(100_000)))
        for bad in (b'', b'PK\3\4' + bytes(600), os.urandom(5000), whole[:3000], whole[:700], whole[:512], b'x' * 511):
            with self.subTest(len(bad)):
                self.refuse(bad, '.')


if __name__ == '__main__':
    unittest.main()
