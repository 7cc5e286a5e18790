"""flask: an application of Flask under gunicorn, as faas.toml starts it. http://flask.faas/"""

from flask import Flask, request

app = Flask(__name__)


@app.get('/')
def hello():
    return f'Hello from Flask, {request.remote_addr}!\n'
