"""Hugging Face's and Triton's clients call a hub with a real proxy, gateway and worker."""

from pathlib import Path

import numpy as np
import pytest
import tritonclient.http as triton
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from adapters import Adapter, load_backbone
from hub.client.client import Client
from tests.support.models import png, random_adapter

from .conftest import SharedHub


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return random_adapter(load_backbone("demo"), classes=7, labels=[f"flower {k}" for k in range(7)])


@pytest.fixture(scope="module")
def served(hub: SharedHub, adapter: Adapter) -> SharedHub:
    """Return the hub with a task `flowers`, whose version 1 is `stable`."""
    with Client(hub.url, hub.key) as client:
        client.register("flowers", adapter.data, alias="stable")
    return hub


def test_hugging_face_client_gets_the_answers_of_v1(served: SharedHub, tmp_path: Path) -> None:
    path = tmp_path / "cat.png"
    path.write_bytes(png())
    with Client(served.url, served.key) as client:
        expected = client.classify("flowers", [png()], top_k=3).predictions[0]
    for model in ("flowers", "flowers?version=stable"):
        got = InferenceClient(f"{served.url}/models/{model}", token=served.key).image_classification(path, top_k=3)
        assert [p.label for p in got] == [p.label for p in expected]
        assert [p.score for p in got] == pytest.approx([p.score for p in expected], abs=1e-4)
    with pytest.raises(HfHubHTTPError, match="task 'trees'"):
        InferenceClient(f"{served.url}/models/trees", token=served.key).image_classification(path)


def test_triton_client_gets_the_answers_of_v1(served: SharedHub, adapter: Adapter) -> None:
    images = [png(i) for i in range(8)]
    with Client(served.url, served.key) as client:
        answer = client.classify("flowers", images, top_k=7)
    rows = [{p.label: p.score for p in row} for row in answer.predictions]
    expected = np.array([[row[label] for label in adapter.labels] for row in rows])
    key = {"Authorization": f"Bearer {served.key}"}
    files = triton.InferInput("image", [8], "BYTES").set_data_from_numpy(np.array(images, dtype=np.object_))
    grey = np.full((8, *adapter.preprocess["input_size"]), 0.5, np.float32)
    pixels = triton.InferInput("pixels", [*grey.shape], "FP32").set_data_from_numpy(grey)
    best = triton.InferRequestedOutput("probabilities", class_count=1)
    with triton.InferenceServerClient(served.url.removeprefix("http://")) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("flowers", "stable", headers=dict(key))
        assert client.get_model_metadata("flowers", headers=dict(key))["versions"] == ["1"]
        for compression in (None, "gzip"):
            got = client.infer("flowers", [files], request_compression_algorithm=compression, headers=dict(key))
            assert got.as_numpy("probabilities") == pytest.approx(expected, abs=1e-4)
            assert got.as_numpy("labels")[0].tolist() == [label.encode() for label in adapter.labels]
        texts = client.infer("flowers", [files], "stable", outputs=[best], headers=dict(key)).as_numpy("probabilities")
        assert [int(row[0].split(b":")[1]) for row in texts] == expected.argmax(1).tolist()
        of_pixels = client.infer("flowers", [pixels], headers=dict(key)).as_numpy("probabilities")
        assert of_pixels.sum(1) == pytest.approx(np.ones(8), abs=1e-4)
        with pytest.raises(triton.InferenceServerException, match=r"\[404\].* task 'trees'"):
            client.infer("trees", [files], headers=dict(key))
