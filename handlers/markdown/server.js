// markdown: makes HTML from Markdown by a package of npm, which the server installs. http://markdown.faas/
//
//     curl --data-binary @README.md http://markdown.faas/
const http = require('node:http')
const { marked } = require('marked')

const server = http.createServer((request, response) => {
  const chunks = []
  request.on('data', chunk => chunks.push(chunk))
  request.on('end', () => {
    response.setHeader('Content-Type', 'text/html; charset=utf-8')
    response.end(marked.parse(Buffer.concat(chunks).toString() || '*Send* me some **Markdown**.'))
  })
})
server.listen(process.env.PORT, '::')
process.on('SIGTERM', () => server.close())
