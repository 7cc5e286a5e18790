"""Asks a server, a new connection each time, until stdin ends: `python3 tests/load.py IPV6 THREADS LEAST TEXT`.

At least LEAST times, over all threads. Prints JSON: {"asked": count, "lost": {why: count}}; lost is every request that
did not get a whole answer of status 200 with TEXT in it.
"""

import collections
import json
import socket
import sys
import threading

REQUEST = b'GET / HTTP/1.1\r\nHost: load\r\nConnection: close\r\n\r\n'


def ask(address, text):
    """None, or why the answer is none."""
    with socket.socket(socket.AF_INET6) as client:
        client.settimeout(20)
        try:
            client.connect(address)
            client.sendall(REQUEST)
            data = b''
            while chunk := client.recv(65536):
                data += chunk
        except OSError as error:
            return repr(error)
    head, end, body = data.partition(b'\r\n\r\n')
    if not data:
        return 'empty'
    if not head.startswith(b'HTTP/1.1 200 ') or not end:
        return repr(head[:60])
    length = [line.split(b':')[1] for line in head.lower().split(b'\r\n') if line.startswith(b'content-length:')]
    if text not in body or (length and int(length[0]) != len(body)):
        return f'short: {data[-60:]!r}'
    return None


def main(ipv6, threads, least, text):
    lock, lost, asked, going = threading.Lock(), collections.Counter(), [0], threading.Event()

    def work():
        while True:
            with lock:
                if asked[0] >= int(least) and going.is_set():
                    return
                asked[0] += 1
            if why := ask((ipv6, 80), text.encode()):
                with lock:
                    lost[why] += 1

    workers = [threading.Thread(target=work) for _ in range(int(threads))]
    for each in workers:
        each.start()
    sys.stdin.read()
    going.set()
    for each in workers:
        each.join()
    print(json.dumps({'asked': asked[0], 'lost': lost}))


if __name__ == '__main__':
    main(*sys.argv[1:])
