"""Finds the image in an archive from strangers, in docker's form or OCI's, and reads what it says of itself.

https://github.com/opencontainers/image-spec, and docker's image/spec/v1.2.md. Nothing here writes a file.
"""

import contextlib
import hashlib
import json
import os
import platform
import re
import signal
from collections.abc import Iterator
from typing import NamedTuple

from handlers.images import wants
from handlers.images.streams import ImageError, Section, SectionReader, show
from handlers.images.tar import HINT, members, parts

MOST_JSON, MOST_JSON_IN_ALL = 4 << 20, 16 << 20
JSON_COST = 4096  # bytes that the reading of a small file counts as
MOST_MEMBERS = 20_000  # of the archive itself, not of its layers
MOST_LAYERS = 127
MOST_PORTS, MOST_VOLUMES = 1024, 32
MOST_NESTED = 4  # indexes in indexes, links to links

CPUS = {'x86_64': 'amd64', 'aarch64': 'arm64', 'armv7l': 'arm', 'armv6l': 'arm', 'i686': '386', 'i386': '386'}
CPU = CPUS.get(platform.machine(), platform.machine())


class Archive:
    """An index of the members of a tar, in a file that is open as `fd` (borrowed)."""

    def __init__(self, fd: int) -> None:
        self.whole = Section(fd, 0, os.fstat(fd).st_size)
        self._members, self._json_left = {}, MOST_JSON_IN_ALL
        reader = SectionReader(self.whole)
        for count, member in enumerate(members(reader)):
            if count >= MOST_MEMBERS:
                raise ImageError(f'more than {MOST_MEMBERS} files and folders', 'leave out what it does not need')
            with contextlib.suppress(ImageError):  # an image does not need it, and unpacking a folder refuses it
                self._members[b'/'.join(parts(member.name))] = member, Section(fd, reader.at, member.size)

    def __contains__(self, name: str) -> bool:
        return name.encode() in self._members

    def is_image(self) -> bool:
        return 'manifest.json' in self or ('oci-layout' in self and 'index.json' in self)

    def section(self, name: str, what: str) -> Section:
        """The content of the file `name`, which may be a link to another. Raises ImageError when it is missing."""
        path = os.fsencode(name)
        for _ in range(MOST_NESTED):
            member, section = self._members.get(path, (None, None))
            if member is None:
                break
            if member.kind == 'file':
                return section
            if member.kind == 'link':
                path = b'/'.join(parts(member.link))
            elif member.kind == 'symlink':
                path = b'/'.join(parts(os.path.dirname(path) + b'/' + member.link))
            else:
                break
        raise ImageError(f'{what} is not in the archive: {show(name)} is missing', 'save the image again')

    def json(self, name: str, what: str, digest: str | None = None, size: int | None = None) -> object:
        """What the JSON file `name` holds, after a check of digest and size. Raises ImageError."""
        section = self.section(name, what)
        if size is not None and section.size != size:
            raise ImageError(f'{what} has {section.size} bytes, not {size}', 'save the image again')
        if section.size > MOST_JSON:
            raise ImageError(f'{what} has {section.size} bytes, more than {MOST_JSON}')
        self._json_left -= section.size + JSON_COST  # an index can be named many times
        if self._json_left < 0:
            raise ImageError('the archive names too many indexes and manifests', 'save one image alone')
        data = b''.join(section.chunks())
        if digest and hashlib.sha256(data).hexdigest() != digest:
            raise ImageError(f'{what} has another digest than {digest}', 'save the image again')
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ImageError(f'{what} is not JSON', 'save the image again') from error


class Layer(NamedTuple):
    """A layer in an archive: the digest of the unpacked content, that of the blob (or None), and where the blob is."""

    diff_id: str
    blob: str | None
    section: Section


def find_image(archive: Archive, reference: str | None = None) -> tuple[dict, list[Layer]]:
    """(config, [Layer, …] from the bottom) of the image of that name, or of the only one. Raises ImageError."""
    find = docker_image if 'manifest.json' in archive else oci_image
    config, blobs = find(archive, reference)
    check_platform(of(config, dict, 'the config'))
    rootfs = of(config.get('rootfs'), dict, "the config's rootfs")
    what = "the config's diff_ids"
    ids = [hex_of(each, what) for each in of(rootfs.get('diff_ids') or [], list, what)]
    if not blobs:
        raise ImageError('the image has no layers')
    if len(ids) != len(blobs):
        raise ImageError(
            f'the image has {len(blobs)} layers, the config names {len(ids)}: one is missing or foreign',
            'save the image again',
        )
    return config, [Layer(diff_id, blob, section) for diff_id, (blob, section) in zip(ids, blobs, strict=True)]


