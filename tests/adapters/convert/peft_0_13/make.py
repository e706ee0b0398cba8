"""Maker of this folder: a LoKr that peft 0.13 wrote, and the logits that peft 0.13 computes with it.

    python -m pip install --no-deps --target OLD peft==0.13.2
    python tests/adapters/convert/peft_0_13/make.py OLD

peft before 0.14 stores alpha and does not use it, so no newer peft can make the expected logits.
"""

import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])

import peft
import safetensors.torch
import torch

from adapters import load_backbone
from adapters.backbone import create_model

HERE = Path(__file__).parent
CLASSES = 3


def main() -> None:
    assert peft.__version__ == "0.13.2", peft.__version__
    torch.manual_seed(1)
    backbone = load_backbone("demo")
    base = create_model("demo", num_classes=CLASSES)
    base.load_state_dict(backbone.model.state_dict(), strict=False)
    config = peft.LoKrConfig(
        r=4,
        alpha=16,
        decompose_factor=8,
        target_modules=["blocks.0.attn.proj", "blocks.1.mlp.fc1", "blocks.2.mlp.fc2"],
        rank_pattern={"blocks.0.attn.proj": 40},  # its w2 is whole
        modules_to_save=["head"],
    )
    model = peft.get_peft_model(base.eval(), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lokr_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
        pixels = torch.randn(2, *backbone.input_size).half().float()
        logits = model(pixels)
    model.save_pretrained(str(HERE / "lokr"))
    (HERE / "lokr" / "README.md").unlink(missing_ok=True)
    safetensors.torch.save_file({"pixels": pixels.half(), "logits": logits}, HERE / "expected.safetensors")


if __name__ == "__main__":
    main()
