"""Tensors of the Open Inference Protocol v2: a request's tensor -> images, probabilities -> a reply's tensors. No HTTP.

With two extensions of Triton's: binary data (tensors as bytes after the JSON) and classification (the best classes as
text). B images, K classes, H and W pixels.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ..errors import InvalidRequest
from ..schemas import MAX_IMAGES
from ..services.classification import decode_base64

EXTENSIONS = ("binary_tensor_data", "classification")
NUMBERS: dict[str, np.dtype[Any]] = {"UINT8": np.dtype("u1"), "FP32": np.dtype("<f4")}
ROUNDING = 1e-3  # how far outside 0..1 an FP32 pixel may be and still count as rounded

Output = Literal["probabilities", "labels"]


class _Asked(BaseModel):
    """What clients send: types are exact, and what the hub has no use for (sequences, priorities) is passed over."""

    model_config = ConfigDict(strict=True, frozen=True)


class InputParameters(_Asked):
    binary_data_size: int | None = Field(None, ge=0, description="bytes of this tensor after the JSON")
    shared_memory_region: str | None = Field(None, description="refused: the hub shares no memory with its clients")


class InputTensor(_Asked):
    """`image`: BYTES [B], image files (in JSON base64). `pixels`: [B, 3, H, W], UINT8 (0 to 255) or FP32 (0 to 1)."""

    name: Literal["image", "pixels"]
    shape: list[Annotated[int, Field(ge=1, le=2**31)]] = Field(max_length=8)
    datatype: Literal["BYTES", "UINT8", "FP32"]
    parameters: InputParameters | None = None
    data: list[Any] | None = Field(None, description="row-major, flat or nested; or binary_data_size in parameters")


class OutputParameters(_Asked):
    binary_data: bool | None = Field(None, description="as bytes after the JSON")
    classification: int | None = Field(None, ge=0, description="of probabilities: this many best as score:index:label")
    shared_memory_region: str | None = Field(None, description="refused: the hub shares no memory with its clients")


class OutputRequest(_Asked):
    name: Output
    parameters: OutputParameters | None = None


class RequestParameters(_Asked):
    binary_data_output: bool | None = Field(None, description="all outputs as bytes after the JSON")


class InferRequest(_Asked):
    """One input, `image` or `pixels`; without `outputs` both come back."""

    id: str | None = Field(None, description="comes back in the reply")
    parameters: RequestParameters | None = None
    inputs: list[InputTensor] = Field(min_length=1, max_length=1)
    outputs: list[OutputRequest] | None = Field(None, max_length=2)


class TensorInfo(BaseModel):
    """A tensor that a task takes or gives; -1 is any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelInfo(BaseModel):
    """A task, as the protocol describes a model."""

    name: str
    versions: list[str]
    platform: str = "karst_safetensors"
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]


class OutputTensor(TensorInfo):
    """`data` is flat, row-major; or `parameters` has `binary_data_size`."""

    parameters: dict[str, int] = {}
    data: list[float | str] = []


class InferReply(BaseModel):
    model_name: str
    model_version: str
    id: str = ""
    outputs: list[OutputTensor]


@dataclass(frozen=True)
class Wanted:
    """An output that shall come back: as bytes or as JSON; `classes` > 0: so many of the best, as text."""

    name: Output
    binary: bool
    classes: int


def tensors_of(labels: Sequence[str], input_size: Sequence[int]) -> tuple[list[TensorInfo], list[TensorInfo]]:
    """What a task takes (one of them; `pixels` as FP32 too) and gives. `input_size` is (3, H, W)."""
    inputs = [
        TensorInfo(name="image", datatype="BYTES", shape=[-1]),
        TensorInfo(name="pixels", datatype="UINT8", shape=[-1, *input_size]),
    ]
    outputs = [
        TensorInfo(name="probabilities", datatype="FP32", shape=[-1, len(labels)]),
        TensorInfo(name="labels", datatype="BYTES", shape=[-1, len(labels)]),
    ]
    return inputs, outputs


