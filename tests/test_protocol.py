"""The hand-off wire: what is drawn is what is sent, and every descriptor has one owner on every path."""

import array
import os
import socket
import unittest

from handlers.containers import protocol


def descriptors():
    return len(os.listdir('/proc/self/fd'))


class Wire(unittest.TestCase):
    def setUp(self):
        self.before = descriptors()
        self.ours, self.theirs = protocol.pair()
        self.theirs.settimeout(5)

    def tearDown(self):
        self.ours.close()
        self.theirs.close()
        self.assertEqual(self.before, descriptors())

    def send_raw(self, message, fds=()):
        self.ours.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', fds))] if fds else [])

    def test_the_pair_keeps_messages_apart_is_not_inherited_and_ours_does_not_block(self):
        for each in (self.ours, self.theirs):
            self.assertFalse(each.get_inheritable())
            self.assertEqual(socket.SOCK_SEQPACKET, each.type)
        self.assertFalse(self.ours.getblocking())
        self.assertTrue(self.theirs.getblocking())

    def test_a_connection_arrives_as_drawn_with_a_descriptor_of_its_own(self):
        with socket.socket(socket.AF_INET6) as connection:
            protocol.send_connection(self.ours, 7, connection)
            message, fd = protocol.receive(self.theirs)
            try:
                self.assertEqual(b'C\0\0\0\0\0\0\0\7', message)
                self.assertEqual(7, protocol.number_of(message))
                self.assertFalse(os.get_inheritable(fd))
                self.assertNotEqual(connection.fileno(), fd)
                self.assertTrue(os.path.sameopenfile(connection.fileno(), fd))
            finally:
                os.close(fd)

    def test_the_other_messages_carry_none(self):
        protocol.send_number(self.ours, protocol.STOP, 30)
        protocol.send_number(self.ours, protocol.DONE, 2**64 - 1)
        protocol.send_text(self.ours, protocol.READY, 'handle')
        self.assertEqual((b'S' + bytes(7) + b'\x1e', None), protocol.receive(self.theirs))
        self.assertEqual((b'D' + b'\xff' * 8, None), protocol.receive(self.theirs))
        self.assertEqual((b'Rhandle', None), protocol.receive(self.theirs))

    def test_a_long_reason_is_cut_to_what_a_message_holds(self):
        protocol.send_text(self.ours, protocol.FAILED, 'ä' * 5000)
        message, _ = protocol.receive(self.theirs)
        self.assertEqual(protocol.MAX_MESSAGE, len(message))
        protocol.send_text(self.ours, protocol.FAILED, 'a lone \udc80 surrogate')
        self.assertEqual(b'Fa lone ? surrogate', protocol.receive(self.theirs)[0])

    def test_the_end_is_an_empty_message(self):
        self.ours.close()
        self.assertEqual((b'', None), protocol.receive(self.theirs))

    def test_a_reader_that_does_not_read_is_no_wait_for_us(self):
        with socket.socket(socket.AF_INET6) as connection:
            sent = 0
            with self.assertRaises(BlockingIOError):
                while sent < 100_000:
                    protocol.send_connection(self.ours, sent, connection)
                    sent += 1
            for number in range(sent):
                message, fd = protocol.receive(self.theirs)
                os.close(fd)
                self.assertEqual(number, protocol.number_of(message))

    def test_what_is_not_in_the_drawing_is_refused_and_its_descriptors_are_closed(self):
        with socket.socket() as one, socket.socket() as two:
            fds = one.fileno(), two.fileno()
            for message, carried in (
                (b'C' + bytes(8), fds),  # two of them
                (b'D' + bytes(8), fds[:1]),  # one where none belongs
                (b'C' * (protocol.MAX_MESSAGE + 1), fds[:1]),  # too long
                (b'C' * (protocol.MAX_MESSAGE + 1), ()),
                (b'C' + bytes(8), fds * 100),
            ):
                with self.subTest(message=message[:3], carried=len(carried)):
                    before = descriptors()
                    self.send_raw(message, carried)
                    self.assertRaises(protocol.ProtocolError, protocol.receive, self.theirs)
                    self.assertEqual(before, descriptors())

    def test_a_number_of_another_length_is_refused(self):
        for message in (b'C', b'C' + bytes(7), b'D' + bytes(9), b''):
            self.assertRaises(protocol.ProtocolError, protocol.number_of, message)

    def test_fifty_hand_offs_whose_receiver_dies_leak_nothing(self):
        before = descriptors()
        for number in range(50):
            ours, theirs = protocol.pair()
            with ours, theirs, socket.socket(socket.AF_INET6) as connection:
                protocol.send_connection(ours, number, connection)
                if number % 2:
                    theirs.close()
                    with self.assertRaises(OSError):
                        protocol.send_connection(ours, number, connection)
        self.assertEqual(before, descriptors())

    def test_what_a_client_gets_for_a_dead_instance_is_a_whole_http_answer(self):
        head, _, body = protocol.BAD_GATEWAY.partition(b'\r\n\r\n')
        self.assertTrue(head.startswith(b'HTTP/1.1 502 '))
        self.assertIn(b'Content-Length: %d\r\n' % len(body), head)


if __name__ == '__main__':
    unittest.main()
