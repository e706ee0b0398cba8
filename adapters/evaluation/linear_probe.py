"""Linear probe: a logistic regression on the frozen backbone's pooled features, as a baseline for an adapter."""

from collections import Counter

from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ..backbone import Backbone
from ..data.errors import DataError
from ..data.image_set import ImageTensors
from ..training.inference import pooled_features

INVERSE_PENALTIES = [1e-3, 1e-2, 1e-1, 1, 10]  # candidates for C, the inverse strength of the L2 penalty
MAX_ITERATIONS = 5000
MAX_FOLDS = 3


def linear_probe(backbone: Backbone, train: ImageTensors, test: ImageTensors) -> float:
    """Return the test accuracy in [0, 1] of the best logistic regression.

    The strength of the L2 penalty is selected by cross-validation on the training images, so that the baseline is as
    strong as possible: three folds, or two if a class has two images.

    Raises:
        DataError: a class has fewer than two training images, or an image cannot be read.
    """
    folds = min(MAX_FOLDS, *Counter(train.images.targets).values())
    if folds < 2:
        raise DataError("a linear probe needs at least two training images per class; add images, or omit --probe")
    x, y = pooled_features(backbone, train)
    test_x, test_y = pooled_features(backbone, test)
    search = GridSearchCV(
        make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS)),
        {"logisticregression__C": INVERSE_PENALTIES},
        cv=folds,
    )
    search.fit(x.numpy(), y.numpy())
    return float(search.score(test_x.numpy(), test_y.numpy()))
