"""Hub of `benchmarks.feed`: a worker whose pass sleeps, and a gateway that sends one adapter's calls alone.

Beside it runs an empty gateway: it reads a body and answers, and has no worker.

    python -m benchmarks.feed_hub IMAGES_PER_SECOND LEAST_MS DIGEST

It runs until stdin ends. What it replaces is private to the hub, and only here.
"""

import sys
import time
from functools import partial
from typing import Any

from hub.settings import Settings

from .beside import run_hub

FLOOR = "/floor"


def main() -> None:
    """Run the hub."""
    rate, least_ms, alone = float(sys.argv[1]), float(sys.argv[2]), sys.argv[3]

    def deploy(settings: Settings) -> None:
        from ray import serve  # Ray reads its settings at import.

        from hub.cluster import app

        app.Worker = worker_class(rate, least_ms / 1e3)
        app.create_app = partial(create_app, alone)
        serve.run(app.application(settings), name=app.NAME, route_prefix="/")  # in place of the hub's own
        serve.run(empty_gateway(), name="floor", route_prefix=FLOOR)

    run_hub(deploy)


def worker_class(rate: float, least_s: float) -> Any:
    """Return the hub's worker with a bank whose pass sleeps. The class is local, so Ray sends it by value."""
    import numpy as np
    import torch

    from hub.worker.replica import Worker

    class FedWorker(Worker):
        """Worker whose device computes beside the CPU."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            # The device normalises the pixels.
            self._passes._gather = lambda items: torch.from_numpy(np.stack([item.pixels for item in items]))

        def _create_bank(self, settings: Settings) -> Any:
            bank = super()._create_bank(settings)
            width = bank.frozen_features(torch.zeros(1, *bank.input_size)).shape[1]

            def sleep(images: int) -> torch.Tensor:
                time.sleep(max(least_s, images / rate))
                return torch.zeros(images, width)

            # The device gathers the adapters of a pass.
            bank._pooled = lambda pixels, plan, own, index: sleep(len(plan.adapters) + len(plan.shared))
            bank.warm_up = lambda pixels, **_sizes: sleep(len(pixels))
            return bank

    return FedWorker


def empty_gateway() -> Any:
    """Build the empty gateway. Its class is local, so Ray sends it by value."""
    from ray import serve
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    from hub.cluster.app import GATEWAY_REQUESTS

    @serve.ingress()
    class EmptyGateway:
        def __serve_build_asgi_app__(self) -> Starlette:
            async def call(request: Request) -> JSONResponse:
                return JSONResponse({"bytes": len(await request.body())})

            return Starlette(routes=[Route("/", call, methods=["POST"])])

    options: dict[str, Any] = {"max_ongoing_requests": GATEWAY_REQUESTS, "ray_actor_options": {"num_cpus": 0}}
    return serve.deployment(name="gateway", **options)(EmptyGateway).bind()


def create_app(alone: str, settings: Settings, workers: Any, *others: Any) -> Any:
    """Return the hub's application. Calls of the adapter `alone` leave one by one, through Serve's handle."""
    from hub.api.app import create_app as create

    links = getattr(workers, "_links", None)
    if links is None:  # an older hub, all of whose calls leave one by one
        return create(settings, workers, *others)
    choose = links.choose
    links.choose = lambda key: None if key.startswith(alone) else choose(key)
    return create(settings, workers, *others)


if __name__ == "__main__":
    main()
