"""Deploys: a new revision of a function, from an archive or from other wants, takes the place of the former one."""

import contextlib
import shutil
from collections.abc import Callable, Iterable

import registry
from control.builds import Builds
from control.events import Emit, attempt
from control.functions import Ending, Functions
from control.projection import Projection
from control.revisions import Revisions
from control.secrets import SecretInUse, Secrets, users
from control.volumes import Volumes
from handlers.containers.containers import Containers
from handlers.containers.private import MountRefused
from handlers.images import wants
from handlers.images.spec import Spec
from handlers.images.staging import Staging
from handlers.serving.instance import Instance, Revision
from handlers.serving.pool import Pool
from host.errors import FaasError

ENDING_REMOVAL_S = 2  # how long the end of faasd removes what was unpacked; the next start does the rest
FLAGS = 'the flags'  # where wants come from that are not of the folder or the image


class TooLarge(FaasError):
    """An upload is longer than FAAS_MAX_UPLOAD."""

    status = 413

    def __init__(self, what: str, most: int) -> None:
        super().__init__(
            f'{what} more than FAAS_MAX_UPLOAD, {most}',
            'leave out what the function does not need, or raise the setting',
        )


def bounded(read: Callable[[int], bytes], most: int) -> Callable[[int], bytes]:
    """A read() for an archive of which nobody has said how long it is. It raises TooLarge after `most` bytes."""
    left = most

    def read_bounded(count: int) -> bytes:
        nonlocal left
        data = read(count)
        left -= len(data)
        if left < 0:
            raise TooLarge('the archive is', most)
        return data

    return read_bounded


