"""The configuration: which words exist, what is legal, and how one is composed.

The defaults live in `conf/` alone; this module holds the types and the checks. Both faces,
`feddm-train` and `flwr run`, end in `load_config`, so that the same words give the same run.
"""

import dataclasses
import logging
import math
import re
import shlex
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from task.config.overrides import escaped, hydra_value, typed_text, typed_texts
from task.files import atomic_path

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"

# One word changes the model of a run, so every size fits the deepest of the presets.
IMAGE_SIZE_DIVISOR = 8

PACKAGED_SETS = ("digits", "mnist", "fashion_mnist", "cifar10", "svhn")
# Of files below data.root; by name, how they lie there.
FILE_SETS = {
    "image_folder": "image_folder",
    "dicom_folder": "dicom_folder",
    "chest_xray": "image_folder",
    "sars_cov_2_ct": "image_folder",
    "odir": "odir",
}
# Of all values these alone; none may be nan.
MAY_BE_INFINITE = ("partition.beta",)
# Those of which conf/ cannot know how many images they hold: feddm-train fits hospitals and epochs
# to them.
OWN_IMAGES = ("image_folder", "dicom_folder")
FITTED_VALUES = ("federation.num_supernodes", "train.local_epochs")
# What runs did whose configuration lacks the value, where conf/ may have another by now.
BEFORE_WRITTEN = {"data.fit": "stretch"}
TRAIN_MODES = ("federated", "centralized")
DATA_SETS = (*PACKAGED_SETS, *FILE_SETS)
# The inception score parts the images into 10 splits.
MIN_MEASURED_IMAGES = 10
DATA_FITS = ("stretch", "crop", "pad")
IMAGE_RANGES = ("correct", "paper")
AGGREGATIONS = ("fedavg", "median", "trimmed_mean", "krum")
# They change how images are drawn from weights, and no weights.
DRAWING_VALUES = (
    *("diffusion.sampler", "diffusion.num_inference_steps", "diffusion.eta"),
    *("diffusion.variance", "diffusion.guidance_scale", "diffusion.clip_x_start"),
)
# What may be changed of a run to draw images from it.
GENERATION_VALUES = frozenset(
    {"seed", "train.device", "eval.batch_size", "eval.precision", *DRAWING_VALUES}
)
PRECISIONS = ("auto", "float32", "bfloat16")
EXTRACTORS = ("inception", "classifier", "exported")
DIFFUSION_CHOICES = {
    "schedule": ("linear", "cosine", "continuous"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "loss_weighting": ("epsilon", "uniform"),
    "loss_reduction": ("mean", "sum"),
    "timestep_sampling": ("uniform", "stratified", "sobol"),
    "sampler": ("ddpm", "ddim", "dpmpp_2m"),
    "variance": ("beta", "posterior"),
}

# What macOS, Linux, Windows, Synology and QNAP put into folders of their users.
SYSTEM_FOLDERS = frozenset(
    {
        *("__MACOSX", "lost+found", "$RECYCLE.BIN", "System Volume Information"),
        *("@eaDir", "#recycle", "@Recycle"),
    }
)


def require(condition: bool, name: str, expected: str, value: object) -> None:
    """Raise a ValueError that names the field, what it must be and what it is.

    Raises:
        ValueError: `condition` is false.
    """
    if not condition:
        raise ValueError(f"{name} must be {expected}, got {value!r}")


def require_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise a ValueError unless `value` is one of `choices`.

    Raises:
        ValueError: `value` is none of them.
    """
    require(value in choices, name, f"one of {', '.join(choices)}", value)


def require_positive(section: str, config: object, *fields: str) -> None:
    """Raise a ValueError unless each of the named fields that is set is > 0 and finite.

    Raises:
        ValueError: a field is 0, negative, infinite or not a number.
    """
    for field in fields:
        value = getattr(config, field)
        if value is not None:
            require(0 < value < math.inf, f"{section}.{field}", "> 0 and finite", value)


def require_seed(name: str, value: int) -> None:
    """Raise a ValueError unless a seed is in [0, 2^63).

    Raises:
        ValueError: it is not.
    """
    require(0 <= value < 2**63, name, "in [0, 2^63)", value)


def is_hidden(folder: str) -> bool:
    """Whether a folder of this name is hidden, or one that a system keeps for itself."""
    return folder.startswith(".") or folder in SYSTEM_FOLDERS


def require_folder(root: Path) -> None:
    """Raise a FileNotFoundError unless there is a folder of images.

    Raises:
        FileNotFoundError: there is none.
    """
    if not root.is_dir():
        raise FileNotFoundError(
            f"data.root={root}: there is no such folder; set it to that of the images"
        )


def class_folders(folder: Path) -> list[str]:
    """Name the folders in a folder, sorted, without hidden ones; none where there is no folder."""
    if not folder.is_dir():
        return []
    names = (path.name for path in folder.iterdir() if path.is_dir())
    return sorted(name for name in names if not is_hidden(name))


def image_classes(root: Path) -> list[str]:
    """Name the folders of classes in a tree of images, `root/train/<class>` or `root/<class>`."""
    return class_folders(root / "train") or class_folders(root)


def are_named_by_folders(data: DictConfig) -> bool:
    """Whether the classes of a data set, not checked yet, are to be the names of its folders."""
    return FILE_SETS.get(data.name) in ("image_folder", "dicom_folder") and not data.classes


def classes_below(root: Path) -> list[str]:
    """Name the classes of a tree of images by its folders; see `image_classes`.

    Raises:
        FileNotFoundError: there is no such tree, or it has no folders.
    """
    require_folder(root)
    if not (classes := image_classes(root)):
        raise FileNotFoundError(
            f"data.root={root}: no class folders there; put the images of each class into a "
            f"folder named as the class, and those of a single class into one, e.g. {root}/cells/"
        )
    return classes


@dataclass
class DataConfig:
    """A data set and the shape in which the model sees it."""

    name: str = MISSING
    root: str = MISSING
    classes: list[str] = MISSING
    image_size: int = MISSING
    channels: int = MISSING
    fit: str = MISSING
    horizontal_flip: bool = MISSING
    test_fraction: float | None = None
    val_fraction: float = MISSING
    window: list[float] | None = None
    cache_dir: str = MISSING
    on_corrupt: str = MISSING
    split_seed: int = MISSING

    def __post_init__(self) -> None:
        require_one_of("data.name", self.name, DATA_SETS)
        if not self.classes:
            raise ValueError(f"data.classes must be {self._expected_classes()}, got []")
        require(
            len(set(self.classes)) == len(self.classes), "data.classes", "distinct", self.classes
        )
        for name in self.classes:
            require_text("the name of a class, or of its folder below data.root,", name)
        require_one_of("data.channels", str(self.channels), ("1", "3"))
        require(
            self.image_size > 0 and self.image_size % IMAGE_SIZE_DIVISOR == 0,
            "data.image_size",
            f"a positive multiple of {IMAGE_SIZE_DIVISOR} (the images are resized to it)",
            self.image_size,
        )
        require_one_of("data.fit", self.fit, DATA_FITS)
        for field in ("test_fraction", "val_fraction"):
            value = getattr(self, field)
            if value is not None:
                require(0 < value < 1, f"data.{field}", "between 0 and 1, exclusive", value)
        require(
            self.window is None or (len(self.window) == 2 and self.window[1] >= 1),
            "data.window",
            "[center, width] with a width >= 1, or null for what each file says",
            self.window,
        )
        require_one_of("data.on_corrupt", self.on_corrupt, ("refuse", "skip"))
        require_seed("data.split_seed", self.split_seed)

    def _expected_classes(self) -> str:
        if self.name not in FILE_SETS:
            return "at least one class"
        found = image_classes(Path(self.root).expanduser())
        return (
            "at least one class, the names of the folders with their images, in the order of "
            f"their labels, e.g. 'data.classes=[{','.join(found) or 'normal,pneumonia'}]' "
            f"(folders in data.root={self.root}: {', '.join(found) or 'none'})"
        )


@dataclass
class PartitionConfig:
    """How a simulation deals the images of one data set out to its hospitals."""

    beta: float | None = None
    counts: list[list[int]] | None = None

    def __post_init__(self) -> None:
        require(
            (self.beta is None) != (self.counts is None),
            "partition.beta",
            "null where partition.counts is given, and a number where it is not",
            self.beta,
        )
        if self.beta is not None:
            require(
                self.beta > 0, "partition.beta", "> 0 (inf deals every class evenly)", self.beta
            )


@dataclass
class ModelConfig:
    """The U-Net of the released code and its smaller relatives."""

    width: int = MISSING
    num_poolings: int = MISSING
    bottom_blocks: int = MISSING
    final_relu: bool = MISSING
    dropout: float = MISSING
    class_embedding_dim: int = MISSING
    fourier_features: int = MISSING

    def __post_init__(self) -> None:
        require_positive("model", self, "width", "num_poolings", "class_embedding_dim")
        require(self.bottom_blocks >= 2, "model.bottom_blocks", ">= 2", self.bottom_blocks)
        require(0 <= self.dropout < 1, "model.dropout", "in [0, 1)", self.dropout)
        require(
            self.fourier_features > 0 and self.fourier_features % 2 == 0,
            "model.fourier_features",
            "a positive even number (cosines and sines)",
            self.fourier_features,
        )


@dataclass
class DiffusionConfig:
    """The noise, the objective and the sampler."""

    num_timesteps: int = MISSING
    schedule: str = MISSING
    prediction_type: str = MISSING
    loss_weighting: str = MISSING
    loss_reduction: str = MISSING
    timestep_sampling: str = MISSING
    label_dropout: float = MISSING
    sampler: str = MISSING
    variance: str = MISSING
    eta: float = MISSING
    num_inference_steps: int | None = None
    clip_x_start: bool = MISSING
    guidance_scale: float = MISSING

    def __post_init__(self) -> None:
        require(self.num_timesteps >= 2, "diffusion.num_timesteps", ">= 2", self.num_timesteps)
        require(
            self.schedule != "linear" or self.num_timesteps > 20,
            "diffusion.num_timesteps",
            "> 20 with diffusion.schedule=linear, whose last beta is 20 over it",
            self.num_timesteps,
        )
        for field, choices in DIFFUSION_CHOICES.items():
            require_one_of(f"diffusion.{field}", getattr(self, field), choices)
        require(
            0 <= self.label_dropout < 1,
            "diffusion.label_dropout",
            "in [0, 1) (0: no null class, no guidance)",
            self.label_dropout,
        )
        require(0 <= self.eta <= 1, "diffusion.eta", "in [0, 1]", self.eta)
        steps = self.num_inference_steps
        if steps is not None:
            require(
                1 <= steps <= self.num_timesteps,
                "diffusion.num_inference_steps",
                f"between 1 and diffusion.num_timesteps={self.num_timesteps} (or null for all)",
                steps,
            )
            require(
                self.sampler != "ddpm" or steps == self.num_timesteps,
                "diffusion.num_inference_steps",
                "null with diffusion.sampler=ddpm, which takes every step "
                "(diffusion.sampler=ddim and dpmpp_2m skip steps)",
                steps,
            )
        require(
            0 <= self.guidance_scale < math.inf,
            "diffusion.guidance_scale",
            ">= 0 (1: no guidance)",
            self.guidance_scale,
        )
        require(
            self.guidance_scale == 1 or self.label_dropout > 0,
            "diffusion.guidance_scale",
            "1 unless diffusion.label_dropout > 0, which trains the null class that it needs",
            self.guidance_scale,
        )


@dataclass
class TrainConfig:
    """The local epochs of a hospital, or the training on the pooled data."""

    mode: str = MISSING
    local_epochs: int = MISSING
    steps_per_round: int | None = None
    batch_size: int = MISSING
    lr: float = MISSING
    device: str = MISSING
    precision: str = MISSING
    channels_last: bool = MISSING
    compile: bool | None = None
    num_threads: int = MISSING
    num_processes: int | None = None
    deterministic: bool = MISSING

    def __post_init__(self) -> None:
        require_one_of("train.mode", self.mode, TRAIN_MODES)
        require_positive("train", self, "local_epochs", "batch_size", "lr")
        require_positive("train", self, "num_threads", "num_processes", "steps_per_round")
        require_one_of("train.precision", self.precision, PRECISIONS)
        require(
            not (self.compile and self.deterministic),
            "train.compile",
            "null or false with train.deterministic=true: its code depends on which size of batch "
            "comes first",
            self.compile,
        )
        require(
            re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device) is not None,
            "train.device",
            "auto, cpu, cuda or cuda:N",
            self.device,
        )


@dataclass
class FederationConfig:
    """The hospitals, the rounds and what the server waits for."""

    num_supernodes: int = MISSING
    images_per_client: int | None = None
    clients_per_round: int | None = None
    rounds: int = MISSING
    min_nodes: int = MISSING
    min_replies: int = MISSING
    round_attempts: int = MISSING
    aggregation: str = MISSING
    trim_fraction: float = MISSING
    num_malicious: int = MISSING
    num_selected: int = MISSING
    max_update_norm: float | None = None
    max_weight_share: float | None = None
    node_wait: float = MISSING
    round_timeout: float = MISSING
    max_in_flight: int | None = None
    wire_dtype: str = MISSING
    ema_decay: float | None = None
    keep_checkpoints: int = MISSING
    cpus_per_client: int = MISSING
    gpus_per_client: float | None = None
    keep_local_models: list[int] = MISSING

    def __post_init__(self) -> None:
        require_positive(
            "federation",
            self,
            *("num_supernodes", "clients_per_round", "rounds", "min_nodes", "min_replies"),
            *("node_wait", "round_timeout", "keep_checkpoints", "cpus_per_client"),
            *("max_in_flight", "round_attempts", "num_selected", "max_update_norm"),
            "images_per_client",
        )
        require(
            self.clients_per_round is None or self.clients_per_round <= self.num_supernodes,
            "federation.clients_per_round",
            f"at most federation.num_supernodes={self.num_supernodes} (or null for all)",
            self.clients_per_round,
        )
        sampled = self.clients_per_round or self.num_supernodes
        require(
            self.min_replies <= sampled,
            "federation.min_replies",
            f"at most {sampled}, the clients that train in a round",
            self.min_replies,
        )
        require(
            all(0 <= client < self.num_supernodes for client in self.keep_local_models),
            "federation.keep_local_models",
            f"numbers of clients, 0 to {self.num_supernodes - 1}",
            self.keep_local_models,
        )
        if self.gpus_per_client is not None:
            require(
                0 <= self.gpus_per_client < math.inf,
                "federation.gpus_per_client",
                ">= 0, or null",
                self.gpus_per_client,
            )
        require_one_of("federation.wire_dtype", self.wire_dtype, ("float32", "float16"))
        if self.ema_decay is not None:
            require(
                0 < self.ema_decay < 1,
                "federation.ema_decay",
                "in (0, 1), or null for off",
                self.ema_decay,
            )
        if self.max_weight_share is not None:
            require(
                0 < self.max_weight_share <= 1,
                "federation.max_weight_share",
                "in (0, 1], or null to believe every number of images",
                self.max_weight_share,
            )
        self._check_aggregation()

    def _check_aggregation(self) -> None:
        require_one_of("federation.aggregation", self.aggregation, AGGREGATIONS)
        require(
            0 < self.trim_fraction < 0.5,
            "federation.trim_fraction",
            "between 0 and 0.5, exclusive, so that something is cut off and something left",
            self.trim_fraction,
        )
        require(self.num_malicious >= 0, "federation.num_malicious", ">= 0", self.num_malicious)
        require(
            self.min_replies >= self._replies_needed(),
            "federation.min_replies",
            f"at least {self._replies_needed()} with federation.aggregation={self.aggregation} "
            f"{self._why_needed()}",
            self.min_replies,
        )
        honest = self.min_replies - self.num_malicious
        require(
            self.aggregation != "krum" or self.num_selected <= honest,
            "federation.num_selected",
            f"at most {honest}, federation.min_replies without federation.num_malicious",
            self.num_selected,
        )

    def _replies_needed(self) -> int:
        if self.aggregation == "median":
            return 3
        if self.aggregation == "trimmed_mean":
            at_least = math.ceil(1 / self.trim_fraction)
            # As Flower rounds: of 49 replies a 49th is none in floating point.
            return at_least + (int(self.trim_fraction * at_least) < 1)
        return 2 * self.num_malicious + 3 if self.aggregation == "krum" else 1

    def _why_needed(self) -> str:
        return {
            "median": "(the median of two is their mean)",
            "trimmed_mean": f"and federation.trim_fraction={self.trim_fraction:g}, or none is "
            "cut off (or a larger federation.trim_fraction)",
            "krum": f"and federation.num_malicious={self.num_malicious} (or a smaller "
            "federation.num_malicious)",
        }.get(self.aggregation, "")


@dataclass
class EvalConfig:
    """What is drawn and measured on the way and at the end."""

    every: int = MISSING
    images_per_class: int = MISSING
    num_images: int = MISSING
    metrics_every: int | None = None
    final_metrics: bool = MISSING
    num_per_class: int | None = None
    seed: int = MISSING
    batch_size: int | None = None
    precision: str = MISSING
    extractor: str = MISSING
    image_range: str = MISSING
    inception_weights: str = MISSING
    exported_program: str = MISSING

    def __post_init__(self) -> None:
        require_positive("eval", self, "every", "images_per_class", "batch_size")
        require_positive("eval", self, "metrics_every", "num_per_class")
        require(
            self.metrics_every is None or self.num_images >= MIN_MEASURED_IMAGES,
            "eval.num_images",
            f">= {MIN_MEASURED_IMAGES} with eval.metrics_every, which measures as many",
            self.num_images,
        )
        require_seed("eval.seed", self.seed)
        require_one_of("eval.precision", self.precision, PRECISIONS)
        require_one_of("eval.extractor", self.extractor, EXTRACTORS)
        require_one_of("eval.image_range", self.image_range, IMAGE_RANGES)
        require(
            self.extractor != "exported" or self.exported_program != "",
            "eval.exported_program",
            "the file of a program for eval.extractor=exported",
            self.exported_program,
        )
        require(self.num_images >= 0, "eval.num_images", ">= 0 (0: off)", self.num_images)


@dataclass
class Config:
    """A whole run."""

    experiment: str = MISSING
    output_dir: str = MISSING
    run_name: str = MISSING
    resume: bool = MISSING
    seed: int = MISSING
    data: DataConfig = MISSING
    partition: PartitionConfig = MISSING
    model: ModelConfig = MISSING
    diffusion: DiffusionConfig = MISSING
    train: TrainConfig = MISSING
    federation: FederationConfig = MISSING
    eval: EvalConfig = MISSING

    def __post_init__(self) -> None:
        for path in value_paths():
            value = attrgetter(path)(self)
            numbers = value if isinstance(value, list) else [value]
            finite = all(math.isfinite(n) for n in numbers if isinstance(n, float))
            require(finite or path in MAY_BE_INFINITE, path, "finite", value)
        require_seed("seed", self.seed)
        require(
            self.run_name not in ("", ".", "..") and "/" not in self.run_name,
            "run_name",
            "the name of one folder, without a slash",
            self.run_name,
        )
        divisor = 2**self.model.num_poolings
        require(
            self.data.image_size % divisor == 0,
            "data.image_size",
            f"a multiple of {divisor} (2 to the power of model.num_poolings)",
            self.data.image_size,
        )


def require_data_root(config: Config) -> None:
    """Raise a FileNotFoundError unless the folder of a data set of files is there.

    Raises:
        FileNotFoundError: it is not.
    """
    if config.data.name in FILE_SETS:
        require_folder(Path(config.data.root).expanduser())


def register_schema() -> None:
    """Make the types known to Hydra under the name that `conf/config.yaml` asks for."""
    ConfigStore.instance().store(name="schema", node=Config)


def load_config(overrides: Iterable[str] = (), *, images_below: Path | None = None) -> Config:
    """Compose `conf/` with Hydra overrides and check the result.

    Args:
        overrides: as on `feddm-train`'s command line, e.g. `["data=mnist", "partition.beta=0.1"]`.
        images_below: see `config_from_hydra`.

    Raises:
        ValueError: a name is unknown, a value is of the wrong type or out of range.
    """
    try:
        return config_from_hydra(_composed(overrides), images_below=images_below)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(composition_error(error)) from error


def _composed(overrides: Iterable[str]) -> DictConfig:
    read = [read_override(word) for word in overrides]
    register_schema()
    # Hydra keeps one composition context per process; the one of feddm-train stays untouched.
    hydra, GlobalHydra.instance().hydra = GlobalHydra.instance().hydra, None
    try:
        with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
            return compose("config", overrides=read)
    finally:
        GlobalHydra.instance().hydra = hydra


def config_from_hydra(composed: DictConfig, *, images_below: Path | None = None) -> Config:
    """Turn what Hydra composed into a checked `Config`.

    Args:
        composed: whole.
        images_below: the folder from which a relative `data.root` counts, where the images of the
            run lie on this machine: classes that are left open take the names of their folders.

    Raises:
        ValueError: a value is missing, of the wrong type or out of range.
    """
    try:
        known = {p for path in value_paths() for p in (path, path.split(".")[0])}
        unknown = leaves(OmegaConf.to_container(composed)).keys() - known  # type: ignore[arg-type]
        if unknown:
            raise ValueError(f"configuration: no such value: {', '.join(sorted(unknown))}")
        if images_below is not None and are_named_by_folders(composed.data):
            root = images_below / Path(composed.data.root).expanduser()
            composed = OmegaConf.merge(composed, {"data": {"classes": classes_below(root)}})  # type: ignore[assignment]
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ValueError(composition_error(error)) from error
    if not isinstance(config, Config):
        raise TypeError(f"expected a composed Config, got {type(config).__name__}")
    return config


def leaves(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to the dotted path of every value."""
    found: dict[str, Any] = {}
    for key, child in tree.items():
        path = f"{prefix}{key}"
        found |= leaves(child, f"{path}.") if isinstance(child, dict) else {path: child}
    return found


def composition_error(error: Exception) -> str:
    """Say in a few words what Hydra or OmegaConf did not accept, and why."""
    reasons = [str(error)] if error.__cause__ is None else [str(error), str(error.__cause__)]
    # Hydra speaks of its own insides, and advises to append what no part of feddm would read.
    return "configuration: " + "; ".join(
        re.split("\nConfig search path|\nTo append to your config", reason)[0].strip()
        for reason in reasons
    )


def load_run_config(run_config: Mapping[str, Any], *, has_images: bool = False) -> Config:
    """Compose the configuration of a run, with the paths of this machine; see `compose_run_config`.

    Args:
        run_config: `context.run_config`.
        has_images: whether the images of the run lie on this machine, as in a simulation.

    Raises:
        ValueError: see `load_config`.
    """
    # The working directory is that of whichever process runs the app, so nothing counts from it.
    home = Path.home()
    images_below = home if has_images else None
    return anchored(compose_run_config(run_config, images_below=images_below), home)


def compose_run_config(
    run_config: Mapping[str, Any], *, images_below: Path | None = None
) -> Config:
    """Compose the configuration that Flower's run config asks for, with its paths as they stand.

    An empty string means "what conf/ says". `experiment` names a preset, `overrides` is one
    string of further Hydra overrides; every other key is the path of one value.

    Args:
        run_config: `context.run_config`, flat, keys as `[tool.flwr.app.config]` lists them.
        images_below: see `config_from_hydra`.

    Raises:
        ValueError: see `load_config`.
    """
    given = {key: value for key, value in run_config.items() if value != ""}
    overrides = []
    if "experiment" in given:
        overrides.append(f"experiment={given.pop('experiment')}")
    try:
        further = shlex.split(str(given.pop("overrides", "")))
    except ValueError as error:
        raise ValueError(
            f"overrides must be Hydra overrides quoted as in a shell ({error}), "
            f"got {run_config['overrides']}"
        ) from error
    overrides += [hydra_override(key, value) for key, value in given.items()]
    return load_config(overrides + further, images_below=images_below)


def anchored(config: Config, folder: Path) -> Config:
    """Make the paths of a configuration absolute; relative ones count from `folder`."""

    def absolute(name: str) -> str:
        return str((folder / Path(name).expanduser()).absolute())

    def absolute_or_empty(name: str) -> str:
        return absolute(name) if name else ""

    return dataclasses.replace(
        config,
        output_dir=absolute(config.output_dir),
        data=dataclasses.replace(
            config.data,
            root=absolute(config.data.root),
            cache_dir=absolute(config.data.cache_dir),
        ),
        eval=dataclasses.replace(
            config.eval,
            inception_weights=absolute_or_empty(config.eval.inception_weights),
            exported_program=absolute_or_empty(config.eval.exported_program),
        ),
    )


def settle_precisions(config: Config, **precisions: str) -> Config:
    """Replace the precisions that are still "auto", given by section: `train="bfloat16"`."""
    for section, precision in precisions.items():
        part = getattr(config, section)
        if part.precision == "auto":
            settled = dataclasses.replace(part, precision=precision)
            config = dataclasses.replace(config, **{section: settled})
    return config


def hydra_override(path: str, value: object) -> str:
    """Write `path=value` in Hydra's grammar, so that text is read back as it stands.

    A string for a field that is not text is left to Hydra to read (`"null"`, `"inf"`, `"[a,b]"`).

    Raises:
        ValueError: a text cannot be kept in a configuration.
    """
    if value_paths().get(path) is str:
        require_text(path, value)
    elif isinstance(value, str):
        return f"{path}={value}"
    return f"{path}={hydra_value(value)}"


def read_override(word: str, *, sweep: bool = False) -> str:
    """Write an override in Hydra's grammar as somebody typed it: `data.root=/tmp/a=b (x)`.

    What follows the `=` of a text field is text, unless it stands in Hydra's quotes.

    Args:
        word: `path=value`; anything else is left as it is.
        sweep: whether a field may be given several values, with commas between them.

    Raises:
        ValueError: a text cannot be kept in a configuration.
    """
    given = re.fullmatch(r"(\+{0,2})([\w.]+)=(.*)", word, re.DOTALL)
    if given is None:
        return word
    plus, path, typed = given.groups()
    kind = value_paths().get(path)
    if kind is str:
        require_text(path, typed)
        typed = typed_text(typed, sweep=sweep)
    elif kind in (list[str], list[str] | None):
        typed = typed_texts(typed, sweep=sweep)
    return f"{plus}{path}={typed}"


def require_text(path: str, value: object) -> None:
    """Raise a ValueError unless a value is a text that a configuration can hold.

    Raises:
        ValueError: it is a number with a fraction or an exponent, which a reader of TOML has
            already rounded, or it is "???", which is no value in OmegaConf, or no Unicode.
    """
    require(not isinstance(value, float), path, f'text in quotes, such as {path}="1e5"', value)
    text = str(value)
    require(text != "???", path, "another text than OmegaConf's sign for no value", text)
    surrogates = re.search("[\ud800-\udfff]", text)  # of the name of a file in another encoding
    require(surrogates is None, path, "text in UTF-8", text)


def value_paths(schema: type = Config, prefix: str = "") -> dict[str, Any]:
    """List the dotted path and the type of every value of the configuration."""
    paths: dict[str, Any] = {}
    for field in dataclasses.fields(schema):
        path = f"{prefix}{field.name}"
        if dataclasses.is_dataclass(field.type):
            paths |= value_paths(field.type, f"{path}.")  # type: ignore[arg-type]
        else:
            paths[path] = field.type
    return paths


def flat_values(config: Config) -> dict[str, Any]:
    """Flatten a configuration to dotted paths, for comparing and recording it."""
    return {path: attrgetter(path)(config) for path in value_paths()}


def changed_config(
    config: Config,
    overrides: Iterable[str] = (),
    *,
    options: Mapping[str, object | None],
    names: Collection[str],
) -> Config:
    """Change some values of a run's configuration, to work with what came out of it.

    Args:
        config: of the run.
        overrides: `name=value` each.
        options: by name as well; None leaves a value as it is. They win over `overrides`.
        names: of the values that may be changed.

    Returns:
        The configuration with absolute paths; new relative ones count from the working directory.

    Raises:
        ValueError: a name is none of `names`, or a value is wrong.
    """
    tree = as_hydra(config)
    given = {name: value for name, value in options.items() if value is not None}
    words = [*overrides, *(hydra_override(name, value) for name, value in given.items())]
    try:
        for word in words:
            name, equals, _ = word.partition("=")
            expected = f"NAME=VALUE with a name of {', '.join(sorted(names))}"
            require(name in names and equals != "", "an override", expected, word)
            override = OverridesParser.create().parse_override(read_override(word))
            require(not override.is_sweep_override(), name, "one value", word)
            OmegaConf.update(tree, name, override.value())
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(composition_error(error)) from error
    return anchored(config_from_hydra(tree), Path.cwd())


def as_hydra(config: Config) -> DictConfig:
    """Return the configuration as an OmegaConf tree, which can be written as YAML."""
    tree: DictConfig = OmegaConf.structured(_escaped_texts(config))
    return tree


def _escaped_texts(value: Any) -> Any:
    """Return a configuration, or a part of it, whose texts OmegaConf resolves to what they were."""
    if isinstance(value, str):
        return escaped(value)
    if isinstance(value, list):
        return [_escaped_texts(each) for each in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        return dataclasses.replace(
            value, **{name: _escaped_texts(getattr(value, name)) for name in names}
        )
    return value


def write_config(config: Config, path: Path) -> None:
    """Write the resolved configuration as YAML, atomically."""
    with atomic_path(path) as aside:
        aside.write_text(OmegaConf.to_yaml(as_hydra(config)), encoding="utf-8")


def read_config(path: Path) -> Config:
    """Read a configuration that `write_config` of this version of feddm, or of another, wrote.

    A value that it lacks is what runs did before it could be chosen (`BEFORE_WRITTEN`), else the
    default of conf/ for its experiment and its data set; one that is unknown here is left out.
    Both are logged.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not the configuration of a run, or a value is wrong.
    """
    try:
        stored = _stored_values(path)
        missing = value_paths().keys() - stored.keys()
        unknown = stored.keys() - value_paths().keys()
        defaults = _defaults(stored.get("experiment"), stored.get("data.name")) if missing else {}
        # Where a run lies is known without its configuration.
        place = {"output_dir": str(path.parent.parent), "run_name": path.parent.name}
        defaults = defaults | BEFORE_WRITTEN | place
        tree = OmegaConf.create()
        for name in value_paths():
            OmegaConf.update(tree, name, defaults[name] if name in missing else stored[name])
        config = config_from_hydra(OmegaConf.merge(OmegaConf.structured(Config), tree))  # type: ignore[arg-type]
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not a configuration of this feddm: {error}") from error
    for name in sorted(missing):
        why = (
            "which runs did before it was written" if name in BEFORE_WRITTEN else "as conf/ has it"
        )
        _log_once(f"{path} has no {name}; taken for {flat_values(config)[name]!r}, {why}")
    for name in sorted(unknown):
        _log_once(f"{path} has {name}, which this version of feddm does not know; left out")
    return config


def unknown_values(path: Path) -> dict[str, Any]:
    """Return the values of a written configuration that this version of feddm does not know."""
    return {n: value for n, value in _stored_values(path).items() if n not in value_paths()}


def _stored_values(path: Path) -> dict[str, Any]:
    """Read the values of a written configuration, by dotted path."""
    stored = yaml.safe_load(path.read_bytes())
    sections = {name.partition(".")[0] for name in value_paths() if "." in name}
    lacking = {"data", "diffusion", "model", "train"} - set(
        stored if isinstance(stored, dict) else ()
    )
    if lacking:
        raise ValueError(f"it has no section {', '.join(sorted(lacking))}")
    for name in sections & stored.keys():
        require(isinstance(stored[name], dict), name, "a mapping", stored[name])
    return leaves(stored)


@cache
def _defaults(experiment: object, data: object) -> dict[str, Any]:
    """Return the values of conf/ by dotted path, for an experiment and a data set if known."""
    given = {"experiment": experiment, "data": data}
    known = {
        group: name
        for group, name in given.items()
        if name in {file.stem for file in (CONF_DIR / group).glob("*.yaml")}
    }
    tree = _composed([f"{group}={name}" for group, name in known.items()])
    return {name: OmegaConf.select(tree, name) for name in value_paths()}


@cache
def _log_once(text: str) -> None:
    logging.getLogger(__name__).warning(text)
