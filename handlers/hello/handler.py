"""hello: the smallest function, a socket and an address. http://hello.faas/"""


def handle(connection, address):
    request = b''
    while b'\r\n\r\n' not in request and len(request) < 65536:
        chunk = connection.recv(4096)
        if not chunk:
            return
        request += chunk
    body = f'Hello, {address[0]}!\n'.encode()
    connection.sendall(
        b'HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n'
        b'Content-Length: %d\r\n\r\n%s' % (len(body), body)
    )
