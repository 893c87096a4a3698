"""The values of a configuration, their types, and what is legal. Their defaults live in `conf/`.

Those of the sections `data` and `model` are in `task.config.data_config` and `.models`.
"""

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator
from pydantic.fields import FieldInfo

from task.checks import require
from task.config.class_folders import require_folder
from task.config.data_config import FILE_SETS, DataConfig
from task.config.errors import explanation
from task.config.models import ModelConfig, model_schemas, of_family
from task.config.section import PositiveFloat, PositiveInt, Section, Seed

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"

# Those of which conf/ cannot know how many images they hold: feddm-train fits hospitals and epochs
# to them.
OWN_IMAGES = ("image_folder", "dicom_folder")
FITTED_VALUES = ("federation.num_supernodes", "train.local_epochs")
# The inception score parts the images into 10 splits.
MIN_MEASURED_IMAGES = 10
# Of a sum that is to hide its parts: of two, each would know the other's from the sum and its own.
MIN_PEERS = 3
# They change how images are drawn from the weights of a diffusion model, and no weights.
SAMPLER_VALUES = (
    *("diffusion.sampler", "diffusion.num_inference_steps", "diffusion.eta"),
    *("diffusion.variance", "diffusion.guidance_scale", "diffusion.clip_x_start"),
)
# They say what its loss is of, whatever its network.
OBJECTIVE_VALUES = (
    *("diffusion.num_timesteps", "diffusion.schedule", "diffusion.prediction_type"),
    *("diffusion.loss_weighting", "diffusion.loss_reduction"),
)

# Which strategies take which values; of the others they are null.
STRATEGY_VALUES = {
    "server_lr": ("fedavgm", "fedadam", "fedyogi"),
    "momentum": ("fedavgm",),
    "beta1": ("fedadam", "fedyogi"),
    "beta2": ("fedadam", "fedyogi"),
    "tau": ("fedadam", "fedyogi"),
    "proximal_mu": ("fedprox",),
    "alpha": ("feddyn",),
}

# Values where a run draws no images.
MEASURING_OFF: dict[str, Any] = {
    "eval.num_images": 0,
    "eval.metrics_every": None,
    "eval.final_metrics": False,
}

Precision = Literal["auto", "float32", "bfloat16"]


class PartitionConfig(Section):
    """How a simulation deals the images of one data set out to its hospitals."""

    beta: float | None = Field(
        gt=0,
        allow_inf_nan=True,
        description="> 0 (inf deals every class evenly), or null with partition.counts",
    )
    counts: list[list[int]] | None

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            (self.beta is None) != (self.counts is None),
            "partition.beta",
            "null where partition.counts is given, and a number where it is not",
            self.beta,
        )
        return self


class DiffusionConfig(Section):
    """The noise, the objective and the sampler."""

    num_timesteps: int = Field(ge=2)
    schedule: Literal["linear", "cosine", "sigmoid", "continuous"]
    prediction_type: Literal["epsilon", "v_prediction", "sample"]
    loss_weighting: Literal["epsilon", "uniform"]
    loss_reduction: Literal["mean", "sum"]
    timestep_sampling: Literal["uniform", "stratified", "sobol"]
    label_dropout: float = Field(
        ge=0, lt=1, description="in [0, 1) (0: no null class, no guidance)"
    )
    sampler: Literal["ddpm", "ddim", "dpmpp_2m"]
    variance: Literal["beta", "posterior"]
    eta: float = Field(ge=0, le=1, description="in [0, 1]")
    num_inference_steps: int | None = Field(gt=0)
    clip_x_start: bool
    guidance_scale: float = Field(ge=0, description=">= 0 (1: no guidance)")
    ema_decay: float | None = Field(gt=0, lt=1, description="in (0, 1), or null for off")

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            self.schedule != "linear" or self.num_timesteps > 20,
            "diffusion.num_timesteps",
            "> 20 with diffusion.schedule=linear, whose last beta is 20 over it",
            self.num_timesteps,
        )
        steps = self.num_inference_steps
        require(
            steps is None or steps <= self.num_timesteps,
            "diffusion.num_inference_steps",
            f"between 1 and diffusion.num_timesteps={self.num_timesteps} (or null for all)",
            steps,
        )
        require(
            self.sampler != "ddpm" or steps in (None, self.num_timesteps),
            "diffusion.num_inference_steps",
            "null with diffusion.sampler=ddpm, which takes every step "
            "(diffusion.sampler=ddim and dpmpp_2m skip steps)",
            steps,
        )
        require(
            self.guidance_scale == 1 or self.label_dropout > 0,
            "diffusion.guidance_scale",
            "1 unless diffusion.label_dropout > 0, which trains the null class that it needs",
            self.guidance_scale,
        )
        return self


