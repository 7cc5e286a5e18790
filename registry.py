"""The registry: what exists.

The zone, peer files, addresses, listeners and containers are projections of the registry: they can be rebuilt from it.
"""

import base64
import hashlib
import hmac
import itertools
import json
import os
import re
import secrets
import sqlite3
import time
from collections.abc import Collection
from typing import NamedTuple

from host import disk, files
from host.database import Database, removal
from host.errors import FaasError

GATEWAY = 'fd00:faa5:0:100::1'  # WireGuard, CoreDNS and the control API on wg0
ZONE_SERVER = 'fd00:faa5:0:100::2'  # CoreDNS for faas alone: it refuses every other name
PEERS = 'fd00:faa5:0:100'
FIRST_HOST, LAST_HOST = 0xA, 0xFFFF
RESERVED = frozenset(('ns', 'dashboard', 'metrics', 'peers', 'host'))  # labels of the apex that no function may have
# For this time a redeemed invite gives the same answer to the same key again: the reply may have been lost.
INVITE_REPEAT_S = 120
FIRST_SERIAL = 2025001  # as the document has it

LABEL = re.compile(r'[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?')

SCHEMA_1 = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value NOT NULL) WITHOUT ROWID;
INSERT INTO meta VALUES ('instance', lower(hex(randomblob(3))));
CREATE TABLE deployments (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, subnet INTEGER NOT NULL UNIQUE);
INSERT INTO deployments VALUES (1, 'default', 0);
CREATE TABLE functions (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    deployment INTEGER NOT NULL REFERENCES deployments,
    name TEXT NOT NULL,
    ipv6 TEXT NOT NULL UNIQUE,
    revision INTEGER,                              -- the number of the live one; NULL while the first is deploying
    created INTEGER NOT NULL,
    UNIQUE (deployment, name));
CREATE TABLE revisions (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    function INTEGER NOT NULL REFERENCES functions ON DELETE CASCADE,
    number INTEGER NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('deploying', 'live')),
    created INTEGER NOT NULL,
    UNIQUE (function, number));
CREATE TABLE addresses (                           -- every address that was ever in use
    network TEXT NOT NULL,
    host INTEGER NOT NULL,
    freed INTEGER,                                 -- a counter, not a clock; NULL while in use
    PRIMARY KEY (network, host)) WITHOUT ROWID;
CREATE TABLE peers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    public_key TEXT NOT NULL UNIQUE,
    preshared_key TEXT,
    ipv6 TEXT NOT NULL UNIQUE,
    role TEXT NOT NULL CHECK (role IN ('peer', 'admin')),
    state TEXT NOT NULL CHECK (state IN ('live', 'removing')),
    created INTEGER NOT NULL);
CREATE TABLE invites (
    id TEXT PRIMARY KEY,
    secret BLOB NOT NULL,
    name TEXT,
    role TEXT NOT NULL,
    expires INTEGER NOT NULL,
    redeemed INTEGER,
    public_key TEXT,
    peer INTEGER REFERENCES peers ON DELETE CASCADE) WITHOUT ROWID;
"""
# Changes of the schema in their order: a new one is added at the end, none is edited. A test opens a file of each.
MIGRATIONS = (
    (1, SCHEMA_1),
    (2, 'ALTER TABLE revisions ADD COLUMN source TEXT'),  # what the deploy took: './api', "the example 'api'"
    (3, 'ALTER TABLE revisions ADD COLUMN config TEXT'),  # JSON: what flags and `faas config` set; see Revision.config
)


class RegistryError(FaasError):
    """The registry refused a change."""


class BadName(RegistryError):
    """A name that is not a DNS label, or is reserved."""

    status = 400
    hint = "use a-z, 0-9 and hyphens inside, at most 63 characters, for example 'hello' or 'api-2'"


class NameTaken(RegistryError):
    """Another function or peer has the name."""

    status = 409


class KeyTaken(RegistryError):
    """Another peer has the public key, or the preshared key."""

    status = 409
    hint = 'make a new key pair: each peer needs its own'


class AddressTaken(RegistryError):
    """Another peer has the address, or it is outside the peers' range."""

    status = 409


