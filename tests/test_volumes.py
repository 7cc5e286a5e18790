"""Volumes: what a function keeps, over redeploys, kills and removals, and who may have it at a time."""

import json
import os
import pathlib
import re
import sys
import tempfile
import time
import unittest
import unittest.mock

from control import volumes as store
from handlers.containers import volumes
from handlers.images.spec import Spec
from handlers.images.wants import BadWant
from host import volume_image
from tests import images, lab, packages, programs, serving

TAKEN = volumes.TAKEN + volumes.TAKEN_BY_FOLDERS

# Keeps numbers in SQLite. /check says whether the database is whole, and how many it has.
KEEPS = """
import os, sqlite3

def app(environ, start_response):
    path, query = environ['PATH_INFO'], environ['QUERY_STRING']
    answer = 'ok'
    if path == '/fill':
        try:
            with open('/data/filler', 'wb') as file:
                while True:
                    file.write(bytes(1 << 20))
                    file.flush()
        except OSError as error:
            answer = error.strerror
    else:
        db = sqlite3.connect('/data/numbers.db', timeout=30, isolation_level=None)
        db.execute('pragma journal_mode=wal')
        db.execute('pragma synchronous=full')
        db.execute('create table if not exists numbers (number unique)')
        if path == '/add':
            db.execute('insert or ignore into numbers values (?)', (query,))
        elif path == '/check':
            whole, = db.execute('pragma integrity_check').fetchone()
            answer = f'{whole} {db.execute("select count(*) from numbers").fetchone()[0]}'
        elif path == '/owner':
            answer = f'{os.stat("/data").st_uid} {os.stat("/data/numbers.db").st_uid} {os.listdir("/data")}'
        db.close()
    start_response('200 OK', [('Content-Type', 'text/plain'), ('Content-Length', str(len(answer)))])
    return [answer.encode()]
"""
# Adds numbers one after the other, and prints each that was acknowledged; '!' for anything else.
ADDS = """
import itertools, sys, urllib.request
for number in itertools.count():
    name = f'{sys.argv[2]}-{number}'
    try:
        ok = urllib.request.urlopen(f'http://[{sys.argv[1]}]/add?{name}', timeout=30).read() == b'ok'
    except Exception as error:
        ok = print(error, file=sys.stderr)
    print(name if ok else '!', flush=True)
"""
# Serves alone: exits with 3 when another has the lock.
ALONE = """
import fcntl, http.server, os, signal, socket, sys
lock = open('/data/lock', 'w')
try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    open('/data/two', 'w')
    sys.exit(3)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header('Content-Length', '2')
        self.end_headers()
        self.wfile.write(b'ok')
    def log_message(self, *_):
        pass
class Server(http.server.ThreadingHTTPServer):
    address_family = socket.AF_INET6
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
print(os.listdir('/data'), flush=True)
Server(('::', 80), Handler).serve_forever()
"""
# Leaves a volume frozen, as a faasd does that is killed during a snapshot; or thaws it.
FREEZES = f"""
import fcntl, os, sys
sys.path.insert(0, {str(lab.REPO)!r})
from handlers.containers.rootfs import apart
from host import volume_image
def change():
    volume_image.mount(sys.argv[2], '/mnt')
    fcntl.ioctl(os.open('/mnt', os.O_RDONLY), getattr(volume_image, sys.argv[1]))
apart(change)
"""


def wanting(size='32M', **more):
    volume = f'volumes = {{ data = {{ path = "/data", size = "{size}" }} }}\n'
    return volume + ''.join(f'{key} = {json.dumps(value)}\n' for key, value in more.items())


