"""Calls of a model on images by their numbers, through its frozen prefix where it has one.

With `KarstConfig.sites` of the last blocks, the blocks before them never change. Their outputs are computed once per
image and shared by all trainings: the search of the learning rate, the folds and the last training. Augmented images
have a fixed number of variants then, and each variant is computed once.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..backbone import Backbone
from ..data.image_set import ImageTensors
from ..data.images import normalise_for
from ..method.frozen_prefix import MAX_PREFIX_BYTES, FrozenPrefix, find_prefix
from ..method.karst import KarstModel
from .augmentation import augment

VARIANTS = 8  # augmented images per image, where a frozen prefix is cached


class TokenCache:
    """Pixels of an image set, and outputs of a frozen prefix for images and their augmented variants."""

    def __init__(self, backbone: Backbone, images: ImageTensors, seed: int) -> None:
        self.backbone = backbone
        self._images, self._seed = images, seed
        self._tokens: dict[tuple[int, int], Tensor] = {}  # (image, variant), variant 0 is the image itself
        self._free_bytes = MAX_PREFIX_BYTES

    def pixels(self, index: Tensor) -> Tensor:
        """Return uint8 (B, 3, H, W)."""
        return torch.stack([self._images[int(i)][0] for i in index])

    def tokens(self, prefix: FrozenPrefix, index: Tensor, variants: Tensor, kinds: Sequence[str]) -> Tensor:
        """Return the inputs of the first adapted block, (B, T, D).

        Args:
            index: int64 (B,), numbers of images.
            variants: int64 (B,), 0 to `VARIANTS`.
            kinds: of augmentation; the same in every call.
        """
        keys = [(int(i), int(v)) for i, v in zip(index, variants, strict=True)]
        missing = [key for key in dict.fromkeys(keys) if key not in self._tokens]
        found = {key: self._tokens[key] for key in keys if key in self._tokens}
        if missing:
            pixels = torch.cat([self._variant(i, v, kinds) for i, v in missing])
            for key, tokens in zip(missing, prefix.run(normalise_for(self.backbone, pixels)), strict=True):
                found[key] = tokens
                if self._free_bytes >= tokens.nbytes:
                    self._free_bytes -= tokens.nbytes
                    self._tokens[key] = tokens.clone()  # otherwise the whole batch would stay in memory
        return torch.stack([found[key] for key in keys])

    def _variant(self, i: int, variant: int, kinds: Sequence[str]) -> Tensor:
        pixels = self.pixels(torch.tensor([i]))
        if variant == 0:
            return pixels
        own_seed = (self._seed * 1_000_003 + i) * (VARIANTS + 1) + variant
        return augment(pixels, kinds, torch.Generator().manual_seed(own_seed))


class ModelRunner:
    """One model and its frozen prefix."""

    def __init__(self, model: KarstModel, cache: TokenCache) -> None:
        self.model = model
        self._cache = cache
        self.prefix = find_prefix(model, normalise_for(cache.backbone, cache.pixels(torch.tensor([0]))))

    def call(
        self,
        function: Callable[[Tensor], Tensor],
        index: Tensor,
        kinds: Sequence[str] = (),
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return `function` of normalised pixels (B, 3, H, W) of these images, with the prefix skipped where possible.

        Args:
            function: the model, or a part of it that includes its blocks.
            index: int64 (B,), numbers of images.
            kinds: of augmentation; the same in every call. `generator` draws it.
        """
        if self.prefix is None:
            pixels = self._cache.pixels(index)
            if kinds and generator is not None:
                pixels = augment(pixels, kinds, generator)
            return function(normalise_for(self._cache.backbone, pixels))
        variants = torch.zeros_like(index)
        if kinds:
            variants = torch.randint(1, VARIANTS + 1, index.shape, generator=generator)
        training = self.model.training
        with torch.autocast(self._cache.backbone.device.type, enabled=False):  # evaluations share these outputs
            tokens = self._cache.tokens(self.prefix, index, variants, kinds)
        self.model.train(training)  # the prefix runs in eval mode
        with self.prefix.skipped():
            return function(self.prefix.placeholder_pixels(tokens))