def read_images(tensor: InputTensor, binary: memoryview) -> list[tuple[str, bytes | np.ndarray]]:
    """The images of a request's tensor, each with its name for errors.

    Args:
        binary: what follows the JSON in the body.

    Returns:
        Image files, or pixels (3, H, W): uint8, or float32 in 0..255.

    Raises:
        InvalidRequest: the tensor is not what its name, its shape or its datatype says.
        InvalidImage: text that is not base64.
    """
    parameters = tensor.parameters or InputParameters()
    claimed = parameters.binary_data_size
    if parameters.shared_memory_region is not None:
        raise refused(tensor.name, "the hub shares no memory with its clients; send the data itself")
    if (tensor.data is None) == (claimed is None):
        raise refused(tensor.name, "takes either data, or binary_data_size and that many bytes after the JSON")
    if (claimed or 0) != len(binary):
        raise refused(tensor.name, f"binary_data_size is {claimed or 0}, but {len(binary)} bytes follow the JSON")
    _check_kind(tensor)
    if tensor.datatype != "BYTES":
        pixels = _numbers(tensor, binary).reshape(tensor.shape)  # (B, 3, H, W)
        return [(f"pixels.{i}", image) for i, image in enumerate(pixels)]
    if tensor.data is None:
        return [(f"image.{i}", data) for i, data in enumerate(_byte_strings(tensor, binary))]
    texts = _elements(tensor)
    if set(map(type, texts)) != {str}:
        raise refused(tensor.name, "in JSON each element is the base64 text of an image file")
    return [*decode_base64([(f"image.{i}", text) for i, text in enumerate(texts)])]


def wanted_outputs(request: InferRequest) -> list[Wanted]:
    """What shall come back, in the order asked for.

    Raises:
        InvalidRequest: an output twice, or in a form that it does not have.
    """
    everything = [OutputRequest(name="probabilities"), OutputRequest(name="labels")]
    binary = bool(request.parameters and request.parameters.binary_data_output)
    wanted: list[Wanted] = []
    for output in request.outputs or everything:
        parameters = output.parameters or OutputParameters()
        if output.name in [w.name for w in wanted]:
            raise refused(output.name, "is asked for twice")
        if parameters.shared_memory_region is not None:
            raise refused(output.name, "the hub shares no memory with its clients; it sends the data itself")
        if parameters.classification and output.name == "labels":
            raise refused("labels", "has no classification; ask for that of probabilities")
        chosen = binary if parameters.binary_data is None else parameters.binary_data
        wanted.append(Wanted(output.name, chosen, parameters.classification or 0))
    return wanted


def write_reply(
    members: Mapping[str, str], wanted: Sequence[Wanted], labels: Sequence[str], probabilities: np.ndarray
) -> tuple[bytes, int | None]:
    """The reply's body.

    Args:
        members: of the JSON, beside `outputs`.
        probabilities: (B, K) float32; column k belongs to `labels[k]`.

    Returns:
        The body, and the length of its JSON where bytes follow it.
    """
    outputs: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for output in wanted:
        entry, elements = _output(output, labels, probabilities)
        if output.binary:
            blob = _packed(elements) if isinstance(elements, list) else elements.astype("<f4").tobytes()
            blobs.append(blob)
            entry["parameters"] = {"binary_data_size": len(blob)}
        else:
            entry["data"] = elements if isinstance(elements, list) else elements.ravel().tolist()
        outputs.append(entry)
    text = json.dumps({**members, "outputs": outputs}).encode()
    return b"".join([text, *blobs]), len(text) if blobs else None


def refused(field: str, message: str) -> InvalidRequest:
    return InvalidRequest.at(field, message)


def _check_kind(tensor: InputTensor) -> None:
    """Datatype and shape as the tensor's name has them; H and W are the adapter's to check."""
    name, shape, datatype = tensor.name, tensor.shape, tensor.datatype
    if (name == "image") != (datatype == "BYTES"):
        takes = "BYTES, whole image files" if name == "image" else "UINT8 or FP32; image files go into image"
        raise refused(name, f"datatype is {datatype}, but {name} takes {takes}")
    if name == "image" and len(shape) != 1:
        raise refused(name, f"shape is {shape}, but image takes [B], an image file each")
    if name == "pixels" and (len(shape) != 4 or shape[1] != 3):
        raise refused(name, f"shape is {shape}, but pixels takes [B, 3, H, W]")
    if shape[0] > MAX_IMAGES:
        raise refused(name, f"has {shape[0]} images, but at most {MAX_IMAGES} are allowed in a call")


