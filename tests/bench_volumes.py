"""The rows of `make bench` for volumes: SQLite on a volume against SQLite on the disk that has the volume's file."""

import contextlib

MOUNT = '/var/lib/faasd'
# Commits for some seconds in a new database in the folder; returns how many a second.
COMMITS = """
import os, sqlite3, time

def commits(folder, synchronous, seconds):
    path = f'{folder}/commits.db'
    for end in ('', '-wal', '-shm'):
        if os.path.exists(path + end):
            os.unlink(path + end)
    db = sqlite3.connect(path, isolation_level=None)
    db.execute('pragma journal_mode=wal')
    db.execute(f'pragma synchronous={synchronous}')
    db.execute('create table t (x)')
    count, began = 0, time.monotonic()
    while time.monotonic() < began + seconds:
        for _ in range(10):
            db.execute('insert into t values (?)', (bytes(200),))
        count += 10
    rate = count / (time.monotonic() - began)
    db.close()
    return rate
"""
HANDLER = (
    COMMITS
    + """
def app(environ, start_response):
    synchronous, seconds = environ['QUERY_STRING'].split('-')
    rate = commits('/data', synchronous, float(seconds))
    start_response('200 OK', [('Content-Type', 'text/plain')])
    return [str(rate).encode()]
"""
)
BOUNDS = {'sqlite-normal': 0.8, 'sqlite-full': 0.5}


def rows(bench, wanted, check, compared):
    """A Row for each of `wanted`; `check` and `compared` are the bench's."""
    with contextlib.ExitStack() as stack:
        host, server = stack.enter_context(bench.faasd(in_folder=True))
        toml = 'volumes = { data = { path = "/data", size = "256M" } }\n'
        reply = check(server.deploy('commits', {'handler.py': HANDLER, 'faas.toml': toml}), 'deploying it')
        host.run(['mkdir', f'{MOUNT}/peer'])
        for row in sorted(wanted & BOUNDS.keys()):
            synchronous, samples = row.rpartition('-')[2], {'volume': [], 'disk': []}
            for number in range(bench.size.rounds):
                bench.tell(f'{row}: round {number + 1} of {bench.size.rounds}')
                said = server.get(reply.json['ipv6'], f'/?{synchronous}-{bench.size.seconds}')
                samples['volume'].append(float(said))
                code = f'{COMMITS}\nprint(commits({MOUNT + "/peer"!r}, {synchronous!r}, {bench.size.seconds}))'
                samples['disk'].append(float(host.run(['/usr/bin/python3', '-c', code]).stdout))
            what = f'commits of SQLite in WAL mode, synchronous={synchronous}'
            yield compared(row, what, samples, unit='commits/s', better='more', bound=BOUNDS[row])
