"""The states of an instance and the table of their transitions."""

import itertools
import unittest

from handlers.serving.instance import TRANSITIONS, InstanceState, ServingMode, TransitionError, text_of
from handlers.serving.program import Program, make_instance, unsignalled_s
from tests.fakes import FakeFunction, program, revision


class States(unittest.TestCase):
    def setUp(self):
        self.function = FakeFunction()

    def instance(self, state):
        instance = self.function.make(self.function.pool, revision(1))
        for step in {
            InstanceState.DRAINING: (InstanceState.READY, InstanceState.DRAINING),
            InstanceState.STARTING: (),
        }.get(state, (state,)):
            instance.become(step)
        return instance

    def test_each_pair_of_states(self):
        for before, after in itertools.product(InstanceState, InstanceState):
            with self.subTest(before=before, after=after):
                instance = self.instance(before)
                if after in TRANSITIONS[before]:
                    instance.become(after)
                    self.assertEqual(after, instance.state)
                else:
                    with self.assertRaises(TransitionError):
                        instance.become(after)
                    self.assertEqual(before, instance.state)

    def test_each_state_leads_to_dead_alone(self):
        self.assertEqual(set(InstanceState), set(TRANSITIONS))
        for state in set(InstanceState) - {InstanceState.DEAD}:
            self.assertIn(InstanceState.DEAD, TRANSITIONS[state])
        self.assertEqual(set(), TRANSITIONS[InstanceState.DEAD])

    def test_ready_is_said_once(self):
        instance = self.function.trial(revision(1))
        self.assertFalse(instance.up.done())
        instance.come_up()
        self.assertIs(instance, instance.up.result(0))

    def test_one_that_is_told_to_stop_at_its_start_is_never_ready(self):
        instance = self.function.trial(revision(1))
        instance.stop(0, 5)
        instance.come_up()
        self.assertFalse(instance.up.done())
        instance.end('ended by SIGKILL')
        self.assertIn('SIGKILL', str(instance.up.exception(0)))
        self.assertTrue(instance.gone.done())

    def test_gone_is_said_also_when_the_pool_fails(self):
        instance = self.function.trial(revision(1))

        def ended(*_):
            raise RuntimeError

        self.function.pool.ended = ended
        with self.assertRaises(RuntimeError):
            instance.end()
        self.assertTrue(instance.gone.done())


class Modes(unittest.TestCase):
    def test_who_listens(self):
        function = FakeFunction()
        for mode, listens in (
            (None, False),
            (ServingMode.HANDLER, False),
            (ServingMode.CONTROL, False),
            (ServingMode.LISTENING, True),
            (ServingMode.ADOPTED, True),
        ):
            instance = function.make(function.pool, program(1))
            instance.mode = mode
            self.assertEqual(listens, instance.listens_itself, mode)

    def test_which_kind_a_spec_makes(self):
        pool = FakeFunction().pool
        self.assertFalse(make_instance(pool, revision(1)).can_listen)
        self.assertIsInstance(make_instance(pool, program(1)), Program)

    def test_a_text_is_one_printable_line(self):
        self.assertEqual('a\ufffdb', text_of(b'Ra\nb'))


class StopSignal(unittest.TestCase):
    def test_when_it_comes_while_connections_are_held(self):
        for within_s, expected in ((600, 10), (12, 10), (10, 8), (4, 2), (2, 1), (0, 0)):
            self.assertEqual(expected, unsignalled_s(within_s))


if __name__ == '__main__':
    unittest.main()
