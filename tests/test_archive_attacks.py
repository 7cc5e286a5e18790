"""Archives that attack: they claim a layer of another, cost more than their size says, or go on without an uploader."""

import contextlib
import gzip
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import tarfile
import tempfile
import threading
import time
import unittest
import unittest.mock

from handlers.images import archive, folder, staging, streams, tar
from handlers.images.streams import ImageError
from tests import images, inside, lab, serving, staged
from tests.staged import BASE, HANDLER, RUN, StagedImages, written

SECRET = images.layer(('secret', b'of another function', {'mode': 0o600}))


class Content(StagedImages):
    """A layer is what its bytes hash to. Knowing its digest is not having it."""

    def claim(self, *blobs, form, absent=False):
        """The archive of an image whose layers are `blobs` (images.Layer), of which each says that it is SECRET."""
        for blob in blobs:
            blob.diff_id = images.sha256(SECRET)
        files = images.files_of(blobs, RUN, form=form)
        if absent:
            files = {name: each for name, each in files.items() if not isinstance(each, images.Layer)}
        return written(files)

    def refuse_claim(self, data, pattern):
        with self.assertRaisesRegex(ImageError, pattern), self.staging() as staging:
            staging.receive(io.BytesIO(data).read, None)
        self.assertEqual(['1'], os.listdir(self.functions), 'something remains')
        self.assertEqual({images.sha256(SECRET)}, self.layers.present())

    @inside.inside
    def test_a_digest_gives_no_layer_of_another(self):
        self.image(SECRET)
        for form in ('docker', 'oci'):
            for pack in (None, 'gzip', 'zstd'):
                decoys = [images.Layer(images.layer((name, b'x')), pack) for name in ('a', 'b')]
                with self.subTest((form, pack)):
                    self.refuse_claim(self.claim(decoys[0], form=form), 'layer 1: the content has another digest')
                    self.refuse_claim(self.claim(*decoys, form=form), 'layer .: the content has another digest')
                    self.refuse_claim(self.claim(decoys[0], decoys[0], form=form), 'the content has another digest')
                    self.refuse_claim(self.claim(decoys[0], form=form, absent=True), 'is not in the archive')
                    genuine = images.Layer(SECRET, pack)  # the one shows that it has the layer, the other does not
                    self.refuse_claim(self.claim(genuine, decoys[0], form=form), 'layer 2: the content has another')
                    self.refuse_claim(self.claim(decoys[0], genuine, form=form), 'layer 1: the content has another')

    @inside.inside
    def test_a_blob_is_believed_for_the_layer_alone_that_it_was_found_to_hold(self):
        """Its bytes are hashed all the same, and it needs a stored layer."""
        few = pathlib.Path('/tmp/few')
        few.mkdir()
        (few / 'rm').symlink_to(shutil.which('rm'))
        for form in ('docker', 'oci'):
            for pack in ('gzip', 'zstd'):
                with self.subTest((form, pack)):
                    self.image(SECRET, form=form, pack=pack)
                    blob = images.sha256(images.packed(SECRET, pack))
                    self.assertEqual([blob], self.layers.blobs(images.sha256(SECRET)))
                    good = images.image([SECRET], RUN, form=form, pack=pack)
                    with unittest.mock.patch.dict(os.environ, PATH=str(few)):  # nothing needs zstd: it is not unpacked
                        self.receive(good)
                    genuine, bad = images.Layer(SECRET, pack), images.Layer(SECRET, pack)
                    bad.data = bad.data[:-1] + bytes([bad.data[-1] ^ 1])
                    self.refuse_claim(written(images.files_of([bad], RUN, form=form)), 'another digest|damaged')
                    genuine.diff_id = images.sha256(BASE)
                    self.refuse_claim(written(images.files_of([genuine], RUN, form=form)), 'another digest')
                    self.refuse_claim(self.claim(images.Layer(BASE, pack), form=form), 'another digest')
                    self.clean()
                    self.assertEqual([], os.listdir(self.layers.folder))
                    self.image(SECRET, form=form, pack=pack)
                    self.clean()

    def receive(self, data):
        with self.staging() as staging:
            staging.receive(io.BytesIO(data).read, None)
            self.assertEqual([], os.listdir(f'{staging._folder}/work'), 'it was unpacked again')


