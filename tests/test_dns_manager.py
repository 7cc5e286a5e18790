"""The zone file to the letter, its serial and its atomicity; and what the real CoreDNS makes of it."""

import contextlib
import errno
import ipaddress
import os
import pathlib
import socket
import struct
import tempfile
import threading
import time
import unittest
from unittest import mock

import dns_manager
import registry
from host import files, process
from tests import inside, lab

THREE = {'fibonacci': 'fd00:faa5:1:0::a', 'hello': 'fd00:faa5:1:0::b', 'api': 'fd00:faa5:1:0::c'}

# The document's, with these differences: the ns record, names in order, and the two ones that say how long a client
# may keep "no such name".
ZONE = """\
$ORIGIN faas.
$TTL 60

@   1   IN  SOA ns.faas. admin.faas. (
            2025001 ; Serial
            3600    ; Refresh
            1800    ; Retry
            604800  ; Expire
            1 )     ; Minimum TTL

@       IN  NS  ns.faas.
ns      IN  AAAA  fd00:faa5:0:100::1

; Function IPv6 records (auto-managed by faasd)
api             IN  AAAA  fd00:faa5:1:0::c
fibonacci       IN  AAAA  fd00:faa5:1:0::a
hello           IN  AAAA  fd00:faa5:1:0::b
"""

COREFILE = """\
faas:53 {
    bind fd00:faa5:0:100::1 fd00:faa5:0:100::2

    file /var/lib/faasd/dns/faas.db {
        reload 200ms
    }

    reload 2s 1s
    log
    errors
}

# Forward all other queries
.:53 {
    bind fd00:faa5:0:100::1
    forward . 2001:4860:4860::8888 2606:4700:4700::1111
    log
    errors
}
"""


class Serials:
    """next_serial as the registry gives it."""

    def __init__(self, last=2025000):
        self.last = last

    def __call__(self, seen=None):
        self.last = registry.serial_after(self.last, seen)
        return self.last


