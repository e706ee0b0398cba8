"""Random adapters and images for tests."""

import torch

from adapters import Adapter, Backbone, KarstConfig, attach, extract


def random_adapter(backbone: Backbone, seed: int = 0, classes: int = 5, **config) -> Adapter:
    """An adapter whose every number is random, large enough to change every answer."""
    generator = torch.Generator().manual_seed(seed)
    model = attach(backbone, KarstConfig(**config), classes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.02 if "head" in name else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
        for layer in model.layers.values():
            layer.c.copy_(torch.randn(layer.c.shape, generator=generator) * 0.3)
            layer.a.copy_(torch.randn(layer.a.shape, generator=generator) * 0.3)
            layer.b.copy_(torch.randn(layer.b.shape, generator=generator) * 0.1)
    return extract(model, [f"class {i}" for i in range(classes)])


def random_pixels(backbone: Backbone, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *backbone.input_size, generator=generator)
