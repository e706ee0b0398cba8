"""The same backbone, tasks, images and right answers for every contender."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch

from adapters import Adapter, Backbone, KarstConfig, load_backbone
from adapters.backbone import features
from adapters.data.images import decode_image, eval_transform, normalise_for, preprocess_of

from .. import real_backbone
from ..bare import pictures
from ..common import copy_of, random_adapter

Form = Literal["merged", "heads"]
DISTINCT = 8  # different adapters; task t has number t % DISTINCT, under a digest of its own
CLASSES = 10
IMAGES = 16
SLOTS = 512
HEAD = KarstConfig(kernels=0, rescale="none")


@dataclass(frozen=True)
class Model:
    """A backbone of the benchmark."""

    name: str
    size_px: int
    real: bool = False  # weights of `real_backbone`, if its package is installed; otherwise random ones
    callers: int = 16
    seconds: float = 5.0  # of the window with all callers
    warm_up_s: float = 10.0


MODELS = {
    "vit_s14": Model(real_backbone.NAME, 98, real=True),
    "vit_b16": Model("vit_base_patch16_224", 224, seconds=10.0),
    "tiny": Model("vit_tiny_patch16_224", 32, callers=4, seconds=1.0, warm_up_s=3.0),  # for tests
}


@dataclass
class Inputs:
    """The inputs of one backbone in one form."""

    model: Model
    form: Form
    cache: Path
    slots: int = SLOTS
    _adapters: list[Adapter] = field(default_factory=list)
    _expected: dict[tuple[int, int], tuple[str, float]] = field(default_factory=dict)
    _models: dict[int, torch.nn.Module] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.model.name

    @property
    def size_px(self) -> int:
        return self.model.size_px

    @property
    def config(self) -> KarstConfig:
        return KarstConfig() if self.form == "merged" else HEAD

    @cached_property
    def backbone(self) -> Backbone:
        checkpoint = None
        if self.model.real:
            try:
                checkpoint = real_backbone.checkpoint()
            except real_backbone.RealBackboneError:
                checkpoint = None
        torch.manual_seed(0)
        return load_backbone(self.name, checkpoint, pretrained=False, image_size=self.size_px)

    @cached_property
    def images(self) -> list[bytes]:
        return list(pictures(self.size_px, IMAGES))

    def adapter(self, number: int) -> Adapter:
        """Return the adapter of a task: numbers of one of `DISTINCT` adapters, and a digest of its own."""
        while len(self._adapters) <= number % DISTINCT:
            self._adapters.append(random_adapter(self.backbone, self.config, seed=len(self._adapters), classes=CLASSES))
        return copy_of(self._adapters[number % DISTINCT], number)

    def write(self, folder: Path) -> None:
        """Write a new folder with the backbone and no task, as `contenders/models.py` reads it."""
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "tasks").mkdir(parents=True)
        settings = {"name": self.name, "size_px": self.size_px, "form": self.form}
        (folder / "settings.json").write_text(json.dumps(settings))
        state = {name: t.contiguous() for name, t in self.backbone.model.state_dict().items()}
        safetensors.torch.save_file(state, folder / "backbone.safetensors")

    def task_file(self, number: int) -> Path:
        """Return the file with a rival's weights of a task, made once per different adapter."""
        path = self.cache / f"{self.form}-{number % DISTINCT}.safetensors"
        if not path.exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            adapter = self.adapter(number)
            if self.form == "heads":
                tensors = {name: adapter.tensors[name] for name in ("head.weight", "head.bias")}
            else:
                tensors = {name: t.contiguous() for name, t in adapter.merge(self.backbone).state_dict().items()}
            safetensors.torch.save_file(tensors, path)
        return path

    def decode(self, image: int) -> torch.Tensor:
        """Return the pixels (3, H, W) of an image, uint8."""
        return self._transform(decode_image(self.images[image]))

    @cached_property
    def _transform(self) -> Callable[[Any], torch.Tensor]:
        return eval_transform(preprocess_of(self.backbone))

    @torch.inference_mode()
    def expected(self, number: int, image: int) -> tuple[str, float]:
        """Return label and score of the merged model."""
        key = number % DISTINCT, image
        if key not in self._expected:
            pixels = self.decode(image)[None]
            model = self._merged(key[0])
            score, label = model(normalise_for(self.backbone, pixels))[0].softmax(-1).max(-1)
            self._expected[key] = f"class {int(label)}", float(score)
        return self._expected[key]

    def _merged(self, number: int) -> torch.nn.Module:
        if number not in self._models:
            self._models = {number: self.adapter(number).merge(self.backbone)}  # one at a time: they are large
        return self._models[number]

    @torch.inference_mode()
    def bare_pass(self, batch: int) -> None:
        """Run timm's frozen backbone over one batch."""
        features(self.backbone.model, torch.zeros(batch, *self.backbone.input_size))
