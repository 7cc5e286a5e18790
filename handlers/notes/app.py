"""notes: an application of Flask whose packages the server installs. http://notes.faas/

It keeps notes in SQLite on a volume, and asks the function hello.

    curl -d text='buy milk' http://notes.faas/
    curl http://notes.faas/
    curl http://notes.faas/greeting
"""

import contextlib
import os
import sqlite3
import urllib.request

from flask import Flask, request

app = Flask(__name__)


@contextlib.contextmanager
def notes():
    """The database, in which all is done or nothing."""
    with contextlib.closing(sqlite3.connect('/data/notes.db')) as db, db:
        db.execute('pragma journal_mode=wal')
        db.execute('create table if not exists notes (id integer primary key, text text not null)')
        yield db


@app.get('/')
def all_notes():
    with notes() as db:
        return [text for (text,) in db.execute('select text from notes order by id')]


@app.post('/')
def new_note():
    with notes() as db:
        db.execute('insert into notes (text) values (?)', (request.form['text'],))
    return 'kept\n', 201


@app.get('/greeting')
def greeting():
    with urllib.request.urlopen(os.environ['GREETING'], timeout=10) as reply:
        return f'hello says: {reply.read().decode()}'
