"""The enroll port: bound from the start, open only while it is wanted."""

import errno
import socket
import threading
import unittest

from control.enroll import EnrollPort, EnrollUnavailable


def listens(port):
    with socket.socket() as client:
        return client.connect_ex(('127.0.0.1', port)) == 0


class Server:
    """What serves the socket, without an API."""

    def __init__(self, sock):
        self.sock, self.thread = sock, threading.main_thread()
        sock.listen()

    def close(self):
        self.sock.close()


class Port(unittest.TestCase):
    def setUp(self):
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            self.port = free.getsockname()[1]
        self.wanted, self.events = False, []
        self.enroll = EnrollPort(
            f'127.0.0.1:{self.port}', lambda: self.wanted, lambda area, text: self.events.append(text)
        )
        self.addCleanup(self.enroll.close)

    def test_it_is_open_while_an_invite_is_outstanding_and_bound_all_the_time(self):
        self.enroll.begin(Server)
        for self.wanted in (False, True, False, True, False):
            self.enroll.adjust()
            self.assertEqual(self.wanted, listens(self.port))
            with socket.socket() as other, self.assertRaises(OSError) as caught:
                other.bind(('127.0.0.1', self.port))
            self.assertEqual(errno.EADDRINUSE, caught.exception.errno)
        where = f'tcp 127.0.0.1:{self.port}'
        self.assertEqual([f'Invites can be redeemed at {where}', f'Closed {where}'] * 2, self.events)

    def test_a_server_whose_thread_has_ended_is_replaced(self):
        self.wanted = True
        self.enroll.begin(Server)
        ended = threading.Thread()
        ended.start()
        ended.join()
        dead = self.enroll._server
        dead.thread = ended
        self.enroll.adjust()
        self.assertIsNot(dead, self.enroll._server)
        self.assertTrue(listens(self.port))

    def test_it_is_open_while_an_invite_is_made(self):
        self.enroll.begin(Server)
        with self.enroll.opened():
            self.assertTrue(listens(self.port))
        self.enroll.adjust()
        self.assertFalse(listens(self.port))

    def test_a_port_in_use_is_an_error_with_a_hint_until_it_is_free(self):
        with socket.socket() as other:
            other.bind(('127.0.0.1', self.port))
            self.enroll.begin(Server)
            with self.assertRaisesRegex(EnrollUnavailable, 'Address already in use') as caught, self.enroll.opened():
                pass
            self.assertIn('FAAS_ENROLL_BIND', caught.exception.hint)
        with self.enroll.opened():
            self.assertTrue(listens(self.port))

    def test_an_invite_before_the_api_is_served_is_no_fault(self):
        with self.assertRaises(EnrollUnavailable), self.enroll.opened():
            pass


if __name__ == '__main__':
    unittest.main()
