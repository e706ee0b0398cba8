"""Metric types that record in memory."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from hub.observability.metrics import MetricTypes


class RecordedMetric:
    """A counter, gauge or histogram that keeps every value, by labels."""

    def __init__(self, recorder: "Recorder", name: str, labels: Sequence[str]) -> None:
        self._recorder = recorder
        self._name = name
        self._labels = set(labels)

    def record(self, value: float = 1.0, tags: Mapping[str, str] = MappingProxyType({})) -> None:
        assert set(tags) == self._labels, self._name
        assert value >= 0
        self._recorder.values.setdefault((self._name, *tags.values()), []).append(value)

    inc = set = observe = record

    def start(self, tags: Mapping[str, str] = MappingProxyType({})) -> None:
        assert set(tags) == self._labels, self._name
        self._recorder.started.add((self._name, *tags.values()))


class Recorder:
    """All recorded values, by name and label values."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, ...], list[float]] = {}
        self.started: set[tuple[str, ...]] = set()  # series that were exported at 0

    def types(self) -> MetricTypes:
        return MetricTypes(self._make, self._make, self._make)

    def sums(self) -> dict[tuple[str, ...], float]:
        return {key: sum(values) for key, values in self.values.items()}

    def _make(
        self, name: str, description: str, tag_keys: Sequence[str] = (), boundaries: Sequence[float] = ()
    ) -> RecordedMetric:
        assert description
        return RecordedMetric(self, name, tag_keys)