class Rules(unittest.TestCase):
    def spec(self, *paths, kind='handler', **settings):
        wanted = {f'v{number}': {'path': path, 'size': None} for number, path in enumerate(paths)}
        return Spec(kind, layers=('0' * 64,) if kind == 'image' else (), settings={'volumes': wanted, **settings})

    def test_places_that_are_taken(self):
        for path in TAKEN:
            for each in (path, f'{path}/x'):
                with self.subTest(each), self.assertRaises(BadWant):
                    volumes.check(self.spec(each))
        for paths in (('/data', '/data'), ('/data', '/data/x'), ('/var/x', '/var')):
            with self.subTest(paths), self.assertRaises(BadWant):
                volumes.check(self.spec(*paths))
        volumes.check(self.spec('/data', '/database', '/var/lib/x'))
        volumes.check(self.spec('/usr/share/x', kind='image'))

    def test_who_excludes_whom(self):
        handler, image = self.spec('/data'), self.spec('/data', kind='image')
        both = self.spec('/data', kind='image', overlap=True)
        self.assertFalse(handler.excludes(handler))
        self.assertTrue(image.excludes(image) and image.excludes(handler) and handler.excludes(image))
        self.assertFalse(both.excludes(both) or both.excludes(handler))
        self.assertTrue(self.spec('/data', overlap=False).excludes(handler))
        self.assertFalse(image.excludes(self.spec()))

    def test_one_instance_has_a_volume_alone(self):
        holders = volumes.Holders()
        holders.take('1', 'a', {'data': False})
        with self.assertRaisesRegex(volumes.VolumeInUse, 'an instance of a has the volume data'):
            holders.take('2', 'b', {'data': True})
        self.assertEqual(['a'], holders.users('data'))
        holders.release('1')
        holders.take('2', 'b', {'data': True})
        holders.take('3', 'c', {'data': True})
        with self.assertRaises(volumes.VolumeInUse):
            holders.take('4', 'b', {'data': False})
        self.assertEqual(['b', 'c'], holders.users('data'))

    def test_a_server_without_loop_devices(self):
        for error in (FileNotFoundError(2, 'none'), PermissionError(1, 'no')):
            with unittest.mock.patch('os.open', side_effect=error), self.assertRaises(volume_image.NoLoopDevices) as it:
                volume_image._open('/dev/loop-control')
            self.assertNotIn('\n', str(it.exception))
            self.assertIn('modprobe loop', it.exception.hint)

    def test_names_and_sizes(self):
        with tempfile.TemporaryDirectory() as folder:
            them = store.Volumes(f'{folder}/volumes', folder, lambda *_, **__: None)
            for name in ('', '.', '../x', 'a/b', '-x', 'X', 'x' * 64, 'a\nb'):
                with self.subTest(name), self.assertRaises(BadWant):
                    them.create(name, None, 'by test')
                with self.subTest(name), self.assertRaises(store.NoVolume):
                    them.remove(name, 'by test')
            with self.assertRaisesRegex(BadWant, 'at least 16M'):
                them.create('x', 1 << 20, 'by test')
            with self.assertRaisesRegex(Exception, 'no room for'):
                them.create('x', 1 << 43, 'by test')
            self.assertEqual([], os.listdir(them.folder))


