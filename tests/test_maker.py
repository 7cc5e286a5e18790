"""The process that makes networks and changes nftables, in a host of its own."""

import json
import sys
import unittest

from tests import lab

SCRIPT = r"""
import json, os, signal
from control.monitor import read_all
from host import netlink
from host import process
from host.maker import Maker, MakerError
users = process.user_namespace('0 1879048192 1')
maker, networks = Maker(), []

def meanwhile(fd):
    networks.append(os.readlink(f'/proc/self/fd/{fd}'))
    os.close(fd)

hears = netlink.listen(netlink.NETLINK_NETFILTER, netlink.NFNLGRP_NFTABLES)
said = [maker.make(users, 'add table inet one\n', meanwhile), maker.make(users, 'add chain inet none x\n', meanwhile)]
own = [{maker.is_author(each) for each in read_all(hears)}]
process.run(['nft', 'add', 'table', 'inet', 'zero'])
own.append({maker.is_author(each) for each in read_all(hears)})
own = [list(each) for each in own]
net, fds = os.readlink('/proc/self/ns/net'), len(os.listdir('/proc/self/fd'))
for _ in range(20):
    said.append(maker.make(users, 'add table inet two\n', meanwhile))
os.kill(maker._child.pid, signal.SIGKILL)
maker._child.wait()
said.append(maker.change('add table inet three\n'))
errors = []

def fail(fd):
    os.close(fd)
    raise ValueError

null = os.open('/dev/null', os.O_RDONLY)
for wrong, call in ((null, meanwhile), (users, fail)):
    try:
        maker.make(wrong, 'add table inet two\n', call)
    except (MakerError, ValueError) as error:
        errors.append(type(error).__name__)
os.close(null)
maker.change('add table inet two\n')
left = len(os.listdir('/proc/self/fd'))
maker.close()
tables = process.run(['nft', 'list', 'tables']).stdout
print(json.dumps([said, [len(networks), net in networks], own, errors, left - fds, tables]))
"""


@lab.needs_root
class Process(unittest.TestCase):
    def test_it_makes_networks_and_says_what_is_wrong(self):
        with lab.Host('server') as host:
            answer = json.loads(host.run([sys.executable, '-c', SCRIPT]).stdout)
        said, networks, own, errors, leaked, tables = answer
        self.assertEqual('', said[0])
        self.assertIn('No such file or directory', said[1])
        self.assertEqual([''] * 21, said[2:])
        self.assertEqual([22, False], networks)
        self.assertEqual(['MakerError', 'ValueError'], errors)
        self.assertEqual(0, leaked)
        self.assertEqual([[True], [False]], own)  # whose change the kernel tells of
        self.assertEqual(['one', 'three', 'two', 'zero'], sorted(each.split()[2] for each in tables.splitlines()))


if __name__ == '__main__':
    unittest.main()
