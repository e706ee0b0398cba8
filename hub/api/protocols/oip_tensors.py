"""Tensors of the Open Inference Protocol v2: request tensor -> images, answers -> reply tensors. No HTTP.

Two of Triton's extensions are supported: binary data (tensors as bytes after the JSON) and classification (the best
classes as text). Axes: B images, K classes, H and W pixels.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Literal, get_args

import numpy as np
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from ...errors import InvalidRequest
from ...registry.versions import ServedVersion
from ...schemas import MAX_IMAGES
from ..base64_images import decode_base64, refuse_base64
from .json_numbers import JsonNumbers, array_of

EXTENSIONS = ("binary_tensor_data", "classification")
PIXEL_DTYPES: dict[str, np.dtype[Any]] = {"UINT8": np.dtype("u1"), "FP32": np.dtype("<f4")}
ROUNDING = 1e-3  # an FP32 pixel may be this far outside of 0 to 1, as a rounding error
NO_SHARED_MEMORY = "the hub does not support shared memory; omit shared_memory_region"

OutputName = Literal["probabilities", "labels", "typicality", "unknown"]
OUTPUTS: tuple[OutputName, ...] = get_args(OutputName)
ALWAYS: tuple[OutputName, ...] = ("probabilities", "labels")  # the others need an adapter with typicality


def _one_input(inputs: Any) -> Any:
    """Refuse two inputs. Clients that fill all inputs of the metadata send both."""
    if isinstance(inputs, list) and len(inputs) > 1:
        raise PydanticCustomError("one_input", "has {count} tensors; send one, image or pixels", {"count": len(inputs)})
    return inputs


class _RequestModel(BaseModel):
    """Part of a request. Types are strict; members without a meaning here (sequences, priorities) are refused."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class _Parameters(_RequestModel):
    shared_memory_region: str | None = Field(None, description="refused; shared memory is not supported")
    shared_memory_byte_size: int | None = Field(None, description="refused")
    shared_memory_offset: int | None = Field(None, description="refused")

    def refuse_shared_memory(self, name: str) -> None:
        """Refuse shared memory for a tensor.

        Raises:
            InvalidRequest: a parameter of shared memory is set.
        """
        if {self.shared_memory_region, self.shared_memory_byte_size, self.shared_memory_offset} != {None}:
            raise InvalidRequest.at(name, NO_SHARED_MEMORY)


class InputParameters(_Parameters):
    binary_data_size: int | None = Field(None, ge=0, description="bytes of this tensor after the JSON")


class InputTensor(_RequestModel):
    """Input `image` or `pixels`.

    `image`: BYTES [B] or [B, 1], image files (base64 in JSON).
    `pixels`: [B, 3, H, W], UINT8 (0 to 255) or FP32 (0 to 1).
    """

    name: Literal["image", "pixels"]
    shape: list[Annotated[int, Field(ge=1, le=2**31)]] = Field(max_length=8)
    datatype: Literal["BYTES", "UINT8", "FP32"]
    parameters: InputParameters | None = None
    data: list[Any] | None = Field(None, description="row-major, flat or nested; omit it if binary_data_size is set")


class OutputParameters(_Parameters):
    binary_data: bool | None = Field(None, description="send this output as bytes after the JSON")
    classification: int | None = Field(
        None, ge=0, description="for probabilities: return this many best classes as score:index:label"
    )


class OutputRequest(_RequestModel):
    name: OutputName
    parameters: OutputParameters | None = None


class RequestParameters(_RequestModel):
    binary_data_output: bool | None = Field(None, description="send all outputs as bytes after the JSON")


class InferRequest(_RequestModel):
    """One input, `image` or `pixels`. Without `outputs` the reply has all outputs of the task."""

    id: str | None = Field(None, description="repeated in the reply")
    parameters: RequestParameters | None = None
    inputs: Annotated[list[InputTensor], Field(min_length=1, max_length=1), BeforeValidator(_one_input)]
    outputs: list[OutputRequest] | None = Field(None, max_length=len(OUTPUTS))


