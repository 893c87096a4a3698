"""The figures of a classifier on test images, from torchmetrics."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Of the expected calibration error.
NUM_BINS = 15
# By name in the records: title, and whether more is better.
TITLES = {
    "macro_auc": ("macro AUC", True),
    "balanced_accuracy": ("balanced accuracy", True),
    "kappa": ("kappa", True),
    "macro_f1": ("macro F1", True),
    "calibration_error": ("calibration error", False),
    "odir_score": ("ODIR score", True),
    "sensitivity": ("sensitivity", True),
    "specificity": ("specificity", True),
}
# A class's own.
OF_CLASS = ("sensitivity", "specificity")


def figures_of(
    probabilities: Tensor, labels: Tensor, *, odir: bool = False
) -> Iterator[tuple[str, int | None, float]]:
    """Compute every figure: its name, the class that it is of (None: of all), and its value.

    Classes without a test image have none of their own and count in no mean.

    Args:
        probabilities: [N, C] float32.
        labels: [N] int64.
        odir: whether the classes are ODIR's, which have a score of their own.
    """
    from torchmetrics.functional import classification as metrics  # takes seconds to import

    number = probabilities.shape[1]
    there = sorted({*labels.tolist()})
    # A mean over classes that are there; torchmetrics counts the others as 0.
    areas = metrics.multiclass_auroc(probabilities, labels, number, average="none")
    several = len(there) > 1
    recalls = metrics.multiclass_recall(probabilities, labels, number, average="none")
    specific = metrics.multiclass_specificity(probabilities, labels, number, average="none")
    scores = metrics.multiclass_f1_score(probabilities, labels, number, average="none")
    if several:
        yield "macro_auc", None, float(areas[there].mean())
    yield "balanced_accuracy", None, float(recalls[there].mean())
    if several:
        yield "kappa", None, float(metrics.multiclass_cohen_kappa(probabilities, labels, number))
    yield "macro_f1", None, float(scores[there].mean())
    error = metrics.multiclass_calibration_error(probabilities, labels, number, n_bins=NUM_BINS)
    yield "calibration_error", None, float(error)
    if odir:
        yield "odir_score", None, odir_score(probabilities, labels)
    for label in there:
        yield "sensitivity", label, float(recalls[label])
    for label in range(number) if several else ():
        yield "specificity", label, float(specific[label])


def odir_score(probabilities: Tensor, labels: Tensor) -> float:
    """Return the score of the ODIR challenge: the mean of kappa, F1 and AUC.

    Each is of all pairs of an image and a class, at a threshold of 0.5. Here an eye has one class;
    the challenge scores both eyes of a patient, who may have several.

    Args:
        probabilities: [N, C] float32.
        labels: [N] int64.

    Source: ODIR-2019, the task's page.
    """
    from torchmetrics.functional import classification as metrics  # takes seconds to import

    truth = torch.nn.functional.one_hot(labels, probabilities.shape[1]).flatten()
    said = probabilities.flatten()
    parts = (metrics.binary_cohen_kappa, metrics.binary_f1_score, metrics.binary_auroc)
    return float(torch.stack([part(said, truth) for part in parts]).mean())
