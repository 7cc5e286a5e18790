"""A folder of private files, NAME.conf, that are kept as wanted beside those that a person puts there."""

import os
from collections.abc import Iterator, Mapping

from host import files
from host.disk import Signature, signature_of


class ProjectedFolder:
    """The *.conf files of the folder `path`. Links, folders and other names are not looked at.

    A file is read again only when its signature differs, so that a look every few seconds is cheap.
    """

    SUFFIX = '.conf'

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self._texts: dict[str, tuple[Signature, str]] = {}  # name → what was read, and of which file
        self._left_out: dict[str, Signature] = {}

    def make(self) -> None:
        """Make the folder if it is missing. Raises OSError."""
        os.makedirs(self.path, mode=0o700, exist_ok=True)

    def texts(self) -> dict[str, str]:
        """{name: text} of the files. A folder that is missing has none. Raises OSError when it cannot be read."""
        found = {}
        for name, path, signature in self._scan():
            if self._texts.get(name, (None,))[0] == signature:
                found[name] = self._texts[name]
                continue
            try:
                with open(path, encoding='utf-8', errors='replace') as file:
                    found[name] = signature, file.read()  # a change after the look has another signature
            except FileNotFoundError:
                continue
        self._texts = found
        return {name: text for name, (_, text) in found.items()}

    def differing(self, wanted: Mapping[str, str]) -> list[str]:
        """The names in `wanted`, {name: text}, whose file is missing or has another text. Raises OSError."""
        texts = self.texts()
        return [name for name, text in wanted.items() if texts.get(name) != text]

    def changed(self, wanted: Mapping[str, str]) -> bool:
        """True if a file is not as wanted, or is neither wanted nor left out as it is now, or the folder is missing.

        Raises OSError.
        """
        if not os.path.isdir(self.path) or self.differing(wanted):
            return True
        return any(
            self._left_out.get(name) != signature
            for name, (signature, _) in self._texts.items()
            if name not in wanted
        )

    def leave_out(self, name: str) -> None:
        """Take the file of that name, as it was read last, for seen: only another change of it counts."""
        if name in self._texts:
            self._left_out[name] = self._texts[name][0]

    def write(self, name: str, text: str) -> None:
        """Write a file, and the folder if it is missing. Raises OSError."""
        self.make()
        files.write_file(self._file(name), text, mode=0o600)

    def remove(self, name: str) -> None:
        """Remove a file, which may be gone already. Raises OSError."""
        self._left_out.pop(name, None)
        files.remove_file(self._file(name))

    def _file(self, name: str) -> str:
        return os.path.join(self.path, name + self.SUFFIX)

    def _scan(self) -> Iterator[tuple[str, str, Signature]]:
        try:
            entries = os.scandir(self.path)
        except FileNotFoundError:
            return
        with entries:
            for entry in entries:
                if entry.name.endswith(self.SUFFIX) and entry.is_file(follow_symlinks=False):
                    try:
                        yield entry.name.removesuffix(self.SUFFIX), entry.path, signature_of(entry.stat())
                    except FileNotFoundError:
                        continue
