"""The nftables table, on the real nft: it is there, and every way to lose it is noticed."""

import os
import pathlib
import re
import tempfile
import unittest
from unittest import mock

import registry
from host import firewall, process
from tests import inside


class Table(inside.InHost):
    @inside.inside
    def test_the_table_is_there_and_every_way_to_lose_it_is_noticed(self):
        table = firewall.Firewall('faas', 'wg0', registry.GATEWAY, registry.ZONE_SERVER)
        self.assertFalse(table.is_loaded())
        table.load()
        self.assertTrue(table.is_loaded())
        table.load()
        self.assertTrue(table.is_loaded())
        listing = self.nft('-a', 'list', 'table', 'inet', 'faas')
        handles = re.findall(r'(drop|reject|accept|return) # handle (\d+)', listing)
        self.assertEqual(17, len(handles))
        chains = re.findall(r'chain (\w+) \{ # handle', listing)
        self.assertEqual(['input', 'output', 'forward'], chains)
        for command in (
            ['flush', 'ruleset'],
            ['flush', 'table', 'inet', 'faas'],
            ['delete', 'table', 'inet', 'faas'],
            *(['flush', 'chain', 'inet', 'faas', chain] for chain in chains),
        ):
            self.nft(*command)
            self.assertFalse(table.is_loaded(), command)
            table.load()
            self.assertTrue(table.is_loaded(), command)
        for index in range(len(handles)):
            text = self.nft('-a', 'list', 'table', 'inet', 'faas')
            chain = None
            rules = []
            for line in text.splitlines():
                chain = (re.match(r'\s*chain (\w+)', line) or [None, chain])[1]
                if found := re.search(r'(?:drop|reject|accept|return) # handle (\d+)', line):
                    rules.append((chain, found[1]))
            self.nft('delete', 'rule', 'inet', 'faas', rules[index][0], 'handle', rules[index][1])
            self.assertFalse(table.is_loaded(), rules[index])
            table.load()
        table.remove()
        self.assertFalse(table.is_loaded())
        table.remove()
        self.assertEqual('', self.nft('list', 'ruleset'))

    @inside.inside
    def test_a_rule_that_was_put_in_the_place_of_another_is_noticed(self):
        table = firewall.Firewall('faas', 'wg0', registry.GATEWAY, registry.ZONE_SERVER)
        table.load()
        self.stack.callback(table.remove)
        text = self.nft('-a', 'list', 'chain', 'inet', 'faas', 'output')
        handle = re.search(r'drop # handle (\d+)', text)[1]
        self.nft('replace', 'rule', 'inet', 'faas', 'output', 'handle', handle, 'counter', 'accept')
        self.assertFalse(table.is_loaded())

    @inside.inside
    def test_other_tables_are_left_alone(self):
        table = firewall.Firewall('faas', 'wg0', registry.GATEWAY, registry.ZONE_SERVER)
        self.nft('add', 'table', 'inet', 'mine')
        table.load()
        table.remove()
        self.assertEqual('table inet mine\n', self.nft('list', 'tables'))
        self.nft('delete', 'table', 'inet', 'mine')

    @staticmethod
    def nft(*arguments):
        return process.run(['nft', *arguments]).stdout

    @inside.inside
    def test_the_table_needs_no_names_of_protocols_and_what_nft_says_is_told(self):
        table = firewall.Firewall('faas', 'wg0', registry.GATEWAY, registry.ZONE_SERVER)
        for name in ('protocols', 'services'):
            if os.path.exists(f'/etc/{name}'):
                os.rename(f'/etc/{name}', f'/etc/{name}.away')
                self.stack.callback(os.rename, f'/etc/{name}.away', f'/etc/{name}')
        table.load()
        self.assertTrue(table.is_loaded())
        table.remove()
        wrong = mock.patch.object(firewall, 'RULES', 'table inet x {{ chain y {{ meta nonsense }} }}')
        with wrong, self.assertRaisesRegex(firewall.FirewallError, r'cannot be loaded: syntax error'):
            table.load()

    @inside.inside
    def test_a_table_that_cannot_be_looked_at_is_not_taken_for_gone(self):
        table = firewall.Firewall('faas', 'wg0', registry.GATEWAY, registry.ZONE_SERVER)
        table.load()
        self.stack.callback(table.remove)
        with inside.no_descriptor_left(), self.assertRaisesRegex(firewall.FirewallError, 'looked at: Too many open'):
            table.is_loaded()
        # nft itself has none left, or does not end.
        program = self.stack.enter_context(tempfile.TemporaryDirectory())
        fake, path = pathlib.Path(program, 'nft'), os.environ['PATH']
        self.stack.callback(os.environ.update, PATH=path)
        os.environ['PATH'] = f'{program}:{path}'
        for script, why in (
            ('echo "netlink.c:62: No socket: Too many open files" >&2; exit 3', 'Too many open'),
            ('kill -9 $$', 'exit code -9'),
        ):
            fake.write_text(f'#!/bin/sh\n{script}\n')
            fake.chmod(0o755)
            with self.assertRaisesRegex(firewall.FirewallError, f'looked at: .*{why}') as caught:
                table.is_loaded()
            self.assertEqual(503, caught.exception.status)
        os.environ['PATH'] = path
        self.assertTrue(table.is_loaded())

    @inside.inside
    def test_without_nft_there_is_an_error_with_a_hint(self):
        table = firewall.Firewall('faas', 'wg0', registry.GATEWAY, registry.ZONE_SERVER)
        os.environ['PATH'] = '/nowhere'
        self.assertFalse(table.is_loaded())
        with self.assertRaisesRegex(firewall.FirewallError, 'cannot be loaded') as caught:
            table.load()
        self.assertIn('install nftables', caught.exception.hint)


if __name__ == '__main__':
    unittest.main()
