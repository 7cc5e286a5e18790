"""Attacks on the client: by other users of the laptop, and by a hostile server. Each works without its cure."""

import os
import shutil
import unittest

from tests.test_faas import ApiCase, token

# In place of the client: it keeps what every user of the machine can read of it, and what came on its stdin.
TELLTALE = """#!/bin/sh
tr '\\0' ' ' </proc/$$/cmdline >seen
cat >given
"""


class Paste(ApiCase):
    """Other users of a laptop read /proc/PID/cmdline while its owner pastes an invite."""

    def test_what_is_to_be_pasted_is_in_no_argument(self):
        self.serve((200, {'token': token(), 'name': None, 'expires': '2026-11-23T21:00:00Z'}))
        code, text, _ = self.faas('vpn', 'invite', 'laptop')
        self.assertEqual(0, code)
        for shell in filter(shutil.which, ('sh', 'bash', 'zsh', 'busybox')):
            with self.subTest(shell):
                folder = self.folder({'faas': TELLTALE, 'typed': text}, shell)
                (folder / 'faas').chmod(0o755)
                self.type(shell, folder)
                self.assertIn('vpn connect laptop --invite', (folder / 'seen').read_text())
                self.assertNotIn('faas1_', (folder / 'seen').read_text())
                self.assertEqual(f'{token()}\n', (folder / 'given').read_text())

    @staticmethod
    def type(shell, folder):
        """The text comes from a terminal: the shell has it on its stdin."""
        words = [shell, 'sh'] if shell == 'busybox' else [shell]
        with open(folder / 'typed') as typed:
            move = (os.POSIX_SPAWN_DUP2, typed.fileno(), 0)
            pid = os.posix_spawnp('env', ['env', '-C', str(folder), *words], os.environ, file_actions=[move])
            os.waitpid(pid, 0)


if __name__ == '__main__':
    unittest.main()
