// node: a plain server of node:http that listens on [::], port $PORT. http://node.faas/
const http = require('node:http')

const server = http.createServer((request, response) => {
  response.end(`Hello from Node ${process.versions.node}, ${request.socket.remoteAddress}!\n`)
})
server.listen(process.env.PORT, '::')