def _elements(tensor: InputTensor) -> list[Any]:
    """The elements of JSON data in row-major order; nested data must be nested as the shape says."""
    elements = tensor.data or []
    if any(isinstance(x, list) for x in elements):
        rows: list[Any] = [elements]
        for axis, size in enumerate(tensor.shape):
            if not all(isinstance(row, list) and len(row) == size for row in rows):
                raise refused(tensor.name, f"data is not nested as shape {tensor.shape} says, at axis {axis}")
            rows = list(chain.from_iterable(rows))
        elements = rows
    count = math.prod(tensor.shape)
    if len(elements) != count:
        raise refused(tensor.name, f"shape {tensor.shape} has {count} elements, but data has {len(elements)}")
    return elements


def _numbers(tensor: InputTensor, binary: memoryview) -> np.ndarray:
    """Flat pixels: uint8, or float32 in 0..255."""
    if tensor.data is not None:
        numbers = _json_numbers(tensor)
    else:
        dtype = NUMBERS[tensor.datatype]
        size = math.prod(tensor.shape) * dtype.itemsize
        if len(binary) != size:
            kind = f"shape {tensor.shape} of {tensor.datatype}"
            raise refused(tensor.name, f"{kind} takes {size} bytes, but binary_data_size is {len(binary)}")
        numbers = np.frombuffer(binary, dtype)
    return numbers if tensor.datatype == "UINT8" else _scaled(tensor.name, numbers)


def _json_numbers(tensor: InputTensor) -> np.ndarray:
    numbers = _elements(tensor)
    kinds = set(map(type, numbers))
    if tensor.datatype == "UINT8":
        if kinds != {int} or min(numbers) < 0 or max(numbers) > 255:
            raise refused(tensor.name, "UINT8 data takes whole numbers from 0 to 255")
        return np.array(numbers, np.uint8)
    if not kinds <= {int, float}:
        raise refused(tensor.name, "FP32 data takes numbers")
    try:
        return np.array(numbers, np.float64)
    except OverflowError:  # an integer beyond every float
        return np.array([math.inf])


def _scaled(name: str, numbers: np.ndarray) -> np.ndarray:
    """0..1 -> float32 in 0..255."""
    if not np.isfinite(numbers).all():
        raise refused(name, "has a value that is not finite (NaN or infinity)")
    low, high = numbers.min(), numbers.max()
    if low < -ROUNDING or high > 1 + ROUNDING:
        takes = "FP32 pixels take 0 to 1, before mean and standard deviation, which the hub applies"
        raise refused(name, f"has values from {low:.4g} to {high:.4g}, but {takes}")
    return np.clip(numbers, 0, 1).astype(np.float32) * np.float32(255)


def _byte_strings(tensor: InputTensor, binary: memoryview) -> list[bytes]:
    """The elements of a BYTES tensor: each a length (4 bytes, little-endian) and so many bytes."""
    elements, at = [], 0
    for i in range(tensor.shape[0]):
        left = len(binary) - at - 4
        size = struct.unpack_from("<I", binary, at)[0] if left >= 0 else 0
        if size > left:
            raise refused(tensor.name, f"element {i} of {tensor.shape[0]} goes beyond the {len(binary)} bytes sent")
        elements.append(bytes(binary[at + 4 : at + 4 + size]))
        at += 4 + size
    if at != len(binary):
        raise refused(tensor.name, f"{len(binary) - at} bytes are left after {tensor.shape[0]} elements")
    return elements


def _output(
    output: Wanted, labels: Sequence[str], probabilities: np.ndarray
) -> tuple[dict[str, Any], list[str] | np.ndarray]:
    """An output's description, and its elements: text, or float32 (B, K)."""
    count, classes = probabilities.shape
    elements: list[str] | np.ndarray
    if output.name == "labels":
        elements = [*labels] * count
    elif output.classes:
        classes = min(classes, output.classes)
        best = np.argsort(-probabilities, axis=1, kind="stable")[:, :classes]
        elements = [
            f"{row[k]:.6f}:{k}:{labels[k]}" for row, order in zip(probabilities, best, strict=True) for k in order
        ]
    else:
        elements = probabilities
    datatype = "BYTES" if isinstance(elements, list) else "FP32"
    return {"name": output.name, "datatype": datatype, "shape": [count, classes]}, elements


def _packed(texts: Sequence[str]) -> bytes:
    encoded = [text.encode(errors="replace") for text in texts]
    return b"".join(chain.from_iterable((struct.pack("<I", len(text)), text) for text in encoded))
