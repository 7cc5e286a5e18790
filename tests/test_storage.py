import os
import tempfile
import unittest

from control.storage import Storage


class Disks(unittest.TestCase):
    def test_a_folder_that_is_lost_for_a_moment_is_no_fault_of_the_disk(self):
        with tempfile.TemporaryDirectory() as folder:
            storage = Storage(f'{folder}/state', f'{folder}/run', lambda *_, **__: None)
            os.mkdir(storage.state)
            storage.add([f'{folder}/lost'])
            storage.look_at_disks()
