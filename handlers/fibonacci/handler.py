"""fibonacci: http://fibonacci.faas/?n=10"""

from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlsplit

MOST = 10_000


def sequence(steps):
    a, b = 0, 1
    for _ in range(steps):
        yield a
        a, b = b, a + b


class FibonacciHandler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'

    def do_GET(self):
        text = parse_qs(urlsplit(self.path).query).get('n', ['10'])[-1]
        steps = int(text) if text.isascii() and text.isdigit() and len(text) <= 5 else -1
        if not 0 <= steps <= MOST:
            return self.answer(400, f'n must be a whole number from 0 to {MOST}\n')
        self.answer(200, f'Fibonacci sequence ({steps} steps):\n{", ".join(map(str, sequence(steps)))}\n')

    do_HEAD = do_GET

    def answer(self, status, text):
        body = text.encode()
        self.send_response(status)
        self.send_header('Content-Type', 'text/plain; charset=utf-8')
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)
