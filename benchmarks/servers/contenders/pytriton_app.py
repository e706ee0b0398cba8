"""PyTriton: NVIDIA's Triton server with dynamic batches; the model runs in this process."""

import numpy as np
from models import PORT, Models
from pytriton.decorators import batch
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor
from pytriton.triton import Triton, TritonConfig

models = Models()


@batch
def classify(task, image):
    found = models.answer([one.decode() for one in task[:, 0]], [models.decode(one) for one in image[:, 0]])
    return {
        "label": np.array([[one["label"].encode()] for one in found]),
        "score": np.array([[one["score"]] for one in found], np.float32),
    }


config = TritonConfig(http_address="127.0.0.1", http_port=PORT, grpc_port=PORT + 1, metrics_port=PORT + 2)
with Triton(config=config) as triton:
    triton.bind(
        model_name="classifier",
        infer_func=classify,
        inputs=[Tensor(name="task", dtype=bytes, shape=(1,)), Tensor(name="image", dtype=bytes, shape=(1,))],
        outputs=[Tensor(name="label", dtype=bytes, shape=(1,)), Tensor(name="score", dtype=np.float32, shape=(1,))],
        config=ModelConfig(max_batch_size=16, batcher=DynamicBatcher(max_queue_delay_microseconds=5000)),
        strict=False,
    )
    triton.serve()