class RangeFull(RegistryError):
    """Every address of the range is in use."""

    status = 507
    hint = 'remove a function or a peer that is no longer needed'


class NotFound(RegistryError):
    """No function or peer has the name."""

    status = 404


class BadInvite(RegistryError):
    """The invite is unknown, expired or used. One error for all: a stranger must not learn which."""

    status = 403
    hint = "ask for a new one: 'sudo faas vpn invite' on the server prints it"

    def __init__(self) -> None:
        super().__init__('this invite is not valid')


class Function(NamedTuple):
    id: int
    name: str
    ipv6: str
    revision: int | None  # the number of the live one
    created: int
    source: str | None  # what the live revision was made from, None when it is not known
    config: dict = {}  # the wants that flags and `faas config` set for the live revision (handlers.images.wants)

    @classmethod
    def of(cls, *row: object) -> 'Function':
        """The Function of a row."""
        return cls(*row[:-1], json.loads(row[-1] or '{}'))


FUNCTIONS = (  # for Function.of
    'SELECT f.id, f.name, f.ipv6, f.revision, f.created, live.source, live.config FROM functions AS f'
    ' LEFT JOIN revisions AS live ON live.function = f.id AND live.number = f.revision'
)


class Peer(NamedTuple):
    name: str
    public_key: str
    preshared_key: str | None
    ipv6: str
    role: str
    created: int


PEER_COLUMNS = ', '.join(Peer._fields)


class Invite(NamedTuple):
    id: str
    secret: bytes
    name: str | None
    role: str
    expires: int

    def token(self, api: str, endpoint: str, server_public_key: str) -> str:
        """The invite as one word to paste: JSON in base64url, then the start of the SHA-256, which shows a cut end."""
        fields = {
            'i': self.id,
            's': _base64url(self.secret),
            'a': api,
            'e': endpoint,
            'k': server_public_key,
            'n': self.name,
        }
        text = _base64url(json.dumps(fields, separators=(',', ':')).encode())
        return f'faas1_{text}.{hashlib.sha256(text.encode()).hexdigest()[:8]}'

    def proof(self, *fields: str | bytes) -> str:
        """HMAC-SHA256 in hex over the fields, each after its length in four bytes: 'ab', 'c' is not 'a', 'bc'."""
        parts = (field.encode() if isinstance(field, str) else field for field in fields)
        return hmac.new(
            self.secret, b''.join(len(part).to_bytes(4, 'big') + part for part in parts), 'sha256'
        ).hexdigest()


def _base64url(data):
    return base64.urlsafe_b64encode(data).decode().rstrip('=')


def check_name(name: object, reserved: Collection[str] = frozenset()) -> str:
    """Return `name`, a DNS label in lower case (RFC 1035 2.3.1, RFC 1123 2.1) that is not reserved; else BadName."""
    if not isinstance(name, str) or not LABEL.fullmatch(name):
        raise BadName(f'{name!r} is not a name that DNS knows' if name else 'the name is empty')
    if name in reserved:
        raise BadName(f"'{name}' is reserved", f'these names are taken by the platform: {", ".join(sorted(RESERVED))}')
    return name


def serial_after(serial: int, seen: int | None = None) -> int:
    """The serial after the larger of both in the arithmetic of RFC 1982. Never 0: CoreDNS takes 0 for no zone."""
    if seen is not None and 0 < (seen - serial) & 0xFFFFFFFF < 0x80000000:
        serial = seen
    return (serial + 1) & 0xFFFFFFFF or 1


# Steps of a transaction


def _next_host(db: sqlite3.Connection, network: str) -> int:
    (host,) = db.execute(
        'SELECT min(host) + 1 FROM (SELECT host FROM addresses WHERE network = :n UNION SELECT :before) AS used'
        ' WHERE host < :last'
        ' AND NOT EXISTS (SELECT 1 FROM addresses WHERE network = :n AND host = used.host + 1)',
        {'n': network, 'before': FIRST_HOST - 1, 'last': LAST_HOST},
    ).fetchone()
    if host is None:
        row = db.execute(
            'SELECT host FROM addresses WHERE network = ? AND freed NOT NULL ORDER BY freed LIMIT 1', (network,)
        ).fetchone()
        if row is None:
            raise RangeFull(f'all addresses of {network}::/64 from ::{FIRST_HOST:x} to ::{LAST_HOST:x} are in use')
        (host,) = row
    return host