def header(kind, size=0, name='f'):
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.USTAR_FORMAT)


def extra(kind, data):
    """An entry that adds `data` to the header of the next one."""
    return header(kind, len(data)) + data + bytes(-len(data) % 512)


def record(key, value):
    """A pax record."""
    text = f' {key}={value}\n'.encode()
    size = len(text)
    while size != len(text) + len(str(size)):
        size = len(text) + len(str(size))
    return str(size).encode() + text


FILE = header(tarfile.REGTYPE)
PAX, PAX_GLOBAL, LONG_NAME = b'x', b'g', b'L'


@lab.not_in_check
class Cost(unittest.TestCase):
    """What is small is soon read or refused. All of these pack well: most are 1 to 20 kB when they arrive."""

    MOST_S = 2  # of processor time

    def soon(self, function, pattern=None, most_s=MOST_S):
        """Call it. It returns or raises what `pattern` says, within most_s of processor time."""
        before = time.process_time()
        try:
            function()
            self.assertIsNone(pattern, 'it was not refused')
        except ImageError as error:
            self.assertRegex(str(error), pattern or 'nothing')
        self.assertLess(time.process_time() - before, most_s)

    def members(self, data):
        return lambda: sum(1 for _ in tar.members(streams.Reader([data])))

    def find(self, files, *reference):
        """find_image() in an archive of these files."""

        def find():
            with tempfile.TemporaryFile() as file:
                file.write(files if isinstance(files, bytes) else written(files))
                file.flush()
                archive.find_image(archive.Archive(file.fileno()), *reference)

        return find

    def test_pax_records(self):
        tiny = b'6 a=b\n'
        self.soon(self.members(extra(PAX, tiny * (tar.MOST_HEADER // 6)) + FILE), 'more than 256 pax records')
        self.soon(self.members(extra(PAX_GLOBAL, tiny * (tar.MOST_HEADER // 6)) + FILE), 'more than 256 pax records')
        self.soon(self.members(extra(PAX, tiny * 256) + FILE))
        for bad in (b'1' * tar.MOST_HEADER, b'9' * 11 + b' a=b\n', b'-6 a=b\n', b'0 a=b\n', b'6 aab\n', b'5 a=b\n'):
            with self.subTest(bad[:12]):
                self.soon(self.members(extra(PAX, bad) + FILE), 'malformed pax records')
        big = record('comment', 'x' * (tar.MOST_HEADER - 30))
        self.soon(self.members(extra(PAX, big) + FILE))
        for key in ('size', 'uid'):
            self.soon(self.members(extra(PAX, record(key, '9' * 100_000)) + FILE), 'malformed|ends in the middle')

    def test_headers_without_a_file(self):
        for kind, data in ((PAX, b'6 a=b\n' * 170), (PAX_GLOBAL, b''), (LONG_NAME, b'name'), (b'K', b'link')):
            with self.subTest(kind):
                chain = extra(kind, data)
                self.soon(self.members(chain * 30_000 + FILE), 'more than 8 headers for one file')
                self.soon(self.members((chain * 8 + FILE) * 2))

    def test_long_names(self):
        long = 'a/' * 250_000 + 'x'
        for start in (
            extra(PAX_GLOBAL, record('path', long)),
            extra(PAX_GLOBAL, record('linkpath', long)),
            extra(LONG_NAME, long.encode()),
        ):
            self.soon(self.find(start + FILE * 500), 'name or a link of more than 4095 bytes')
        self.soon(self.find(extra(PAX_GLOBAL, record('path', 'a/' * 2047)) + FILE * 5000), 'not in the archive')

    def test_gzip_members(self):
        empty = gzip.compress(b'')
        for data, pattern in ((empty * 200_000, None), (b'\0'.join([empty] * 200_000), None)):
            chunks = [data[at : at + streams.CHUNK] for at in range(0, len(data), streams.CHUNK)]
            self.soon(lambda chunks=chunks: list(streams.gunzip(chunks)), pattern)
        with unittest.mock.patch.object(streams, 'MOST_GZIP_MEMBERS', 1000):
            self.soon(lambda: list(streams.gunzip([empty * 1001])), 'more than 1000 members')
        parts = [os.urandom(size) for size in (1, 100_000, 0, 3 << 20, 5)]
        packed = bytes(512).join(map(gzip.compress, parts)) + bytes(99_999)
        for size in (7777, 1 << 20, len(packed)):
            chunks = (packed[at : at + size] for at in range(0, len(packed), size))
            self.assertEqual(b''.join(parts), b''.join(streams.gunzip(chunks)))

    def test_zstd_frames(self):
        for empty in (images.packed(b'', 'zstd'), b'\x50\x2a\x4d\x18' + bytes(4)):
            for count, pattern in ((1000, None), (1001, 'more than 1000 frames')):
                data = empty * count
                with unittest.mock.patch.object(streams, 'MOST_ZSTD_FRAMES', 1000):
                    self.soon(lambda data=data: list(streams.unzstd([data], self.start_zstd)), pattern)

    def start_zstd(self):
        child = subprocess.Popen(['zstd', '-dcq'], -1, None, *(subprocess.PIPE,) * 3)
        self.addCleanup(child.wait, 10)
        fds = []
        for pipe in (child.stdin, child.stdout, child.stderr):
            fds.append(os.dup(pipe.fileno()))
            pipe.close()
        return fds

    def test_indexes_that_name_an_index_often(self):
        for width, leaf in ((20, b'{}'), (20, b' ' * 100_000 + b'{}'), (1000, b'{}')):
            files, inner = {'oci-layout': b'{}'}, leaf
            for _ in range(archive.MOST_NESTED):
                files[f'blobs/sha256/{images.sha256(inner)}'] = inner
                inner = json.dumps({'manifests': [images.descriptor(inner, images.INDEX)] * width}).encode()
            files['index.json'] = inner
            with self.subTest((width, len(leaf))):
                self.soon(self.find(files), 'too many indexes')

    def test_lists_that_are_long(self):
        many = [{'Config': 'c', 'RepoTags': ['a'] * 800_000}]
        self.soon(self.find({'manifest.json': json.dumps(many).encode()}, 'b' * 60_000), 'the archive holds no')
        many = [{'Config': 'c.json', 'Layers': ['c.json'] * 400_000}]
        files = {'manifest.json': json.dumps(many).encode(), 'c.json': b'{}'}
        self.soon(self.find(files), 'has 400000 layers, more than 127')
        empty = {'platform': {'os': 0}}
        files = {'oci-layout': b'{}', 'index.json': json.dumps({'manifests': [empty] * 150_000}).encode()}
        self.soon(self.find(files), 'is not a text')
        for text in ('[' + '[],' * 1_300_000 + '[]]', '[' + '{},' * 1_300_000 + '{}]', '9' * (4 << 20)):
            self.soon(self.find({'manifest.json': text.encode()}), 'is not')
        self.soon(self.find({'manifest.json': b'9' * ((4 << 20) - 2) + b'.0'}), 'is not')

    def test_settings(self):
        for text in ('.'.join('a' * 8000) + '=1', '[' + '.'.join('a' * 5000) + ']\n' + 'b=1\n'):
            self.soon(lambda text=text: self.toml(text), 'there is no setting|is not TOML')
        for text in ('.'.join('a' * 32_000) + '=1',):
            self.soon(lambda text=text: self.toml(text), 'more than 16384 bytes')

    def toml(self, text):
        with unittest.mock.patch.object(folder, 'read_settings', lambda name: self.read(text)):
            folder.faas_toml()

    def read(self, text):
        if len(text) > folder.MOST_SETTINGS:
            raise ImageError(f'faas.toml has more than {folder.MOST_SETTINGS} bytes')
        return text


class CostOfTrees(StagedImages):
    def soon(self, most_s, function, *args, **more):
        before = time.monotonic()
        function(*args, **more)
        self.assertLess(time.monotonic() - before, most_s)

    @inside.inside
    def test_an_entry_that_changes_its_type_again_and_again(self):
        many = [(f'd{number}/', None) for number in range(15_000)]
        change = [('x/', None), ('x', b'')] * 10_000
        self.soon(10, self.image, images.layer(*many, *change))
        kept = [('d/', None, {'mode': 0o700}), ('d/e/', None, {'mode': 0o700}), ('f/', None, {'mode': 0o711})]
        (layer,) = self.image_anew(images.layer(*kept, ('d', b''), ('d/', None, {'mode': 0o500}), ('d/e/f', b'')))
        modes = {name: oct(os.stat(layer / name).st_mode & 0o777) for name in ('d', 'd/e', 'f')}
        self.assertEqual({'d': '0o500', 'd/e': '0o755', 'f': '0o711'}, modes)

    def image_anew(self, *layers):
        self.clean()
        return self.image(*layers)

    @inside.inside
    def test_opaque_folders(self):
        deep = '/'.join('x' * 120)
        few = images.layer(*((f'{number}/.wh..wh..opq', b'') for number in range(300)))
        self.soon(10, self.image, few)
        many = images.layer(*((f'{deep}/.wh..wh..opq', b'') for number in range(12_000)))
        self.clean()
        self.soon(20, self.refuse_image, 'more than 10000 opaque folders', many)

    @inside.inside
    def test_python_files_that_take_long_to_compile(self):
        """The compiler writes the body of each `finally` twice."""
        depth = 16
        lines = [f'{" " * at}try: pass\n{" " * at}finally:\n' for at in range(depth)]
        slow = ''.join(lines) + f'{" " * depth}f(1, 2, 3)\n'
        files = [HANDLER, ('before.py', 'x = 1\n'), *((f'slow{number}.py', slow) for number in range(40))]
        tree = []
        self.soon(12, lambda: tree.append(self.stage(staged.archive(*files)) / 'tree'))
        self.assertTrue((tree[0] / 'handler.py').exists())
        self.assertEqual('handler', self.spec.kind)

    @inside.inside
    def test_whatever_takes_long_is_ended(self):
        """The kernel follows these links through 22,000 folders for each file."""
        chain = [('d/', None), *((f'l{at}', 'd/../' * 800 + (f'l{at - 1}' if at else 'd')) for at in range(12))]
        slow = images.layer(*chain, *((f'l11/{number}', b'') for number in range(15_000)))
        worker = self.worker_with(CPU_LEAST_S=2, CPU_BYTES_A_SECOND=1 << 40)
        with unittest.mock.patch.object(staging, 'WORKER', worker):
            self.soon(15, self.refuse_image, 'takes too long or too much memory', slow)
        with unittest.mock.patch.object(staging, 'UNPACK_LEAST_S', 0.5):
            self.soon(10, self.refuse_image, 'no end after 0.5 s', slow, outer='zstd')


class Odd(StagedImages):
    """What is strange is refused in one line, or does no harm."""

    @inside.inside
    def test_texts_and_depths(self):
        hundred = 'x/' * 100
        chain = [(f'{hundred}f', b'')]
        for at in range(12):
            chain += [(f'l{at}', f'/l{at - 1}/{hundred}' if at else hundred), (f'l{at}/{hundred}f', b'')]
        for pattern, data in (
            ('not valid Unicode', written({'manifest.json': b'[{"Config": "\\ud800.json"}]'})),
            ('not valid Unicode', images.image([BASE], {**RUN, 'WorkingDir': '/\ud800'})),
            ("the spec's env is not valid", images.image([BASE], {**RUN, 'Env': ['A=\ud800']})),
            ('settings are too long', images.image([BASE], {**RUN, 'Env': ['A=' + 'x' * (2 << 20)]})),
            ('nested too deeply', images.image([images.layer(*chain, ('x', b''))], RUN)),
            (r"'a\\nb\\x1b\[31m' is a sparse file", self.of(('a\nb\x1b[31m', b'', {'type': tarfile.GNUTYPE_SPARSE}))),
            ('which is not in its layer', self.of(('l', '/../..'), ('h', images.Hard('l/etc/passwd')))),
            ('not permitted', self.of(('d/', None), ('h', images.Hard('d')))),
            ('is a file, which an image cannot hold', self.of(('.', b''))),
            ('is a symlink, which an image cannot hold', self.of(('./', '/etc'))),
            ('Not a directory', self.of(('f', b'', {'type': tarfile.FIFOTYPE}), ('f/x', b''))),
        ):
            with self.subTest(pattern):
                self.refuse(data, pattern)

    def of(self, *members):
        return images.image([images.layer(*members)], RUN)

    @inside.inside
    def test_opaque_folders_that_are_gone(self):
        (layer,) = self.image(
            images.layer(
                ('gone/.wh..wh..opq', b''),
                ('gone', '/etc'),
                ('a/b/.wh..wh..opq', b''),
                ('a', b''),
                ('up', '/'),
                ('up/.wh..wh..opq', b''),
            )
        )
        self.assertEqual(['trusted.overlay.opaque'], os.listxattr(layer))
        self.assertEqual([], os.listxattr(layer / 'a'))

    @inside.inside
    def test_a_layer_twice_in_two_blobs_keeps_what_it_hides(self):
        content = images.layer(('d/.wh..wh..opq', b''))
        data = images.image([images.Layer(content, pack) for pack in ('gzip', None, 'zstd')], RUN, form='oci')
        self.stage(data)
        layer = pathlib.Path(self.layers.path(images.sha256(content)))
        self.assertEqual(['trusted.overlay.opaque'], os.listxattr(layer / 'd'))
        self.assertEqual(2, len(self.layers.blobs(layer.name)))


def slow(seconds=60):
    """A small archive of an image. It takes about so long to unpack here, and little of the disk."""
    frame = images.packed(bytes(64 << 20), 'zstd')
    layer = images.Layer(BASE, 'zstd')
    layer.data += frame * (seconds * 8)  # after the end of the tar: it is only hashed
    layer.digest, layer.size = images.sha256(layer.data), len(layer.data)
    return images.image([layer], RUN, form='oci')


def unpackers(pid):
    """The processes that unpack for the faasd `pid`, and all that they have started."""
    found, parents = [], {}
    for status in pathlib.Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):
            own, _, rest = status.read_text().rpartition(')')
            parents[int(own.split()[0])] = int(rest.split()[1]), own.partition('(')[2]
    below = {pid}
    while more := {child for child, (parent, _) in parents.items() if parent in below} - below:
        below |= more
    for child in below - {pid}:
        with contextlib.suppress(OSError):
            if 'unpack.py' in pathlib.Path(f'/proc/{child}/cmdline').read_text() or parents[child][1] == 'zstd':
                found.append(child)
    return found


class Ends(StagedImages):
    """Unpacking ends when nobody wants it, and leaves nothing."""

    @inside.inside
    def test_unpacking_that_nobody_wants(self):
        self.disk()
        wanted, data = [True], slow()
        with self.assertRaises(ConnectionAbortedError), self.staging() as staging:
            timer = threading.Thread(target=self.when_unpacking, args=(wanted.clear,))
            timer.start()
            staging.receive(io.BytesIO(data).read, None, lambda: bool(wanted))
        timer.join()
        self.assertEqual([], unpackers(os.getpid()))
        self.assertEqual(([], []), (os.listdir(self.functions), os.listdir(self.layers.folder)))
        self.assertEqual([], [each for each in children(os.getpid()) if each != timer], 'a process is not reaped')

    def when_unpacking(self, act):
        lab.wait_until(lambda: len(unpackers(os.getpid())) >= 4, 20, 'zstd')
        act()


def children(pid):
    return pathlib.Path(f'/proc/{pid}/task/{pid}/children').read_text().split()


@lab.needs_root
class EndsOfFaasd(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        host = cls.enterClassContext(lab.Host('server'))
        cls.server = cls.enterClassContext(serving.standalone(host, FAAS_MAX_UNPACKED='200G'))
        cls.data = slow()

    def setUp(self):
        self.assertEqual([], unpackers(self.server.process.pid))

    def begin(self):
        self.server.lines.clear()
        self.server.start()

    def state(self):
        """What is below functions/ and layers/."""
        return [os.listdir(self.server.host.path(f'/var/lib/faasd/{name}')) for name in ('functions', 'layers')]

    def upload(self, data, length=None):
        """A connection on which a deploy has been sent."""
        connection = serving.UnixConnection(str(self.server.host.path('/run/faasd/faasd.sock')))
        self.addCleanup(connection.close)
        connection.putrequest('POST', '/api/new?name=slow')
        connection.putheader('Content-Length', str(length or len(data)))
        connection.endheaders(data)
        return connection

    def unpacking(self):
        connection = self.upload(self.data)
        lab.wait_until(lambda: len(unpackers(self.server.process.pid)) >= 4, 20, 'unpacking')
        return connection

    def assert_ended(self, pids, within_s):
        lab.wait_until(lambda: not any(os.path.exists(f'/proc/{pid}') for pid in pids), within_s, 'the end')

    def test_1_it_ends_when_the_uploader_is_gone(self):
        connection = self.unpacking()
        pids = unpackers(self.server.process.pid)
        connection.close()
        self.assert_ended(pids, 5)
        lab.wait_until(lambda: self.state() == [[], ['id_base']], 5, 'the folder to be removed')
        self.assertEqual([], self.server.api('GET', '/api/list').json)

    def test_2_it_ends_soon_when_faasd_ends(self):
        for how in ('unpacking', 'uploading', 'both'):
            with self.subTest(how):
                pids, connections = [], []
                if how != 'unpacking':
                    connections.append(self.upload(b'half', 1000))
                if how != 'uploading':
                    connections.append(self.unpacking())
                    pids = unpackers(self.server.process.pid)
                lab.wait_until(lambda: self.state()[0], 5, 'the upload')
                before = time.monotonic()
                self.server.stop()
                self.assertLess(time.monotonic() - before, 5 + 2)  # CoreDNS and WireGuard end after it
                self.assert_ended(pids, 0)
                self.assertEqual([[], ['id_base']], self.state())
                for connection in connections:
                    self.assertEqual(503, connection.getresponse().status)
                self.begin()
                self.assertEqual([], self.server.api('GET', '/api/list').json)

    def test_3_a_killed_faasd_leaves_no_unpacker_and_no_folder(self):
        self.unpacking()
        pids = unpackers(self.server.process.pid)
        self.server.stop(signal.SIGKILL)
        self.assert_ended(pids, 2)
        deep = self.server.host.path('/var/lib/faasd/functions/.incoming-deep')  # deeper than Python can recurse
        os.makedirs(deep)
        here = os.open('.', os.O_RDONLY)
        try:
            os.chdir(deep)
            for _ in range(2000):
                os.mkdir('x')
                os.chdir('x')
        finally:
            os.fchdir(here)
            os.close(here)
        self.begin()
        self.assertEqual([[], ['id_base']], self.state())


if __name__ == '__main__':
    unittest.main()
