"""A cache of file layouts, so that a second file of the same layout loads without validating every tensor.

Adapters of one shape differ only in their metadata and their numbers. Whether the tensors are valid, whether they fit
a backbone and where each number goes in a bank follows from the layout, so each is computed once per layout.
"""

import threading
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from cachetools import LRUCache

from ..short_repr import short_repr

MAX_LAYOUTS = 32
MAX_TEXT_CHARS = 128 * 1024  # of a header's text that is kept as a key; a ViT-B/16 adapter has about 15,000
MAX_RESULT_BYTES = 128 * 1024**2  # of all results together, so that uploads cannot fill a worker's memory


@dataclass(frozen=True, eq=False)
class Layout:
    """Names, shapes, dtype and order of the tensors in a file, compared by identity.

    Attributes:
        tensors: name -> shape, in the order of the tensors' bytes.
        dtype: of all tensors, `F32`, `F16` or `BF16`; None where they differ.
        data_bytes: length of the tensors' bytes.
        valid_with: the metadata values that the tensors were validated against.
    """

    tensors: Mapping[str, tuple[int, ...]]
    dtype: str | None
    data_bytes: int
    valid_with: Hashable

    __repr__ = short_repr


class LayoutCache:
    """Known layouts by header text, and results that were computed for a layout; both evict the least recently used.

    A process that loads many adapters makes one cache and passes it to `Adapter.read` and to `Bank`. Threads may
    share it.
    """

    def __init__(
        self,
        max_layouts: int = MAX_LAYOUTS,
        max_text_chars: int = MAX_TEXT_CHARS,
        max_result_bytes: int = MAX_RESULT_BYTES,
    ) -> None:
        self._max_text_chars = max_text_chars
        self._layouts: LRUCache[str, Layout] = LRUCache(max_layouts)
        self._results: LRUCache[tuple[Layout, object], tuple[Any, int]] = LRUCache(
            max_result_bytes, getsizeof=lambda entry: entry[1]
        )
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Return the number of known layouts."""
        return len(self._layouts)

    @property
    def result_bytes(self) -> int:
        """Size of all results, in bytes."""
        return int(self._results.currsize)

    def find(self, header_text: str) -> Layout | None:
        """Return the layout that was added for this text, or None."""
        with self._lock:
            return self._layouts.get(header_text)

    def add(self, header_text: str, layout: Layout) -> None:
        """Keep the layout of a valid file, unless its text is too long."""
        if len(header_text) <= self._max_text_chars:
            with self._lock:
                self._layouts[header_text] = layout

    def result(self, layout: Layout, owner: object) -> Any:
        """Return this owner's result for the layout, or None."""
        with self._lock:
            entry = self._results.get((layout, owner))
        return None if entry is None else entry[0]

    def add_result(self, layout: Layout, owner: object, result: Any, size_bytes: int) -> None:
        """Keep a result for this owner, which is compared by identity, unless it is larger than the whole cache."""
        if size_bytes <= self._results.maxsize:
            with self._lock:
                self._results[layout, owner] = result, size_bytes