class TrainConfig(Section):
    """The local epochs of a hospital, or the training on the pooled data."""

    mode: Literal["federated", "centralized"]
    local_epochs: PositiveInt
    steps_per_round: PositiveInt | None
    batch_size: PositiveInt
    client_batch_fraction: float = Field(gt=0, le=1, description="in (0, 1]")
    lr: PositiveFloat
    client_lr_factor: PositiveFloat
    lr_schedule: Literal["constant", "cosine"]
    warmup_rounds: int = Field(ge=0)
    optimizer_state: Literal["new", "kept", "averaged"]
    accumulation: PositiveInt
    clip_norm: PositiveFloat | None
    start_from: str
    device: str = Field(
        pattern=r"^(auto|cpu|cuda(:[0-9]+)?)$", description="auto, cpu, cuda or cuda:N"
    )
    precision: Precision
    channels_last: bool
    compile: bool | None
    num_threads: PositiveInt
    num_processes: PositiveInt | None
    deterministic: bool

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            not (self.compile and self.deterministic),
            "train.compile",
            "null or false with train.deterministic=true: its code depends on which size of batch "
            "comes first",
            self.compile,
        )
        return self

    @property
    def trained_batch_size(self) -> int:
        """Images that go through the networks at a time where this run trains."""
        fraction = self.client_batch_fraction if self.mode == "federated" else 1
        return max(1, round(fraction * self.batch_size))

    @property
    def trained_lr(self) -> float:
        """The learning rate that this run trains with, before `lr_schedule`."""
        return self.lr * (self.client_lr_factor if self.mode == "federated" else 1)


class StrategyConfig(Section):
    """What clients and server do with a round's training beside taking a mean of weights."""

    name: Literal["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi", "scaffold", "feddyn"]
    server_lr: PositiveFloat | None
    momentum: float | None = Field(ge=0, lt=1, description="in [0, 1)")
    beta1: float | None = Field(ge=0, lt=1, description="in [0, 1)")
    beta2: float | None = Field(ge=0, lt=1, description="in [0, 1)")
    tau: PositiveFloat | None
    proximal_mu: float | None = Field(ge=0, description=">= 0 (0: FedAvg)")
    alpha: PositiveFloat | None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in STRATEGY_VALUES:
            value, users = getattr(self, name), STRATEGY_VALUES[name]
            wanted = self.name in users
            chosen = " or ".join(f"strategy={user}" for user in users)
            require(
                (value is not None) == wanted,
                f"strategy.{name}",
                f"{'a value' if wanted else 'null'} with strategy.name={self.name} ({chosen} sets "
                "it, with what else it needs)",
                value,
            )
        return self

    @property
    def described(self) -> str:
        """Its name and values, such as "fedprox (proximal_mu 0.01)"."""
        values = {name: getattr(self, name) for name in STRATEGY_VALUES}
        given = [f"{name} {value:g}" for name, value in values.items() if value is not None]
        return f"{self.name} ({', '.join(given)})" if given else self.name

    @property
    def corrects_clients(self) -> bool:
        """Whether what clients keep between rounds, and what the server has, must fit together."""
        return self.name in ("scaffold", "feddyn")