def of(value: object, kind: type, what: str) -> object:
    """`value`, if it is of that type. Raises ImageError, which calls it `what`."""
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {dict: 'an object', list: 'a list', str: 'a text', int: 'a number'}
        raise ImageError(f'{what} is not {names[kind]}', 'save the image again')
    return value


def hex_of(digest: object, what: str) -> str:
    """The hex digits of a digest. Raises ImageError."""
    if not re.fullmatch(r'sha256:[0-9a-f]{64}', of(digest, str, what)):
        raise ImageError(f'{what}: {show(digest)} is not a SHA-256 digest', 'save the image again')
    return digest.removeprefix('sha256:')


def check_platform(config: dict) -> None:
    """Raise ImageError unless the image is for this kind of machine."""
    system, cpu = config.get('os') or 'linux', config.get('architecture') or CPU
    if system != 'linux':
        raise ImageError(f'the image is for {show(of(system, str, "os"))[1:-1]}, this server runs linux')
    if cpu != CPU:
        cpu = show(of(cpu, str, 'architecture'))[1:-1]
        raise ImageError(f'the image is for {cpu}, this server is {CPU}', f'build it with --platform linux/{CPU}')


def choose(images: list[tuple[list[str], object]], reference: str | None) -> object:
    """The image of [(names, image), …] that has the name `reference`, or the only one. Raises ImageError."""
    found = [image for names, image in images if reference is None or same_name(names, reference)]
    if len(found) == 1:
        return found[0]
    listed = ', '.join(show(names[0])[1:-1] for names, _ in images[:50])
    if not found and images and reference is not None:
        raise ImageError(f'the archive holds no {show(reference)[1:-1]}, but {listed}', 'say which: --image REF')
    if not found:
        raise ImageError('the archive holds no image', HINT)
    raise ImageError(f'the archive holds {len(images)} images: {listed}', 'say which: --image REF')


def same_name(names: list[str], reference: str) -> bool:
    """True if one of the names means `reference`, with or without the default registry and tag."""

    def plain(name):
        for prefix in ('docker.io/', 'library/', 'localhost/'):
            name = name.removeprefix(prefix)
        return name if ':' in name.rpartition('/')[2] else f'{name}:latest'

    wanted = plain(reference)
    return any(plain(name) == wanted for name in names)


def docker_image(archive: Archive, reference: str | None) -> tuple[dict, list[tuple[str | None, Section]]]:
    """(config, [(blob digest or None, Section), …]) of an image that `docker save` wrote. Raises ImageError."""
    images = []
    for entry in of(archive.json('manifest.json', 'manifest.json'), list, 'manifest.json'):
        config = of(of(entry, dict, 'manifest.json').get('Config'), str, "manifest.json's Config")
        names = [of(each, str, 'RepoTags') for each in of(entry.get('RepoTags') or [], list, 'RepoTags')]
        images.append((names or [f'sha256:{os.path.basename(config)[:12]}'], entry))
    entry = choose(images, reference)
    named = re.fullmatch(r'(?:([0-9a-f]{64})\.json|blobs/sha256/([0-9a-f]{64}))', entry['Config'])
    config = archive.json(entry['Config'], 'the config', digest=named and (named[1] or named[2]))
    names = [of(each, str, 'Layers') for each in layers_of(entry.get('Layers'), 'Layers')]
    return config, [(None, archive.section(name, f'layer {at + 1}')) for at, name in enumerate(names)]


