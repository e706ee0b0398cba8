"""Construction of timm models by name, the demo's among them, for images of a given size."""

from typing import Any

from .timm_import import timm

DEMO_NAME = "demo"
DEMO_SIDE_PX = 32


class BackboneError(ValueError):
    """A backbone that cannot be loaded or adapted; the message names the model, the file or the sites."""


def create_model(name: str, *, num_classes: int = 0, pretrained: bool = False, image_size: int | None = None) -> Any:
    """Return the timm module for a backbone name, `demo` included, in training mode with timm's initial weights.

    Raises:
        BackboneError: timm does not know the name, or cannot download its pretrained weights.
    """
    try:
        if name == DEMO_NAME:
            if image_size not in (None, DEMO_SIDE_PX):
                raise ValueError(f"it takes images of {DEMO_SIDE_PX} px, not {image_size}")
            return _create_demo(num_classes)
        sized: dict[str, Any] = {} if image_size is None else _sized(name, image_size)
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **sized)
    except Exception as error:  # timm and its hub client raise many kinds
        kind = "pretrained weights of " if pretrained else ""
        raise BackboneError(
            f"cannot load {kind}backbone {name!r}: {first_line(error)} "
            "(give a timm model name, or a local checkpoint file if there is no network)"
        ) from error


def _sized(name: str, side_px: int) -> dict[str, Any]:
    """Return the arguments by which timm builds a model for images of another size.

    Raises:
        ValueError: the model's grid of patches or windows does not fit the size.
    """
    size: dict[str, Any] = {"pretrained_cfg_overlay": {"input_size": (3, side_px, side_px)}}
    model = timm.create_model(name, **size)
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if patch is not None and side_px % patch[0]:
        near = max(patch[0], side_px // patch[0] * patch[0])
        raise ValueError(f"images of {side_px} px are not a whole number of {patch[0]} px patches; use {near} px")
    return size


def _create_demo(num_classes: int) -> Any:
    return timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=num_classes,
        img_size=32,
        patch_size=4,
        embed_dim=128,
        depth=6,
        num_heads=4,
        global_pool="avg",
        pretrained_cfg_overlay={
            "input_size": (3, 32, 32),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
        },
    )


def first_line(error: Exception) -> str:
    """Return the first line of another library's error message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
