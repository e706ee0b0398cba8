"""Random adapters and images for tests."""

import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from adapters import Adapter, Backbone, KarstConfig, KarstModel, attach, extract, load_backbone

# Of images with 8 x 8 pixels.
PREPROCESS = {
    "input_size": [3, 8, 8],
    "interpolation": "bicubic",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "crop_pct": 1.0,
    "crop_mode": "center",
}


def coloured_noise(root: Path, colours: Mapping[str, tuple[int, int, int]], count: int, seed: int) -> Path:
    """A folder of class folders: 8 x 8 pixels, each class noise around a colour of its own."""
    rng = np.random.default_rng(seed)
    for label, colour in colours.items():
        (root / label).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(colour + rng.normal(0, 30, (8, 8, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / label / f"{i}.png")
    return root


def random_model(backbone: Backbone, seed: int = 0, classes: int = 5, **config) -> KarstModel:
    """A model whose every trained number is random, large enough to change every answer."""
    generator = torch.Generator().manual_seed(seed)
    model = attach(backbone, KarstConfig(**config), classes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.02 if "head" in name else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
        for norm in model.norms.values():  # a norm's weights are near 1
            norm.weight.add_(1)
        for layer in model.layers.values():
            layer.c.copy_(torch.randn(layer.c.shape, generator=generator) * 0.3)
            layer.a.copy_(torch.randn(layer.a.shape, generator=generator) * 0.3)
            layer.b.copy_(torch.randn(layer.b.shape, generator=generator) * 0.1)
    return model.eval()


def random_adapter(
    backbone: Backbone, seed: int = 0, classes: int = 5, labels: Sequence[str] | None = None, **config
) -> Adapter:
    """The adapter of a `random_model`."""
    return extract(random_model(backbone, seed, classes, **config), labels or [f"class {i}" for i in range(classes)])


def local_backbone(folder: Path, architecture: str, **model_args) -> Backbone:
    """A timm model of any size at seeded random weights, by way of a folder that timm opens (`local-dir:`)."""
    torch.manual_seed(0)
    model = timm.create_model(architecture, num_classes=0, **model_args)
    side = model_args["img_size"]
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, side, side)}
    save_for_hf(model, folder, model_args=model_args, safe_serialization=True)
    return load_backbone(f"local-dir:{folder}")


def small_swin(folder: Path) -> Backbone:
    """Swin with windows of 4 x 4 and all four stages, 32 x 32 pixels."""
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 32}
    return local_backbone(folder, "swin_tiny_patch4_window7_224", depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), **sizes)


def random_pixels(backbone: Backbone, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *backbone.input_size, generator=generator)


def png(value: int = 0, size: tuple[int, int] = (32, 32)) -> bytes:
    """A real PNG: seeded noise, another picture for each value."""
    generator = torch.Generator().manual_seed(value)
    noise = torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8)
    return encoded(Image.fromarray(noise.numpy()), "PNG")


def encoded(image: Image.Image, format: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def bomb_png(side_px: int = 50_000) -> bytes:
    """A PNG of a few dozen bytes that claims side_px x side_px pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side_px, side_px, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def with_metadata(adapter: Adapter, **changes: str) -> bytes:
    """The adapter's file with other metadata strings; the tensors stay."""
    length = struct.unpack("<Q", adapter.data[:8])[0]
    header = json.loads(adapter.data[8 : 8 + length])
    header["__metadata__"] |= changes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + adapter.data[8 + length :]


def with_tensors(adapter: Adapter, tensors: dict[str, torch.Tensor]) -> bytes:
    """A file with the adapter's metadata and these tensors."""
    length = struct.unpack("<Q", adapter.data[:8])[0]
    metadata = json.loads(adapter.data[8 : 8 + length])["__metadata__"]
    return safetensors.torch.save(tensors, metadata=metadata)


def wait_until(
    true: Callable[[], bool], timeout_s: float = 15, what: str | Callable[[], object] = "what was waited for"
) -> None:
    """
    Args:
        what: is waited for, or asked when it did not come.
    """
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"{what() if callable(what) else what}: not within {timeout_s:g} s"
        time.sleep(0.05)


def listens(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0
