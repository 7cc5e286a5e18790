"""The files of a replaced revision are deleted after its last instance, and not before."""

import unittest

from handlers.serving.instance_set import InstanceSet


class Revision:
    def __init__(self, folder):
        self.folder = folder


class Instance:
    def __init__(self, folder):
        self.revision = Revision(folder)


class InstanceSetTest(unittest.TestCase):
    def setUp(self):
        self.forgotten = []
        self.instances = InstanceSet(self.forgotten.append)

    def test_with_instances(self):
        first, second, other = Instance('1'), Instance('1'), Instance('2')
        for instance in (first, second, other):
            self.instances.add(instance)
        self.instances.replaced('1')
        self.instances.remove(first)
        self.assertEqual([], self.forgotten)
        self.instances.remove(second)
        self.assertEqual(['1'], self.forgotten)
        self.instances.remove(second)
        self.instances.remove(other)  # of the live revision
        self.assertEqual((['1'], 0), (self.forgotten, len(self.instances)))

    def test_without_an_instance(self):
        self.instances.replaced('1')
        self.assertEqual(['1'], self.forgotten)

    def test_it_may_change_while_it_is_gone_through(self):
        for _ in range(3):
            self.instances.add(Instance('1'))
        for instance in self.instances:
            self.instances.remove(instance)
        self.assertEqual(0, len(self.instances))


if __name__ == '__main__':
    unittest.main()