class TensorInfo(BaseModel):
    """Input or output tensor of a task; -1 means any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelInfo(BaseModel):
    """A task as a model of the protocol."""

    name: str
    versions: list[str]
    platform: str = "karst_safetensors"
    parameters: dict[str, str] = {"inputs": "alternatives: a request has one input, image or pixels"}
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]


class OutputTensor(TensorInfo):
    """Output tensor. `data` is flat and row-major, unless `parameters` has `binary_data_size`."""

    parameters: dict[str, int] = {}
    data: list[float | str | bool] = []


class InferReply(BaseModel):
    model_name: str
    model_version: str
    id: str = ""
    outputs: list[OutputTensor]


@dataclass(frozen=True)
class OutputFormat:
    """Format of one output in the reply.

    Attributes:
        binary: bytes after the JSON; False: in the JSON.
        classes: number of best classes to return as text; 0: all as numbers.
        optional: left out where the adapter has no such output; False: the client named the output.
    """

    name: OutputName
    binary: bool
    classes: int = 0
    optional: bool = False


def tensors_of(version: ServedVersion) -> tuple[list[TensorInfo], list[TensorInfo]]:
    """Return a version's possible inputs and its outputs. A call has one input; `pixels` may be FP32 as well."""
    labels, input_size = version.labels, version.preprocess["input_size"]  # (3, H, W)
    inputs = [
        TensorInfo(name="image", datatype="BYTES", shape=[-1]),
        TensorInfo(name="pixels", datatype="UINT8", shape=[-1, *input_size]),
    ]
    outputs = [
        TensorInfo(name="probabilities", datatype="FP32", shape=[-1, len(labels)]),
        TensorInfo(name="labels", datatype="BYTES", shape=[-1, len(labels)]),
    ]
    if version.typicality:
        outputs.append(TensorInfo(name="typicality", datatype="FP32", shape=[-1]))
        outputs.append(TensorInfo(name="unknown", datatype="BOOL", shape=[-1]))
    return inputs, outputs


def read_images(
    tensor: InputTensor, binary: memoryview, numbers: JsonNumbers | None = None
) -> list[tuple[str, bytes | np.ndarray]]:
    """Return the images of a request's tensor, each with its field name for errors.

    Args:
        binary: the body after the JSON.
        numbers: numbers that were cut out of the JSON, in place of an empty list `data`.

    Returns:
        Image files, or pixels (3, H, W): uint8, or float32 in 0..255.

    Raises:
        InvalidRequest: the data do not match the tensor's name, shape or datatype.
        InvalidImage: a text is not base64, or binary data are base64 text.
    """
    parameters = tensor.parameters or InputParameters()
    claimed = parameters.binary_data_size
    parameters.refuse_shared_memory(tensor.name)
    if (tensor.data is None) == (claimed is None):
        raise InvalidRequest.at(
            tensor.name, "needs either data, or binary_data_size and that many bytes after the JSON"
        )
    if (claimed or 0) != len(binary):
        raise InvalidRequest.at(
            tensor.name, f"binary_data_size is {claimed or 0}, but {len(binary)} bytes follow the JSON"
        )
    _check_kind(tensor)
    if tensor.datatype != "BYTES":
        pixels = _numbers(tensor, binary, numbers).reshape(tensor.shape)  # (B, 3, H, W)
        return [(f"pixels.{i}", image) for i, image in enumerate(pixels)]
    if tensor.data is None:
        files = [(f"image.{i}", data) for i, data in enumerate(_byte_strings(tensor, binary))]
        for field, data in files:
            refuse_base64(field, data)
        return [*files]
    texts = _elements(tensor)
    if set(map(type, texts)) != {str}:
        raise InvalidRequest.at(tensor.name, "data must be base64 texts of image files")
    return [*decode_base64([(f"image.{i}", text) for i, text in enumerate(texts)])]


