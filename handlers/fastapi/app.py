"""fastapi: an application of FastAPI under uvicorn, as faas.toml starts it. http://fastapi.faas/"""

from fastapi import FastAPI, Request

app = FastAPI()


@app.get('/')
async def hello(request: Request):
    return {'hello': 'FastAPI', 'client': request.client.host}
