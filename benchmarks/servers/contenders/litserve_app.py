"""LitServe: one worker process a core (its advice for CPUs), dynamic batches and the fast queue."""

import base64
import os

import litserve as ls
from models import PORT, Models


class Classifier(ls.LitAPI):
    def setup(self, device):
        self.models = Models(threads=1)

    def decode_request(self, request):
        return request["task"], self.models.decode(base64.b64decode(request["image"]))

    def batch(self, inputs):
        return list(inputs)

    def predict(self, calls):
        return self.models.answer([task for task, _ in calls], [pixels for _, pixels in calls])

    def unbatch(self, output):
        return list(output)

    def encode_response(self, output):
        return output


if __name__ == "__main__":
    api = Classifier(max_batch_size=8, batch_timeout=0.005, api_path="/classify")
    server = ls.LitServer(api, accelerator="cpu", workers_per_device=os.cpu_count(), fast_queue=True, timeout=120)
    server.run(host="127.0.0.1", port=PORT, generate_client_file=False, log_level="warning", access_log=False)
