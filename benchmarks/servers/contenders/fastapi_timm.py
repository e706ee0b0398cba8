"""A plain script: FastAPI, timm, one process. A call is a pass; as many calls run at once as there are cores."""

import os

import uvicorn
from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI, Request
from models import PORT, Models

app = FastAPI()
models = Models(threads=1)  # one core a pass and as many passes as cores is faster than one pass on all cores
cores = CapacityLimiter(os.cpu_count())


def work(task, image):
    return models.answer([task], [models.decode(image)])[0]


@app.post("/classify/{task}")
async def classify(task: str, request: Request):
    return await to_thread.run_sync(work, task, await request.body(), limiter=cores)


uvicorn.run(app, host="127.0.0.1", port=PORT, log_level="warning", access_log=False)
