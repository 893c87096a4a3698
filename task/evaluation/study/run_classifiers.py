"""Classifiers that runs have trained, as the arms of a study."""

import torch
from torch import Tensor

from task.data import ImageSet, normalize
from task.evaluation.study.fitting import IMAGES_AT_ONCE, Fit
from task.generators.classifier import Classifier


@torch.no_grad()
def fit_of_run(
    model: Classifier, validation: ImageSet, test: ImageSet, device: torch.device, *, step: int
) -> Fit:
    """Apply the classifier of a run to the images that choose and to those that are measured on.

    Args:
        model: with its final weights.
        validation: real images.
        test: likewise.
        device: that computes.
        step: the round of the weights.
    """
    model.to(device).eval()

    def said(images: ImageSet) -> Tensor:
        chunks = torch.split(images.images, IMAGES_AT_ONCE)
        logits = [model.logits(normalize(chunk).to(device)).cpu() for chunk in chunks]
        return torch.cat(logits).softmax(1)

    return Fit(said(validation), said(test), step)
