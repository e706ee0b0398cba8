"""The hub beside other model servers, over HTTP: `python -m benchmarks.servers`."""
