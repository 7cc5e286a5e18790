"""The bodies of requests."""

import io
import unittest

from control.body import Chunks, RequestError


class ChunksTest(unittest.TestCase):
    def read(self, body, most=4):
        chunks = Chunks(io.BufferedReader(io.BytesIO(body)))
        return b''.join(iter(lambda: chunks.read(most), b''))

    def test_what_the_standard_allows(self):
        for body in (
            b'5\r\nhello\r\n0\r\n\r\n',
            b'00000005\r\nhello\r\n00\r\n\r\n',
            b'1\r\nh\r\n4;a="b;c"\r\nello\r\n0 ;x\r\nTrailer: x\r\nOther: y\r\n\r\n',
        ):
            self.assertEqual(b'hello', self.read(body))
            self.assertEqual(b'hello', self.read(body, 1 << 20))
        self.assertEqual(b'\r\n0\r\n', self.read(b'5\r\n\r\n0\r\n\r\n0\r\n\r\n'))

    def test_what_it_does_not(self):
        for body in (
            b'\r\n',
            b' 5\r\nhello\r\n0\r\n\r\n',
            b'5 \r\nhello\r\n0\r\n\r\n',
            b'+5\r\nhello\r\n0\r\n\r\n',
            b'0x5\r\nhello\r\n0\r\n\r\n',
            b'000000005\r\nhello\r\n0\r\n\r\n',
            b'5\nhello\n0\n\n',
            b'5;\rx\r\nhello\r\n0\r\n\r\n',
            b'5\r\nhello!\r\n0\r\n\r\n',
            b'5\r\nhello\n0\r\n\r\n',
            b'5;' + b'x' * 5000 + b'\r\nhello\r\n0\r\n\r\n',
            b'0\r\n' + b'a: b\r\n' * 100 + b'\r\n',
        ):
            with self.subTest(body[:30]), self.assertRaises(RequestError) as caught:
                self.read(body)
            self.assertEqual(400, caught.exception.status)

    def test_one_that_is_cut(self):
        whole = b'5;x\r\nhello\r\n0\r\nTrailer: x\r\n\r\n'
        for end in range(len(whole)):
            with self.subTest(end), self.assertRaises(EOFError):
                self.read(whole[:end])


if __name__ == '__main__':
    unittest.main()