def _claim(db: sqlite3.Connection, ipv6: str) -> None:
    """Take one certain address of the peers' range for a peer that was put there by hand."""
    network, _, host = ipv6.rpartition('::')
    if network != PEERS or not host.isalnum() or not FIRST_HOST <= int(host, 16) <= LAST_HOST:
        raise AddressTaken(f'{ipv6} is not between {PEERS}::{FIRST_HOST:x} and ::{LAST_HOST:x}')
    if db.execute(
        'SELECT 1 FROM addresses WHERE network = ? AND host = ? AND freed IS NULL', (network, int(host, 16))
    ).fetchone():
        raise AddressTaken(f'{ipv6} belongs to another peer')
    db.execute('INSERT OR REPLACE INTO addresses VALUES (?, ?, NULL)', (network, int(host, 16)))


def _free(db: sqlite3.Connection, ipv6: str) -> None:
    network, host = ipv6.split('::')
    db.execute(
        'UPDATE addresses SET freed = (SELECT coalesce(max(freed), 0) + 1 FROM addresses)'
        ' WHERE network = ? AND host = ?',
        (network, int(host, 16)),
    )


def _taken(db: sqlite3.Connection, invite_id: str | None = None) -> set[str]:
    """The names of peers, and of the invites but one that can still be redeemed."""
    names = db.execute(
        'SELECT name FROM peers UNION SELECT name FROM invites'
        ' WHERE name NOT NULL AND redeemed IS NULL AND expires > ? AND id IS NOT ?',
        (int(time.time()), invite_id),
    )
    return {name for (name,) in names}


def _unique(db: sqlite3.Connection, name: str) -> str:
    taken, candidate, number = _taken(db), name, 1
    while candidate in taken:
        number += 1
        candidate = f'{name[: 63 - len(f"-{number}")].rstrip("-")}-{number}'
    return candidate


