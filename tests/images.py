"""Images without a registry: archives as docker save, podman save and skopeo write them, by the standard library.

    app = images.layer(('bin/', None), ('bin/serve', b'…', {'mode': 0o755}), ('sh', 'bin/serve'))
    data = images.image([app], {'Cmd': ['/bin/serve']}, form='oci', pack='gzip')
    images.image([images.big(500 << 20, 10_000)], {'Cmd': ['/x']}, path='/var/tmp/image.tar')

A layer is bytes, or a callable that writes it to a file: then it is never held in memory as a whole.
"""

import copy
import gzip
import hashlib
import io
import json
import os
import platform
import subprocess
import tarfile
import tempfile

CPU = {'x86_64': 'amd64', 'aarch64': 'arm64'}.get(platform.machine(), platform.machine())
CONFIG = 'application/vnd.oci.image.config.v1+json'
INDEX = 'application/vnd.oci.image.index.v1+json'
LAYER = 'application/vnd.oci.image.layer.v1.tar'
MANIFEST = 'application/vnd.oci.image.manifest.v1+json'
REF_NAME = 'org.opencontainers.image.ref.name'
ZSTD_MAGIC = b'\x28\xb5\x2f\xfd'
CHUNK = 1 << 20


class Hard(str):
    """The content of a member that is a hard link to this name."""


def member(name, content=b'', **more):
    """(TarInfo, bytes): content is bytes, None for a folder, text for a symbolic link, or Hard; more are its fields."""
    info = tarfile.TarInfo(name)
    info.mode = 0o755 if content is None else 0o644
    if content is None:
        info.type = tarfile.DIRTYPE
    elif isinstance(content, Hard):
        info.type, info.linkname = tarfile.LNKTYPE, str(content)
    elif isinstance(content, str):
        info.type, info.linkname = tarfile.SYMTYPE, content
    else:
        info.size = len(content)
    for key, value in more.items():
        setattr(info, key, value)
    return info, content if isinstance(content, bytes) else b''