def oci_image(archive: Archive, reference: str | None) -> tuple[dict, list[tuple[str | None, Section]]]:
    """(config, [(blob digest, Section), …]) of an image in an OCI image layout. Raises ImageError."""
    groups = {}  # (names, or what else tells images apart) → manifests for several platforms
    index = of(archive.json('index.json', 'index.json'), dict, 'index.json')
    for names, descriptor in manifests(archive, index):
        platform_ = descriptor.get('platform')
        key = names or ('' if platform_ else hex_of(descriptor.get('digest'), 'index.json'))
        groups.setdefault(key, []).append(descriptor)
    images = {}  # digest → (names, manifests): one image may have several names
    for key, group in groups.items():
        digest = hex_of(group[0].get('digest'), 'index.json')
        names = list(key) if isinstance(key, tuple) else [f'sha256:{digest[:12]}']
        images.setdefault(digest, ([], group))[0].extend(names)
    group = choose(list(images.values()), reference)
    descriptor = next(filter(fits, group), None)
    if descriptor is None:
        cpus = ', '.join(sorted({show(str(each['platform'].get('architecture')))[1:-1] for each in group}))
        raise ImageError(f'the image is for {cpus}, this server is {CPU}', f'build it with --platform linux/{CPU}')
    manifest = of(blob_json(archive, descriptor, 'the manifest'), dict, 'the manifest')
    config = blob_json(archive, of(manifest.get('config'), dict, "the manifest's config"), 'the config')
    layers = []
    for at, layer in enumerate(layers_of(manifest.get('layers'), "the manifest's layers")):
        what = f'layer {at + 1}'
        digest = hex_of(of(layer, dict, what).get('digest'), what)
        name = f'blobs/sha256/{digest}'
        if layer.get('urls') and name not in archive:
            raise ImageError(f'{what} is foreign: it is not in the archive', 'save the image with all its layers')
        section = archive.section(name, what)
        if section.size != of(layer.get('size'), int, f"{what}'s size"):
            raise ImageError(f'{what} has {section.size} bytes, not {layer["size"]}', 'save the image again')
        layers.append((digest, section))
    return config, layers


def layers_of(value: object, what: str) -> list:
    """The layers that a manifest lists. Raises ImageError."""
    found = of(value or [], list, what)
    if len(found) > MOST_LAYERS:
        raise ImageError(f'the image has {len(found)} layers, more than {MOST_LAYERS}', 'build it with fewer steps')
    return found


def blob_json(archive: Archive, descriptor: dict, what: str) -> object:
    """What the JSON blob of a descriptor holds. Raises ImageError."""
    digest = hex_of(descriptor.get('digest'), what)
    size = of(descriptor.get('size'), int, f"{what}'s size")
    return archive.json(f'blobs/sha256/{digest}', what, digest, size)


def fits(descriptor: dict) -> bool:
    """True if the manifest is for this kind of machine, or for any."""
    platform_ = descriptor.get('platform')
    return not platform_ or (platform_.get('os'), platform_.get('architecture')) == ('linux', CPU)


def manifests(archive: Archive, index: dict, names: tuple = (), nested: int = 0) -> Iterator[tuple[tuple, dict]]:
    """(names, descriptor) of each image's manifest for a platform, in an index and the indexes in it."""
    if nested > MOST_NESTED:
        raise ImageError(f'more than {MOST_NESTED} indexes in each other')
    for descriptor in of(index.get('manifests') or [], list, 'the index'):
        annotations = of(of(descriptor, dict, 'the index').get('annotations') or {}, dict, 'annotations')
        platform_ = of(descriptor.get('platform') or {}, dict, 'platform')
        if platform_.get('architecture') == 'unknown' or 'vnd.docker.reference.type' in annotations:
            continue  # an attestation
        keys = ('io.containerd.image.name', 'org.opencontainers.image.ref.name')
        said = tuple(of(annotations[key], str, key) for key in keys if key in annotations)
        if 'index' in str(descriptor.get('mediaType')) or 'manifest.list' in str(descriptor.get('mediaType')):
            inner = of(blob_json(archive, descriptor, 'the index'), dict, 'the index')
            digest = hex_of(descriptor.get('digest'), 'the index')
            yield from manifests(archive, inner, names or said or (f'sha256:{digest[:12]}',), nested + 1)
        else:
            yield names or said, descriptor


# What an image says of itself


def image_spec(config: dict, layers: list[str]) -> dict:
    """The fields of a spec.Spec, from the config of an image. Raises ImageError."""
    inner = of(config.get('config') or {}, dict, "the config's config")
    args = [*texts(inner, 'Entrypoint'), *texts(inner, 'Cmd')]
    if not args or not args[0]:
        raise ImageError('the image has no command', 'give it an ENTRYPOINT or a CMD')
    env = {}
    for text in texts(inner, 'Env'):
        name, equals, value = text.partition('=')
        if not name or not equals:
            raise ImageError(f"the config's Env: {show(text)} is not NAME=VALUE")
        env[name] = value
    ports, warnings = exposed(of(inner.get('ExposedPorts') or {}, dict, "the config's ExposedPorts"))
    volumes = sorted(of(inner.get('Volumes') or {}, dict, "the config's Volumes"))[:MOST_VOLUMES]
    labels = of(inner.get('Labels') or {}, dict, "the config's Labels")
    try:
        settings = wants.from_labels(labels)
    except wants.BadWant as error:
        raise ImageError(str(error), error.hint) from error
    check = healthcheck(of(inner.get('Healthcheck') or {}, dict, "the config's Healthcheck"))
    if check and (asked := asked_path(check['args'])):
        check, settings = None, {'ready': asked} | settings
    return {
        'kind': 'image',
        'args': args,
        'env': env,
        'cwd': '/' + '/'.join(map(os.fsdecode, parts(os.fsencode(text_of(inner, 'WorkingDir'))))),
        'user': text_of(inner, 'User'),
        'ports': ports,
        'stop_signal': signal_name(text_of(inner, 'StopSignal') or 'SIGTERM'),
        'layers': layers,
        'settings': settings,
        'volumes': volumes,
        'healthcheck': check,
        'warnings': warnings,
    }