def requested_outputs(request: InferRequest) -> list[OutputFormat]:
    """Return the formats of the reply's outputs, in the requested order.

    Raises:
        InvalidRequest: an output is requested twice, or in a format that it does not have.
    """
    binary = bool(request.parameters and request.parameters.binary_data_output)
    if not request.outputs:
        return [OutputFormat(name, binary, optional=name not in ALWAYS) for name in OUTPUTS]
    formats: list[OutputFormat] = []
    for output in request.outputs:
        parameters = output.parameters or OutputParameters()
        if output.name in [f.name for f in formats]:
            raise InvalidRequest.at(output.name, "is requested twice")
        parameters.refuse_shared_memory(output.name)
        if parameters.classification and output.name != "probabilities":
            raise InvalidRequest.at(output.name, "does not support classification; request it for probabilities")
        chosen = binary if parameters.binary_data is None else parameters.binary_data
        formats.append(OutputFormat(output.name, chosen, parameters.classification or 0))
    return formats


@dataclass(frozen=True)
class ReplyTensors:
    """Answers to the images of a call.

    Attributes:
        probabilities: float32 (B, K); column k belongs to `labels[k]`.
        typicality, unknown: of each image; None if the adapter has no typicality.
    """

    labels: Sequence[str]
    probabilities: np.ndarray
    typicality: Sequence[float] | None
    unknown: Sequence[bool] | None


def write_reply(
    members: Mapping[str, str], formats: Sequence[OutputFormat], tensors: ReplyTensors
) -> tuple[bytes, int | None]:
    """Return the body of a reply.

    Args:
        members: members of the JSON besides `outputs`.

    Returns:
        The body, and the length of its JSON; None if no binary data follow the JSON.

    Raises:
        InvalidRequest: the client named an output that the adapter does not have.
    """
    outputs: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    for output in formats:
        if tensors.typicality is None and output.name not in ALWAYS:
            if output.optional:
                continue
            message = "this version's adapter has no typicality; omit the output, or train the adapter again"
            raise InvalidRequest.at(output.name, message)
        entry, elements = _output(output, tensors)
        if output.binary:
            blob = _packed(elements) if isinstance(elements, list) else elements.tobytes()
            blobs.append(blob)
            entry["parameters"] = {"binary_data_size": len(blob)}
        else:
            entry["data"] = elements if isinstance(elements, list) else elements.ravel().tolist()
        outputs.append(entry)
    text = json.dumps({**members, "outputs": outputs}).encode()
    return b"".join([text, *blobs]), len(text) if blobs else None


def _check_kind(tensor: InputTensor) -> None:
    """Check datatype and shape against the tensor's name. The adapter's H and W are checked with the images."""
    name, shape, datatype = tensor.name, tensor.shape, tensor.datatype
    if (name == "image") != (datatype == "BYTES"):
        expected = "BYTES (image files)" if name == "image" else "UINT8 or FP32; send image files in the input image"
        raise InvalidRequest.at(name, f"datatype is {datatype}; expected {expected}")
    if name == "image" and len(shape) != 1 and shape[1:] != [1]:
        raise InvalidRequest.at(name, f"shape is {shape}; expected [B] or [B, 1], one image file per element")
    if name == "pixels" and (len(shape) != 4 or shape[1] != 3):
        raise InvalidRequest.at(name, f"shape is {shape}; expected [B, 3, H, W]")
    if shape[0] > MAX_IMAGES:
        raise InvalidRequest.at(name, f"has {shape[0]} images; a call may have at most {MAX_IMAGES}")


def _elements(tensor: InputTensor) -> list[Any]:
    """Return the elements of JSON data in row-major order. Nested data must match the shape."""
    elements = tensor.data or []
    if any(isinstance(x, list) for x in elements):
        rows: list[Any] = [elements]
        for axis, size in enumerate(tensor.shape):
            if not all(isinstance(row, list) and len(row) == size for row in rows):
                raise InvalidRequest.at(
                    tensor.name, f"nesting of data does not match shape {tensor.shape} at axis {axis}"
                )
            rows = list(chain.from_iterable(rows))
        elements = rows
    count = math.prod(tensor.shape)
    if len(elements) != count:
        raise InvalidRequest.at(tensor.name, f"shape {tensor.shape} has {count} elements, but data has {len(elements)}")
    return elements