class FederationConfig(Section):
    """The hospitals, the rounds and what the server waits for."""

    num_supernodes: PositiveInt
    images_per_client: PositiveInt | None
    clients_per_round: PositiveInt | None
    rounds: PositiveInt
    min_nodes: PositiveInt
    min_replies: PositiveInt
    round_attempts: PositiveInt
    aggregation: Literal["fedavg", "bounded_mean", "median", "trimmed_mean", "krum"]
    trim_fraction: float = Field(
        gt=0,
        lt=0.5,
        description="between 0 and 0.5, exclusive, so that something is cut off and something left",
    )
    num_malicious: int = Field(ge=0)
    num_selected: PositiveInt
    secure_aggregation: bool
    update_range: PositiveFloat
    max_images_per_client: PositiveInt
    max_update_norm: PositiveFloat | None
    max_weight_share: float | None = Field(
        gt=0, le=1, description="in (0, 1], or null to believe every number of images"
    )
    node_wait: PositiveFloat
    round_timeout: PositiveFloat
    max_in_flight: PositiveInt | None
    wire_dtype: Literal["float32", "float16", "int8", "int4"]
    error_feedback: bool
    local: list[str]
    drawn_by: Literal["global", "clients"]
    sharing: Literal["whole", "usplit"]
    ema_decay: float | None = Field(gt=0, lt=1, description="in (0, 1), or null for off")
    keep_checkpoints: PositiveInt
    cpus_per_client: PositiveInt
    gpus_per_client: float | None = Field(ge=0)
    keep_local_models: list[int]

    @model_validator(mode="after")
    def _check(self) -> Self:
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
        least, why = self._replies_needed()
        require(
            self.min_replies >= least,
            "federation.min_replies",
            f"at least {least} with federation.aggregation={self.aggregation} {why}",
            self.min_replies,
        )
        honest = self.min_replies - self.num_malicious
        require(
            self.aggregation != "krum" or self.num_selected <= honest,
            "federation.num_selected",
            f"at most {honest}, federation.min_replies without federation.num_malicious",
            self.num_selected,
        )
        in_blocks = self.wire_dtype in ("int8", "int4")
        require(
            in_blocks or not self.error_feedback,
            "federation.error_feedback",
            "false unless federation.wire_dtype is int8 or int4, which round coarsely",
            self.error_feedback,
        )
        require(
            not (in_blocks and self.secure_aggregation),
            "federation.wire_dtype",
            "float32 or float16 with federation.secure_aggregation=true: masks hide sums of "
            "integers, and scales of blocks would be each hospital's own",
            self.wire_dtype,
        )
        if self.secure_aggregation:
            self._check_secure_aggregation(sampled)
        return self

    def _check_secure_aggregation(self, sampled: int) -> None:
        """Check that nothing looks at what single clients send, and that there are enough."""
        why = "with federation.secure_aggregation=true, where the server sees sums alone"
        require(
            self.aggregation in ("fedavg", "bounded_mean"),
            "federation.aggregation",
            f"fedavg or bounded_mean {why}",
            self.aggregation,
        )
        require(
            self.max_update_norm is None,
            "federation.max_update_norm",
            f"null {why} (federation.update_range bounds each value at the client)",
            self.max_update_norm,
        )
        require(
            not self.keep_local_models,
            "federation.keep_local_models",
            f"[] {why}",
            self.keep_local_models,
        )
        require(
            sampled >= MIN_PEERS,
            "federation.num_supernodes"
            if self.clients_per_round is None
            else "federation.clients_per_round",
            f"at least {MIN_PEERS} with federation.secure_aggregation=true (of two, each "
            "works out the other's update from the sum)",
            sampled,
        )

    def _replies_needed(self) -> tuple[int, str]:
        """Return how many replies the aggregation needs at least, and why."""
        if self.aggregation == "median":
            return 3, "(the median of two is their mean)"
        if self.aggregation == "trimmed_mean":
            least = math.ceil(1 / self.trim_fraction)
            # As Flower rounds: of 49 replies a 49th is none in floating point.
            least += int(self.trim_fraction * least) < 1
            return least, (
                f"and federation.trim_fraction={self.trim_fraction:g}, or none is cut off "
                "(or a larger federation.trim_fraction)"
            )
        if self.aggregation == "krum":
            return 2 * self.num_malicious + 3, (
                f"and federation.num_malicious={self.num_malicious} (or a smaller "
                "federation.num_malicious)"
            )
        return 1, ""


