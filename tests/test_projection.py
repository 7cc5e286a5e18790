"""Projections coalesce and know when they are stale."""

import threading
import unittest

from control.projection import Projection
from tests import lab


class Projections(unittest.TestCase):
    def test_callers_that_wait_share_one_run(self):
        runs, gate = [], threading.Event()

        def apply():
            runs.append(len(runs))
            gate.wait(10)

        projection = Projection(apply)
        threads = [threading.Thread(target=projection.sync) for _ in range(20)]
        for thread in threads:
            thread.start()
        lab.wait_until(lambda: projection._wanted == 20, 5, 'twenty callers')
        gate.set()
        for thread in threads:
            thread.join()
        self.assertLessEqual(len(runs), 3)
        self.assertFalse(projection.stale)

    def test_each_caller_sees_a_run_that_began_after_its_call(self):
        truth, seen, wrong = [0], [None], []
        lock = threading.Lock()

        def apply():
            seen[0] = truth[0]

        projection = Projection(apply)

        def change():
            for _ in range(50):
                with lock:
                    truth[0] += 1
                    mine = truth[0]
                projection.sync()
                if seen[0] < mine:
                    wrong.append(mine)

        threads = [threading.Thread(target=change) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        self.assertEqual([], wrong)

    def test_an_error_reaches_the_caller_and_the_next_good_run_makes_up_for_it(self):
        outcomes = [OSError('the disk is full'), None]

        def apply():
            outcome = outcomes.pop(0)
            if outcome:
                raise outcome

        projection = Projection(apply)
        self.assertFalse(projection.stale)
        with self.assertRaisesRegex(OSError, 'the disk is full'):
            projection.sync()
        self.assertTrue(projection.stale)
        projection.sync()
        self.assertFalse(projection.stale)


if __name__ == '__main__':
    unittest.main()
