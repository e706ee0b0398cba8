"""A real process that trains and receives SIGINT, then SIGTERM: the training resumes after both."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters import Adapter, DataError, KarstConfig, Recipe, fit
from adapters.evaluation.outputs import checkpoint_file
from tests.support.image_sets import coloured_images

CONFIG = KarstConfig(kernels=1, rank=2)
RECIPE = Recipe(epochs=3, warmup_epochs=1, batch_size=4, lr=1e-3)
TRAIN_AND_WAIT = """
import signal, sys, time
from adapters import Watch, fit
from tests.adapters.paper.test_interruption import CONFIG, RECIPE

class WaitAfterEpoch(Watch):
    def epoch(self, epoch):
        print("epoch", epoch.number, flush=True)
        while True:  # not signal.pause(): a signal just before that call would not end it
            time.sleep(0.05)

def train(resume):
    fit(sys.argv[1], sys.argv[2], config=CONFIG, recipe=RECIPE, resume=resume, watch=WaitAfterEpoch())

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore SIGINT
try:
    train(resume=False)
except KeyboardInterrupt:
    train(resume=True)
"""


def train(data: Path, output: Path, **options: Any) -> Adapter:
    return fit(data, output, config=CONFIG, recipe=RECIPE, **options).adapter


@pytest.mark.slow
def test_training_resumes_with_the_same_bits_when_its_process_receives_sigint_and_sigterm(tmp_path: Path) -> None:
    data, cut = tmp_path / "data", tmp_path / "cut.safetensors"
    coloured_images(data, count=5, seed=0)
    process = subprocess.Popen(
        [sys.executable, "-c", TRAIN_AND_WAIT, str(data), str(cut)],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "epoch 1\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "epoch 2\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
    assert not cut.exists()
    assert checkpoint_file(cut).exists()

    with pytest.raises(DataError, match=r"cut.checkpoint: checkpoint of an interrupted training; continue with --res"):
        train(data, cut)
    resumed = train(data, cut, resume=True)
    uninterrupted = train(data, tmp_path / "whole.safetensors")
    assert all(torch.equal(resumed.tensors[name], tensor) for name, tensor in uninterrupted.tensors.items())
    assert not list(tmp_path.glob("*.checkpoint"))
