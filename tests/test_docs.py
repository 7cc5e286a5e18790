"""The examples of docs/HANDLERS.md: each is deployed to a real faasd as it stands there, and asked once.

A fenced block below `<!-- FUNCTION/FILE -->` is that file of that function. A main.go is built first, as the text says,
and a Dockerfile makes an image of the same folder, which is deployed too.

The map of docs/ARCHITECTURE.md has each module, and the links of every page lead somewhere.
"""

import io
import os
import pathlib
import re
import shutil
import subprocess
import tarfile
import tempfile
import unittest

from tests import lab, packages, serving

HANDLERS = lab.REPO / 'docs' / 'HANDLERS.md'
BLOCK = re.compile(r'^<!-- ([\w-]+)/([\w./-]+) -->\n```\w*\n(.*?)^```$', re.DOTALL | re.MULTILINE)
GREETING = re.compile(r'Good day, \[?fd00:faa5:1:[0-9a-f:]+(\]:[0-9]+)?!\n')


def examples(text):
    """{function: {file: content}} of a page."""
    found = {}
    for function, file, content in BLOCK.findall(text):
        found.setdefault(function, {})[file] = content
    return found


def anchor(title):
    """What GitHub calls a section of that title."""
    return re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-')


def archive(folder):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
    return out.getvalue()


def image(folder, work):
    """The archive of the image that its Dockerfile makes."""
    podman = ['podman', '--root', f'{work}/store', '--runroot', f'{work}/run', '--storage-driver', 'vfs']
    podman += ['--cgroup-manager', 'cgroupfs']
    for command in (['build', '--quiet', '--isolation=chroot', '--tag', 'example', folder], ['save', 'example']):
        done = subprocess.run([*podman, *command], capture_output=True, timeout=60)
        if done.returncode:
            raise AssertionError(done.stderr.decode(errors='replace'))
    return done.stdout


def program(name, *more):
    """Where a program is. Raises SkipTest."""
    path = os.pathsep.join([os.environ.get('PATH', os.defpath), *more])
    if not (found := shutil.which(name, path=path)):
        raise unittest.SkipTest(f'{name} is not installed')
    return found


class Reading(unittest.TestCase):
    def test_blocks_are_taken_apart(self):
        text = '<!-- a/x.py -->\n```python\nx\n\ny\n```\n\n    x\n\n'
        text += '<!-- b/x -->\n```\nz\n```\n<!-- a/y -->\n```\n1\n```\n'
        self.assertEqual({'a': {'x.py': 'x\n\ny\n', 'y': '1\n'}, 'b': {'x': 'z\n'}}, examples(text))


class Pages(unittest.TestCase):
    def test_the_map_has_each_module(self):
        rooms = ('', 'control', 'handlers/serving', 'handlers/containers', 'handlers/images', 'host')
        modules = {str(path.relative_to(lab.REPO)) for room in rooms for path in (lab.REPO / room).glob('*.py')}
        text = (lab.REPO / 'docs/ARCHITECTURE.md').read_text().partition('\n## The rooms\n')[2].partition('\n## ')[0]
        rows = re.findall(r'^\| `([\w./]+)` \|', text, re.MULTILINE)
        self.assertEqual(sorted({*modules, 'faas'}), sorted(rows))

    def test_what_the_map_names_is_in_the_code(self):
        paths = [path for top in ('control', 'handlers', 'host') for path in (lab.REPO / top).rglob('*.py')]
        code = '\n'.join(path.read_text() for path in [*lab.REPO.glob('*.py'), *paths])
        pages = [(lab.REPO / page).read_text() for page in ('docs/ARCHITECTURE.md', 'CONTRIBUTING.md')]
        names = re.findall(r'\b([A-Z][a-z]\w+)\.(?!test_)(\w+)', '\n'.join(pages))
        self.assertGreater(len(names), 20)
        for kind, member in names:
            with self.subTest(f'{kind}.{member}'):
                self.assertTrue(re.search(rf'\nclass {kind}\b', code))
                self.assertTrue(re.search(rf'(def |self\.){member}\b', code))

    def test_what_security_says_is_tested(self):
        text = (lab.REPO / 'docs/SECURITY.md').read_text()
        named = set(re.findall(r'`((?:tests|host)/\w+\.py)`', text))
        self.assertGreater(len(named), 15)
        self.assertEqual([], [path for path in sorted(named) if not (lab.REPO / path).exists()])

    def test_the_readme_names_how_to_contribute(self):
        part = (lab.REPO / 'README.md').read_text().partition('\n## Contribute\n')[2]
        self.assertIn('(CONTRIBUTING.md)', part)
        self.assertIn('    make check\n', part)

    def test_the_links_lead_somewhere(self):
        pages = [*lab.REPO.glob('*.md'), *lab.REPO.glob('docs/*.md')]
        fence = re.compile(r'^```.*?^```$', re.DOTALL | re.MULTILINE)
        texts = {page.resolve(): fence.sub('', page.read_text()) for page in pages}
        link = re.compile(r'\]\((?!https?:)([^)]+)\)')
        found = [(page, target) for page, text in texts.items() for target in link.findall(text)]
        self.assertGreater(len(found), 20)
        for page, place in found:
            file, _, section = place.partition('#')
            with self.subTest(place, page=page.name):
                target = (page.parent / file).resolve() if file else page
                self.assertTrue(target.exists())
                if section:
                    self.assertIn(section, [anchor(title) for title in re.findall(r'^#+ (.*)$', texts[target], re.M)])


@lab.needs_root
class Handlers(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.host = cls.enterClassContext(lab.Host('server'))
        cls.server = cls.enterClassContext(serving.standalone(cls.host))
        cls.work = pathlib.Path(cls.enterClassContext(tempfile.TemporaryDirectory(dir='/var/tmp')))

    def greets(self, name, data):
        reply = self.server.deploy(name, data)
        self.assertEqual(200, reply.status, reply.body)
        self.assertIsNone(reply.json['warning'])
        self.assertRegex(self.server.get(reply.json['ipv6']), GREETING)

    def folder(self, name):
        folder = self.work / name
        folder.mkdir(exist_ok=True)
        for file, content in examples(HANDLERS.read_text())[name].items():
            (folder / file).write_text(content)
        if (folder / 'main.go').exists():
            go = program('go', '/usr/local/go/bin')
            build = [go, 'build', '-o', 'server', 'main.go']
            subprocess.run(build, cwd=folder, env=os.environ | {'CGO_ENABLED': '0'}, check=True, timeout=120)
        return folder

    def test_each_example(self):
        """Those in Python, which every server can run."""
        found = examples(HANDLERS.read_text())
        names = [name for name, files in found.items() if any(file.endswith('.py') for file in files)]
        names.remove('database')  # see test_private
        self.assertGreater(len(names), 6)
        for name in names:
            with self.subTest(name):
                self.greets(name, archive(self.folder(name)))

    def test_node(self):
        if not self.host.path('/usr/bin/node').exists():
            packages.put(self.host, 'nodejs')
        self.greets('node', archive(self.folder('node')))

    def test_go(self):
        self.greets('go', archive(self.folder('go')))

    def test_an_image(self):
        program('podman')
        self.greets('image', image(self.folder('go'), self.work))


if __name__ == '__main__':
    unittest.main()
