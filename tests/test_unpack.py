"""The process that unpacks: what it may do, what layers become, and what an image says of itself."""

import hashlib
import os
import pathlib
import shutil
import stat
import subprocess
import tarfile
import unittest
import unittest.mock

from handlers.images import staging
from handlers.images.spec import Spec, signal_number
from host import process
from tests import images, inside
from tests.staged import BASE, HANDLER, RUN, Staged, StagedImages, archive


class Worker(Staged):
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


class Unpacked(StagedImages):
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
        with unittest.mock.patch.object(staging, 'WORKER', self.worker_with(IMAGE_ENTRIES=300)):
            self.refuse_image('more than 300 files and folders', deep)
            self.refuse_image(
                'more than 300 files and folders',
                *[images.layer(*((f'{n}{k}', b'') for n in range(200))) for k in 'ab'],
            )

    @inside.inside
    def test_a_config_that_is_none_is_refused(self):
        for config, pattern in (
            ({}, 'has no command'),
            (None, 'has no command'),
            ({'Cmd': []}, 'has no command'),
            ({'Cmd': ['']}, 'has no command'),
            ({'Cmd': 'sh'}, 'Cmd is not a list'),
            ({'Entrypoint': 'sh'}, 'Entrypoint is not a list'),
            ({'Cmd': [1]}, 'Cmd is not a text'),
            ({'Cmd': ['a\0b']}, 'Cmd holds a NUL'),
            ({**RUN, 'Env': {'A': 'b'}}, 'Env is not a list'),
            ({**RUN, 'Env': ['A']}, "Env: 'A' is not NAME=VALUE"),
            ({**RUN, 'User': 5}, 'User is not a text'),
            ({**RUN, 'WorkingDir': '/a/../..'}, 'leads out'),
            ({**RUN, 'WorkingDir': []}, None),
            ({**RUN, 'WorkingDir': ['a']}, 'WorkingDir is not a text'),
            ({**RUN, 'ExposedPorts': ['80']}, 'ExposedPorts is not an object'),
            ({**RUN, 'Labels': {'faas.memroy': '1'}}, "the LABELs faas..: there is no setting 'memroy'"),
            ({**RUN, 'Labels': {'faas.pids': 'x'}}, 'the LABELs faas..: pids must be a number'),
            ({**RUN, 'StopSignal': 'SIGNOT'}, "no signal 'SIGNOT'"),
            ({**RUN, 'StopSignal': '99'}, "no signal '99'"),
            ([], None),
            (['x'], 'is not an object'),
        ):
            if pattern:
                with self.subTest(config):
                    self.refuse_image(pattern, config=config)
        for edit, pattern in (
            ({'rootfs': None}, 'rootfs is not an object'),
            ({'rootfs': {'diff_ids': ['sha256:x']}}, 'is not a SHA-256 digest'),
            ({'rootfs': {'diff_ids': ['sha512:' + 'a' * 128]}}, 'is not a SHA-256 digest'),
            ({'rootfs': {'diff_ids': []}}, '1 layers, the config names 0: one is missing or foreign'),
            ({'os': 'windows'}, 'for windows, this server runs linux'),
            ({'architecture': 's390x'}, f'for s390x, this server is {images.CPU}'),
            ({'architecture': 7}, 'architecture is not a text'),
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
            'ExposedPorts': {'8080': {}, '80/TCP': {}, '53/udp': {}, '90-92': {}, 'http': {}, '70000/tcp': {}},
            'Labels': {'faas.memory': '64M', 'faas.env.B': 'x', 'maintainer': 'me'},
            'StopSignal': 'quit',
            'Healthcheck': {'Test': ['CMD', '/check'], 'Interval': 5 * 10**9, 'Retries': 2},
            'Volumes': {'/data': {}},
        }
        self.image(BASE, BASE, config=config)
        digits = hashlib.sha256(BASE).hexdigest()
        self.assertEqual(
            Spec(
                'image',
                ('/entry', '-x', 'serve', ''),
                {'PATH': '/bin', 'EMPTY': '', 'A': 'd'},
                '/srv/app',
                'www-data:101',
                (80, 90, 91, 92, 8080),
                'SIGQUIT',
                (digits, digits),
                settings={'memory': 64 << 20, 'env': {'B': 'x'}},
                volumes=('/data',),
                healthcheck={'args': ['/check'], 'interval_s': 5, 'timeout_s': 30, 'retries': 2},
                warnings=("EXPOSE: 'http', '70000/tcp' is not a port and counts for nothing",),
            ),
            self.spec,
        )
        for text, name, number in (('15', 'SIGTERM', 15), ('SIGRTMIN+3', 'SIGRTMIN+3', 37), (None, 'SIGTERM', 15)):
            shutil.rmtree(f'{self.functions}/1')
            self.image(BASE, config={**RUN, 'StopSignal': text})
            self.assertEqual((name, number, '/'), (self.spec.stop_signal, signal_number(name), self.spec.cwd))

    @inside.inside
    def test_devices_are_left_out(self):
        """A whiteout by hand among them: it would remove what lies below."""
        null = {'type': tarfile.CHRTYPE, 'devmajor': 1, 'devminor': 3}
        devices = [(f'dev/{name}', b'', null) for name in ('null', 'a', 'b', 'c')]
        layer = images.layer(('run', b'x'), *devices, ('disk', b'', {'type': tarfile.BLKTYPE}))
        self.image(layer, images.layer(('run', b'', {'type': tarfile.CHRTYPE})), config=RUN)
        (top, _) = (f'{self.layers.folder}/{digits}' for digits in self.spec.layers)
        self.assertEqual((['run'], []), (sorted(set(os.listdir(top)) - {'dev'}), os.listdir(_)))
        (warning,) = self.spec.warnings
        self.assertRegex(warning, "^left out the devices 'dev/null', 'dev/a', 'dev/b', …: each instance gets a /dev$")

    @inside.inside
    def test_without_zstd_it_says_so(self):
        self.disk()
        few = pathlib.Path('/tmp/few')
        few.mkdir()
        (few / 'rm').symlink_to(shutil.which('rm'))
        self.stack.enter_context(unittest.mock.patch.dict(os.environ, {'PATH': str(few)}))
        for data in (images.ZSTD_MAGIC + bytes(99), images.image([images.ZSTD_MAGIC + bytes(99)], RUN)):
            error = self.refuse(data, 'packed with zstd, which is not installed here')
            self.assertIn('install zstd', error.hint)


if __name__ == '__main__':
    unittest.main()
