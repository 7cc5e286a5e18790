"""What an image's instance sees: its layers under a writable one, ids and a small world of its own."""

import os
import pathlib
import re
import shutil
import subprocess
import unittest

from handlers.containers import containers, rootfs
from handlers.containers.limits import Limits
from handlers.images.spec import Spec
from host import process
from tests import inside, programs

BASE = 0x70000000  # where layers lie: the first range
PASSWD = 'root:x:0:0:root:/root:/bin/sh\nwww:x:33:44:Web:/srv:/bin/sh\n'
GROUP = 'root:x:0:\nweb:x:44:\nlogs:x:50:other,www\n'


class Image(inside.InHost):
    @classmethod
    def setUpClass(cls):
        super().setUpClass()
        cls.busybox = programs.static_busybox().read_bytes()

    def setUp(self):
        self.layers = []

    def layer(self, files):
        """Put down a layer of {path: text, bytes, None for a folder, or a function that makes it}."""
        store = pathlib.Path('/var/lib/faasd/layers')
        top = store / os.urandom(32).hex()
        top.mkdir(parents=True)
        for name, content in files.items():
            path = top / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.mkdir()
            elif callable(content):
                content(path)
            else:
                path.write_bytes(content if isinstance(content, bytes) else content.encode())
                path.chmod(0o755)
        for where, folders, names in os.walk(top):
            for each in (where, *(os.path.join(where, name) for name in (*folders, *names))):
                status = os.lstat(each)
                if status.st_uid < BASE:
                    os.lchown(each, BASE + status.st_uid, BASE + status.st_gid)
        self.layers.append(top.name)
        return top

    def base(self, **files):
        self.layer({'bin/busybox': self.busybox, 'etc/passwd': PASSWD, 'etc/group': GROUP})

    def start(self, them, command, user='', layers=None, cwd='/', env=None):
        reader, writer = os.pipe()
        spec = Spec(
            'image', ('/bin/busybox', 'sh', '-c', command), env or {}, cwd, user, layers=tuple(layers or self.layers)
        )
        try:
            its = them.start('test', 1, spec, '/var/lib/faasd/layers', writer, cookie=1)
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        return its, reader

    def run_in(self, command, user='', limits=inside.LIMITS, **more):
        """What the shell command prints in an instance of the layers."""
        with inside.prepared(limits) as them:
            its, reader = self.start(them, command, user, **more)
            with open(reader, 'rb') as file:
                output = file.read().decode()
            for each in (its.control, its.notifier):
                each.close()
            its.kill()
            them.remove(its)
        return output

    @inside.inside
    def test_later_layers_hide_and_take_away_what_earlier_ones_have(self):
        self.base()
        self.layer({'a/gone': 'x', 'a/kept': 'one', 'a/over': 'one', 'b/gone': 'x'})
        self.layer({'a/over': 'two', 'a/gone': lambda path: os.mknod(path, 0o20000, 0)})
        top = self.layer({'b/new': 'x'})
        os.setxattr(top / 'b', 'trusted.overlay.opaque', b'y')
        self.assertEqual('kept over two new', ' '.join(self.run_in('cd /a; ls; cat over; echo; ls /b').split()))

    @inside.inside
    def test_what_was_taken_away_can_be_made_again(self):
        self.base()
        self.layer({'var/cache/app/old': 'x'})
        made = self.run_in('rm -r /var/cache/app && mkdir /var/cache/app && ls -A /var/cache/app && echo made')
        self.assertEqual('made\n', made)

    @inside.inside
    def test_what_it_writes_is_gone_with_it_and_bounded(self):
        self.base()
        limits = Limits(memory=64 << 20, pids=64, cpus=1)
        self.assertIn(
            'No space left',
            self.run_in('echo x >/written; ls /written; dd if=/dev/zero of=/fill bs=1M count=40 2>&1', limits=limits),
        )
        self.assertEqual('no\n', self.run_in('ls /written 2>/dev/null || echo no'))
        for layer in self.layers:
            self.assertFalse(pathlib.Path('/var/lib/faasd/layers', layer, 'written').exists())
        self.assertNotIn('/run/faasd', pathlib.Path('/proc/mounts').read_text())

    @inside.inside
    def test_owners_are_the_images_and_its_root_may_change_them(self):
        self.base()
        top = self.layer({'srv/file': 'x'})
        os.chown(top / 'srv/file', BASE + 33, BASE + 44)
        said = self.run_in('stat -c %u:%g /bin /srv/file; chown 5:6 /srv/file && stat -c %u:%g /srv/file; id -u')
        self.assertEqual(['0:0', '33:44', '5:6', '0'], said.split())

    @inside.inside
    def test_users_by_name_and_number(self):
        self.base()
        for user, expected in (
            ('', 'uid=0(root) gid=0(root) groups=0(root) /root'),
            ('www', 'uid=33(www) gid=44(web) groups=44(web),50(logs) /srv'),
            ('33', 'uid=33(www) gid=44(web) groups=44(web),50(logs) /srv'),
            ('www:logs', 'uid=33(www) gid=50(logs) groups=50(logs) /srv'),
            ('1234:5678', 'uid=1234 gid=5678 groups=5678 /'),
            ('1234', 'uid=1234 gid=0(root) groups=0(root) /'),
        ):
            with self.subTest(user):
                said = self.run_in('id; echo $HOME', user).split()
                self.assertEqual(sorted(expected.split()), sorted({*said}))

    @inside.inside
    def test_a_user_that_does_not_exist_is_named(self):
        self.base()
        for user, pattern in (
            ('nobody', "user 'nobody' is not in the image's /etc/passwd"),
            ('www:none', "group 'none' is not in the image's /etc/group"),
            ('99999999', '65535 is the greatest'),
        ):
            with inside.prepared() as them, self.assertRaisesRegex(containers.ContainerError, pattern):
                self.start(them, 'true', user)
            self.assertEqual(set(), them._slots)

    @inside.inside
    def test_accounts_that_are_links_lead_nowhere_but_into_the_image(self):
        pathlib.Path('/etc/passwd').write_text(PASSWD + 'secret:x:77:77::/:/bin/sh\n')
        self.layer({'bin/busybox': self.busybox})
        for link in ('/etc/real', '../../../../etc/real', '/proc/self/root/etc/passwd', '/etc/passwd'):
            self.layer({'etc/passwd': lambda path, link=link: path.symlink_to(link), 'etc/real': PASSWD})
            with inside.prepared() as them, self.assertRaisesRegex(containers.ContainerError, "'secret' is not in"):
                self.start(them, 'true', 'secret')
            self.layers.pop()
        self.layer({'etc/passwd': os.mkfifo})
        with inside.prepared() as them, self.assertRaisesRegex(containers.ContainerError, "'www' is not in"):
            self.start(them, 'true', 'www')

    @inside.inside
    def test_its_own_small_world(self):
        self.base()
        said = self.run_in(
            'grep Cap /proc/self/status; grep -E "NoNewPrivs|Seccomp:" /proc/self/status; grep -c : /proc/net/dev;'
            'cat /proc/sys/net/ipv4/ip_unprivileged_port_start; hostname; ls /root /home 2>&1; echo PORT=$PORT;'
            'mount -t tmpfs x /mnt 2>&1; unshare -U true 2>&1; mknod /dev/x b 8 0 2>&1; echo x >/sys/power/state;'
            'echo 1 >/proc/sys/kernel/panic'
        )
        self.assertIn('CapEff:\t00000000000400eb', said)  # with FOWNER, SYS_CHROOT
        self.assertIn('CapAmb:\t0000000000000000', said)
        self.assertRegex(said, r'NoNewPrivs:\t1\nSeccomp:\t2\n1\n0\ntest\n')
        self.assertIn('PORT=80', said)
        refused = re.findall('not permitted|ermission denied|Read-only', said)
        self.assertEqual(5, len(refused), said)

    @inside.inside
    def test_what_root_may_stays_inside(self):
        """FOWNER and SYS_CHROOT: it changes the files of its own ids alone, and leaves a chroot for its own root."""
        self.base()
        said = self.run_in(
            'touch /f; chown 33 /f; chmod 600 /f && stat -c %a /f; '
            'chmod 777 /sys/kernel /proc/sys /etc/hosts 2>&1; '
            'mkdir -p /jail/bin; cp /bin/busybox /jail/bin; chroot /jail /bin/busybox ls /; '
            'chroot /proc/1/root /bin/busybox test -e /control.sock && echo own; cat /etc/hosts'
        )
        self.assertTrue(said.startswith('600\n'), said)
        self.assertEqual(3, len(re.findall('not permitted|Read-only', said)), said)
        self.assertIn('\nbin\nown\n', said)
        self.assertIn('127.0.0.1 localhost test', said)

    @inside.inside
    def test_the_folder_it_works_in_is_made(self):
        self.base()
        self.assertEqual('/not/there\n', self.run_in('pwd', cwd='/not/there'))

    @inside.inside
    def test_two_instances_have_other_ids_and_the_layers_are_nobodys(self):
        self.base()
        with inside.prepared() as them:
            started = [self.start(them, 'sleep 60') for _ in range(2)]
            owners = [os.stat(f'/proc/{its.pid}').st_uid for its, _ in started]
            for its, reader in started:
                os.close(reader)
                its.control.close()
                its.notifier.close()
                its.kill()
                them.remove(its)
        self.assertEqual([BASE + 65536, BASE + 2 * 65536], sorted(owners))

    @inside.inside
    def test_an_image_from_scratch_and_a_hundred_layers(self):
        self.layer({'bin/busybox': self.busybox})
        self.assertIn('control.sock', self.run_in('/bin/busybox ls /'))
        for number in range(100):
            self.layer({f'{number}': 'x'})
        self.assertEqual('100\n', self.run_in('/bin/busybox ls / | /bin/busybox grep -c "^[0-9]"'))

    @inside.inside
    def test_a_file_system_that_maps_no_ids_is_named(self):
        self.base()
        elsewhere = pathlib.Path('/var/lib/elsewhere')  # on the host's overlay, which cannot
        shutil.copytree('/var/lib/faasd/layers', elsewhere / 'layers')
        with inside.prepared() as them, self.assertRaisesRegex(containers.ContainerError, 'cannot map ids'):
            spec = Spec('image', ('/bin/busybox',), cwd='/', layers=tuple(self.layers))
            them.start('test', 1, spec, str(elsewhere / 'layers'), 1, cookie=1)


class UserNamespace(inside.InHost):
    @inside.inside
    def test_it_has_the_mapping_and_leaves_no_process(self):
        before = process.run(['ps', '-e']).stdout.count('cat')
        fd = process.user_namespace('0 100000 65536')
        seen = subprocess.run(
            ['nsenter', f'--user=/proc/self/fd/{fd}', 'cat', '/proc/self/uid_map'], pass_fds=[fd], capture_output=True
        )
        os.close(fd)
        self.assertEqual(['0', '100000', '65536'], seen.stdout.decode().split())
        self.assertEqual(before, process.run(['ps', '-e']).stdout.count('cat'))


class Users(unittest.TestCase):
    def test_numbers_are_bounded(self):
        for text in ('-1', '65536', '٣', '1e3', ''):
            with self.subTest(text), self.assertRaises(rootfs.ImageUnusable):
                rootfs._number(text)
