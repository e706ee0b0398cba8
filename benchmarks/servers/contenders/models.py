"""The models of every rival: torch and timm only. Each rival's own file adds its server.

The folder has `backbone.safetensors`, `settings.json` and one file a task, `tasks/NAME.safetensors`:

* form `merged`: the whole model of a task, with its adapter merged in.
* form `heads`: only the task's classifier. All tasks share the frozen backbone, so a batch of many tasks is one pass.

A task's file is read at the task's first call, so a new file is a new task.
"""

import copy
import io
import json
import os
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config

FOLDER = Path(os.environ.get("SERVERS_FOLDER", "."))
PORT = int(os.environ.get("SERVERS_PORT", "8000"))


class Models:
    def __init__(self, folder=FOLDER, threads=0):
        """Load the backbone.

        Args:
            folder: see above.
            threads: torch threads of a pass; 0: one per core.
        """
        torch.set_num_threads(threads or os.cpu_count())
        self.folder = folder
        settings = json.loads((folder / "settings.json").read_text())
        self.heads = settings["form"] == "heads"
        self.backbone = timm.create_model(
            settings["name"], pretrained=False, num_classes=0, img_size=settings["size_px"]
        )
        self.backbone.load_state_dict(load_file(folder / "backbone.safetensors"))
        self.backbone.eval().requires_grad_(False)
        config = resolve_model_data_config(self.backbone) | {
            "input_size": (3, settings["size_px"], settings["size_px"])
        }
        self.transform = create_transform(**config)
        self.loaded = {}

    def decode(self, image):
        """Bytes of an image file -> normalised pixels (3, H, W)."""
        return self.transform(Image.open(io.BytesIO(image)).convert("RGB"))

    def load(self, task):
        """Read a task's file: the merged model, or the classifier's tensors."""
        tensors = load_file(self.folder / "tasks" / f"{task}.safetensors")
        if self.heads:
            return tensors
        model = copy.deepcopy(self.backbone)
        model.reset_classifier(len(tensors["head.bias"]))
        model.load_state_dict(tensors)
        return model.eval().requires_grad_(False)

    def get(self, task):
        if task not in self.loaded:
            self.loaded[task] = self.load(task)
        return self.loaded[task]

    @torch.inference_mode()
    def answer(self, tasks, pixels):
        """Classify images (3, H, W), each for its own task: one (label, score) per image."""
        if self.heads:
            features = self.backbone(torch.stack(pixels))
            found = [self.get(task) for task in tasks]
            logits = [f @ one["head.weight"].T + one["head.bias"] for f, one in zip(features, found, strict=True)]
        else:
            logits = [None] * len(tasks)
            for task in dict.fromkeys(tasks):  # one pass per model
                rows = [row for row, name in enumerate(tasks) if name == task]
                for row, one in zip(rows, self.get(task)(torch.stack([pixels[row] for row in rows])), strict=True):
                    logits[row] = one
        return [best(one) for one in logits]


def best(logits):
    score, label = logits.softmax(-1).max(-1)
    return {"label": f"class {int(label)}", "score": float(score)}
