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
from task.efficientnet import ENLARGED_AT_ONCE
from task.evaluation.study.arms import Arm, ArmKind
from task.evaluation.study.classifiers import settled_classifier
from task.evaluation.study.fitting import Fit
from task.evaluation.study.study import ArmResult, Material
from task.files import file_sha256
from task.generators.classifier import Classifier
from task.progress import progress
from task.runs.layout import weights_file
from task.runs.resume import WITHOUT_INFLUENCE
from task.runs.run import trained_model
from task.training.devices import move

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


@torch.no_grad()
def classifier_arm(
    name: str, runs: Sequence[ReadingRun], material: Material, device: torch.device
) -> ArmResult:
    """Apply the classifiers that runs have trained, which differ in their seed.

    Args:
        name: of the arm.
        runs: of one configuration but for the seed, so that what is frozen in them is the same.
        material: whose validation and test images are looked at.
        device: that computes.
    """
    models = [each.model for each in runs]
    for model in models:
        move(model, device, channels_last=True)
        model.eval()
    validation, test = (
        _probabilities_of_runs(models, images, device)
        for images in (material.validation, material.test)
    )
    rounds = [each.server_round for each in runs]
    fits = [Fit(*told) for told in zip(validation, test, rounds, strict=True)]
    arm = Arm(ArmKind.RUN, 1.0, source=name)
    return ArmResult(arm, [len(material.train)], [0], fits, [each.describe() for each in runs])


def _probabilities_of_runs(
    models: Sequence[Classifier], images: ImageSet, device: torch.device
) -> list[Tensor]:
    """Return what each model says of images, [N, classes]; what is frozen looks at them once."""
    found: list[list[Tensor]] = [[] for _ in models]
    with progress(len(images), f"looking at {len(images):,} images") as advance:
        for chunk in torch.split(images.images, ENLARGED_AT_ONCE):
            looked_at = models[0].below(normalize(chunk).to(device))
            for told, model in zip(found, models, strict=True):
                told.append(model.head(model.trained(looked_at)).float().softmax(1).cpu())
            advance(len(chunk))
    return [torch.cat(told) for told in found]


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
