"""Tensors of a file as their bits: shapes, dtypes and numbers without torch, which a gateway does not import."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
from numpy.typing import NDArray

from ..short_repr import short_repr

# dtype in a file -> type of its bits, and the bits of positive infinity. NaNs are above it.
_BITS = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}


@dataclass(frozen=True, eq=False)
class RawTensor:
    """One tensor of a file.

    Attributes:
        dtype: `F32`, `F16` or `BF16`.
        bits: 1-D, uint32 for `F32` and uint16 for the others.
    """

    shape: tuple[int, ...]
    dtype: str
    bits: NDArray[Any]

    __repr__ = short_repr

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def is_finite(self) -> bool:
        """Whether no number is NaN or infinite."""
        return are_finite(self.bits, self.dtype)

    def floats(self) -> NDArray[np.float32]:
        """Return the numbers in the tensor's shape."""
        if self.dtype == "BF16":  # the upper half of a float32
            numbers = (self.bits.astype(np.uint32) << 16).view(np.float32)
        else:
            numbers = self.bits.view("<f4" if self.dtype == "F32" else "<f2").astype(np.float32)
        return numbers.reshape(self.shape)


def read_raw(data: bytes) -> dict[str, RawTensor]:
    """Return the tensors of a whole file by their names, sorted.

    Raises:
        safetensors.SafetensorError, ValueError, KeyError: not a valid file, or a dtype of no adapter.
    """
    found = {}
    for name, entry in sorted(safetensors.deserialize(data)):  # type: ignore[no-untyped-call]
        dtype = entry["dtype"]
        found[name] = RawTensor(tuple(entry["shape"]), dtype, np.frombuffer(entry["data"], _BITS[dtype][0]))
    return found


def bits_of(data: bytes, data_bytes: int, dtype: str) -> NDArray[Any]:
    """Return the bits of all numbers of a file whose tensors have one dtype, in the order of their bytes: 1-D.

    Args:
        data_bytes: length of the tensors' bytes, at the end of the file.
    """
    return np.frombuffer(data, _BITS[dtype][0], offset=len(data) - data_bytes) if data_bytes else np.empty(0, "<u4")


def are_finite(bits: NDArray[Any], dtype: str) -> bool:
    """Return whether no number is NaN or infinite; the largest of the bits tells, without a copy.

    With a sign the positive numbers are the largest, without one the negative numbers are.
    """
    if not bits.size:
        return True
    infinity = _BITS[dtype][1]
    sign = 1 << 8 * bits.itemsize - 1
    return int(bits.view(f"<i{bits.itemsize}").max()) < infinity and int(bits.max()) < sign + infinity