class InFolder(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.zone = pathlib.Path(folder.name, 'dns', 'faas.db')
        self.corefile = pathlib.Path(folder.name, 'coredns', 'Corefile')
        self.events = []
        self.manager = self.make()

    def make(self, last=2025000):
        return dns_manager.DNSZoneManager(
            Serials(last), self.emit, registry.GATEWAY, registry.ZONE_SERVER, str(self.zone), str(self.corefile)
        )

    def emit(self, area, text, **_):
        self.events.append(f'[{area}] {text}')


class Zone(InFolder):
    def test_it_is_the_documents_to_the_letter(self):
        self.manager.project(THREE)
        self.assertEqual(ZONE, self.zone.read_text())
        self.assertEqual(0o644, self.zone.stat().st_mode & 0o777)

    def test_without_functions_it_is_there_too(self):
        self.manager.project({})
        self.assertEqual(ZONE[: ZONE.index('api ')], self.zone.read_text())

    def test_what_happens_is_told_in_the_documents_words(self):
        self.manager.project({'hello': THREE['hello']})
        self.manager.project({})
        self.assertEqual(['[dns] Registered hello.faas → fd00:faa5:1:0::b', '[dns] Removed hello.faas'], self.events)

    def test_a_long_name_keeps_a_blank_behind_it(self):
        name = 'a' * 63
        self.manager.project({name: 'fd00:faa5:1:0::a'})
        self.assertIn(f'\n{name} IN  AAAA  fd00:faa5:1:0::a\n', self.zone.read_text())
        before = self.zone.read_text()
        self.make(5).project({name: 'fd00:faa5:1:0::a'})
        self.assertEqual(before, self.zone.read_text())

    def test_unchanged_content_is_not_written_again_by_this_or_the_next_run(self):
        self.manager.project(THREE)
        before = self.zone.stat()
        self.manager.project(dict(reversed(THREE.items())))
        self.make(7).project(THREE)
        after = self.zone.stat()
        self.assertEqual((before.st_ino, before.st_mtime_ns), (after.st_ino, after.st_mtime_ns))
        self.assertEqual(ZONE, self.zone.read_text())

    def test_each_change_has_a_serial_above_the_registrys_and_the_files(self):
        self.manager.project(THREE)
        self.make(3000000).project({})
        self.assertIn('            3000001 ; Serial\n', self.zone.read_text())
        self.make(5).project(THREE)
        self.assertIn('            3000002 ; Serial\n', self.zone.read_text())
        self.zone.write_text(self.zone.read_text().replace('3000002', '4294967295'))
        self.make(0xFFFFFFF0).project({})
        self.assertIn('            1 ; Serial\n', self.zone.read_text())

    def test_what_a_person_did_to_it_is_mended_with_a_new_serial(self):
        self.manager.project(THREE)
        for damage in (
            lambda text: text.replace('::a\n', '::f\n'),
            lambda text: text.replace('3600 ', '9999 '),
            lambda text: text[: text.index('fibonacci')],
            lambda text: text + 'evil IN  AAAA  ::1\n',
            lambda text: '\udcff garbage',
            lambda text: '',
        ):
            self.zone.write_bytes(damage(self.zone.read_text()).encode(errors='surrogateescape'))
            last = self.manager._next_serial.last
            self.manager.project(THREE)
            self.assertEqual(ZONE.replace('2025001', str(last + 1)), self.zone.read_text())
        self.zone.unlink()
        self.manager.project(THREE)
        self.assertIn('hello ', self.zone.read_text())

    def test_each_change_of_the_file_is_noticed_until_it_is_mended(self):
        self.assertFalse(self.manager.is_current(THREE))
        for change in (
            lambda text: self.zone.write_text(text.replace('::a\n', '::f\n')),
            lambda text: self.zone.write_text(text + 'evil IN  AAAA  ::1\n'),
            lambda text: os.truncate(self.zone, text.index('fibonacci')),
            lambda text: os.truncate(self.zone, 0),
            lambda text: self.zone.unlink(),
            lambda text: (self.zone.unlink(), self.zone.parent.rmdir()),
        ):
            self.manager.project(THREE)
            self.assertTrue(self.manager.is_current(THREE))
            change(self.zone.read_text())
            self.assertFalse(self.manager.is_current(THREE))
            self.assertFalse(self.manager.is_current(THREE))
        self.manager.project(THREE)
        self.assertTrue(self.make().is_current(THREE))
        self.assertFalse(self.manager.is_current(THREE | {'new': 'fd00:faa5:1:0::d'}))
        self.assertFalse(self.manager.is_current({}))

    def test_a_file_that_has_not_changed_is_not_read_again(self):
        self.manager.project(THREE)
        self.assertTrue(self.manager.is_current(THREE))
        with mock.patch.object(self.manager, '_read', side_effect=AssertionError('it is read')):
            self.assertTrue(self.manager.is_current(dict(THREE)))

    def test_what_cannot_be_told_is_not_taken_for_a_change(self):
        self.manager.project(THREE)
        with inside.no_descriptor_left(), self.assertRaises(OSError) as caught:
            self.manager.is_current(THREE)
        self.assertEqual(errno.EMFILE, caught.exception.errno)

    def test_the_folders_it_writes_to_are_named(self):
        self.assertEqual([str(self.zone.parent), str(self.corefile.parent)], self.manager.folders)

    def test_a_write_that_fails_leaves_the_old_file_and_no_other(self):
        self.manager.project(THREE)
        for step in ('fsync', 'replace'):
            with mock.patch.object(files.os, step, side_effect=OSError(28, 'No space left on device')):
                self.assertRaises(OSError, self.manager.project, {})
            self.assertEqual(ZONE, self.zone.read_text())
            self.assertEqual(['faas.db'], os.listdir(self.zone.parent))
        self.manager.project({})
        self.assertNotIn('hello', self.zone.read_text())

    def test_nothing_but_the_file_remains_after_many_changes(self):
        for number in range(20):
            self.manager.project({f'f{number}': 'fd00:faa5:1:0::a'})
        self.assertEqual(['faas.db'], os.listdir(self.zone.parent))


class Corefile(InFolder):
    def write(self, forwarders):
        manager = dns_manager.DNSZoneManager(
            Serials(),
            self.emit,
            registry.GATEWAY,
            registry.ZONE_SERVER,
            '/var/lib/faasd/dns/faas.db',
            str(self.corefile),
        )
        manager.write_corefile(forwarders)
        return self.corefile.read_text()

    def test_it_is_the_documents_with_a_shorter_reload(self):
        text = self.write(dns_manager.DOCUMENT_FORWARDERS)
        self.assertEqual(dns_manager.COREFILE_HEAD + COREFILE, text)
        self.assertTrue(text.startswith('# '))

    def test_one_that_an_older_version_wrote_gets_the_second_address(self):
        self.corefile.parent.mkdir()
        older = COREFILE.replace(f' {registry.ZONE_SERVER}', '')
        self.corefile.write_text(dns_manager.COREFILE_HEAD + older)
        self.assertEqual(dns_manager.COREFILE_HEAD + COREFILE, self.write(dns_manager.DOCUMENT_FORWARDERS))

    def test_without_forwarders_there_is_only_the_zone(self):
        self.assertEqual(dns_manager.COREFILE_HEAD + COREFILE[: COREFILE.index('\n# Forward')], self.write([]))

    def test_ours_follows_the_settings_and_a_persons_is_kept(self):
        self.write(['192.0.2.1'])
        self.assertIn('forward . 192.0.2.2 192.0.2.3\n', self.write(['192.0.2.2', '192.0.2.3']))
        self.corefile.write_text('. {\n}\n')
        self.assertEqual('. {\n}\n', self.write(['192.0.2.1']))
        persons = b'# \xff is not UTF-8\n. {\n}\n'
        self.corefile.write_bytes(persons)
        self.manager.write_corefile(['192.0.2.1'])
        self.assertEqual(persons, self.corefile.read_bytes())

    def test_one_that_was_changed_cut_or_deleted_is_written_again(self):
        text = self.write(['192.0.2.1'])
        for change in (
            lambda: self.corefile.write_text(text.replace('192.0.2.1', '192.0.2.66')),
            lambda: os.truncate(self.corefile, len(text) // 2),
            lambda: os.truncate(self.corefile, 10),
            lambda: os.truncate(self.corefile, 0),
            self.corefile.unlink,
            lambda: (self.corefile.unlink(), self.corefile.parent.rmdir()),
        ):
            change()
            self.assertEqual(text, self.write(['192.0.2.1']))

    def test_one_that_is_right_is_not_written(self):
        text = self.write(['192.0.2.1'])
        with mock.patch.object(files, 'write_file', side_effect=OSError(errno.EROFS, 'Read-only file system')):
            self.assertEqual(text, self.write(['192.0.2.1']))


class Forwarders(unittest.TestCase):
    def ask(self, text, answers=()):
        def query(server, *_):
            if server not in answers:
                raise OSError('no answer')

        with tempfile.NamedTemporaryFile('w') as file, mock.patch.object(dns_manager, 'query', query):
            file.write(text)
            file.flush()
            return dns_manager.default_forwarders(file.name, (registry.GATEWAY, registry.ZONE_SERVER))

    def test_the_documents_two_where_one_of_them_answers(self):
        for address in dns_manager.DOCUMENT_FORWARDERS:
            self.assertEqual(list(dns_manager.DOCUMENT_FORWARDERS), self.ask('nameserver 192.0.2.1\n', [address]))

    def test_else_the_hosts_own_less_ourselves(self):
        text = f'# nameserver 192.0.2.9\nsearch x\nnameserver {registry.GATEWAY}\nnameserver {registry.ZONE_SERVER}\n'
        text += 'nameserver  192.0.2.1\nnameserver 2001:db8::1\n'
        self.assertEqual(['192.0.2.1', '2001:db8::1'], self.ask(text))
        self.assertEqual([], self.ask(''))

    def test_what_cannot_be_told_is_not_taken_for_no_answer_and_no_resolver(self):
        with inside.no_descriptor_left(), self.assertRaises(OSError) as caught:
            dns_manager.default_forwarders()
        self.assertEqual(errno.EMFILE, caught.exception.errno)
        with mock.patch.object(dns_manager, 'query', side_effect=TimeoutError), inside.no_descriptor_left():
            self.assertRaises(OSError, dns_manager.default_forwarders)

    def test_a_host_without_resolv_conf_has_none(self):
        with mock.patch.object(dns_manager, 'query', side_effect=OSError):
            self.assertEqual([], dns_manager.default_forwarders('/no/such/file'))


def reply(query, flags=0x8180, answers=(), question=None, ident=None):
    """An answer message to the bytes of a query; `answers` are resource records as bytes."""
    head = struct.pack(
        '!6H', struct.unpack_from('!H', query)[0] if ident is None else ident, flags, 1, len(answers), 0, 0
    )
    return head + (query[12:] if question is None else question) + b''.join(answers)


def record(address, name=b'\xc0\x0c', kind=28):
    data = ipaddress.ip_address(address).packed
    return name + struct.pack('!HHIH', kind, 1, 60, len(data)) + data


class FakeServer:
    """A UDP server on [::1]:53 that answers by `make(query)`, a message or a list of them."""

    def __init__(self, make):
        self.sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        self.sock.bind(('::1', 53))
        self.make = make
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()

    def _serve(self):
        while True:
            query, client = self.sock.recvfrom(4096)
            if query == b'end':
                return
            answers = self.make(query)
            for answer in answers if isinstance(answers, list) else [answers]:
                self.sock.sendto(answer, client)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.sendto(b'end', self.sock.getsockname())
        self.thread.join()
        self.sock.close()


def ask_fake(make, name='hello.faas', timeout_s=0.3):
    with FakeServer(make):
        return list(map(str, dns_manager.query('::1', name, timeout_s=timeout_s)))


@contextlib.contextmanager
def coredns(forwarders=()):
    """A manager whose zone the real CoreDNS serves at the gateway's two addresses."""
    addresses = registry.GATEWAY, registry.ZONE_SERVER
    for address in addresses:
        process.run(['ip', '-6', 'address', 'add', f'{address}/128', 'dev', 'lo'])
    manager = dns_manager.DNSZoneManager(Serials(), lambda *_, **__: None, *addresses)
    manager.project({})
    manager.write_corefile(forwarders)
    child = process.start(['coredns', '-quiet', '-conf', manager.corefile], output=True)
    try:
        if not manager.wait_served('ns', registry.GATEWAY):
            child.kill()
            raise AssertionError(child.stdout.read().decode())
        yield manager
    finally:
        child.terminate()
        child.communicate(timeout=5)
        for address in addresses:
            process.run(['ip', '-6', 'address', 'del', f'{address}/128', 'dev', 'lo'])


def ask_raw(name, kind=28, server=registry.GATEWAY):
    """(rcode, whole answer message) of CoreDNS."""
    question = b''.join(bytes((len(label),)) + label.encode() for label in name.split('.')) + struct.pack(
        '!BHH', 0, kind, 1
    )
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
        sock.settimeout(2)
        sock.connect((server, 53))
        sock.send(struct.pack('!6H', 1, 0x0100, 1, 0, 0, 0) + question)
        answer = sock.recv(4096)
    return answer[3] & 15, answer


class Queries(inside.InHost):
    @inside.inside
    def test_addresses_are_read_past_aliases_and_written_out_names(self):
        def make(query):
            alias = b'\xc0\x0c' + struct.pack('!HHIH', 5, 1, 60, 2) + b'\xc0\x0c'
            return reply(
                query, answers=[alias, record('fd00:faa5:1::a'), record('192.0.2.1', kind=1), record('::5', b'\1a\0')]
            )

        self.assertEqual(['fd00:faa5:1::a', '::5'], ask_fake(make))

    @inside.inside
    def test_no_such_name_and_no_such_record_are_none(self):
        self.assertEqual([], ask_fake(lambda query: reply(query, 0x8183)))
        self.assertEqual([], ask_fake(reply))

    @inside.inside
    def test_anything_else_is_no_usable_answer(self):
        for make in (
            lambda query: b'',
            lambda query: b'\0',
            lambda query: os.urandom(64),
            lambda query: query,
            lambda query: reply(query, 0x8182),  # SERVFAIL
            lambda query: reply(query, 0x8185),  # REFUSED
            lambda query: reply(query, ident=struct.unpack_from('!H', query)[0] ^ 1),
            lambda query: reply(query, question=b'\5other\4faas\0\0\x1c\0\1'),
            lambda query: reply(query, answers=[record('::1')])[:-3],
            lambda query: reply(query, answers=[record('::1')])[:-17],
            lambda query: reply(query)[:6] + b'\0\5' + reply(query)[8:],
            lambda query: reply(query, answers=[b'\xff']),
            lambda query: reply(query, answers=[b'\x3f' * 64]),
            lambda query: [],
        ):
            sent = make(struct.pack('!6H', 1, 0x100, 1, 0, 0, 0) + b'\5hello\4faas\0\0\x1c\0\1')
            with self.subTest(sent), self.assertRaises(OSError):
                ask_fake(make, timeout_s=0.1)

    @inside.inside
    def test_nobody_there_is_no_usable_answer(self):
        with self.assertRaises(OSError):
            dns_manager.query('::1', 'hello.faas', timeout_s=0.2)
        manager = dns_manager.DNSZoneManager(Serials(), None, '::1', registry.ZONE_SERVER)
        self.assertFalse(manager.wait_served('hello', '::5', timeout_s=0.1))

    @inside.inside
    def test_the_real_coredns_serves_what_is_projected_within_half_a_second(self):
        with coredns() as manager:
            for number in range(3):
                name, ipv6 = f'f{number}', f'fd00:faa5:1:0::{number + 10:x}'
                self.assertEqual([], dns_manager.query(registry.GATEWAY, f'{name}.faas'))
                began = time.monotonic()
                manager.project({name: ipv6})
                self.assertTrue(manager.wait_served(name, ipv6))
                self.assertLess(time.monotonic() - began, 0.5)
            self.assertEqual(3, ask_raw('f0.faas')[0])  # NXDOMAIN: the next projection did not name it
            manager.project({})
            lab.wait_until(lambda: dns_manager.query(registry.GATEWAY, 'f2.faas') == [], 5, 'NXDOMAIN')
            self.assertEqual(3, ask_raw('f2.faas')[0])
            self.assertEqual(
                [registry.GATEWAY], [format_as_gateway(each) for each in dns_manager.query(registry.GATEWAY, 'ns.faas')]
            )

            # Nobody may keep NXDOMAIN for longer than the lesser of the SOA's TTL and its last number.
            rcode, answer = ask_raw('f2.faas')
            soa = answer.index(struct.pack('!HH', 6, 1), 12 + 4)
            (ttl,) = struct.unpack_from('!I', answer, soa + 4)
            (minimum,) = struct.unpack_from('!I', answer, soa + 10 + struct.unpack_from('!H', answer, soa + 8)[0] - 4)
            self.assertEqual((3, True), (rcode, min(ttl, minimum) <= 1))

    @inside.inside
    def test_other_zones_are_refused_without_forwarders(self):
        with coredns(), self.assertRaises(OSError):
            self.assertEqual(5, ask_raw('example.com')[0])
            dns_manager.query(registry.GATEWAY, 'example.com')

    @inside.inside
    def test_the_second_address_serves_the_zone_and_refuses_every_other(self):
        with FakeServer(lambda query: reply(query, answers=[record('2001:db8::7')])), coredns(['[::1]:53']) as manager:
            manager.project(THREE)
            self.assertTrue(manager.wait_served('hello', THREE['hello']))
            for server in manager.server, manager.zone_server:
                self.assertEqual([ipaddress.IPv6Address(THREE['hello'])], dns_manager.query(server, 'hello.faas'))
            self.assertEqual(0, ask_raw('example.com')[0])  # the first forwards it
            for name in 'example.com', 'com', 'notfaas', 'faas.example.com':
                self.assertEqual(5, ask_raw(name, server=manager.zone_server)[0], name)
            self.assertEqual(3, ask_raw('nobody.faas', server=manager.zone_server)[0])

    @inside.inside
    def test_other_forwarders_are_taken_without_a_new_coredns(self):
        with FakeServer(lambda query: reply(query, answers=[record('2001:db8::7')])), coredns() as manager:
            self.assertEqual(5, ask_raw('example.com')[0])
            manager.write_corefile(['[::1]:53'])
            lab.wait_until(lambda: ask_raw('example.com')[0] == 0, 10, 'the reload')

    @inside.inside
    def test_a_name_in_the_zone_file_is_served_after_a_broken_file_was_mended(self):
        with coredns() as manager:
            manager.project(THREE)
            self.assertTrue(manager.wait_served('hello', THREE['hello']))
            pathlib.Path(manager.zone_file).write_text('broken')
            manager.project(THREE | {'new': 'fd00:faa5:1:0::d'})
            self.assertTrue(manager.wait_served('new', 'fd00:faa5:1:0::d', timeout_s=2))


def format_as_gateway(address):
    return registry.GATEWAY if address == ipaddress.IPv6Address(registry.GATEWAY) else str(address)


if __name__ == '__main__':
    unittest.main()
