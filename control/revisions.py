"""The revisions on disk: `functions/ID/REVISION/`, and the layers that they share."""

import os
import pathlib
import shutil
from collections.abc import Iterable

import registry
from control.events import Emit, attempt
from handlers.containers.logs import Log
from handlers.images.layers import Layers, remove_tree
from handlers.images.spec import Spec, read_spec, tree
from handlers.images.staging import Staging
from handlers.serving.instance import Revision
from host import files
from host.errors import FaasError


def link(old: str, new: str) -> None:
    """A further name of a file or of a symbolic link."""
    os.link(old, new, follow_symlinks=False)


class Revisions:
    """What is stored below `state`. Files of layers belong to the ids from `layers.id_base` on."""

    def __init__(
        self, state: str, layers: Layers, layers_base: int, max_unpacked: int, egress: list[str], emit: Emit
    ) -> None:
        """`egress` is what a function may reach that does not say it."""
        self._functions = f'{state}/functions'
        self._layers, self._layers_base, self._max_unpacked, self._emit = layers, layers_base, max_unpacked, emit
        self._default = {'egress': egress} if egress else {}

    def folder(self, function: registry.Function, number: int | None = None) -> str:
        """The folder of a function, or of one of its revisions."""
        folder = f'{self._functions}/{function.id}'
        return folder if number is None else f'{folder}/{number}'

    def log(self, function: registry.Function) -> Log:
        return Log(f'{self.folder(function)}/log')

    def load(self, function: registry.Function, number: int, config: dict[str, object] | None = None) -> Revision:
        """The revision with the wants that `config` sets: those of the live one, unless others are given.

        Raises OSError, ValueError when what is on disk cannot be used.
        """
        folder = self.folder(function, number)
        spec = self.effective(read_spec(folder), function.config if config is None else config)
        return Revision(number, folder, spec, self._layers.folder if spec.layers else tree(folder))

    def effective(self, spec: Spec, config: dict[str, object]) -> Spec:
        """The Spec with what flags and this server say."""
        spec = spec.effective(config)
        return spec._replace(settings=self._default | spec.settings)

    def described(self, function: registry.Function) -> Spec:
        """The Spec of the live revision as its folder or image has it. Raises OSError, ValueError."""
        return read_spec(self.folder(function, function.revision))

    def copy(self, function: registry.Function, number: int) -> None:
        """Make revision `number` from the live one: the same files, by hard links, for none is ever changed.

        Raises OSError, FaasError.
        """
        former, new = self.folder(function, function.revision), self.folder(function, number)
        if not os.path.exists(f'{former}/spec.json'):
            raise FaasError(f'{function.name} was deployed by an older faasd', 'deploy it again')
        shutil.rmtree(new, ignore_errors=True)
        shutil.copytree(former, new, symlinks=True, copy_function=link)
        files.sync_file_system(new)

    def staging(self, reference: str | None) -> Staging:
        """`reference` says which of several images is meant."""
        return Staging(
            self._functions,
            self._layers,
            id_base=self._layers_base,
            most_bytes=self._max_unpacked,
            reference=reference,
        )

    def remove_strays(self, functions: Iterable[registry.Function]) -> None:
        """Remove what no row names: uploads that were cut off, revisions that were never live."""
        top = pathlib.Path(self._functions)
        top.mkdir(mode=0o700, exist_ok=True)
        live = {str(function.id): str(function.revision) for function in functions}
        for folder in top.iterdir():
            if folder.name not in live:
                remove_tree(str(folder))
                continue
            for revision in folder.iterdir():
                if revision.is_dir() and revision.name != live[folder.name]:
                    shutil.rmtree(revision, ignore_errors=True)
        self.collect_layers()

    def forget(self, folder: str) -> None:
        """Delete the files of a revision or of a function, and the layers that no other needs."""
        shutil.rmtree(folder, ignore_errors=True)
        self.collect_layers()

    def collect_layers(self) -> None:
        def wanted() -> set[str]:
            folders = (self._functions, f'{self._functions}.unknown')  # the second: see registry.check_files
            specs = [path for folder in folders for path in pathlib.Path(folder).glob('*/*/spec.json')]
            return {layer for path in specs for layer in read_spec(path.parent).layers}

        try:
            attempt(self._emit, self._layers.collect, wanted)
        except ValueError as error:  # a spec that cannot be read may need any of them
            self._emit('handler', f'Layers are kept for now: {error}', problem=True)
