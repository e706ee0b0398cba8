"""A tiny good adapter file, and files written byte by byte."""

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from .models import PREPROCESS as SMALL

DTYPES = {"float32": "F32", "float16": "F16", "float64": "F64", "int32": "I32"}
CONFIG = {"kernels": 1, "rank": 2, "factor": 2, "gain": 0.5, "rescale": "channel"}
PREPROCESS = SMALL | {"input_size": [3, 32, 32]}
SHAPES = {
    "blocks.0.mlp.fc2.karst_c": (1, 2, 2),
    "blocks.0.mlp.fc2.karst_a": (1, 1, 4, 2),
    "blocks.0.mlp.fc2.karst_b": (1, 2, 3),
    "blocks.0.mlp.fc2.scale": (8,),
    "blocks.0.mlp.fc2.shift": (8,),
    "head.weight": (2, 4),
    "head.bias": (2,),
}
METADATA = {
    "format": "karst/1",
    "config": json.dumps(CONFIG),
    "backbone": "demo",
    "fingerprint": "0123456789abcdef" * 4,
    "labels": '["cat", "dog"]',
    "preprocess": json.dumps(PREPROCESS),
    "metrics": '{"val_accuracy": 0.5}',
}


def raw(header: bytes, payload: bytes = b"") -> bytes:
    """Return a safetensors file with this header and payload."""
    return struct.pack("<Q", len(header)) + header + payload


def pack(tensors: Mapping[str, np.ndarray], metadata: Any = METADATA, **entries: Any) -> bytes:
    """Return a safetensors file; `entries` go into its header unchanged."""
    header: dict[str, Any] = {"__metadata__": metadata}
    payload = b""
    for name, array in tensors.items():
        end = len(payload) + array.nbytes
        header[name] = {
            "dtype": DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [len(payload), end],
        }
        payload += array.tobytes()
    return raw(json.dumps(header | entries, separators=(",", ":")).encode(), payload)


def arrays(**changed: Any) -> dict[str, np.ndarray]:
    """Return the tensors of a good file; a keyword (last part of a name) replaces one, None leaves it out."""
    out = {}
    for name, shape in SHAPES.items():
        array = changed.get(name.split(".")[-1], np.full(shape, 0.25, np.float32))
        if array is not None:
            out[name] = array
    return out


GOOD = pack(arrays())