class PrivacyConfig(Section):
    """What protects each patient of a hospital, or each hospital, from what weights tell."""

    mechanism: Literal["none", "dp_sgd", "dp_clients"]
    epsilon: PositiveFloat | None
    noise_multiplier: float | None = Field(ge=0, description=">= 0 (0: clipping alone)")
    delta: float | None = Field(gt=0, lt=1, description="between 0 and 1, exclusive")
    clipping_norm: PositiveFloat | None
    sampling_rate: float | None = Field(gt=0, le=1, description="in (0, 1]")
    noise_draws: PositiveInt | None
    noise: Literal["local", "distributed"] | None
    colluders: PositiveInt | None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("delta", "clipping_norm", "sampling_rate", "noise_draws", "noise"):
            value = getattr(self, name)
            wanted = self.unit != "" and (self.is_on or name in ("delta", "clipping_norm"))
            expected = "a value" if wanted else "null"
            require(
                (value is not None) == wanted,
                f"privacy.{name}",
                f"{expected} with privacy.mechanism={self.mechanism} (privacy=dp_sgd and "
                "privacy=dp_clients set all)",
                value,
            )
        require(
            (self.colluders is not None) == self.is_distributed,
            "privacy.colluders",
            "how many hospitals may tell the server their share of the noise, 1 or more, with "
            "privacy.noise=distributed, and null without",
            self.colluders,
        )
        budgets = [each for each in (self.epsilon, self.noise_multiplier) if each is not None]
        require(
            len(budgets) == (self.unit != ""),
            "privacy.epsilon",
            "null where privacy.noise_multiplier is given (privacy.epsilon=null), and a number "
            "where it is not"
            if self.unit
            else "null with privacy.mechanism=none, as privacy.noise_multiplier (privacy=dp_sgd "
            "switches it on)",
            self.epsilon,
        )
        return self

    @property
    def is_on(self) -> bool:
        """Whether patients are protected."""
        return self.mechanism == "dp_sgd"

    @property
    def protects_clients(self) -> bool:
        """Whether hospitals as a whole are protected."""
        return self.mechanism == "dp_clients"

    @property
    def unit(self) -> str:
        """Who is protected, "patient" or "hospital"; "" where nobody is."""
        return {"none": "", "dp_sgd": "patient", "dp_clients": "hospital"}[self.mechanism]

    @property
    def is_distributed(self) -> bool:
        """Whether each hospital adds a share of the noise alone."""
        return self.noise == "distributed"


class EvalConfig(Section):
    """What is drawn and measured on the way and at the end."""

    every: PositiveInt
    images_per_class: PositiveInt
    num_images: int = Field(ge=0, description=">= 0 (0: off)")
    metrics_every: PositiveInt | None
    final_metrics: bool
    num_per_class: PositiveInt | None
    seed: Seed
    batch_size: PositiveInt | None
    precision: Precision
    extractor: Literal["auto", "inception", "classifier", "efficientnet", "exported"]
    image_range: Literal["correct", "paper"]
    inception_weights: str
    exported_program: str

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            self.metrics_every is None or self.num_images >= MIN_MEASURED_IMAGES,
            "eval.num_images",
            f">= {MIN_MEASURED_IMAGES} with eval.metrics_every, which measures as many",
            self.num_images,
        )
        require(
            self.extractor != "exported" or self.exported_program != "",
            "eval.exported_program",
            "the file of a program for eval.extractor=exported",
            self.exported_program,
        )
        return self


