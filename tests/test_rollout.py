"""One instance takes the place of another, transition by transition, on fakes."""

import collections
import unittest

from handlers.serving import rollout
from handlers.serving.instance import InstanceState, ServingMode
from handlers.serving.rollout import OwnerError, Phase, Rollout
from tests.fakes import FakeConnection, FakeFunction, program, revision

CONTROL, LISTENING = ServingMode.CONTROL, ServingMode.LISTENING


class Listeners(unittest.TestCase):
    """Which listener an instance gets, and where connections go."""

    def setUp(self):
        self.function = FakeFunction()
        self.pool, self.group, self.loop = self.function.pool, self.function.group, self.function.loop

    def test_the_first_program_gets_the_current_listener_and_the_next_one_of_its_own(self):
        current = self.group.current
        first = self.function.deploy(program(1))
        self.assertIs(current, first.listener)
        self.assertIs(first, self.function.owner())
        second = self.function.trial(program(2))
        self.assertIs(self.group.next, second.listener)
        self.assertIs(first, self.function.owner())  # until it is cut over to
        self.pool.cut_over(second.come_up())
        self.assertIs(second, self.function.owner())
        self.assertIs(current, self.group.former)
        self.assertFalse(self.function.accepting)

    def test_a_trial_that_fails_takes_its_listener_with_it(self):
        first = self.function.deploy(program(1))
        second = self.function.trial(program(2))
        second.end('ended with exit code 3')
        self.assertTrue(second.listener.is_closed)
        self.assertTrue(self.group.has_room)
        self.assertIs(first, self.function.owner())
        self.assertEqual([], self.function.events)

    def test_two_trials_at_once_are_never_at_one_listener(self):
        first, second = self.function.trial(program(1)), self.function.trial(program(2))
        self.assertIs(self.group.current, first.listener)
        self.assertIs(self.group.next, second.listener)
        for order in ((1, 2), (2, 1)):
            with self.subTest(order):
                self.setUp()
                both = {1: self.function.trial(program(1)), 2: self.function.trial(program(2))}
                for number in order:
                    self.pool.cut_over(both[number].come_up())
                    self.loop.advance(0)
                for instance in both.values():
                    if instance.state == InstanceState.STOPPING:
                        instance.end()
                if self.function.owner() == 'faasd':  # nobody serves: a client starts one
                    self.function.connect()
                    self.function.last.come_up()
                self.assertEqual(2, self.function.owner().revision.number)

    def test_a_third_waits_until_the_former_listener_is_done(self):
        first = self.function.deploy(program(1))
        self.function.deploy(program(2))
        third = self.function.trial(program(3))
        self.assertFalse(third.begun)
        self.loop.advance(rollout.LISTENER_QUIET_S + 0.1)
        self.assertEqual(InstanceState.STOPPING, first.state)
        self.assertFalse(third.begun)  # a listener is not shut down before its server was told to stop
        self.assertFalse(first.listener.is_closed)
        first.told = rollout.LISTENER_QUIET_S
        self.loop.advance(0.1)
        self.assertTrue(third.begun)
        self.assertTrue(first.listener.is_closed)

    def test_one_that_is_discarded_while_it_waits_for_room_never_begins(self):
        self.function.deploy(program(1))
        self.function.deploy(program(2))
        third = self.function.trial(program(3))
        self.pool._discard(third)
        self.loop.advance(1)
        self.assertFalse(third.begun)
        self.assertEqual(InstanceState.DEAD, third.state)

    def test_no_listener_can_be_made(self):
        self.function.deploy(program(1))
        self.group.is_full = True
        second = self.function.trial(program(2))
        self.assertRegex(str(second.up.exception(0)), 'no listener: Address already in use')

    def test_a_handler_in_place_of_a_program_gets_what_faasd_accepts_at_a_new_listener(self):
        first = self.function.deploy(program(1))
        waits = self.function.connect()
        second = self.function.deploy(revision(2))
        self.assertEqual('faasd', self.function.owner())
        self.assertIsNot(first.listener, self.group.current)
        self.assertEqual([waits], first.listener.queue)  # it stays with the one that it came to
        self.assertEqual([], second.took)
        self.assertFalse(first.listener.is_closed)

    def test_a_handler_for_which_no_listener_can_be_made_shares_it_until_the_former_has_ended(self):
        first = self.function.deploy(program(1))
        self.group.is_full = True
        second = self.function.deploy(revision(2))
        self.assertEqual([(0, rollout.SHARED_LISTENER_MAX_S)], first.stops)
        self.assertTrue(self.function.accepting)
        self.function.connect()
        self.assertEqual(1, len(second.took))

    def test_a_program_in_place_of_a_handler(self):
        first = self.function.deploy(revision(1))
        held = self.function.connect()
        first.capacity = 1
        waits = self.function.connect()
        second = self.function.deploy(program(2))
        self.assertIs(second, self.function.owner())
        self.assertFalse(self.function.accepting)
        first.finish(held)
        self.loop.advance(0.1)
        self.assertEqual([held, waits], first.took)
        first.finish(waits)
        self.loop.advance(rollout.LISTENER_QUIET_S + 0.1)
        self.assertEqual(InstanceState.STOPPING, first.state)

    def test_programs_that_are_handed_their_connections_keep_the_current_listener(self):
        current = self.group.current
        first = self.function.deploy(program(1), CONTROL)
        second = self.function.deploy(program(2), CONTROL)
        self.assertIs(current, self.group.current)
        self.assertTrue(second.listener.is_closed)
        self.assertEqual([(rollout.KEEPALIVE_IDLE_S, rollout.REPLACED_INSTANCE_MAX_S)], first.stops)
        self.assertEqual('faasd', self.function.owner())

    def test_the_one_before_has_died_meanwhile(self):
        first = self.function.deploy(program(1))
        second = self.function.trial(program(2))
        second.come_up()
        first.end()
        self.pool.cut_over(second)
        self.assertEqual('faasd', self.function.owner())  # who waits at its listener starts one there
        self.assertEqual(InstanceState.STOPPING, second.state)
        self.function.connect()
        self.assertIs(self.group.current, self.function.last.listener)
        self.assertEqual(2, self.function.last.come_up().revision.number)
        self.assertIs(self.function.last, self.function.owner())

    def test_it_has_died_between_its_readiness_and_the_cut_over(self):
        for kind in ('handler', 'command'):
            with self.subTest(kind):
                self.setUp()
                first = self.function.deploy(revision(1, kind))
                second = self.function.trial(revision(2, kind)).come_up()
                second.end()
                self.pool.cut_over(second)
                self.assertNotEqual(InstanceState.READY, first.state)
                self.assertEqual('faasd', self.function.owner())
                self.loop.advance(1)
                self.function.connect()
                self.loop.advance(30)
                self.assertEqual(2, self.function.last.revision.number)
                self.assertEqual(InstanceState.STARTING, self.function.last.state)

    def test_a_listener_without_an_owner_is_refused(self):
        first = self.function.deploy(program(1))
        second = self.function.make(self.pool, program(2))
        second.use_listener(self.group.current)
        second.mode = LISTENING
        with self.assertRaises(OwnerError):
            Rollout(self.group, self.pool.around, second).cut_over(first, collections.deque())
        self.assertIs(first, self.function.owner())
        self.assertEqual(InstanceState.READY, first.state)