class Registry(Database):
    """Functions, revisions, peers, invites and the DNS serial in one SQLite file. Safe to call from any thread."""

    def __init__(self, path: str = '/var/lib/faasd/registry.db', reserve: files.Reserve | None = None) -> None:
        self._deploying: set[int] = set()  # the ids of the functions that are being deployed by this process
        super().__init__(path, MIGRATIONS, reserve)

    @property
    def instance(self) -> str:
        """What tells this server's containers and cgroups from another's on the same kernel: six hex digits."""
        return self._rows("SELECT value FROM meta WHERE key = 'instance'")[0][0]

    @property
    def is_new(self) -> bool:
        """True if no function and no peer was ever in it. It stays so over starts that fail."""
        return not self._rows('SELECT 1 FROM sqlite_sequence LIMIT 1')

    def copy_daily(self) -> bool:
        """As Database does. An empty registry never replaces a copy of one that was lost."""
        if self.is_new and os.path.exists(f'{self.path}.daily'):
            return False
        return super().copy_daily()

    # Addresses

    def allocate_ipv6(self, network: str = 'fd00:faa5:1:0') -> str:
        """The lowest address of `network` never used, else the one freed longest ago, from ::a to ::ffff.

        Raises RangeFull.
        """
        with self._change_within() as db:
            host = _next_host(db, network)
            db.execute('INSERT OR REPLACE INTO addresses VALUES (?, ?, NULL)', (network, host))
            return f'{network}::{host:x}'

    # Functions

    def functions(self) -> list[Function]:
        """The functions that have a live revision, by name."""
        return [Function.of(*row) for row in self._rows(f'{FUNCTIONS} WHERE f.revision NOT NULL ORDER BY f.name')]

    def function(self, name: str) -> Function:
        """The live function of that name; raises NotFound."""
        rows = self._rows(f'{FUNCTIONS} WHERE f.name = ? AND f.revision NOT NULL', name)
        if not rows:
            raise NotFound(f"there is no function '{name}'", "'faas list' shows what there is")
        return Function.of(*rows[0])

    def function_addresses(self) -> list[str]:
        """The addresses of all functions, those too whose first revision is deploying."""
        return [ipv6 for (ipv6,) in self._rows('SELECT ipv6 FROM functions')]

    def begin_revision(self, name: str, source: str | None = None) -> tuple[Function, int]:
        """(Function, number) of a revision that is now 'deploying'; a new name gets its address.

        `source` says what the deploy took. The Function is what serves meanwhile: its `revision` is None when nothing
        does. Raises BadName, NameTaken, RangeFull.
        """
        check_name(name, RESERVED)
        with self._lock:
            function, number = self._begin_revision(name, source)
            self._deploying.add(function.id)
            return function, number

    def _begin_revision(self, name, source):
        with self._change() as db:
            row = db.execute(f'{FUNCTIONS} WHERE f.name = ?', (name,)).fetchone()
            if row is None:
                ipv6, now = self.allocate_ipv6(), int(time.time())
                added = db.execute(
                    'INSERT INTO functions (deployment, name, ipv6, created) VALUES (1, ?, ?, ?)', (name, ipv6, now)
                )
                row = (added.lastrowid, name, ipv6, None, now, None, None)
            function = Function.of(*row)
            if function.id in self._deploying:
                raise NameTaken(f"another deploy of '{name}' is under way", 'try again when it has ended')
            number = (function.revision or 0) + 1
            db.execute(
                'INSERT OR REPLACE INTO revisions (function, number, state, created, source)'
                " VALUES (?, ?, 'deploying', ?, ?)",
                (function.id, number, int(time.time()), source),
            )
            return function, number

    def commit_revision(self, function: Function, number: int, config: dict | None = None) -> None:
        """The deploying revision becomes the live one, with its `config`. The row of the one before it is deleted."""
        with self._change() as db:
            db.execute("DELETE FROM revisions WHERE function = ? AND state = 'live'", (function.id,))
            db.execute(
                "UPDATE revisions SET state = 'live', config = ? WHERE function = ? AND number = ?",
                (json.dumps(config or {}), function.id, number),
            )
            db.execute('UPDATE functions SET revision = ? WHERE id = ?', (number, function.id))
        self._deploying.discard(function.id)

    @removal
    def abandon_revision(self, function: Function, number: int) -> None:
        """Forget a revision that never went live.

        With the first one goes the function, and its address counts as never used.
        """
        self._deploying.discard(function.id)  # first: if the disk fails, abandon_stale() does the rest later
        with self._change() as db:
            db.execute(
                "DELETE FROM revisions WHERE function = ? AND number = ? AND state = 'deploying'", (function.id, number)
            )
            if db.execute('DELETE FROM functions WHERE id = ? AND revision IS NULL', (function.id,)).rowcount:
                network, host = function.ipv6.split('::')
                db.execute('DELETE FROM addresses WHERE network = ? AND host = ?', (network, int(host, 16)))

    def abandon_stale(self) -> None:
        """Forget the revisions whose deploy ended because faasd was killed or the disk was full."""
        with self._lock:
            for function_id, number in self._rows("SELECT function, number FROM revisions WHERE state = 'deploying'"):
                if function_id not in self._deploying:
                    (row,) = self._rows(f'{FUNCTIONS} WHERE f.id = ?', function_id)
                    self.abandon_revision(Function.of(*row), number)

    @removal
    def remove_function(self, name: str) -> Function:
        """Forget a live function and return it. Its address becomes free.

        Raises NotFound; NameTaken while it is being deployed.
        """
        with self._change() as db:
            function = self.function(name)
            if function.id in self._deploying:
                raise NameTaken(f"a deploy of '{name}' is under way", 'try again when it has ended')
            db.execute('DELETE FROM functions WHERE id = ?', (function.id,))
            _free(db, function.ipv6)
            return function

    # Peers

    def peers(self) -> list[Peer]:
        """The peers that may connect, by name."""
        return [
            Peer(*row) for row in self._rows(f"SELECT {PEER_COLUMNS} FROM peers WHERE state = 'live' ORDER BY name")
        ]

    def peer_at(self, ipv6: str) -> Peer | None:
        """The live peer that has the address (as the document writes it), or None."""
        rows = self._rows(f"SELECT {PEER_COLUMNS} FROM peers WHERE ipv6 = ? AND state = 'live'", ipv6)
        return Peer(*rows[0]) if rows else None

    def add_peer(
        self,
        name: str,
        public_key: str,
        role: str = 'peer',
        ipv6: str | None = None,
        preshared_key: str | None = None,
        invite_id: str | None = None,
    ) -> Peer:
        """A new Peer. Without `ipv6` it gets the next address. `invite_id` is the invite that makes it, if one does.

        Raises BadName, NameTaken, KeyTaken, AddressTaken, RangeFull.
        """
        check_name(name)
        with self._change_within() as db:
            if name in _taken(db, invite_id):
                raise NameTaken(
                    f"a peer or an open invite '{name}' exists already",
                    f"choose another name, or 'faas vpn remove {name}' first",
                )
            if db.execute('SELECT 1 FROM peers WHERE public_key = ?', (public_key,)).fetchone():
                raise KeyTaken('another peer has this public key')
            if db.execute('SELECT 1 FROM peers WHERE preshared_key = ?', (preshared_key,)).fetchone():
                raise KeyTaken('another peer has this preshared key')
            if ipv6 is None:
                ipv6 = self.allocate_ipv6(PEERS)
            else:
                _claim(db, ipv6)
            peer = Peer(name, public_key, preshared_key, ipv6, role, int(time.time()))
            db.execute(
                f"INSERT INTO peers ({PEER_COLUMNS}, state) VALUES (?, ?, ?, ?, ?, ?, 'live')",
                peer,
            )
            return peer

    @removal
    def begin_peer_removal(self, name: str) -> None:
        """Remember that the peer is locked out. Its row stays until its file and its key are gone. Raises NotFound.

        An open invite of that name is withdrawn.
        """
        check_name(name)
        with self._change() as db:
            withdrawn = db.execute('DELETE FROM invites WHERE name = ? AND redeemed IS NULL', (name,)).rowcount
            if not db.execute("UPDATE peers SET state = 'removing' WHERE name = ?", (name,)).rowcount and not withdrawn:
                raise NotFound(f"there is no peer '{name}'", "'faas vpn list' on the server shows them with --peers")

    def removed_peers(self) -> list[tuple[str, str]]:
        """(name, public key) of the peers whose removal began."""
        return self._rows("SELECT name, public_key FROM peers WHERE state = 'removing'")

    @removal
    def end_peer_removal(self, name: str) -> None:
        """Forget a peer after its file and its key are gone. Its address becomes free."""
        with self._change() as db:
            for (ipv6,) in db.execute(
                "SELECT ipv6 FROM peers WHERE name = ? AND state = 'removing'", (name,)
            ).fetchall():
                _free(db, ipv6)
                db.execute('DELETE FROM peers WHERE name = ?', (name,))

    # Invites

    def add_invite(self, name: str | None = None, role: str = 'peer', lifetime_s: int = 3600) -> Invite:
        """A new Invite for one peer. Without `name` the newcomer chooses the name. Raises BadName, NameTaken."""
        now = int(time.time())
        with self._change() as db:
            db.execute('DELETE FROM invites WHERE expires <= ?', (now,))
            if name is not None:
                check_name(name)
                if name in _taken(db):
                    raise NameTaken(f"a peer or an open invite '{name}' exists already", 'choose another name')
            invite = Invite(secrets.token_hex(8), secrets.token_bytes(32), name, role, now + lifetime_s)
            db.execute('INSERT INTO invites (id, secret, name, role, expires) VALUES (?, ?, ?, ?, ?)', invite)
            return invite

    def invite(self, invite_id: str) -> Invite | None:
        """The Invite of that id, used or not, or None."""
        rows = self._rows('SELECT id, secret, name, role, expires FROM invites WHERE id = ?', invite_id)
        return Invite(*rows[0]) if rows else None

    def invites_open_for_s(self) -> float:
        """Seconds for which some invite can still be redeemed, or repeat its answer; 0 when none can."""
        now = time.time()
        (until,) = self._rows(
            'SELECT max(CASE WHEN redeemed IS NULL THEN expires ELSE min(expires, redeemed + ?) END) FROM invites',
            INVITE_REPEAT_S,
        )[0]
        return max(0, (until or 0) - now)

    def redeem(self, invite_id: str, name: str, public_key: str) -> Peer:
        """The Peer that the invite makes, or made when the same key asks again. Raises BadInvite, and as add_peer does.

        An invite without a name of its own makes `name` unique: laptop, laptop-2, laptop-3 …
        """
        now = int(time.time())
        with self._change() as db:
            row = db.execute(
                'SELECT name, role, expires, redeemed, public_key, peer FROM invites WHERE id = ?', (invite_id,)
            ).fetchone()
            if row is None or row[2] <= now:
                raise BadInvite
            fixed, role, _, redeemed, used_by, peer_id = row
            if redeemed is not None:
                if used_by != public_key or redeemed + INVITE_REPEAT_S <= now:
                    raise BadInvite
                made = db.execute(
                    f"SELECT {PEER_COLUMNS} FROM peers WHERE id = ? AND state = 'live'",
                    (peer_id,),
                ).fetchone()
                if made is None:
                    raise BadInvite
                return Peer(*made)
            name = fixed or _unique(db, check_name(name))
            peer = self.add_peer(name, public_key, role, invite_id=invite_id)
            db.execute(
                'UPDATE invites SET redeemed = ?, public_key = ?, peer = (SELECT id FROM peers WHERE name = ?)'
                ' WHERE id = ?',
                (now, public_key, peer.name, invite_id),
            )
            return peer

    # DNS

    def next_serial(self, seen: int | None = None) -> int:
        """A serial above the last one and above `seen`, the zone file's (RFC 1982). It is stored before the return."""
        with self._change() as db:
            row = db.execute("SELECT value FROM meta WHERE key = 'serial'").fetchone()
            serial = serial_after(row[0] if row else FIRST_SERIAL - 1, seen)
            db.execute("INSERT OR REPLACE INTO meta VALUES ('serial', ?)", (serial,))
            return serial