@lab.needs_root
class Kept(unittest.TestCase):
    """By functions on a real server."""

    @classmethod
    def setUpClass(cls):
        cls.host = cls.enterClassContext(lab.Host('server'))
        cls.server = cls.enterClassContext(serving.standalone(cls.host))

    def tearDown(self):
        for row in self.server.api('GET', '/api/list').json:
            self.server.api('DELETE', f'/api/remove/{row["name"]}')
        for row in self.server.api('GET', '/api/volume').json:
            reply = self.server.api('DELETE', f'/api/volume/{row["name"]}')
            self.assertEqual(200, reply.status, reply.body)
        self.assertEqual('', self.host.sh('losetup --noheadings --output BACK-FILE | grep "^/volumes/"; true'))

    def faas(self, *words, ok=(0,), **more):
        return self.host.run([str(lab.REPO / 'faas'), *words], ok=ok, **more)

    def kill_faasd(self):
        self.server.stop(9)
        self.server.lines.clear()

    def deploy(self, name='keeps', source=KEEPS, **more):
        reply = self.server.deploy(name, {'handler.py': source, 'faas.toml': wanting(**more)})
        self.assertEqual(200, reply.status, reply.body)
        return reply.json['ipv6']

    def adding(self, ipv6, count=2):
        """Programs that add numbers, and their output so far."""
        ends = []
        for number in range(count):
            out = pathlib.Path(tempfile.mkstemp()[1])
            self.addCleanup(out.unlink)
            with open(out, 'w') as file:
                program = self.host.popen([sys.executable, '-c', ADDS, ipv6, f'{time.time_ns()}{number}'], stdout=file)
            self.addCleanup(program.wait)
            self.addCleanup(program.kill)
            ends.append((program, out))
        lab.wait_until(lambda: all(len(self.added([each])) > 3 for each in ends), 20, 'the first numbers')
        return ends

    def added(self, ends):
        return [line for _, out in ends for line in out.read_text().split('\n')[:-1]]

    def end(self, ends):
        for program, _ in ends:
            program.kill()
            program.wait()
        return self.added(ends)

    def assert_kept(self, ipv6, numbers):
        whole, count = self.server.get(ipv6, '/check').split()
        self.assertEqual('ok', whole)
        self.assertGreaterEqual(int(count), len([each for each in numbers if each != '!']))

    def test_sqlite_over_redeploys_under_load(self):
        ipv6 = self.deploy()
        ends = self.adding(ipv6)
        for _ in range(2):
            self.deploy()
        numbers = self.end(ends)
        self.assertNotIn('!', numbers)
        self.assert_kept(ipv6, numbers)
        self.assertRegex(self.server.get(ipv6, '/owner'), r"^0 0 \['numbers.db")
        shown = json.loads(self.faas('volume', 'list', '--json').stdout)
        self.assertEqual([('data', 32 << 20, ['keeps'])], [(v['name'], v['size'], v['functions']) for v in shown])
        self.assertRegex(self.faas('volume', 'list').stdout, r'data +32 MiB +[\d.]+ [KM]iB +keeps')
        refused = self.faas('volume', 'rm', 'data', ok=(1,)).stderr
        self.assertIn('the volume data is used by keeps', refused)

    def test_it_survives_the_removal_of_the_function(self):
        ipv6 = self.deploy()
        self.server.get(ipv6, '/add?1')
        other = self.server.deploy('other', {'handler.py': KEEPS, 'faas.toml': wanting()})
        self.assertEqual((409, 'the volume data belongs to the function keeps'), (other.status, other.json['error']))
        self.faas('rm', 'keeps', '--yes')
        self.assertEqual('data has 64 MiB\n', self.faas('volume', 'resize', 'data', '64M').stdout)
        ipv6 = self.deploy('other', size='96M')
        self.assertEqual('ok 1', self.server.get(ipv6, '/check'))
        self.assertEqual(96 << 20, self.server.api('GET', '/api/volume').json[0]['size'])
        self.faas('rm', 'other', '--yes')
        self.assertEqual('data has 32 MiB\n', self.faas('volume', 'resize', 'data', '32M').stdout)
        self.assertEqual('ok 1', self.server.get(self.deploy('third'), '/check'))

    def test_what_a_failed_deploy_made_is_gone(self):
        reply = self.server.deploy('keeps', {'handler.py': 'import nothing_such', 'faas.toml': wanting()})
        self.assertEqual(422, reply.status, reply.body)
        self.assertEqual('No volumes yet.', self.faas('volume', 'list').stdout.splitlines()[0])

    def test_a_full_volume_is_of_no_other(self):
        full = self.deploy('full', size='16M')
        toml = wanting(size='16M').replace('data =', 'other =')
        reply = self.server.deploy('other', {'handler.py': KEEPS, 'faas.toml': toml})
        self.assertEqual('No space left on device', self.server.get(full, '/fill'))
        self.assertEqual('ok', self.server.get(reply.json['ipv6'], '/add?1'))
        self.assertEqual('ok 1', self.server.get(reply.json['ipv6'], '/check'))
        self.assertEqual([], self.server.api('GET', '/api/health').json['problems'])

    def test_kills_in_the_middle_of_commits(self):
        ipv6, numbers = self.deploy(), []
        for kind in ('instance', 'faasd', 'host'):
            with self.subTest(kind):
                ends = self.adding(ipv6)
                record = json.loads(self.host.sh('cat /run/faasd/instances/*/record.json'))
                if kind == 'instance':
                    self.host.run(['kill', '-9', record['pid']])
                elif kind == 'faasd':
                    self.kill_faasd()
                else:
                    pids = [pid for pid in os.listdir(self.host.path('/proc')) if pid.isdigit() and pid != '1']
                    self.host.run(['kill', '-9', *pids], ok=None)
                    self.server.process.wait(10)
                    self.server.lines.clear()
                    self.host.run(['umount', '--lazy', '/run/faasd'], ok=None)
                numbers += self.end(ends)
                if kind != 'instance':
                    self.server.start()
                self.assert_kept(ipv6, numbers)

    def test_a_command_is_replaced_and_never_twice(self):
        files = {'server.py': ALONE, 'faas.toml': wanting(command='python3 server.py')}
        ipv6 = self.server.deploy('alone', files).json['ipv6']
        ends = self.adding(ipv6)
        reply = self.server.deploy('alone', files)
        self.assertEqual(200, reply.status, reply.body)
        broken = self.server.deploy('alone', files | {'server.py': 'import nothing_such'})
        self.assertEqual(422, broken.status, broken.body)
        before = len(self.added(ends))
        lab.wait_until(lambda: len(self.added(ends)) > before + 4, 20, 'the former revision to serve again')
        self.assertNotIn('!', self.end(ends))
        self.kill_faasd()
        self.server.start()
        self.assertEqual('ok', self.server.get(ipv6))
        self.assertNotIn('two', self.server.api('GET', '/api/logs/alone').body.decode())

    def test_a_snapshot_is_whole_and_nothing_stays_frozen(self):
        ipv6 = self.deploy()
        ends = self.adding(ipv6)
        before = [each for each in self.added(ends) if each != '!']
        said = self.faas('volume', 'snapshot', 'data', 'copy').stdout
        self.assertIn('Made the volume copy, the file /var/lib/faasd/volumes/copy.img', said)
        self.assertNotIn('!', self.end(ends))
        self.host.run(['e2fsck', '-f', '-n', '/var/lib/faasd/volumes/copy.img'], ok=(0, 4))
        toml = wanting().replace('data =', 'copy =')
        copy = self.server.deploy('copy', {'handler.py': KEEPS, 'faas.toml': toml}).json['ipv6']
        self.assert_kept(copy, before)

        image = '/var/lib/faasd/volumes/data.img'
        self.host.run([sys.executable, '-c', FREEZES, 'FIFREEZE', image])
        self.addCleanup(self.host.run, [sys.executable, '-c', FREEZES, 'FITHAW', image], ok=None)
        adding = self.host.popen(['curl', '-sg', '--max-time', '30', f'http://[{ipv6}]/add?late'])
        time.sleep(0.3)  # it waits now, and cannot be killed
        self.assertIsNone(adding.poll())
        self.kill_faasd()
        self.server.start()
        self.assertTrue(self.server.printed('Thawed data'))
        adding.wait(30)
        self.assertEqual('ok', self.server.get(ipv6, '/add?later'))
        self.assert_kept(ipv6, before)

    def test_an_image_fills_it_once(self):
        busybox = 'busybox', programs.static_busybox().read_bytes(), {'mode': 0o755}
        page = 'echo more >>/data/page; exec /busybox httpd -f -p [::]:80 -h /data'
        layer = images.layer(
            busybox,
            ('bin/sh', '/busybox'),
            ('data', None, {'mode': 0o750, 'uid': 33, 'gid': 33}),
            ('data/page', b'first\n', {'mode': 0o640, 'uid': 33, 'gid': 33}),
            ('data/link', 'page'),
        )
        command = ['/busybox', 'sh', '-c', page]
        labels = {'faas.volumes.data': '/data:16M'}
        image = images.image([layer], {'Entrypoint': command, 'User': '33:33', 'Labels': labels})
        first = self.server.deploy('image', image)
        self.assertEqual(200, first.status, first.body)
        self.assertEqual('first\nmore\n', self.server.get(first.json['ipv6'], '/link'))
        self.assertEqual(200, self.server.deploy('image', image).status)
        self.assertEqual('first\nmore\nmore\n', self.server.get(first.json['ipv6'], '/page'))
        self.faas('rm', 'image', '--yes')
        self.host.run(['mount', '-o', 'loop', '/var/lib/faasd/volumes/data.img', '/mnt'])
        said = self.host.sh('stat -c "%u %g %a" /mnt/files /mnt/files/page; umount /mnt')
        self.assertEqual('33 33 750\n33 33 640\n', said)

    def test_postgresql(self):
        within, found = '', sorted(pathlib.Path('/usr/lib/postgresql').glob('*/bin/initdb'))
        if not found:
            within = programs.unpacked('postgresql-15')
            found = sorted(within.glob('usr/lib/postgresql/*/bin/initdb'))
            packages.put(self.host, 'postgresql-15')
        top = pathlib.Path('/', found[-1].parent.parent.relative_to(within or '/'))
        share, lists = f'/usr/share/postgresql/{top.name}', ('bitcode', 'llvmjit.so', 'pgxs')
        start = (
            'set -e\n[ -s /var/lib/db/PG_VERSION ] || {\n'
            'initdb -D /var/lib/db --no-sync --locale=C -E UTF8 -A trust\n'
            'echo "host all all all trust" >>/var/lib/db/pg_hba.conf\n}\n'
            'exec postgres -D /var/lib/db -c listen_addresses=* -c unix_socket_directories=/tmp\n'
        )
        files = programs.Files().accounts().tree(f'{within}{top}/lib', f'{top}/lib', without=lists)
        files.tree(f'{within}{share}', share, without=('man', 'contrib')).put('/start', start).program('/bin/sh')
        for name in ('initdb', 'postgres'):
            files.program(f'{top}/bin/{name}', within=within)
        files.copy('/usr/share/zoneinfo/UTC').put('/etc/passwd', 'pg:x:70:70::/:/bin/sh\n')
        config = {
            'Cmd': ['/bin/sh', '/start'],
            'User': '70',
            'Env': [f'PATH={top}/bin:/usr/bin:/bin', 'LC_ALL=C'],
            'ExposedPorts': {'5432/tcp': {}},
            'StopSignal': 'SIGINT',
            'Labels': {'faas.volumes.pg': '/var/lib/db:128M', 'faas.start_timeout': '60'},
        }
        image = images.image([files.layer()], config)
        reply = self.server.deploy('db', image)
        self.assertEqual(200, reply.status, reply.body)

        def sql(text):
            command = ['psql', '-h', reply.json['ipv6'], '-p', '80', '-U', 'pg', '-At', 'postgres', '-c', text]

            def asked():
                done = self.host.run(command, ok=None)
                if done.returncode and 'starting up' not in done.stderr:  # PostgreSQL's own answer, for a moment
                    self.fail(done.stderr)
                return done.stdout

            return lab.wait_until(asked, 20, 'an answer')

        sql('create table t (x int); insert into t values (1)')
        self.assertEqual(200, self.server.deploy('db', image).status)
        sql('insert into t values (2)')
        self.kill_faasd()
        self.server.start()
        self.assertEqual('2\n', sql('select count(*) from t'))
        log = self.server.api('GET', '/api/logs/db?lines=1000').body.decode()
        self.assertTrue(re.search('database system is shut down', log), log)


if __name__ == '__main__':
    unittest.main()
