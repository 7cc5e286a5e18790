"""Archives of images in every form that tools write, and those that lie, are cut or lack something."""

import hashlib
import io
import itertools
import json
import os
import pathlib
import shutil
import tarfile
import unittest

from handlers.images.archive import asked_path
from host import process
from tests import images, inside
from tests.staged import BASE, HANDLER, RUN, Staged, StagedImages, archive, written


class Archives(StagedImages):
    @inside.inside
    def test_both_forms_however_packed_are_the_same_image(self):
        for form, pack, outer in itertools.product(
            ('docker', 'oci', 'both'), (None, 'gzip', 'zstd'), (None, 'gzip', 'zstd')
        ):
            with self.subTest((form, pack, outer)):
                base, top = self.image(
                    BASE, images.layer(('b', b'top')), form=form, pack=pack, outer=outer, length=None
                )
                self.assertEqual((b'#!', b'top'), ((base / 'run').read_bytes(), (top / 'b').read_bytes()))
                self.assertEqual([hashlib.sha256(BASE).hexdigest(), top.name], [base.name, top.name])
                self.assertEqual(['spec.json'], os.listdir(f'{self.functions}/1/1'))
                self.clean()

    @inside.inside
    def test_other_ways_to_write_an_archive(self):
        for how in (
            {'last': True},
            {'links': True},
            {'last': True, 'links': True},
            {'ref': None},
            {'form': 'oci', 'ref': None},
        ):
            with self.subTest(how):
                (layer,) = self.image(BASE, **how)
                self.assertTrue((layer / 'run').exists())
                self.clean()
        files = {f'./{name}': content for name, content in images.files_of([BASE], RUN).items()}
        out = io.BytesIO()
        for form in (tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT):
            out = io.BytesIO()
            images.write(files, out, format=form)
            self.stage(out.getvalue())
            self.clean()

    @inside.inside
    def test_tars_without_padding_are_read(self):
        bare = images.layer(('a', b'1'), ('b', b'22'), padded=False)
        self.assertNotEqual(0, len(bare) % 512)
        (layer,) = self.image(bare)
        self.assertEqual(b'22', (layer / 'b').read_bytes())
        self.clean()
        files = images.files_of([BASE], RUN)
        data = images.layer(
            *((name, each.data if isinstance(each, images.Layer) else each) for name, each in files.items()),
            padded=False,
        )
        self.stage(data)
        self.assertEqual(('/run',), self.spec.args)

    @inside.inside
    def test_long_names_in_every_form(self):
        name = '/'.join(['folder' * 8] * 5 + ['ümläut'])
        for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            (layer,) = self.image(images.layer((name, b'x'), ('l', name), ('h', images.Hard(name)), format=form))
            self.assertEqual(b'x', (layer / 'l').read_bytes())
            self.assertEqual(b'x', (layer / 'h').read_bytes())
            self.clean()
        name = name[:200]  # ustar splits it at a slash
        (layer,) = self.image(images.layer((name, b'x'), format=tarfile.USTAR_FORMAT))
        self.assertEqual(b'x', (layer / name).read_bytes())

    @inside.inside
    def test_nested_json_and_huge_json_are_refused(self):
        for name in ('manifest.json', 'index.json'):
            for text, pattern in (
                (b'', 'is not JSON'),
                (b'{', 'is not JSON'),
                (b'\xff\xfe', 'is not JSON'),
                (b'[' * 100_000, 'is not JSON'),
                (b'"' + b'x' * (5 << 20) + b'"', 'more than 4194304'),
                (b'7', 'is not an? '),
                (b'[7]', 'is not an? '),
                (b'[]', 'holds no image|is not an? '),
                (b'{}', 'holds no image|is not an? '),
            ):
                with self.subTest((name, text[:10])):
                    files = images.files_of([BASE], RUN, form='docker' if name == 'manifest.json' else 'oci')
                    self.refuse(written({**files, name: text}), pattern)

    @inside.inside
    def test_layers_that_lie_or_are_not_there_are_refused(self):
        other = images.Layer(images.layer(('other', b'x')), None)
        for form in ('docker', 'oci'):
            what = form

            def swap(files, content):
                return {name: content if isinstance(each, images.Layer) else each for name, each in files.items()}

            files = images.files_of([BASE], RUN, form=form)
            with self.subTest(form):
                self.refuse(written(swap(files, other)), 'another digest|bytes, not')
                files_without = {name: each for name, each in files.items() if not isinstance(each, images.Layer)}
                self.refuse(written(files_without), 'layer 1 is not in the archive')
                same_size = images.Layer(BASE.replace(b'#!', b'!#'), None)
                self.refuse(written(swap(files, same_size)), 'layer 1: the (blob|content) has another digest')
                self.refuse(written(swap(files, images.Layer(b'x' * len(BASE), None))), 'layer 1: it is not a tar')

            def extra(kind, said, what=what):
                if kind == what == 'docker':
                    said[0]['Layers'] *= 2
                elif kind == what == 'oci':
                    said['layers'] *= 2

            self.refuse_image('2 layers, the config names 1: one is missing or foreign', form=form, edit=extra)
        wrong = {'rootfs': {'type': 'layers', 'diff_ids': ['sha256:' + 'a' * 64]}}
        for form, pack in itertools.product(('docker', 'oci'), (None, 'gzip', 'zstd')):
            with self.subTest((form, pack)):
                self.refuse_image('layer 1: the content has another digest', form=form, pack=pack, **wrong)

        def foreign(kind, said):
            if kind == 'oci':
                said['layers'][0] |= {'urls': ['https://example.com/'], 'digest': 'sha256:' + 'a' * 64}

        self.refuse_image('layer 1 is foreign', form='oci', edit=foreign)
        self.refuse(images.image([], RUN), 'the image has no layers')
        self.refuse(images.image([images.layer((str(n), b'')) for n in range(128)], RUN), 'more than 127')

    @inside.inside
    def test_blobs_that_lie_are_refused(self):
        for form in ('docker', 'oci'):
            files = images.files_of([BASE], RUN, form=form)
            config = next(name for name, each in files.items() if isinstance(each, bytes) and b'rootfs' in each)
            self.refuse(
                written({**files, config: files[config].replace(b'/run', b'/ruN')}), 'the config has another digest'
            )
            del files[config]
            self.refuse(written(files), 'the config is not in the archive')
        files = images.files_of([BASE], RUN, form='oci')
        manifest = next(
            name
            for name, each in files.items()
            if isinstance(each, bytes) and b'layers"' in each and b'rootfs' not in each
        )
        self.refuse(written({**files, manifest: b'{}'}), 'the manifest has 2 bytes, not')
        self.refuse(written({**files, manifest: files[manifest][:-1] + b' '}), 'the manifest has another digest')

        def size(kind, said):
            if kind == 'oci':
                said['layers'][0]['size'] += 1

        self.refuse_image('layer 1 has .* bytes, not', form='oci', edit=size)

    @inside.inside
    def test_links_in_the_archive_stay_in_it(self):
        digits = hashlib.sha256(BASE).hexdigest()
        files = images.files_of([BASE], RUN, links=True)
        name = f'{0:064}/layer.tar'
        for link, pattern in (
            ('../../../etc/passwd', 'leads out'),
            ('/etc/passwd', 'not in the archive'),
            ('layer.tar', 'not in the archive'),
            ('..', 'not in the archive'),
        ):
            with self.subTest(link):
                self.refuse(written({**files, name: link}), pattern)
        self.stage(written({**files, name: images.Hard(f'blobs/sha256/{digits}')}))

    @inside.inside
    def test_packed_data_that_is_damaged_or_cut(self):
        for how in ('gzip', 'zstd'):
            data = images.packed(BASE, how)
            for bad in (data[:-9], data[:20] + b'xxxx' + data[24:], data[:10]):
                with self.subTest((how, len(bad))):
                    self.refuse(images.packed(archive(HANDLER, ('x', os.urandom(9999))), how)[:-99], 'data|cut|ends')
                    layer = images.Layer(BASE, how)
                    layer.data, layer.size, layer.digest = bad, len(bad), images.sha256(bad)
                    self.refuse(images.image([layer], RUN), 'layer 1: the')
        both = images.packed(BASE[:1000], 'gzip') + images.packed(BASE[1000:], 'gzip')  # as pigz and others do
        layer = images.Layer(BASE, 'gzip')
        layer.data, layer.size, layer.digest = both, len(both), images.sha256(both)
        self.stage(images.image([layer], RUN, form='oci'))

    @inside.inside
    def test_several_images_in_one_archive(self):
        for form in ('docker', 'oci'):
            several = [
                images.files_of([BASE], {'Cmd': [ref]}, form=form, ref=ref)
                for ref in ('docker.io/library/a:1', 'localhost/b:latest')
            ]
            data = written(images.joined(*several))
            with self.subTest(form):
                error = self.refuse(data, 'holds 2 images: docker.io/library/a:1, localhost/b:latest')
                self.assertEqual('say which: --image REF', error.hint)
                error = self.refuse(data, 'no c:1, but docker.io/library/a:1, localhost/b:latest', reference='c:1')
                for reference, expected in (('a:1', 0), ('docker.io/library/a:1', 0), ('b', 1), ('localhost/b', 1)):
                    self.stage(data, reference=reference)
                    self.assertEqual((('docker.io/library/a:1', 'localhost/b:latest')[expected],), self.spec.args)
                    self.clean()
        self.refuse_image('no x, but t:1', reference='x')

    @inside.inside
    def test_an_index_for_several_platforms(self):
        ours = images.files_of([BASE], RUN, form='oci', ref=None)
        theirs = images.files_of([BASE], {'Cmd': ['other']}, form='oci', ref=None, architecture='s390x')
        manifests = []
        for files, cpu in ((theirs, 's390x'), (ours, images.CPU)):
            (descriptor,) = json.loads(files['index.json'])['manifests']
            manifests.append({**descriptor, 'platform': {'os': 'linux', 'architecture': cpu}})
        attestation = {**manifests[1], 'platform': {'os': 'unknown', 'architecture': 'unknown'}}
        inner = json.dumps({'schemaVersion': 2, 'manifests': [*manifests, attestation]}).encode()
        outer = {'manifests': [images.descriptor(inner, images.INDEX, annotations={images.REF_NAME: 'x:1'})]}
        nested = {**theirs, **ours, f'blobs/sha256/{images.sha256(inner)}': inner}
        for index in (outer, json.loads(inner)):
            self.stage(written({**nested, 'index.json': json.dumps(index).encode()}))
            self.assertEqual(('/run',), self.spec.args)
            self.clean()
        foreign = json.dumps({'manifests': manifests[:1]}).encode()
        self.refuse(written({**nested, 'index.json': foreign}), f'for s390x, this server is {images.CPU}')
        self.refuse(written({**nested, 'index.json': b'{"manifests": []}'}), 'holds no image')


