"""What the end of faasd waits for; deploys themselves are in test_faasd.py."""

import threading
import unittest

from control.functions import Changes, Ending


class ChangesTest(unittest.TestCase):
    def test_the_end_waits_for_a_change_under_way_and_takes_no_other(self):
        changes, begun, may_end, ended = Changes(), threading.Event(), threading.Event(), threading.Event()

        def change():
            with changes.one():
                begun.set()
                may_end.wait(5)

        def end():
            changes.refuse()
            changes.wait()
            ended.set()

        threads = [threading.Thread(target=change), threading.Thread(target=end)]
        threads[0].start()
        self.assertTrue(begun.wait(5))
        threads[1].start()
        self.assertFalse(ended.wait(0.1))
        with self.assertRaises(Ending), changes.one():
            pass
        may_end.set()
        self.assertTrue(ended.wait(5))
        for thread in threads:
            thread.join()

    def test_a_change_that_fails_is_over(self):
        changes = Changes()
        with self.assertRaises(ValueError), changes.one():
            raise ValueError
        changes.wait()


if __name__ == '__main__':
    unittest.main()