# The files of functions at a start


def check_files(registry: Registry, functions: str) -> list[str]:
    """Move each ID/REVISION in the folder `functions` that the registry cannot have made to `functions`.unknown.

    Returns where they are now. There are such files after an older copy took the place of the registry. Raises
    RegistryError when the registry is empty: it was lost. To be called before files without a row are removed.
    """
    made = dict(registry._rows('SELECT id, coalesce(revision, 0) + 1 FROM functions'))  # the greatest number so far
    last = max([0, *itertools.chain(*registry._rows("SELECT seq FROM sqlite_sequence WHERE name = 'functions'"))])
    unknown = [
        (function, number)
        for function in _numbers_in(functions)
        for number in _numbers_in(f'{functions}/{function}')
        if function > last or number > made.get(function, number)
    ]
    if unknown and not last:
        count = len({function for function, _ in unknown})
        raise RegistryError(
            f'{registry.path} is empty or was lost, but {functions} has the code of {count} functions',
            f'{registry.how_to_restore()}; or, to start with nothing: mv {functions} {functions}.old',
        )
    moved = []
    with disk.refusals(functions):
        for function, number in unknown:
            os.makedirs(f'{functions}.unknown/{function}', mode=0o700, exist_ok=True)
            moved.append(f'{functions}.unknown/{function}/{number}.{time.time():.0f}')
            os.rename(f'{functions}/{function}/{number}', moved[-1])
    return moved


def _numbers_in(folder: str) -> list[int]:
    """The names in the folder that are numbers, if it is a folder."""
    try:
        return sorted(int(name) for name in os.listdir(folder) if name.isdecimal())
    except (FileNotFoundError, NotADirectoryError):
        return []