class Healthchecks(unittest.TestCase):
    def test_what_asks_its_own_server(self):
        for text, path in (
            ('curl -f http://localhost/ || exit 1', '/'),
            ('curl --fail http://127.0.0.1:8080/health?full=1 || exit 1', '/health?full=1'),
            ('wget --spider -q "http://[::1]:3000/ready"', '/ready'),
            ("wget -q http://localhost:${PORT}/x'; exit 1", '/x'),
            ('curl http://localhost', '/'),
            ('curl https://localhost/', None),
            ('curl http://example.com/', None),
            ('pg_isready', None),
            ('node check.js http://localhost/', None),
        ):
            with self.subTest(text):
                self.assertEqual(path, asked_path(['/bin/sh', '-c', text]))


class OtherTools(Staged):
    """What podman and skopeo write."""

    @inside.inside
    def test_podman_and_skopeo(self):
        for program in ('podman', 'skopeo'):
            if not process.installed(program):
                self.skipTest(f'{program} is not installed (./deps.sh test installs it)')
        self.disk()
        work = pathlib.Path(self.DISK, 'work')
        work.mkdir()
        (work / 'run').write_text('#!')
        (work / 'Containerfile').write_text(
            'FROM scratch\nCOPY run /bin/run\nCOPY --chown=33:34 run /srv/x\n'
            'ENV A=b\nUSER 33\nWORKDIR /srv\nEXPOSE 8080\nSTOPSIGNAL SIGQUIT\nENTRYPOINT ["/bin/run"]\nCMD ["x"]\n'
        )
        podman = ['podman', '--root', f'{work}/store', '--runroot', f'{work}/run-root', '--storage-driver', 'vfs']
        podman += ['--cgroup-manager', 'cgroupfs']
        process.run([*podman, 'build', '--isolation=chroot', '-t', 'made:1', str(work)], timeout_s=120)
        process.run([*podman, 'save', '-o', f'{work}/docker.tar', 'made:1'], timeout_s=60)
        process.run([*podman, 'save', '--format', 'oci-archive', '-o', f'{work}/oci.tar', 'made:1'], timeout_s=60)
        copied = f'oci-archive:{work}/copied.tar:made:1'
        process.run(['skopeo', '--insecure-policy', 'copy', f'docker-archive:{work}/docker.tar', copied], timeout_s=60)
        for name in ('docker.tar', 'oci.tar', 'copied.tar'):
            with self.subTest(name):
                self.stage((work / name).read_bytes(), reference='made:1')
                spec = self.spec
                self.assertEqual(
                    (('/bin/run', 'x'), 'b', '/srv', '33', (8080,), 'SIGQUIT'),
                    (spec.args, spec.env['A'], spec.cwd, spec.user, spec.ports, spec.stop_signal),
                )
                found = [pathlib.Path(self.layers.path(digits), 'srv/x') for digits in spec.layers]
                (found,) = [path for path in found if path.exists()]
                self.assertEqual((self.ID_BASE + 33, self.ID_BASE + 34), os.stat(found)[4:6])
                shutil.rmtree(f'{self.functions}/1')
                self.layers.collect(set)

    @inside.inside
    def test_they_read_what_the_tests_write(self):
        if not process.installed('skopeo'):
            self.skipTest('skopeo is not installed (./deps.sh test installs it)')
        self.disk()
        for form, kind in (('docker', 'docker-archive'), ('oci', 'oci-archive')):
            path = images.image([BASE], RUN, path=f'{self.DISK}/{form}.tar', form=form, pack='gzip')
            out = f'dir:{self.DISK}/{form}'
            process.run(['skopeo', '--insecure-policy', 'copy', f'{kind}:{path}', out], timeout_s=60)


if __name__ == '__main__':
    unittest.main()