class Draining(unittest.TestCase):
    def setUp(self):
        self.function = FakeFunction()
        self.group, self.loop = self.function.group, self.function.loop
        self.first = self.function.deploy(program(1))
        self.rollout = Rollout(self.group, self.function.pool.around)

    def drain(self, within_s=100):
        self.rollout.cut_over(self.first, collections.deque(), within_s)

    def test_the_phases(self):
        self.assertEqual(Phase.TRIAL, self.rollout.phase)
        self.drain()
        self.assertEqual((Phase.DRAINING, InstanceState.DRAINING), (self.rollout.phase, self.first.state))
        self.loop.advance(rollout.LISTENER_QUIET_S - 0.1)
        self.assertEqual(Phase.DRAINING, self.rollout.phase)
        self.loop.advance(0.2)
        self.assertEqual((Phase.STOPPING, InstanceState.STOPPING), (self.rollout.phase, self.first.state))
        self.assertFalse(self.group.has_room)
        self.first.told = rollout.LISTENER_QUIET_S
        self.loop.advance(0.1)
        self.assertEqual(Phase.DONE, self.rollout.phase)
        self.assertTrue(self.group.has_room)

    def test_who_comes_late_is_waited_for_and_not_for_ever(self):
        self.drain(within_s=20)
        self.loop.advance(0.9)
        self.group.former.queue.append('a client')
        self.loop.advance(5)
        self.assertEqual(Phase.DRAINING, self.rollout.phase)
        self.loop.advance(5)
        self.assertEqual(Phase.STOPPING, self.rollout.phase)
        idle_s, within_s = self.first.stops[-1]
        self.assertEqual(rollout.KEEPALIVE_IDLE_S, idle_s)
        self.assertAlmostEqual(10, within_s, 1)

    def test_its_end_closes_its_listener_at_any_time(self):
        for seconds in (0, 0.5, 1.5, 3):
            with self.subTest(seconds):
                self.setUp()
                second = self.function.deploy(program(2))
                self.loop.advance(seconds)
                self.first.end()
                self.assertIsNone(self.group.former)
                self.loop.advance(20)
                self.assertEqual([], self.function.events)
                self.assertIs(second, self.function.owner())

    def test_what_was_accepted_for_one_that_ends_goes_to_the_next(self):
        function = FakeFunction()
        first = function.deploy(revision(1))
        first.capacity = 0
        waits = FakeConnection()
        function.pool.dispatch(waits)
        second = function.deploy(program(2), CONTROL)
        self.assertEqual([waits], second.took)


if __name__ == '__main__':
    unittest.main()
