"""The lab keeps its word: hosts are whole, real parts run in them, and nothing of them remains."""
import glob
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import threading
import unittest

from tests import lab

# A container as the server makes them: this machine's /usr, a user namespace of its own, a cgroup of its own.
BUNDLE = {
    'ociVersion': '1.0.2',
    'process': {'user': {'uid': 0, 'gid': 0}, 'cwd': '/', 'args': [], 'env': ['PATH=/usr/bin']},
    'root': {'path': 'rootfs', 'readonly': True},
    'mounts': [
        {'destination': '/proc', 'type': 'proc', 'source': 'proc'},
        {'destination': '/dev', 'type': 'tmpfs', 'source': 'tmpfs', 'options': ['mode=755']},
        {'destination': '/usr', 'type': 'bind', 'source': '/usr', 'options': ['rbind', 'ro']},
    ],
    'linux': {
        'cgroupsPath': '',
        'uidMappings': [{'containerID': 0, 'hostID': 1_000_000, 'size': 1}],
        'gidMappings': [{'containerID': 0, 'hostID': 1_000_000, 'size': 1}],
        'namespaces': [{'type': kind} for kind in ('pid', 'mount', 'ipc', 'uts', 'network', 'user')],
        'resources': {'memory': {'limit': 64 << 20}, 'pids': {'limit': 32}},
    },
}


def make_bundle(host, name, args):
    """A runc bundle at /tmp/bundle of the host, in the cgroup `name`."""
    rootfs = host.path('/tmp/bundle/rootfs')
    for folder in ('proc', 'dev', 'usr'):
        (rootfs / folder).mkdir(parents=True)
    for link in ('bin', 'lib', 'lib64'):
        (rootfs / link).symlink_to(f'usr/{link}')
    config = json.loads(json.dumps(BUNDLE))
    config['process']['args'], config['linux']['cgroupsPath'] = args, f'/{name}/one'
    host.path('/tmp/bundle/config.json').write_text(json.dumps(config))


def cgroups(name):
    return glob.glob(f'/sys/fs/cgroup/**/{name}', recursive=True)


def programs(host):
    return [comm.read_text().strip() for comm in host.path('/proc').glob('[0-9]*/comm')]


def machine():
    """What of this machine a host could have changed."""
    links = subprocess.run(['ip', '-o', 'address'], capture_output=True, text=True, check=True).stdout
    links = re.sub(r'\d+sec', '', links)               # what is left of a DHCP lease
    etc = sorted((each.name, each.lstat().st_mtime) for each in pathlib.Path('/etc').iterdir())
    temporary = sorted(each for each in os.listdir(tempfile.gettempdir()) if each.startswith('faas'))
    return links, pathlib.Path('/proc/self/mountinfo').read_text(), etc, temporary, os.uname().nodename


class Polling(unittest.TestCase):
    def test_it_returns_the_value_that_was_waited_for(self):
        values = iter([None, '', 'there'])
        self.assertEqual(lab.wait_until(lambda: next(values), 1, 'a value'), 'there')

    def test_its_error_names_what_did_not_come(self):
        with self.assertRaisesRegex(TimeoutError, 'in vain for the moon'):
            lab.wait_until(lambda: False, 0.01, 'the moon')

    def test_a_host_sees_no_proxy_and_no_settings_of_the_caller(self):
        os.environ['FAAS_SERVER'], os.environ['https_proxy'] = 'elsewhere', 'http://proxy'
        self.addCleanup(os.environ.pop, 'FAAS_SERVER')
        self.addCleanup(os.environ.pop, 'https_proxy')
        seen = lab.environment({'FAAS_TEST': '1'})
        self.assertEqual({'FAAS_TEST'}, {'FAAS_SERVER', 'https_proxy', 'FAAS_TEST'} & set(seen))
        self.assertEqual('/root', seen['HOME'])


