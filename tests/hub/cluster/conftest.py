"""Imports Ray Serve once and ignores the warnings of that import. Pytest would turn them into errors of collection."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray.serve
    import ray.serve._private.haproxy
    import ray.serve.request_router

assert ray.serve
