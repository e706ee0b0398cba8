"""timm, imported without torch's compiler: 150 MB less memory and 1.3 s less CPU time in each process with a backbone.

torchvision and timm import `torch._dynamo` for two functions that nothing here calls unless a model is compiled. While
they are imported, a stand-in takes its place. `torch.compile` imports the real one later. Another torch than the tested
one, and its torchvision, may want more of the compiler at import: it gets the real one.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

TESTED = "2.14."  # torch; `test_timm_import` fails if a newer one needs more
COMPILER, UTILS = "torch._dynamo", "torch._dynamo.utils"


class _StandIn(ModuleType):
    """A module with a few functions. For any other name it makes room for the real module."""

    def __init__(self, name: str, path: Sequence[str] = (), **functions: Callable[..., Any]) -> None:
        super().__init__(name)
        self.__path__ = list(path)
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own questions about a module
            raise AttributeError(name)
        _remove_stand_ins()
        return getattr(import_module(self.__name__), name)


@contextmanager
def _without_compiler() -> Iterator[None]:
    if COMPILER in sys.modules or not torch.__version__.startswith(TESTED):
        yield
        return
    spec = find_spec(COMPILER)
    path = (spec.submodule_search_locations if spec is not None else None) or ()
    sys.modules[COMPILER] = _StandIn(COMPILER, path, disable=_disable)
    sys.modules[UTILS] = _StandIn(UTILS, is_compile_supported=_is_compile_supported)
    try:
        yield
    finally:
        _remove_stand_ins()


def _remove_stand_ins() -> None:
    for name in (COMPILER, UTILS):
        if type(sys.modules.get(name)) is _StandIn:
            del sys.modules[name]


def _disable(function: Callable[..., Any] | None = None, *_args: object, **_options: object) -> Callable[..., Any]:
    """Return the function: if someone compiles a model that calls it, it is compiled too."""
    return (lambda function: function) if function is None else function


def _is_compile_supported(device_type: str) -> bool:
    found: bool = import_module(UTILS).is_compile_supported(device_type)
    return found


with _without_compiler():
    import timm
    from timm.data.config import resolve_model_data_config
    from timm.layers.drop import DropPath
    from timm.models import clean_state_dict

__all__ = ["DropPath", "clean_state_dict", "resolve_model_data_config", "timm"]
