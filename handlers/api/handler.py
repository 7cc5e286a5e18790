"""api: a WSGI application that answers in JSON what it was asked. http://api.faas/any/path?x=1"""

import json
from urllib.parse import parse_qs


def app(environ, start_response):
    body = (
        json.dumps(
            {
                'method': environ['REQUEST_METHOD'],
                'path': environ['PATH_INFO'],
                'query': parse_qs(environ['QUERY_STRING']),
                'client': environ['REMOTE_ADDR'],
            }
        ).encode()
        + b'\n'
    )
    start_response('200 OK', [('Content-Type', 'application/json'), ('Content-Length', str(len(body)))])
    return [body]
