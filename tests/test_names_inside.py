"""Names inside of an instance, as the resolvers of several languages look them up."""

import pathlib
import tempfile
import unittest

from tests import images, lab, programs, serving
from tests.test_egress import PAGES
from tests.test_servers import image

NODE = """
const http = require('http')
http.createServer((question, answer) => {
  http.get('http://' + question.url.slice(2) + '/', reply => reply.pipe(answer)).on('error', e => answer.end(String(e)))
}).listen(80, '::')
"""
GO = """
package main

import (
	"io"
	"net/http"
)

func main() {
	http.ListenAndServe(":80", http.HandlerFunc(func(w http.ResponseWriter, q *http.Request) {
		reply, err := http.Get("http://" + q.URL.RawQuery + "/")
		if err != nil {
			io.WriteString(w, err.Error())
			return
		}
		io.Copy(w, reply.Body)
	}))
}
"""
JAVA = """
import com.sun.net.httpserver.HttpServer;
import java.net.*;

public class Main {
    public static void main(String[] args) throws Exception {
        var server = HttpServer.create(new InetSocketAddress("::", 80), 0);
        server.createContext("/", exchange -> {
            String text;
            try {
                var url = new URL("http://" + exchange.getRequestURI().getQuery() + "/");
                text = new String(url.openStream().readAllBytes());
            } catch (Exception error) {
                text = error.toString();
            }
            exchange.sendResponseHeaders(200, text.length());
            exchange.getResponseBody().write(text.getBytes());
            exchange.close();
        });
        server.start();
    }
}
"""
BUSYBOX = """#!/bin/sh
printf 'Content-Type: text/plain\\r\\n\\r\\n'
exec /busybox wget -q -O - "http://$QUERY_STRING/" 2>&1
"""


@lab.needs_root
class Names(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.host, net = (cls.enterClassContext(lab.Host(name)) for name in ('server', 'net'))
        lab.join(cls.host, net, ['192.168.1.1/24'], ['192.168.1.2/24'])
        cls.host.sh('ip route add default via 192.168.1.2')
        net.sh('ip address add 203.0.113.5/32 dev lo')
        net.popen(['python3', '-c', PAGES, '6', '::', 80])
        cls.host.path('/etc/hosts').write_text('127.0.0.1 localhost\n203.0.113.5 api.example.com\n')
        cls.server = cls.enterClassContext(serving.standalone(cls.host))
        cls.server.deploy('plain', serving.saying('plain'))

    def knows(self, name, archive):
        """It asks a function, whose name CoreDNS has, and a host, whose name is in /etc/hosts."""
        reply = self.server.deploy(name, archive)
        self.assertEqual(200, reply.status, reply.body)
        answers = [self.server.get(reply.json['ipv6'], f'/?{where}') for where in ('plain.faas', 'api.example.com')]
        self.assertEqual(['plain', '192.168.1.1'], answers)
        self.assertNotIn('192.168.1.1', self.server.get(reply.json['ipv6'], '/?other.example.com'))

    LABELS = {'faas.egress': 'functions,api.example.com:80', 'faas.memory': '512M'}

    def test_node(self):
        files = programs.Files().put('/app/server.js', NODE)
        self.knows('node', image(programs.node(), files, command=['node', '/app/server.js'], Labels=self.LABELS))

    def test_go(self):
        with tempfile.TemporaryDirectory() as work:
            pathlib.Path(work, 'main.go').write_text(GO)
            programs.compiled_go(work, f'{work}/server')
            files = programs.Files().copy(f'{work}/server', '/server')
            archive = image(files, command=['/server'], Labels=self.LABELS)
        self.knows('go', archive)

    def test_java(self):
        files = programs.Files()
        for path, content in programs.compiled_java('Main', JAVA).items():
            files.put(f'/app/{path}', content)
        self.knows('java', image(programs.java(), files, command=['java', '-cp', '/app', 'Main'], Labels=self.LABELS))

    def test_busybox(self):
        program = programs.static_busybox().read_bytes()
        runs = {'mode': 0o755}
        page = 'www/cgi-bin/index.cgi', BUSYBOX.encode(), runs
        layer = images.layer(('busybox', program, runs), ('bin/sh', '/busybox'), page)
        config = {'Cmd': ['/busybox', 'httpd', '-f', '-p', '[::]:80', '-h', '/www'], 'Labels': self.LABELS}
        self.knows('busybox', images.image([layer], config))


if __name__ == '__main__':
    unittest.main()