def layer(*members, format=tarfile.PAX_FORMAT, padded=True):
    """The bytes of a tar of (name, content[, fields]) as member() takes them; not `padded`: as umoci writes it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w', format=format) as tar:
        for name, content, *fields in members:
            info, data = member(name, content, **(fields[0] if fields else {}))
            tar.addfile(info, io.BytesIO(data))
            end = tar.offset - (-len(data) % tarfile.BLOCKSIZE)
    return out.getvalue() if padded else out.getvalue()[:end]


def big(size, files, folder='data'):
    """A layer of `files` files with `size` bytes in all, as a callable."""

    def write(out):
        with tarfile.open(fileobj=out, mode='w', format=tarfile.GNU_FORMAT) as tar:
            block = os.urandom(CHUNK) * 2
            for number in range(files):
                info, _ = member(f'{folder}/{number % 100:02}/{number:06}', b'', mtime=1_700_000_000)
                info.size = size // files
                tar.addfile(info, _Repeated(block, number))

    return write


class _Repeated:
    """A file of endless bytes."""

    def __init__(self, block, start):
        self._block, self._start = block, start

    def read(self, count):
        return self._block[self._start : self._start + count]


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def descriptor(data, media, **more):
    return {'mediaType': media, 'digest': f'sha256:{sha256(data)}', 'size': len(data), **more}


def packed(data, how):
    """`data` as None, 'gzip' or 'zstd' packs it."""
    if how == 'gzip':
        return gzip.compress(data, 1, mtime=0)
    if how == 'zstd':
        return subprocess.run(['zstd', '-q'], input=data, capture_output=True, check=True).stdout
    return data


class Layer:
    """What is written of a layer: its blob, in a file or in memory, and the digests."""

    def __init__(self, content, pack):
        self.file = None
        if callable(content):
            self.file = tempfile.TemporaryFile(dir='/var/tmp')
            content(self.file)
            self.diff_id = self.digest = self._digest()
            if pack:
                plain, self.file = self.file, tempfile.TemporaryFile(dir='/var/tmp')
                plain.seek(0)
                subprocess.run([pack, '-1c'], stdin=plain, stdout=self.file, check=True)
                plain.close()
                self.digest = self._digest()
            self.size = self.file.seek(0, os.SEEK_END)
        else:
            self.diff_id, self.data = sha256(content), packed(content, pack)
            self.digest, self.size = sha256(self.data), len(self.data)

    def _digest(self):
        self.file.seek(0)
        return hashlib.file_digest(self.file, 'sha256').hexdigest()

    def open(self):
        """What it holds, as a file from its start."""
        if self.file is None:
            return io.BytesIO(self.data)
        self.file.seek(0)
        return self.file


def config_of(layers, config, **more):
    """The config of an image as JSON: `config` is its inner one, more goes around it."""
    ids = [f'sha256:{each.diff_id}' for each in layers]
    return {
        'architecture': CPU,
        'os': 'linux',
        'config': config,
        'rootfs': {'type': 'layers', 'diff_ids': ids},
        **more,
    }


def files_of(layers, config, form='docker', pack=None, ref='t:1', last=False, links=False, edit=None, **more):
    """{name: bytes or Layer} of an archive; see image(). Archives of several images are joined from several such."""
    layers = [each if isinstance(each, Layer) else Layer(each, pack) for each in layers]
    outer = config_of(layers, config, **more)
    if edit:
        edit('config', outer)
    conf = json.dumps(outer).encode()
    blobs = {f'blobs/sha256/{each.digest}': each for each in layers}
    files = {}
    if form in ('docker', 'both'):
        names, conf_name = [f'blobs/sha256/{each.digest}' for each in layers], f'{sha256(conf)}.json'
        if links:  # as podman and old dockers do
            names = [f'{number:064}/layer.tar' for number in range(len(layers))]
            files |= {name: f'../blobs/sha256/{each.digest}' for name, each in zip(names, layers, strict=True)}
        manifest = [{'Config': conf_name, 'RepoTags': [ref] if ref else None, 'Layers': names}]
        if edit:
            edit('docker', manifest)
        files |= {'manifest.json': json.dumps(manifest).encode(), conf_name: conf}
    if form in ('oci', 'both'):
        manifest = {
            'schemaVersion': 2,
            'mediaType': MANIFEST,
            'config': descriptor(conf, CONFIG),
            'layers': [
                {
                    'mediaType': LAYER + (f'+{pack}' if pack else ''),
                    'digest': f'sha256:{each.digest}',
                    'size': each.size,
                }
                for each in layers
            ],
        }
        if edit:
            edit('oci', manifest)
        data = json.dumps(manifest).encode()
        index = {'schemaVersion': 2, 'mediaType': INDEX, 'manifests': [descriptor(data, MANIFEST)]}
        if ref:
            index['manifests'][0]['annotations'] = {REF_NAME: ref}
        if edit:
            edit('index', index)
        files |= {
            'oci-layout': b'{"imageLayoutVersion":"1.0.0"}',
            'index.json': json.dumps(index).encode(),
            f'blobs/sha256/{sha256(data)}': data,
            f'blobs/sha256/{sha256(conf)}': conf,
        }
    files = {**files, **blobs}
    if last and 'manifest.json' in files:
        files['manifest.json'] = files.pop('manifest.json')
    return files


def joined(*several):
    """The files of one archive with all these images, of one form."""
    files = {name: content for each in several for name, content in each.items()}
    if 'manifest.json' in files:
        files['manifest.json'] = json.dumps([json.loads(each['manifest.json'])[0] for each in several]).encode()
    if 'index.json' in files:
        index = json.loads(several[0]['index.json'])
        index['manifests'] = [each for one in several for each in json.loads(one['index.json'])['manifests']]
        files['index.json'] = json.dumps(index).encode()
    return files


def write(files, out, format=tarfile.PAX_FORMAT):
    """Write an archive of {name: bytes, text for a symbolic link, or Layer} to a file."""
    with tarfile.open(fileobj=out, mode='w', format=format, copybufsize=CHUNK) as tar:
        for name, content in files.items():
            if isinstance(content, Layer):
                info, _ = member(name)
                info.size = content.size
                tar.addfile(info, content.open())
            else:
                info, data = member(name, content)
                tar.addfile(info, io.BytesIO(data))


def image(layers, config, *, path=None, form='docker', outer=None, **more):
    """An image's archive: its bytes, or at `path`.

    form is 'docker', 'oci' or 'both'. pack ('gzip', 'zstd') is for its layers and outer for the archive as a whole; ref
    its name; last: manifest.json at the end; links: layers behind symbolic links. edit(what, object) may change its
    'config', 'docker' (manifest.json), 'oci' (manifest) and 'index' before they are written. More is for the config,
    such as architecture.
    """
    files = files_of(layers, copy.deepcopy(config), form, **more)
    try:
        if path is None:
            out = io.BytesIO()
            write(files, out)
            return packed(out.getvalue(), outer)
        with open(path, 'wb') as file:
            write(files, file)
        return path
    finally:
        for each in files.values():
            if isinstance(each, Layer) and each.file and each not in layers:
                each.file.close()