@lab.needs_root
class Hosts(unittest.TestCase):
    def test_real_parts_run_in_it_and_leave_nothing(self):
        name = f'faas-lab-{os.getpid()}'
        before = machine()
        with lab.pair() as (server, laptop):
            pids = server.pid, laptop.pid
            for address in ('203.0.113.10', '2001:db8::10'):
                laptop.run(['ping', '-c1', '-W2', address])
            lab.add_wireguard(server, 'wg0')
            self.assertIn('interface: wg0', server.run(['wg', 'show', 'wg0']).stdout)
            server.run(['nft', '-f', '-'], input='table inet faas { chain input {\n'
                       'type filter hook input priority filter\nsocket mark 0xfaa5 counter drop\n}\n}\n')
            make_bundle(server, name, ['/usr/bin/sh', '-c', 'echo within; exec sleep 1000'])
            within = server.popen(['runc', 'run', '--no-new-keyring', '--bundle', '/tmp/bundle', name],
                                  stdout=subprocess.PIPE, text=True)
            self.assertEqual('within\n', within.stdout.readline())
            self.assertTrue(cgroups(name))
            make_bundle(laptop, f'{name}-2', ['/no/such/program'])
            laptop.run(['runc', 'run', '--no-new-keyring', '--bundle', '/tmp/bundle', f'{name}-2'], ok=(1,))
            within.stdout.close()
        self.assertEqual(before, machine())
        self.assertEqual([], cgroups(f'{name}*'))
        self.assertFalse(any(os.path.exists(f'/proc/{pid}') for pid in pids))

    def test_its_files_and_its_name_are_its_own(self):
        before = machine()
        with lab.Host('laptop') as host:
            self.assertEqual('laptop\n', host.run(['uname', '-n']).stdout)
            self.assertEqual(f'nameserver {lab.NAMESERVER}\n', host.path('/etc/resolv.conf').read_text())
            self.assertEqual(['lock'], os.listdir(host.path('/run')))
            for empty in ('/etc/wireguard', '/var/lib/faasd'):
                self.assertEqual([], os.listdir(host.path(empty)))
            for absent in ('/etc/coredns', '/etc/faasd'):
                self.assertFalse(host.path(absent).exists(), absent)
            host.run(['sh', '-c', 'echo x >faas-lab; echo x >/usr/faas-lab; echo x >/etc/faas-lab'])
            self.assertEqual('x\n', host.path('/etc/faas-lab').read_text())
        self.assertEqual(before, machine())
        self.assertFalse((lab.REPO / 'faas-lab').exists())

    def test_it_shows_a_checkout_below_tmp(self):
        with tempfile.TemporaryDirectory() as folder:
            tests = pathlib.Path(folder, 'a clone', 'tests')
            tests.mkdir(parents=True)
            for each in ('__init__.py', 'lab.py'):
                (tests / each).write_bytes((lab.REPO / 'tests' / each).read_bytes())
            code = ('from tests import lab\nwith lab.Host("here") as host:\n'
                    '    print(host.run(["ls", "tests/lab.py"]).stdout)')
            done = subprocess.run([sys.executable, '-c', code], cwd=tests.parent, capture_output=True,
                                  text=True)
            self.assertEqual(('tests/lab.py', 0), (done.stdout.strip(), done.returncode), done.stderr)

    def test_signals_exit_codes_and_timeouts_are_those_of_the_command(self):
        with lab.Host('host') as host:
            process = host.popen(['sleep', '1000'])
            argv = pathlib.Path(f'/proc/{process.pid}/cmdline')
            lab.wait_until(lambda: argv.read_bytes().startswith(b'sleep'), 5, 'exec')
            process.terminate()
            self.assertEqual(-signal.SIGTERM, process.wait(5))
            self.assertEqual(3, host.run(['sh', '-c', 'exit 3'], ok=None).returncode)
            with self.assertRaisesRegex(AssertionError, 'host: sh -c .*exit code 3\n.*why'):
                host.run(['sh', '-c', 'echo why >&2; exit 3'])
            with self.assertRaises(subprocess.TimeoutExpired):
                host.run(['sleep', '1000'], timeout_s=0.1)
            lab.wait_until(lambda: programs(host) == ['cat'], 5, 'the end of sleep')
            host.run(['sh', '-c', 'sleep 0.01 & exit'])
            lab.wait_until(lambda: programs(host) == ['cat'], 5, 'the orphan to be reaped')

    def test_links_that_lead_out_of_it_and_in_circles_do_not_keep_it(self):
        with lab.Host('host') as host:
            host.run(['sh', '-c', 'for i in 1 2 3 4; do ln -s /dev/fd /run/circle$i; done'])

    def test_it_can_be_closed_twice_and_is_closed_then(self):
        host = lab.Host('host')
        host.popen(['sleep', '1000'])
        host.close()
        host.close()
        self.assertFalse(os.path.exists(f'/proc/{host.pid}'))
        with self.assertRaisesRegex(RuntimeError, 'closed'):
            host.run(['true'])

    def test_three_hosts_can_be_joined(self):
        with lab.pair() as (server, _), lab.Host('third') as third:
            lab.join(server, third, ['198.51.100.10/24'], ['198.51.100.20/24'])
            third.run(['ping', '-c1', '-W2', '198.51.100.10'])

    def test_it_ends_with_us_even_by_kill_9(self):
        name = f'faas-lab-{os.getpid()}-killed'
        code = ('import sys, time\nfrom tests import lab, test_lab\nhost = lab.Host("host")\n'
                f'test_lab.make_bundle(host, {name!r}, ["/usr/bin/sleep", "1000"])\n'
                f'host.popen(["runc", "run", "--detach", "--bundle", "/tmp/bundle", {name!r}]).wait()\n'
                'lab.add_wireguard(host, "wg0")\nprint(host.pid, flush=True)\ntime.sleep(1000)')
        maker = subprocess.Popen([sys.executable, '-c', code], cwd=lab.REPO, text=True,
                                 stdout=subprocess.PIPE)
        with maker:
            pid = int(maker.stdout.readline())
            self.assertTrue(cgroups(name))
            maker.kill()
        lab.wait_until(lambda: not os.path.exists(f'/proc/{pid}'), 5, 'the end of PID 1')
        lab.wait_until(lambda: not cgroups(name), 5, 'the end of its cgroups')

    def test_two_threads_each_reach_the_host_they_mean(self):
        with lab.Host('one') as one, lab.Host('two') as two:
            seen = {one: [], two: []}

            def ask(host):
                for _ in range(20):
                    seen[host].append(host.run(['sh', '-c', 'uname -n; cat /proc/1/comm']).stdout)
            threads = [threading.Thread(target=ask, args=(host,)) for host in (one, two)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            self.assertEqual({'one\ncat\n'}, set(seen[one]))
            self.assertEqual({'two\ncat\n'}, set(seen[two]))