def _numbers(tensor: InputTensor, binary: memoryview, cut: JsonNumbers | None) -> np.ndarray:
    """Return flat pixels: uint8, or float32 in 0..255."""
    if cut is not None and tensor.data == []:
        numbers = cut.read(tensor.name, tensor.shape, integers=tensor.datatype == "UINT8")
    elif tensor.data is not None:
        numbers = array_of(tensor.name, _elements(tensor), integers=tensor.datatype == "UINT8")
    else:
        dtype = PIXEL_DTYPES[tensor.datatype]
        size = math.prod(tensor.shape) * dtype.itemsize
        if len(binary) != size:
            message = (
                f"shape {tensor.shape} of {tensor.datatype} has {size} bytes, but binary_data_size is {len(binary)}"
            )
            raise InvalidRequest.at(tensor.name, message)
        numbers = np.frombuffer(binary, dtype)
    return numbers if tensor.datatype == "UINT8" else _scaled(tensor.name, numbers)


def _scaled(name: str, numbers: np.ndarray) -> np.ndarray:
    """Return pixels in 0..1 as float32 in 0..255."""
    if not np.isfinite(numbers).all():
        raise InvalidRequest.at(name, "has a non-finite value (NaN or infinity)")
    low, high = numbers.min(), numbers.max()
    if low < -ROUNDING or high > 1 + ROUNDING:
        expected = "FP32 pixels must be 0 to 1, without normalisation; the hub applies mean and standard deviation"
        raise InvalidRequest.at(name, f"has values from {low:.4g} to {high:.4g}; {expected}")
    scaled: np.ndarray = np.clip(numbers, 0, 1).astype(np.float32) * np.float32(255)
    return scaled


def _byte_strings(tensor: InputTensor, binary: memoryview) -> list[bytes]:
    """Return the elements of a BYTES tensor. Each is a length (4 bytes, little-endian) and that many bytes."""
    elements, offset = [], 0
    for i in range(tensor.shape[0]):
        left = len(binary) - offset - 4
        size = struct.unpack_from("<I", binary, offset)[0] if left >= 0 else 0
        if size > left:
            message = f"element {i} of {tensor.shape[0]} ends beyond the {len(binary)} bytes of data"
            raise InvalidRequest.at(tensor.name, message)
        elements.append(bytes(binary[offset + 4 : offset + 4 + size]))
        offset += 4 + size
    if offset != len(binary):
        message = f"{len(binary) - offset} bytes remain after {tensor.shape[0]} elements"
        raise InvalidRequest.at(tensor.name, message)
    return elements


def _output(output: OutputFormat, tensors: ReplyTensors) -> tuple[dict[str, Any], list[str] | np.ndarray]:
    """Return an output's description and its elements: texts, or little-endian numbers."""
    labels, probabilities = tensors.labels, tensors.probabilities
    count, classes = probabilities.shape
    if output.name == "typicality":
        return {"name": output.name, "datatype": "FP32", "shape": [count]}, np.array(tensors.typicality, "<f4")
    if output.name == "unknown":
        return {"name": output.name, "datatype": "BOOL", "shape": [count]}, np.array(tensors.unknown, "?")
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
        elements = probabilities.astype("<f4")
    datatype = "BYTES" if isinstance(elements, list) else "FP32"
    return {"name": output.name, "datatype": datatype, "shape": [count, classes]}, elements


def _packed(texts: Sequence[str]) -> bytes:
    encoded = [text.encode(errors="replace") for text in texts]
    return b"".join(chain.from_iterable((struct.pack("<I", len(text)), text) for text in encoded))
