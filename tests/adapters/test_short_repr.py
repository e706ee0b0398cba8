"""Reprs of the library's dataclasses: a notebook or a log shows sizes, and not every number."""

import dataclasses
import importlib
import pkgutil
import re

import pytest
import torch

import adapters
from adapters import Adapter, Backbone, load_backbone
from adapters.short_repr import short_repr
from adapters.training.trained import Trained

LARGE = re.compile(r"\b(Tensor|bytes|ndarray|KarstModel|ImageTensors|Module)\b")


@pytest.fixture(scope="module")
def demo() -> Backbone:
    return load_backbone("demo")


def dataclasses_of_the_library() -> list[type]:
    modules = [importlib.import_module(found.name) for found in pkgutil.walk_packages(adapters.__path__, "adapters.")]
    return [
        member
        for module in modules
        for member in vars(module).values()
        if isinstance(member, type) and dataclasses.is_dataclass(member) and member.__module__ == module.__name__
    ]


def is_large(annotation: str) -> bool:
    return bool(LARGE.search(annotation)) and "Callable" not in annotation


def test_every_dataclass_with_large_values_has_a_short_repr() -> None:
    found = [
        cls
        for cls in dataclasses_of_the_library()
        if any(is_large(str(field.type)) for field in dataclasses.fields(cls)) and cls is not Trained
    ]
    assert {Adapter} <= set(found)
    assert {cls.__name__ for cls in found if vars(cls).get("__repr__") is not short_repr} == set()


def test_backbone_is_shown_without_its_layers(demo: Backbone) -> None:
    assert len(repr(demo)) < 600
    assert "name='demo'" in repr(demo)
    assert len(repr(demo.info())) < 600


def test_large_values_are_shown_by_their_size() -> None:
    @dataclasses.dataclass
    class Held:
        numbers: torch.Tensor
        data: bytes
        names: tuple[str, ...]
        sizes: dict[str, int]
        text: str
        parts: tuple[torch.Tensor, ...]
        nothing: None = None

        __repr__ = short_repr

    held = Held(torch.zeros(2, 3), bytes(1500), ("a",) * 1000, {"a": 1}, "x" * 100, (torch.zeros(1),))
    assert repr(held) == (
        f"Held(numbers=<float32 (2, 3)>, data=<1,500 bytes>, names=<1,000 items>, sizes={{'a': 1}}, "
        f"text='{'x' * 59}...', parts=<1 items>, nothing=None)"
    )