class Deployments:
    """Makes revisions, and has `functions` serve them. `addresses` projects the addresses of the registry."""

    def __init__(
        self,
        functions: Functions,
        known: registry.Registry,
        revisions: Revisions,
        addresses: Projection,
        containers: Containers,
        secrets: Secrets,
        volumes: Volumes,
        builds: Builds,
        max_upload: int,
        emit: Emit,
    ) -> None:
        self._functions, self._registry, self._revisions, self._addresses = functions, known, revisions, addresses
        self._bounds, self._private = containers.bounds, containers.private
        self._secrets, self._volumes, self._builds = secrets, volumes, builds
        self._max_upload, self._emit = max_upload, emit

    # Verbs

    def deploy(
        self,
        name: str,
        read: Callable[[int], bytes],
        length: int | None,
        *,
        reference: str | None = None,
        source: str | None = None,
        change: 'Change | None' = None,
        is_wanted: Callable[[], bool] = lambda: True,
        stop_reading: Callable[[], None] = lambda: None,
        may_mount: bool = False,
        tell: Callable[[bytes], object] = lambda data: None,
        needs: Iterable[str] = (),
        by: str,
    ) -> dict:
        """Deploy the archive that read(n) gives as `name`: `length` bytes, or all bytes when that is None.

        `reference` says which of several images, `source` what the archive was made from, `change` what else the
        function wants from now on, `may_mount` whether it may have folders of the server, `by` who asks. The former
        revision serves until the new one is ready. When is_wanted() says that nobody waits for the answer any more, all
        is undone.
        stop_reading() is called when faasd ends. read() must end then, also one that is under way. tell() is given the
        output of a build. `needs` are programs that a build will need.
        """
        registry.check_name(name, registry.RESERVED)
        if length is not None and length > self._max_upload:
            raise TooLarge(f'{length} bytes are', self._max_upload)
        self._builds.need(needs)
        with self._functions.changes.one(stop_reading), contextlib.ExitStack() as undo:
            undo.push(lambda error, *_: self._revisions.collect_layers() if error else None)
            staging = undo.enter_context(self._revisions.staging(reference))
            self._receive(staging, read if length is not None else bounded(read, self._max_upload), length, is_wanted)
            self._build(name, staging, tell, is_wanted)

            def put(function: registry.Function, number: int) -> None:
                staging.keep(self._revisions.folder(function, number))

            started = self._start(name, source, change or Change(), put, is_wanted, may_mount)
        return self._serve(*started, 'Deployed', f'by {by}')

    def remove(self, name: str, by: str) -> None:
        """Remove a function and what its builds keep. Raises NotFound."""
        self._functions.remove(name, by)
        self._builds.forget(name)

    def configure(
        self,
        name: str,
        change: 'Change',
        *,
        is_wanted: Callable[[], bool] = lambda: True,
        may_mount: bool = False,
        by: str,
    ) -> dict:
        """Change what a function wants: a new revision with the same code. Returns what deploy() does.

        Raises NotFound; BadWant.
        """
        if change.of(self._registry.function(name).config) == self._registry.function(name).config:
            raise wants.BadWant('nothing would change', f"'faas config {name}' shows what is set")
        return self._same_code(name, change, is_wanted, may_mount, 'Configured', f'by {by}')

    def redeploy(self, name: str, why: str) -> dict:
        """Put a new revision with the same code and the same wants in the place of the live one. Raises NotFound."""
        return self._same_code(name, Change(), lambda: True, True, 'Redeployed', f'since {why}')

    # Secrets

    def set_secret(self, name: str, value: bytes, by: str) -> dict:
        """Keep a secret, and redeploy who wants it: {'changed', 'encrypted', 'redeployed': [NAME], 'failed': [TEXT]}.

        Raises FaasError, OSError.
        """
        with self._functions.changes.one():
            changed = self._secrets.set(name, value)
        redeployed, failed = [], []
        if changed:
            self._emit('secret', f'Set the secret {name}, by {by}')
        for function in self._users(name) if changed else ():
            try:
                self.redeploy(function, f'the secret {name} has changed')
                redeployed.append(function)
            except (FaasError, OSError) as error:  # it goes on with the former value
                failed.append(f'{function}: {error}')
                self._emit('secret', f'{function} goes on without the new value of {name}: {error}', problem=True)
        if not failed:
            self._secrets.given(name)
        encrypted = self._secrets.is_encrypted(name)
        return {'changed': changed, 'encrypted': encrypted, 'redeployed': redeployed, 'failed': failed}

    def remove_secret(self, name: str, by: str) -> None:
        """Raises NoSecret, SecretInUse."""
        with self._functions.changes.one():
            if wanted_by := self._users(name):
                hint = f'first: faas config {wanted_by[0]} --unset …, or take it from its folder or image'
                raise SecretInUse(f'the secret {name} is wanted by {", ".join(wanted_by)}', hint)
            self._secrets.remove(name)
        self._emit('secret', f'Removed the secret {name}, by {by}')

    def secrets(self) -> list[dict]:
        """[{'name', 'set', 'functions'}]"""
        return [
            {'name': name, 'set': when, 'functions': self._users(name)} for name, when in self._secrets.names().items()
        ]

    def _users(self, name: str) -> list[str]:
        return users(name, ((function, spec.settings) for function, spec in self.wanted()))

    def _same_code(
        self, name: str, change: 'Change', is_wanted: Callable[[], bool], may_mount: bool, verb: str, more: str
    ) -> dict:
        function = self._registry.function(name)
        with self._functions.changes.one():
            started = self._start(name, function.source, change, self._revisions.copy, is_wanted, may_mount)
        return self._serve(*started, verb, more)

    # Steps

    def _receive(
        self, staging: Staging, read: Callable[[int], bytes], length: int | None, is_wanted: Callable[[], bool]
    ) -> None:
        """Have an upload unpacked. Raises Ending soon when faasd ends, and what Staging.receive does."""
        try:
            staging.receive(read, length, lambda: is_wanted() and not self._functions.changes.ended)
        except (FaasError, OSError, EOFError) as error:
            if self._functions.changes.ended:
                staging.removal_s = ENDING_REMOVAL_S
                raise Ending from error
            raise

    def _build(
        self, name: str, staging: Staging, tell: Callable[[bytes], object], is_wanted: Callable[[], bool]
    ) -> None:
        """Have it built if it needs that. Raises Ending soon when faasd ends, and what Builds.build does."""
        try:
            self._builds.build(name, staging, tell, lambda: is_wanted() and not self._functions.changes.ended)
        except ConnectionAbortedError as error:
            if self._functions.changes.ended:
                raise Ending from error
            raise

    def _start(
        self,
        name: str,
        source: str | None,
        change: 'Change',
        put: Callable[[registry.Function, int], None],
        is_wanted: Callable[[], bool],
        may_mount: bool,
    ) -> tuple[registry.Function, int, Pool, Instance, dict[str, bytes]]:
        """Commit a revision whose files put() makes, and start its first instance. All is undone if that fails."""
        with contextlib.ExitStack() as steps:
            steps.callback(attempt, self._emit, self._addresses.sync)
            function, number = self._registry.begin_revision(name, source)
            steps.callback(self._registry.abandon_revision, function, number)
            config = change.of(function.config)
            folder = self._revisions.folder(function, number)
            if function.revision is None:
                steps.callback(shutil.rmtree, self._revisions.folder(function), ignore_errors=True)
            steps.callback(shutil.rmtree, folder, ignore_errors=True)
            put(function, number)
            revision = self._revisions.load(function, number, config)
            self._bounds.check(revision.spec)
            given = self._secrets.check(revision.spec.settings)
            if revision.spec.settings.get('mounts') and not may_mount:
                hint = "on the server, with sudo; 'faas config' shows what the function asks for"
                raise MountRefused('only root deploys what asks for folders of the server (mounts)', hint)
            self._private.check(revision.spec)
            steps.callback(self._volumes.prepare(name, revision.spec))
            pool = self._functions.pool_for(function, steps)
            instance = self._up(pool, revision, is_wanted)
            steps.callback(pool.discard, instance)
            if not is_wanted():
                raise ConnectionAbortedError
            self._registry.commit_revision(function, number, config)
            steps.pop_all()
            return function, number, pool, instance, given

    def _up(self, pool: Pool, revision: Revision, is_wanted: Callable[[], bool]) -> Instance:
        """An instance that is ready. Raises Ending soon when faasd ends, and what Pool.start does."""
        try:
            return pool.start(revision, lambda: is_wanted() and not self._functions.changes.ended)
        except ConnectionAbortedError as error:
            if self._functions.changes.ended:
                raise Ending from error
            raise

    def _serve(
        self,
        function: registry.Function,
        number: int,
        pool: Pool,
        instance: Instance,
        given: dict[str, bytes],
        verb: str,
        more: str,
    ) -> dict:
        """Have the instance serve, which was `given` these secrets. Returns the answer."""
        pool.cut_over(instance)
        name = function.name
        spec = instance.revision.spec
        warnings = [*spec.warnings, *volatile(spec, name), self._functions.limit_watch.news_of(instance)]
        warnings += [instance.warning, self._functions.publish(function)]
        text = f'{verb} {name} at {function.ipv6}, revision {number} ({instance.description}), {more}'
        self._emit('handler', text, name=name)
        if self._secrets.check(instance.revision.spec.settings) != given:  # it was not among the users then
            return self.redeploy(name, 'a secret has changed')
        return {
            'name': name,
            'ipv6': function.ipv6,
            'dns': f'{name}.faas',
            'revision': number,
            'serves': instance.description,
            'warning': '; '.join(filter(None, warnings)) or None,
            'hint': instance.hint,
        }

    # Looking

    def config(self, name: str) -> list[dict]:
        """What the function wants: [{'key', 'value', 'from'}], from 'the folder', 'the image' or 'flags'.

        Limits that it does not ask for are there, too, from 'the server'. Raises NotFound, FaasError.
        """
        function = self._registry.function(name)
        spec = self._described(function)
        effective = self._revisions.effective(spec, function.config)
        place = 'the image' if spec.layers else 'the folder'
        set_by_flags = dict(wants.lines(function.config))
        rows = []
        for key, value in wants.lines(effective.settings):
            described = key.partition('.')[0] in spec.settings
            origin = 'flags' if key in set_by_flags else place if described else 'the server'
            rows.append({'key': key, 'value': value, 'from': origin})
        limits = self._bounds.of(effective)._asdict()
        for key in ('memory', 'cpus', 'pids'):
            if key not in effective.settings:
                rows.append({'key': key, 'value': wants.shown(key, limits[key]), 'from': 'the server'})
        return rows

    def describe(self, name: str) -> dict:
        """The function as in the list, its config, its limits, and what its instances use. Raises NotFound."""
        function = self._registry.function(name)
        row = next((row for row in self._functions.list() if row['name'] == name), {})
        spec = self._revisions.effective(self._described(function), function.config)
        return {
            **row,
            'kind': spec.kind,
            'config': self.config(name),
            'limits': self._bounds.of(spec)._asdict(),
            'instances': self._functions.instances(function),
        }

    def wanted(self) -> list[tuple[str, Spec]]:
        """[(name, Spec)] of the live functions. One that cannot be read wants nothing until it is deployed again."""
        found = []
        for function in self._registry.functions():
            with contextlib.suppress(FaasError):
                spec = self._revisions.effective(self._described(function), function.config)
                found.append((function.name, spec))
        return found

    def _described(self, function: registry.Function) -> Spec:
        try:
            return self._revisions.described(function)
        except (OSError, ValueError) as error:
            raise FaasError(f'{function.name}: {error}', 'deploy it again') from error


def volatile(spec: Spec, name: str) -> list[str]:
    """A warning for each VOLUME of the image that no volume of the function covers."""
    kept = [volume['path'] for volume in spec.settings.get('volumes', {}).values()]
    lost = [path for path in spec.volumes if not any(f'{path}/'.startswith(f'{each}/') for each in kept)]
    return [f'{path} goes with the instance (--volume {name}:{path} keeps it)' for path in lost]


class Change:
    """What flags or `faas config` set and unset: texts as wants.from_texts() takes them."""

    def __init__(self, sets: dict[str, str] | None = None, unsets: Iterable[str] = ()) -> None:
        """Raises BadWant."""
        self._sets, self._unsets = wants.from_texts((sets or {}).items(), FLAGS), list(unsets)

    def of(self, config: dict[str, object]) -> dict[str, object]:
        """The wants of a function that had `config`. Raises BadWant."""
        return wants.merged(wants.without(config, self._unsets, FLAGS), self._sets)
