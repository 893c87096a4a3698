"""The values of `feddm study`: which classifiers are trained on which images. None is a run's."""

from collections.abc import Iterable
from typing import Literal, Self

from omegaconf import OmegaConf
from pydantic import Field, ValidationError, model_validator

from task.checks import require
from task.config.compose import compose_conf
from task.config.errors import explanation
from task.config.section import FineTuning, PositiveFloat, PositiveInt, Section, Seed

# Of classifiers that are no network of torchvision.
OWN_CLASSIFIERS = ("auto", "small", "efficientnet")
STUDY_PREFIX = "study."


class StudyConfig(Section):
    """See `conf/study.yaml`."""

    classifier: str
    weights: str
    fine_tuning: FineTuning
    balance: Literal["weights", "oversample", "none"]
    ratios: list[PositiveFloat] = Field(min_length=1)
    fill: Literal["all", "rare"]
    real_fractions: list[float] = Field(min_length=1)
    hospitals: bool
    num_seeds: PositiveInt
    seed: Seed
    val_fraction: float = Field(gt=0, lt=1, description="in (0, 1)")
    num_steps: PositiveInt | None
    batch_size: int = Field(ge=2)
    lr: PositiveFloat | None
    copy_share: float = Field(ge=0, lt=1, description="in [0, 1)")
    leave_out_misclassified: bool
    num_bootstraps: int = Field(ge=100)
    device: str

    @model_validator(mode="after")
    def _check(self) -> Self:
        for fraction in self.real_fractions:
            require(0 < fraction <= 1, "study.real_fractions", "each in (0, 1]", fraction)
        for name, given in (("ratios", self.ratios), ("real_fractions", self.real_fractions)):
            require(len({*given}) == len(given), f"study.{name}", "different ones", given)
        needed = self.classifier not in OWN_CLASSIFIERS
        require(
            needed == (self.weights != ""),
            "study.weights",
            f"the file of the weights of {self.classifier}"
            if needed
            else f"left out with study.classifier={self.classifier}, which takes none",
            self.weights,
        )
        return self


def load_study_config(words: Iterable[str] = ()) -> StudyConfig:
    """Compose the values of a study with words such as "study.ratios=[1,2]".

    Raises:
        ValueError: a name is unknown, a value is of the wrong type or out of range.
    """
    composed = compose_conf(words, file="study")
    values = OmegaConf.to_container(composed, resolve=True)
    if not isinstance(values, dict) or not isinstance(values.get("study"), dict):
        raise ValueError(f"study must be a section of values, got {values!r}")
    study = values["study"]
    try:
        return StudyConfig.model_validate(study)
    except ValidationError as error:
        raise ValueError(
            STUDY_PREFIX
            + explanation(error, study, StudyConfig.model_fields).removeprefix(STUDY_PREFIX)
        ) from error
