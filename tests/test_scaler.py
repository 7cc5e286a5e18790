"""How many instances a function should have, as a function of time, clients and failures."""

import unittest

from handlers.serving.scaler import (
    CRASH_AGE_S,
    CRASH_FIRST_DELAY_S,
    CRASH_LAST_DELAY_S,
    Scaler,
    Situation,
    instances_wanted,
    start_time,
)


def wanted(now=100.0, instances=0, waiting=False, last_use=0.0, failures=0, last_failure=0.0, idle_timeout_s=0.0):
    return instances_wanted(Situation(now, instances, waiting, last_use, failures, last_failure, idle_timeout_s))


class Wanted(unittest.TestCase):
    def test_none_until_a_client_waits(self):
        self.assertEqual(0, wanted())
        self.assertEqual(1, wanted(waiting=True))

    def test_one_stays_until_nobody_has_used_it_for_the_idle_time(self):
        self.assertEqual(1, wanted(instances=1, last_use=0))  # 0 s: never
        self.assertEqual(1, wanted(instances=1, last_use=90, idle_timeout_s=10))
        self.assertEqual(0, wanted(instances=1, last_use=89.9, idle_timeout_s=10))
        self.assertEqual(1, wanted(instances=1, last_use=89.9, idle_timeout_s=10, waiting=True))

    def test_none_before_the_delay_after_a_crash(self):
        self.assertEqual(0, wanted(waiting=True, failures=1, last_failure=100 - CRASH_FIRST_DELAY_S + 0.1))
        self.assertEqual(1, wanted(waiting=True, failures=1, last_failure=100 - CRASH_FIRST_DELAY_S))

    def test_the_delay_doubles_up_to_a_bound(self):
        delays = [start_time(failures, 0) for failures in range(6)]
        self.assertEqual([0, *(CRASH_FIRST_DELAY_S * 2**n for n in range(5))], delays)
        for failures in (7, 8, 100, 5000):
            self.assertEqual(CRASH_LAST_DELAY_S, start_time(failures, 0))


class Remembered(unittest.TestCase):
    def setUp(self):
        self.scaler = Scaler(idle_timeout_s=10, now=0)

    def test_young_deaths_add_up_and_an_old_one_ends_the_count(self):
        for number, delay_s in enumerate((0.5, 1, 2), 1):
            self.scaler.failed(number, CRASH_AGE_S - 0.1)
            self.assertEqual(delay_s, self.scaler.delay_s(number))
            self.assertEqual(0, self.scaler.wanted(number, 0, waiting=True))
            self.assertEqual(1, self.scaler.wanted(number + delay_s, 0, waiting=True))
        self.scaler.failed(9, CRASH_AGE_S)
        self.assertEqual(0, self.scaler.delay_s(9))

    def test_other_code_starts_at_once(self):
        self.scaler.failed(1, 0)
        self.scaler.recovered()
        self.assertEqual(1, self.scaler.wanted(1, 0, waiting=True))

    def test_use(self):
        self.assertEqual(0, self.scaler.wanted(11, 1, waiting=False))
        self.scaler.used(5)
        self.scaler.used(3)  # what is late does not count
        self.assertEqual(1, self.scaler.wanted(15, 1, waiting=False))
        self.assertEqual(0, self.scaler.wanted(15.1, 1, waiting=False))


if __name__ == '__main__':
    unittest.main()