def exposed(said: dict) -> tuple[list[int], list[str]]:
    """The TCP ports of ExposedPorts, and what cannot be read of it, as warnings: '80', '80/tcp', '8000-8010/TCP'."""
    ports, unread = set(), []
    for text in said:
        found = re.fullmatch(r'([0-9]{1,5})(?:-([0-9]{1,5}))?(?:/(tcp|udp|sctp))?', text.lower())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        if not 1 <= first <= last <= 65535:
            unread.append(show(text))
        elif found[3] in (None, 'tcp'):
            ports.update(range(first, min(last, first + MOST_PORTS) + 1))
    warnings = [f'EXPOSE: {", ".join(unread[:9])} is not a port and counts for nothing'] if unread else []
    return sorted(ports)[:MOST_PORTS], warnings


def healthcheck(said: dict) -> dict | None:
    """The HEALTHCHECK, whose times are in nanoseconds; None without one. Raises ImageError."""
    how, *args = texts(said, 'Test') or ['NONE']
    if how == 'CMD-SHELL':
        args = ['/bin/sh', '-c', *args[:1]]
    if how not in ('CMD', 'CMD-SHELL') or not args or not args[0]:
        return None

    def number(key: str, default: float, unit: float, least: float, most: float) -> float:
        value = of(said.get(key) or 0, int, f"the config's Healthcheck: {key}") / unit
        return max(least, min(value or default, most))

    return {
        'args': args,
        'interval_s': number('Interval', 30, 1e9, 1, 86400),
        'timeout_s': number('Timeout', 30, 1e9, 1, 3600),
        'retries': int(number('Retries', 3, 1, 1, 1000)),
    }


def asked_path(args: list[str]) -> str | None:
    """The path that a HEALTHCHECK asks its own server for by curl or wget, None if it does something else.

    faasd asks for it: inside, nothing listens at that port, for the listener is of the host's network.
    """
    text = ' '.join(args)
    host = r'(?:localhost|127\.0\.0\.1|0\.0\.0\.0|\[::1?\])'
    found = re.search(rf'http://{host}(?::(?:[0-9]+|\$\{{?[A-Z_]+\}}?))?(/[!#%-&(-:=?-Z_a-z~+]*)?', text)
    if not found or not re.search(r'\b(curl|wget)\b', text) or len(found[1] or '') > 1000:
        return None
    return found[1] or '/'


def text_of(config: dict, key: str) -> str:
    """A text of the config, '' if it is missing. Raises ImageError."""
    text = of(config.get(key) or '', str, f"the config's {key}")
    if '\0' in text:
        raise ImageError(f"the config's {key} holds a NUL")
    return text


def texts(config: dict, key: str) -> list[str]:
    """A list of texts of the config, [] if it is missing. Raises ImageError."""
    found = of(config.get(key) or [], list, f"the config's {key}")
    for text in found:
        if '\0' in of(text, str, f"the config's {key}"):
            raise ImageError(f"the config's {key} holds a NUL")
    return found


def signal_name(text: str) -> str:
    """The name of a signal: SIGTERM for 'TERM' and for '15', SIGRTMIN+3 for 'rtmin+3'. Raises ImageError."""
    name = text.upper()
    if re.fullmatch('[0-9]{1,2}', name):
        with contextlib.suppress(ValueError):
            return signal.Signals(int(name)).name
    name = name if name.startswith('SIG') else f'SIG{name}'
    if name in signal.Signals.__members__ or re.fullmatch(r'SIGRT(MIN\+|MAX-)([0-9]|[12][0-9]|30)', name):
        return name
    raise ImageError(f"the config's StopSignal: there is no signal {show(text)}")
