"""Random adapters and images for tests."""

import io
import json
import socket
import struct
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

from adapters import Adapter, Backbone, KarstConfig, KarstModel, attach, extract, load_backbone
from adapters.backbone import features
from adapters.data.images import decode_image, eval_transform, normalise, preprocess_of
from adapters.evaluation.calibration import coverage_table
from adapters.method.karst import KarstLayer, KarstNorm
from adapters.method.typicality import fit_typicality

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
    """Write a folder of class folders: images of 8 x 8 pixels, each class noise around its own colour."""
    rng = np.random.default_rng(seed)
    for label, colour in colours.items():
        (root / label).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(colour + rng.normal(0, 30, (8, 8, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / label / f"{i}.png")
    return root


def random_model(backbone: Backbone, seed: int = 0, classes: int = 5, **config: Any) -> KarstModel:
    """Return a model with random trained numbers, large enough to change every score."""
    generator = torch.Generator().manual_seed(seed)
    model = attach(backbone, KarstConfig(**config), classes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.02 if "head" in name else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
        for norm in model.norms.values():
            assert isinstance(norm, KarstNorm)
            norm.weight.add_(1)  # a norm's weights are near 1
        for layer in model.layers.values():
            assert isinstance(layer, KarstLayer)
            for factor, spread in ((layer.c, 0.3), (layer.a, 0.3), (layer.b, 0.1)):
                factor.copy_(torch.randn(factor.shape, generator=generator) * spread)
    return model.eval()


def random_adapter(
    backbone: Backbone, seed: int = 0, classes: int = 5, labels: Sequence[str] | None = None, **config: Any
) -> Adapter:
    """Return the adapter of a `random_model`."""
    return extract(random_model(backbone, seed, classes, **config), labels or [f"class {i}" for i in range(classes)])


def calibrated_adapter(backbone: Backbone, seed: int = 0, classes: int = 5) -> Adapter:
    """Return an adapter without kernels whose task is `png` noise, with typicality and thresholds for label sets.

    Its head is random, and the true label of each noise image is drawn from the probabilities.
    """
    preprocess = preprocess_of(backbone)
    transform = eval_transform(preprocess)
    pixels = torch.stack([transform(decode_image(png(1000 + i))) for i in range(60)])
    mean, std = (torch.tensor(preprocess[name]) for name in ("mean", "std"))
    with torch.inference_mode():
        pooled = features(backbone.model, normalise(pixels, mean, std)).clone()
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, pooled.shape[1], generator=generator)
    centred = pooled - pooled.mean(0)
    weight *= 2 / (centred @ weight.T).std()  # probabilities of different sizes
    probabilities = (centred @ weight.T).softmax(1)
    targets = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
    return Adapter.create(
        {"head.weight": weight, "head.bias": -weight @ pooled.mean(0)} | fit_typicality(pooled).tensors,
        config=KarstConfig(kernels=0, rescale="none"),
        backbone=backbone.name,
        fingerprint=backbone.fingerprint,
        labels=[f"class {i}" for i in range(classes)],
        preprocess=preprocess,
        created="2026-01-01T00:00:00Z",
        coverage=coverage_table(probabilities, targets),
    )


def local_backbone(folder: Path, architecture: str, **model_args: Any) -> Backbone:
    """Return a timm model of any size with seeded random weights; timm opens it as `local-dir:`."""
    torch.manual_seed(0)
    model: Any = timm.create_model(architecture, num_classes=0, **model_args)
    side = model_args["img_size"]
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, side, side)}
    save_for_hf(model, str(folder), model_args=model_args, safe_serialization=True)
    return load_backbone(f"local-dir:{folder}")


def small_swin(folder: Path) -> Backbone:
    """Return a Swin with windows of 4 x 4 and all four stages, 32 x 32 pixels."""
    sizes = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 32}
    return local_backbone(folder, "swin_tiny_patch4_window7_224", depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), **sizes)


def random_pixels(backbone: Backbone, count: int, seed: int = 0) -> torch.Tensor:
    """Return seeded noise (count, 3, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *backbone.input_size, generator=generator)


def png(value: int = 0, size: tuple[int, int] = (32, 32)) -> bytes:
    """Return a PNG of seeded noise, another image for each value."""
    generator = torch.Generator().manual_seed(value)
    noise = torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8)
    return encoded(Image.fromarray(noise.numpy()), "PNG")


def flat_png(value: int = 255, size: tuple[int, int] = (32, 32)) -> bytes:
    """Return a PNG of one grey value: no image of a task of noise."""
    return encoded(Image.new("RGB", size, (value, value, value)), "PNG")


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    """Return the bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def bomb_png(side_px: int = 50_000) -> bytes:
    """Return a PNG of a few dozen bytes whose header claims side_px x side_px pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side_px, side_px, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


def with_metadata(adapter: Adapter, **changes: str) -> bytes:
    """Return the adapter's file with other metadata strings and the same tensors."""
    length = struct.unpack("<Q", adapter.data[:8])[0]
    header = json.loads(adapter.data[8 : 8 + length])
    header["__metadata__"] |= changes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + adapter.data[8 + length :]


def with_tensors(adapter: Adapter, tensors: dict[str, torch.Tensor]) -> bytes:
    """Return a file with the adapter's metadata and these tensors."""
    length = struct.unpack("<Q", adapter.data[:8])[0]
    metadata = json.loads(adapter.data[8 : 8 + length])["__metadata__"]
    return safetensors.torch.save(tensors, metadata=metadata)


def wait_until(
    true: Callable[[], bool], timeout_s: float = 15, what: str | Callable[[], object] = "the condition is false"
) -> None:
    """Poll a condition until it is true.

    Args:
        what: text of the failure, or a function that returns it.

    Raises:
        AssertionError: the condition is still false after the timeout.
    """
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"{what() if callable(what) else what}: not within {timeout_s:g} s"
        time.sleep(0.05)


def listens(port: int, host: str = "127.0.0.1") -> bool:
    """Return whether a TCP connection to the port succeeds."""
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0
