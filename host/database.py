"""One SQLite file: opened, brought to its newest schema, changed and copied. Every failure is a FaasError."""

import contextlib
import errno
import functools
import glob
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from host import disk, files
from host.errors import FaasError

DAY_S = 24 * 60 * 60


class DatabaseError(FaasError):
    """The database cannot be used now."""

    status = 503
    hint = "on the server: look for errors of the disk ('dmesg'), then restart faasd"


class Damaged(DatabaseError):
    """The file is not a database any more."""


class Replaced(DatabaseError):
    """The path leads to another file than the one that is open."""


def removal(method: Callable) -> Callable:
    """A method of a Database that removes something: on a full disk it may use the reserve.

    The method runs a second time, so what it does must be one transaction.
    """

    @functools.wraps(method)
    def run(self: 'Database', *args: object) -> object:
        return self._with_reserve(lambda: method(self, *args))

    return run


class Database:
    """An SQLite file in WAL mode. Safe to call from any thread.

    `migrations` are (number, SQL statements or a function of the connection) in their order. Each runs once, in one
    transaction; the number of the last is the schema of the file. Before each the file is copied to PATH.before-NUMBER.
    """

    def __init__(
        self,
        path: str,
        migrations: Sequence[tuple[int, str | Callable[[sqlite3.Connection], None]]],
        reserve: files.Reserve | None = None,
    ) -> None:
        self.path, self._reserve = os.path.abspath(path), reserve
        self._folder = os.path.dirname(self.path)
        self._lock = threading.RLock()
        # Opening makes the files that WAL mode needs beside the database, where a clean end removed them.
        self._db = self._with_reserve(self._open)
        try:
            self._migrate(migrations)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        with self._lock, self._named_errors():
            self._db.close()

    def _open(self) -> sqlite3.Connection:
        with self._named_errors():
            # SQLite gives PATH-wal and PATH-shm the same mode.
            fd = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            status = os.fstat(fd)
            os.close(fd)  # before connect(): closing a descriptor of the file ends the locks that the process has on it
            self._file = status.st_dev, status.st_ino
            db = sqlite3.connect(self.path, check_same_thread=False, isolation_level=None, timeout=10)
            try:
                db.execute('PRAGMA journal_mode = WAL')
                db.execute('PRAGMA synchronous = FULL')
                db.execute('PRAGMA foreign_keys = ON')
                db.execute('PRAGMA temp_store = MEMORY')
                # Pages: the write-ahead log grows to 1 MiB and is then used again. It must fit into a reserve.
                db.execute('PRAGMA wal_autocheckpoint = 256')
                self._check(db, 'quick_check')
                self._size = os.stat(self.path).st_size  # a new file has its first page now
            except BaseException:
                db.close()
                raise
            return db

    def _check(self, db: sqlite3.Connection, how: str) -> None:
        (said,) = db.execute(f'PRAGMA {how}(1)').fetchone()
        if said != 'ok':
            raise self._damaged(' '.join(said.split()))

    def _migrate(self, migrations: Sequence) -> None:
        ((version,),) = self._rows('PRAGMA user_version')
        newest = migrations[-1][0]
        if version > newest:
            raise DatabaseError(
                f'{self.path} has schema {version}, this faasd knows {newest}', 'install the newer faasd'
            )
        for number, step in migrations:
            if number <= version:
                continue
            if version:
                self._copy(f'{self.path}.before-{number}')
            with self._change() as db:
                if callable(step):
                    step(db)
                else:
                    for statement in step.split(';\n'):
                        db.execute(statement)
                db.execute(f'PRAGMA user_version = {number}')
        if not version:
            files.sync_folder(self._folder)

    # Changes and reads

    @contextlib.contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it or nothing."""
        with self._lock, self._named_errors():
            self._db.execute('BEGIN IMMEDIATE')
            try:
                yield self._db
                self._db.execute('COMMIT')
            except BaseException:
                if self._db.in_transaction:  # SQLite itself rolls back after some errors, a full disk is one
                    self._db.execute('ROLLBACK')
                raise

    @contextlib.contextmanager
    def _change_within(self) -> Iterator[sqlite3.Connection]:
        """The transaction under way, else one of its own."""
        with self._lock:
            if self._db.in_transaction:
                yield self._db
            else:
                with self._change() as db:
                    yield db

    def _rows(self, sql: str, *values: object) -> list[tuple]:
        with self._lock, self._named_errors():
            return self._db.execute(sql, values).fetchall()

    def _with_reserve(self, work: Callable) -> object:
        """What work() returns. On a full disk the reserve is released and work() is called once more."""
        try:
            return work()
        except disk.DiskFull:
            if self._reserve is None or not self._reserve.release():
                raise
            return work()

    # Errors

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Raise a FaasError in place of what sqlite3 and the system say."""
        try:
            with disk.refusals(self._folder):
                yield
        except sqlite3.Error as error:
            raise self._named(error) from error

    def _named(self, error: sqlite3.Error) -> FaasError:
        code = getattr(error, 'sqlite_errorcode', None)  # None: Python's module says it, and not SQLite
        match code and code & 0xFF:  # the primary result code
            case sqlite3.SQLITE_FULL:
                return disk.refusal(errno.ENOSPC, self._folder)
            case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_NOTADB:
                return self._damaged(str(error))
            case sqlite3.SQLITE_BUSY:
                return DatabaseError(
                    f'{self.path} is in use by another program', f"'fuser -v {self.path}' names it: end it"
                )
            case sqlite3.SQLITE_IOERR | sqlite3.SQLITE_READONLY | sqlite3.SQLITE_CANTOPEN:
                # SQLite calls it an I/O error, too, when the shared memory of WAL mode finds no room, and when the
                # disk became read-only after an error. That is not among the flags of a mount: only a write shows it.
                try:
                    disk.try_write(self._folder)
                except disk.DiskRefuses as refusal:
                    return refusal
                except OSError:
                    pass
        return DatabaseError(f'{self.path} cannot be used: {error}')

    def _damaged(self, what: str) -> Damaged:
        return Damaged(
            f'{self.path} is damaged: {what}', f'{self.how_to_restore()}; or, to start with nothing, move it away'
        )

    def how_to_restore(self) -> str:
        """How the newest copy takes the place of the file, for a hint."""
        copies = glob.glob(f'{glob.escape(self.path)}.daily') + glob.glob(f'{glob.escape(self.path)}.before-*')
        if not copies:
            return 'there is no copy of it'
        newest = max(copies, key=os.path.getmtime)
        made = time.strftime('%Y-%m-%d %H:%M', time.localtime(os.path.getmtime(newest)))
        # A write-ahead log that a killed faasd left would be played into the copy.
        return f'a copy is of {made}; stop faasd, then: rm -f {self.path}-wal {self.path}-shm; cp {newest} {self.path}'

    # The file as a whole

    def check_file(self) -> None:
        """Raises Replaced when the file was deleted, replaced or cut under the open database. It writes nothing."""
        try:
            status = os.stat(self.path)
        except FileNotFoundError:
            status = None
        if status is None or (status.st_dev, status.st_ino) != self._file:
            how = 'deleted' if status is None else 'replaced by another file'
            raise Replaced(
                f'{self.path} was {how} while faasd runs: changes go to the old file and will be lost',
                f'restart faasd to use what is there; {self.how_to_restore()}',
            )
        if status.st_size < self._size:  # nothing shrinks it: it is never vacuumed in place
            raise Replaced(f'{self.path} was cut while faasd runs', self.how_to_restore())
        self._size = status.st_size

    def copy_daily(self) -> bool:
        """Copy the file to PATH.daily unless there is a copy of the last 24 hours; True if it was made.

        Other threads go on with changes meanwhile. Raises Replaced, DiskFull, DatabaseError.
        """
        daily = f'{self.path}.daily'
        with contextlib.suppress(FileNotFoundError):
            if 0 <= time.time() - os.path.getmtime(daily) < DAY_S:
                return False
        self._copy(daily)
        return True

    def _copy(self, target: str) -> None:
        """Replace `target` by a checked copy of what is committed."""
        self.check_file()  # another file's content must not replace a good copy
        with (
            self._named_errors(),
            files.replacing(target, 0o600) as temporary,  # VACUUM INTO takes an empty file
            contextlib.closing(sqlite3.connect(self.path, isolation_level=None, timeout=10)) as source,
            contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as copy,
        ):
            source.execute('VACUUM INTO ?', (temporary,))
            self._check(copy, 'integrity_check')
