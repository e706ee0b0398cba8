"""Inference over an image set: predictions, confusion matrix, features."""

import torch

from adapters import Backbone, KarstConfig, attach
from adapters.backbone import features
from adapters.data.image_set import ImageTensors
from adapters.data.images import normalise_for
from adapters.training.inference import Predictions, accuracy, pooled_features, predict


def test_predict_returns_the_model_s_logits_when_given_a_split(backbone: Backbone, held_out: ImageTensors) -> None:
    model = attach(backbone, KarstConfig(kernels=1), 3)
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(0))
    found = predict(model, held_out, "validation")
    pixels = torch.stack([held_out[i][0] for i in range(len(held_out))])
    with torch.inference_mode():
        torch.testing.assert_close(found.logits, model.eval()(normalise_for(backbone, pixels)))
    assert (found.split, found.logits.dtype, found.logits.device.type) == ("validation", torch.float32, "cpu")
    assert found.targets.tolist() == list(held_out.images.targets)
    assert found.accuracy == accuracy(model, held_out)
    assert found.confusion().sum() == len(held_out)


def test_predictions_list_the_most_confident_errors_first_when_some_are_wrong(held_out: ImageTensors) -> None:
    logits = torch.tensor([[1.0, 0, 0], [0, 2, 0], [3, 0, 0], [0, 0, 4]])
    found = Predictions("test", held_out.subset([0, 1, 4, 5]), logits, torch.tensor([0, 0, 1, 1]))
    assert found.predicted.tolist() == [0, 1, 0, 2]
    assert found.accuracy == 0.25
    assert found.confusion().tolist() == [[1, 1, 0], [1, 0, 1], [0, 0, 0]]
    assert found.worst_errors(2) == [3, 2]
    torch.testing.assert_close(torch.from_numpy(found.confidences), logits.softmax(1).amax(1))


def test_pooled_features_equal_the_backbone_s_when_computed_over_a_set(
    backbone: Backbone, held_out: ImageTensors
) -> None:
    found, targets = pooled_features(backbone, held_out)
    pixels = torch.stack([held_out[i][0] for i in range(len(held_out))])
    with torch.inference_mode():
        torch.testing.assert_close(found, features(backbone.model, normalise_for(backbone, pixels)))
    assert targets.tolist() == list(held_out.images.targets)