class AuditConfig(Section):
    """Attacks on the weights, in the run: which images were they trained on?"""

    at_end: bool
    every: PositiveInt | None
    num_images: int = Field(ge=20, description=">= 20")


class Config(Section):
    """A whole run."""

    experiment: str
    output_dir: str
    run_name: str
    resume: bool
    seed: Seed
    data: DataConfig
    partition: PartitionConfig
    model: Annotated[SerializeAsAny[ModelConfig], BeforeValidator(of_family)]
    diffusion: DiffusionConfig | None
    train: TrainConfig
    strategy: StrategyConfig
    federation: FederationConfig
    privacy: PrivacyConfig
    eval: EvalConfig
    audit: AuditConfig

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            self.run_name not in ("", ".", "..") and "/" not in self.run_name,
            "run_name",
            "the name of one folder, without a slash",
            self.run_name,
        )
        self.model.check_images(self.data)
        require(
            self.model.accumulates or self.train.accumulation == 1,
            "train.accumulation",
            f"1 with model.family={self.model.family}, whose optimizers follow each other; "
            "train.batch_size alone says what a step is taken on",
            self.train.accumulation,
        )
        given, diffuses = self.diffusion is not None, self.model.diffuses
        require(
            given == diffuses,
            "diffusion",
            f"{'given' if diffuses else 'null'} with model.family={self.model.family}",
            "its values" if given else None,
        )
        if self.diffusion is not None:
            self.model.check_label_dropout(self.diffusion.label_dropout)
        if self.privacy.is_on:
            self._check_private()
        if self.privacy.protects_clients:
            self._check_private_clients()
        self._check_strategy()
        self._check_optimizer_state()
        self._check_sharing()
        require(
            self.train.warmup_rounds < self.federation.rounds,
            "train.warmup_rounds",
            f"below federation.rounds={self.federation.rounds}, or no round would reach train.lr",
            self.train.warmup_rounds,
        )
        for name, off in MEASURING_OFF.items() if not self.model.draws else ():
            section, _, field = name.partition(".")
            given_value = getattr(getattr(self, section), field)
            require(
                given_value == off,
                name,
                f"left out with model.family={self.model.family}, which draws no images",
                given_value,
            )
        return self

    def _check_strategy(self) -> None:
        name, federation = self.strategy.name, self.federation
        require(
            not (self.strategy.corrects_clients and federation.secure_aggregation),
            "strategy.name",
            "another with federation.secure_aggregation=true, such as fedprox or fedadam: the sum "
            "leaves out who did not answer in time, and the terms that hospitals keep would no "
            "longer add up to the server's",
            name,
        )
        require(
            not (self.strategy.corrects_clients and self.privacy.unit),
            "strategy.name",
            f"another with privacy.mechanism={self.privacy.mechanism}, such as fedprox or fedadam: "
            "its terms would add up the noise of all rounds, or tell what has no noise",
            name,
        )
        require(
            name != "scaffold" or federation.aggregation == "fedavg",
            "federation.aggregation",
            "fedavg with strategy.name=scaffold: its corrections cancel out in the mean alone",
            federation.aggregation,
        )
        require(
            name != "scaffold" or federation.max_update_norm is None,
            "federation.max_update_norm",
            "null with strategy.name=scaffold, whose second array it would not bound",
            federation.max_update_norm,
        )
        rounded = federation.wire_dtype in ("int8", "int4")
        require(
            name != "feddyn" or not rounded or federation.error_feedback,
            "federation.error_feedback",
            f"true with strategy.name=feddyn and federation.wire_dtype={federation.wire_dtype}, or "
            "the terms of clients and server drift apart",
            federation.error_feedback,
        )
        require(
            name != "feddyn" or federation.aggregation in ("fedavg", "bounded_mean"),
            "federation.aggregation",
            "fedavg or bounded_mean with strategy.name=feddyn, whose server adds up the mean",
            federation.aggregation,
        )

    def _check_optimizer_state(self) -> None:
        state, federation = self.train.optimizer_state, self.federation
        require(
            state == "new" or not self.privacy.is_distributed,
            "train.optimizer_state",
            "new with privacy.noise=distributed, where the server takes the steps",
            state,
        )
        if state != "averaged":
            return
        require(
            not federation.secure_aggregation and not self.privacy.unit,
            "train.optimizer_state",
            "new or kept with federation.secure_aggregation=true or privacy: moments that are sent "
            "would have neither a mask nor noise",
            state,
        )
        require(
            federation.aggregation == "fedavg" and federation.max_update_norm is None,
            "train.optimizer_state",
            "new or kept unless federation.aggregation=fedavg and federation.max_update_norm=null, "
            "which bound weights and not moments",
            state,
        )

    def _check_sharing(self) -> None:
        federation = self.federation
        if federation.drawn_by == "clients":
            self._check_drawn_by_clients()
        if federation.sharing == "whole":
            return
        why = "with federation.sharing=usplit, where half of the clients send a part"
        require(
            federation.aggregation == "fedavg",
            "federation.aggregation",
            f"fedavg {why}",
            federation.aggregation,
        )
        require(
            not federation.secure_aggregation,
            "federation.secure_aggregation",
            f"false {why}: of a part that two hospitals send, each would know the other's",
            federation.secure_aggregation,
        )
        require(
            not federation.keep_local_models,
            "federation.keep_local_models",
            f"[] {why}: no client's whole model is known",
            federation.keep_local_models,
        )
        require(
            not federation.error_feedback,
            "federation.error_feedback",
            f"false {why}, another one in each round",
            federation.error_feedback,
        )
        require(
            not self.strategy.corrects_clients,
            "strategy.name",
            f"another {why}, such as fedprox or fedadam: what clients keep would not add up",
            self.strategy.name,
        )
        require(
            not self.privacy.unit,
            "privacy.mechanism",
            f"none {why}: its noise is of sums of all clients",
            self.privacy.mechanism,
        )
        sampled = federation.clients_per_round
        clients = sampled or federation.num_supernodes
        require(
            clients >= 2,
            "federation.num_supernodes" if sampled is None else "federation.clients_per_round",
            f"at least 2 {why}",
            clients,
        )

    def _check_drawn_by_clients(self) -> None:
        why = "with federation.drawn_by=clients, where each hospital's own model draws"
        federation = self.federation
        require(
            not federation.secure_aggregation and not self.privacy.unit,
            "federation.drawn_by",
            "global with federation.secure_aggregation=true or privacy: the model of a single "
            "hospital would have neither a mask nor noise",
            federation.drawn_by,
        )
        require(
            self.model.draws,
            "federation.drawn_by",
            f"global with model.family={self.model.family}, which draws no images",
            federation.drawn_by,
        )
        sampled = federation.clients_per_round
        require(
            sampled in (None, federation.num_supernodes),
            "federation.clients_per_round",
            f"null {why} its own classes, so that all must train",
            sampled,
        )
        for name, usual, because in (
            ("sharing", "whole", "and sends all of it"),
            ("ema_decay", None, "and no average"),
        ):
            value = getattr(federation, name)
            require(
                value == usual,
                f"federation.{name}",
                f"{'null' if usual is None else usual} {why} {because}",
                value,
            )

    def _check_private(self) -> None:
        asked = f"with privacy.mechanism={self.privacy.mechanism}"
        require(
            not self.model.not_private,
            "model.family",
            f"another {asked}: {self.model.not_private}",
            self.model.family,
        )
        require(
            self.train.num_processes in (None, 1),
            "train.num_processes",
            f"1 {asked}, which trains in one process",
            self.train.num_processes,
        )
        require(
            self.train.client_batch_fraction == 1,
            "train.client_batch_fraction",
            f"1 {asked}, whose steps are of privacy.sampling_rate",
            self.train.client_batch_fraction,
        )
        require(
            self.federation.wire_dtype in ("float32", "float16"),
            "federation.wire_dtype",
            f"float32 or float16 {asked}, whose noise is in every value",
            self.federation.wire_dtype,
        )
        if self.privacy.is_distributed:
            self._check_distributed_noise(int(self.privacy.colluders or 0))

    def _check_private_clients(self) -> None:
        why = "with privacy.mechanism=dp_clients"
        require(
            self.train.mode == "federated",
            "train.mode",
            f"federated {why}, which protects clients",
            self.train.mode,
        )
        require(
            self.federation.aggregation in ("fedavg", "bounded_mean"),
            "federation.aggregation",
            f"fedavg or bounded_mean {why}: of a mean it is known how far a client can move it",
            self.federation.aggregation,
        )

    def _check_distributed_noise(self, colluders: int) -> None:
        why = "with privacy.noise=distributed"
        federation = self.federation
        require(
            federation.secure_aggregation,
            "federation.secure_aggregation",
            f"true {why}: a single hospital's share of the noise hides little",
            federation.secure_aggregation,
        )
        require(
            self.train.local_epochs == 1,
            "train.local_epochs",
            f"1 {why}, a round of which is one step",
            self.train.local_epochs,
        )
        require(
            self.strategy.name == "fedavg",
            "strategy.name",
            f"fedavg {why}, where the server takes the steps of the model's own optimizer",
            self.strategy.name,
        )
        for name, usual in (
            *(("lr_schedule", "constant"), ("warmup_rounds", 0)),
            ("client_lr_factor", 1),
        ):
            value = getattr(self.train, name)
            require(
                value == usual,
                f"train.{name}",
                f"{usual} {why}, where the server takes the steps, all with train.lr",
                value,
            )
        clients = federation.clients_per_round or federation.num_supernodes
        least = max(colluders, (clients + colluders) // 2) + 1
        require(
            federation.min_replies >= least,
            "federation.min_replies",
            f"at least {least} {why}: with privacy.colluders={colluders} of {clients} hospitals "
            "fewer do not have all of the noise, or could take the masks off of two sums",
            federation.min_replies,
        )
        require(
            not federation.local,
            "federation.local",
            f"[] {why}, where the server takes the step for all parts of the model",
            federation.local,
        )

    @property
    def tells_of_clients(self) -> bool:
        """Whether single clients may be told of; not where protected, or hidden in a sum."""
        return not (self.privacy.is_on or self.federation.secure_aggregation)

    @property
    def drawing_values(self) -> tuple[str, ...]:
        """Paths of the values that change how images are drawn from weights, and no weights."""
        return (*SAMPLER_VALUES * self.model.diffuses, *self.model.drawing_values)

    @property
    def loss_values(self) -> tuple[str, ...]:
        """Paths of the values in which runs agree whose losses can be compared."""
        if self.model.diffuses:
            return (*OBJECTIVE_VALUES, *self.model.loss_values)
        return ("model.family", *self.model.loss_values)

    @property
    def generation_values(self) -> frozenset[str]:
        """Paths of the values that may be changed of a run to draw images from it."""
        free = {"seed", "train.device", "eval.batch_size", "eval.precision"}
        return frozenset({*free, *self.drawing_values})

    def changed(self, values: Mapping[str, object]) -> "Config":
        """Return a copy with other values, by dotted path: `{"train.lr": 0.1}`.

        Raises:
            ValueError: the configuration has no such value, or does not allow it.
        """
        return config_of(flat_values(self) | dict(values))


def require_diffusion(config: Config) -> DiffusionConfig:
    """Return the section `diffusion` of a configuration.

    Raises:
        ValueError: the family of the model has none.
    """
    if config.diffusion is None:
        raise ValueError(f"model.family={config.model.family} has no diffusion")
    return config.diffusion


def config_of(values: Mapping[str, Any]) -> Config:
    """Make a configuration of all its values by dotted path.

    Raises:
        ValueError: a value is missing, unknown, of the wrong type or out of range.
    """
    tree: dict[str, Any] = {}
    for path, value in values.items():
        section, _, name = path.rpartition(".")
        part = tree.setdefault(section, {}) if section else tree
        if part is None:
            raise ValueError(f"configuration: no such value: {path} ({section} is null)")
        part[name] = value
    return checked(tree)


def checked(tree: Mapping[str, Any]) -> Config:
    """Make a configuration of its values, nested by section.

    Raises:
        ValueError: a value is missing, unknown, of the wrong type or out of range.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        values = leaves(tree)
        fields = schema_fields(values.get("model.family"))
        raise ValueError(explanation(error, values, fields)) from error


def schema_fields(family: object = None) -> dict[str, FieldInfo]:
    """List the field of every value by dotted path, with those of a family, or of all.

    A family without diffusion has the one value `diffusion`, null, in place of the section's.
    """
    models = model_schemas(family).values()
    fields: dict[str, FieldInfo] = {}
    for name, field in Config.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))
        sections = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)]
        if sections == [ModelConfig]:
            sections = [*models]
        if not sections or (name == "diffusion" and not any(each.diffuses for each in models)):
            fields[name] = field
            continue
        for section in sections:
            for value, its_field in section.model_fields.items():
                fields.setdefault(f"{name}.{value}", its_field)
    return fields


def value_paths() -> dict[str, Any]:
    """List the dotted path and the type of every value of the configuration."""
    return {path: field.annotation for path, field in schema_fields().items()}


@cache
def choices(path: str) -> tuple[Any, ...]:
    """Return the words that a value may be."""
    return get_args(value_paths()[path])


EXTRACTORS = choices("eval.extractor")
IMAGE_RANGES = choices("eval.image_range")


def flat_values(config: Config) -> dict[str, Any]:
    """Flatten a configuration to dotted paths, for comparing and recording it."""
    return leaves(config.model_dump())


def leaves(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to the dotted path of every value."""
    found: dict[str, Any] = {}
    for key, child in tree.items():
        path = f"{prefix}{key}"
        found |= leaves(child, f"{path}.") if isinstance(child, dict) else {path: child}
    return found


def require_data_root(config: Config) -> None:
    """Raise a FileNotFoundError unless the folder of a data set of files is there.

    Raises:
        FileNotFoundError: it is not.
    """
    if config.data.name in FILE_SETS:
        require_folder(Path(config.data.root).expanduser())


def anchored(config: Config, folder: Path) -> Config:
    """Make the paths of a configuration absolute; relative ones count from `folder`."""
    values = flat_values(config)
    # Empty: none.
    files = ["data.patients", "train.start_from", "eval.inception_weights", "eval.exported_program"]
    if (frozen := config.model.frozen_file) is not None:
        files.append(frozen.path_value)
    paths = ["output_dir", "data.root", "data.cache_dir", *(file for file in files if values[file])]
    return config.changed(
        {path: str((folder / Path(values[path]).expanduser()).absolute()) for path in paths}
    )


def settle_precisions(config: Config, **precisions: str) -> Config:
    """Replace the precisions that are still "auto", given by section: `train="bfloat16"`."""
    open_ones = (name for name in precisions if getattr(config, name).precision == "auto")
    return config.changed({f"{name}.precision": precisions[name] for name in open_ones})


def settle_extractor(config: Config, extractor: str) -> Config:
    """Replace an `eval.extractor` that is still "auto"."""
    settled = config.eval.extractor != "auto"
    return config if settled else config.changed({"eval.extractor": extractor})


def settle_frozen_file(config: Config) -> Config:
    """Write the SHA-256 of what a run freezes into its configuration, where it is left open.

    All of a run, a resumed one too, then trains on top of the same file or not at all.

    Args:
        config: of the run, with absolute paths.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: none is named, or it is another than the configuration tells.
    """
    if (frozen := config.model.frozen_file) is None:
        return config
    values = flat_values(config)
    _, sha256 = frozen.read(values[frozen.path_value], values[frozen.sha256_value])
    return config.changed({frozen.sha256_value: sha256})
