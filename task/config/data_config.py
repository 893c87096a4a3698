"""The section `data`: a data set, and the shape in which the model sees it."""

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from task.checks import require
from task.config.class_folders import image_classes
from task.config.hydra_grammar import require_text
from task.config.patterns import MOST_WAYS, ways_to_match
from task.config.section import Section, Seed

# Of files below data.root; by name, how they lie there.
FILE_SETS = {
    "image_folder": "image_folder",
    "dicom_folder": "dicom_folder",
    "chest_xray": "image_folder",
    "blood_cells": "image_folder",
    "sars_cov_2_ct": "image_folder",
    "odir": "odir",
}


class DataConfig(Section):
    """A data set and the shape in which the model sees it."""

    name: Literal[
        "digits",
        "mnist",
        "fashion_mnist",
        "cifar10",
        "svhn",
        "image_folder",
        "dicom_folder",
        "chest_xray",
        "blood_cells",
        "sars_cov_2_ct",
        "odir",
    ]
    root: str
    classes: list[str]
    # One word changes the model of a run, so every size fits the deepest of the presets.
    image_size: int = Field(
        gt=0,
        multiple_of=8,
        description="a positive multiple of 8 (the images are resized to it)",
    )
    channels: Literal[1, 3]
    fit: Literal["stretch", "crop", "pad"]
    horizontal_flip: bool
    test_fraction: float | None = Field(
        gt=0, lt=1, description="between 0 and 1, exclusive, or null"
    )
    val_fraction: float = Field(gt=0, lt=1, description="between 0 and 1, exclusive")
    window: list[float] | None
    patient_pattern: str
    patients: str
    cache_dir: str
    on_corrupt: Literal["refuse", "skip"]
    split_seed: Seed

    @model_validator(mode="after")
    def _check(self) -> Self:
        classes, window = self.classes, self.window
        require(classes != [], "data.classes", self._expected_classes(), classes)
        require(len(set(classes)) == len(classes), "data.classes", "distinct", classes)
        for name in classes:
            require_text("the name of a class, or of its folder below data.root,", name)
        require(
            window is None or (len(window) == 2 and window[1] >= 1),
            "data.window",
            "[center, width] with a width >= 1, or null for what each file says",
            window,
        )
        self._check_patients()
        return self

    @property
    def in_class_folders(self) -> bool:
        """Whether the images lie in folders of their classes, so that patients can be named."""
        return FILE_SETS.get(self.name) in ("image_folder", "dicom_folder")

    def _check_patients(self) -> None:
        named = {"data.patient_pattern": self.patient_pattern, "data.patients": self.patients}
        for name, value in named.items():
            expected = f"empty for data={self.name}, whose images lie in no folders of classes"
            require(self.in_class_folders or value == "", name, expected, value)
        require(
            "" in named.values(),
            "data.patients",
            "empty where data.patient_pattern says which images are of one patient",
            self.patients,
        )
        try:
            groups = re.compile(self.patient_pattern).groups
            ways = ways_to_match(self.patient_pattern)
        except (re.error, OverflowError, RecursionError) as error:
            groups, ways = -1, 0
            problem = f"{self.patient_pattern} ({error})"
        else:
            problem = f"{self.patient_pattern}, with {groups} groups"
        require(
            self.patient_pattern == "" or groups == 1,
            "data.patient_pattern",
            "a regular expression with one group, the patient, such as ^(patient[0-9]+)_",
            problem,
        )
        require(
            ways <= MOST_WAYS,
            "data.patient_pattern",
            "a pattern that is searched for in seconds: without a repeat or a choice within a "
            "repeat, as in (a+)+ or (a|bc)*, and with at most three repeats of no fixed number, "
            "such as ^(patient[0-9]+)_",
            self.patient_pattern,
        )

    def _expected_classes(self) -> str:
        if self.name not in FILE_SETS:
            return "at least one class"
        found = image_classes(Path(self.root).expanduser())
        return (
            "at least one class, the names of the folders with their images, in the order of "
            f"their labels, e.g. 'data.classes=[{','.join(found) or 'normal,pneumonia'}]' "
            f"(folders in data.root={self.root}: {', '.join(found) or 'none'})"
        )
