"""The values of a configuration, their types, and what is legal. Their defaults live in `conf/`."""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from task.checks import require, require_one_of, require_positive, require_seed
from task.config.class_folders import image_classes, require_folder
from task.config.grammar import require_text

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


def leaves(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to the dotted path of every value."""
    found: dict[str, Any] = {}
    for key, child in tree.items():
        path = f"{prefix}{key}"
        found |= leaves(child, f"{path}.") if isinstance(child, dict) else {path: child}
    return found


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
