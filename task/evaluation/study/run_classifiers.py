"""Classifiers that runs have trained, as the arms of a study."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from task.config import Config, flat_values
from task.config.study_config import StudyConfig
from task.data import ImageSet, normalize
from task.evaluation.study.arms import Arm, ArmKind
from task.evaluation.study.classifiers import settled_classifier
from task.evaluation.study.fitting import IMAGES_AT_ONCE, Fit
from task.evaluation.study.study import ArmResult, Material
from task.files import file_sha256
from task.generators.classifier import Classifier
from task.runs.layout import weights_file
from task.runs.resume import WITHOUT_INFLUENCE
from task.runs.run import trained_model

# Values in which classifiers of one arm may differ.
OF_ONE_ARM = WITHOUT_INFLUENCE | {"seed"}


def by_all_but_seed(configs: Mapping[str, Config]) -> dict[str, list[str]]:
    """Group runs that differ in their seed alone, by the name of the first."""
    groups: dict[str, list[str]] = {}
    for name, config in configs.items():
        for first, names in groups.items():
            ours, theirs = (flat_values(each) for each in (config, configs[first]))
            if {key for key in ours if ours[key] != theirs.get(key)} <= OF_ONE_ARM:
                names.append(name)
                break
        else:
            groups[name] = [name]
    return groups


@dataclass(frozen=True, eq=False)
class ReadingRun:
    """A run that has trained a classifier."""

    name: str
    config: Config
    model: Classifier
    server_round: int
    sha256: str

    @classmethod
    def of(cls, name: str, path: Path, config: Config) -> "ReadingRun":
        """Load its final weights."""
        model, server_round = trained_model(path, config)
        if not isinstance(model, Classifier):
            raise ValueError(f"RUN {name} must draw images or be of model=classifier")
        return cls(name, config, model, server_round, file_sha256(weights_file(path)))

    def describe(self) -> dict[str, Any]:
        """Say what it is."""
        told = [f"{name} {value}" for name, value in self.model.description().items()]
        return {
            "name": self.name,
            "weights_sha256": self.sha256,
            "round": self.server_round,
            "classifier": ", ".join(told),
            "mode": self.config.train.mode,
        }


def classifier_arm(
    name: str, runs: Sequence[ReadingRun], material: Material, device: torch.device
) -> ArmResult:
    """Apply the classifiers that runs have trained, which differ in their seed."""
    fits = [
        fit_of_run(each.model, material.validation, material.test, device, step=each.server_round)
        for each in runs
    ]
    arm = Arm(ArmKind.RUN, 1.0, source=name)
    return ArmResult(arm, [len(material.train)], [0], fits, [each.describe() for each in runs])


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


def unlike_arms(first: Config, study: StudyConfig, reading: Sequence[Config]) -> Iterator[str]:
    """Say where classifiers of runs are other networks than those of the arms."""
    name = settled_classifier(study, first.data.channels, first.data.image_size)
    for config in reading:
        model = config.model
        theirs = (getattr(model, "network", ""), getattr(model, "fine_tuning", ""))
        if theirs != (name, study.fine_tuning):
            yield (
                f"A classifier of a run is model.network={theirs[0]} with "
                f"model.fine_tuning={theirs[1]}, those of the arms are study.classifier={name} "
                f"with study.fine_tuning={study.fine_tuning}: they differ in more than in who "
                "trained them."
            )
