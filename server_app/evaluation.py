"""What is drawn and measured of the global weights, on the way and at the end."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from server_app.hospital_scores import (
    combined_records,
    describe_scores,
    is_scored,
    scored_labels,
    scoring_settings,
    wants_scores,
)
from server_app.launch.time_estimate import seconds_to_draw
from server_app.log import log
from task.checks import require
from task.config import MIN_MEASURED_IMAGES, Config
from task.data import Dataset, ImageSet
from task.evaluation.comparison import RealFeatures, extract_real, training_halves
from task.evaluation.evaluate import evaluate_images, quick_measures
from task.evaluation.features import FeatureExtractor, build_extractor
from task.evaluation.hospital_scores import HospitalScores
from task.evaluation.metrics import Use
from task.files import write_json
from task.generation.draw_images import balanced_labels, draw_images, full_labels
from task.generation.grids import mosaic, save_sample_grid
from task.generators.base import Generator
from task.generators.registry import with_weights
from task.protocol.wire import Key
from task.randomness import Stream
from task.runs.checkpoint import load_weights
from task.runs.evaluations import Evaluation, evaluation_file, evaluation_of
from task.runs.layout import METRICS_FILE, NODES_FILE, read_json, weights_file
from task.runs.records import (
    HELD_OUT,
    SCORING_CLIENTS,
    SECONDS_EVALUATING,
    TRAIN,
    Record,
    Records,
    read_records,
)
from task.runs.writer import RunWriter


def wants_metrics(config: Config) -> bool:
    """Whether a run is to look through an extractor, so that it must be there."""
    return config.eval.final_metrics or config.eval.metrics_every is not None


def is_measured(path: Path, config: Config) -> bool:
    """Whether the final images of the run in a folder were measured, or are not to be."""
    last = config.federation.rounds
    if (path / NODES_FILE).exists():
        return is_scored(path, config)  # by real nodes, whose images stay with them
    if config.eval.final_metrics:
        file = evaluation_file(path, config)
        if not file.exists():
            return False
        found = evaluation_of(read_json(file), file)
        asked = last, config.eval.seed, config.eval.num_per_class
        return asked == (found.round, found.label.seed, found.num_per_class)
    measured = read_records(path / METRICS_FILE).by_round("class_agreement")
    return config.eval.num_images == 0 or last in measured


def check_numbers(config: Config, dataset: Dataset) -> None:
    """Check that the metrics that a run is to end with have enough images.

    Raises:
        ValueError: they have not.
    """
    if config.eval.final_metrics:
        labels, names = full_labels(config, dataset), config.data.classes
        require(
            len(labels) >= MIN_MEASURED_IMAGES and len(set(labels.tolist())) == len(names),
            "eval.num_per_class",
            f"a number that makes {MIN_MEASURED_IMAGES} images or more, or null where the test "
            "images are as many and of every class",
            config.eval.num_per_class,
        )
    # Without test images one half of the training images is measured against the other.
    needed = MIN_MEASURED_IMAGES if len(dataset.test) > 0 else 2 * MIN_MEASURED_IMAGES
    for part, images in (("training", dataset.train), ("test", dataset.test)):
        require(
            len(images) >= needed or (part == "test" and len(images) == 0),
            f"the {part} images",
            f"at least {needed} for eval.final_metrics and eval.metrics_every",
            len(images),
        )
    if len(dataset.test) == 0:
        train = dataset.train
        smaller = min(map(len, training_halves(len(train), train.groups, config.eval.seed)))
        require(
            smaller >= MIN_MEASURED_IMAGES,
            "the training images, without test images,",
            f"of patients of whom each half has at least {MIN_MEASURED_IMAGES} images, for "
            "eval.final_metrics and eval.metrics_every",
            smaller,
        )


def is_complete(path: Path, config: Config) -> bool:
    """Whether the run in a folder, which has final weights, is done with all that was asked."""
    _, metadata = load_weights(weights_file(path))
    return int(metadata["round"]) == config.federation.rounds and is_measured(path, config)


class GlobalEvaluation(ABC):
    """Pictures and measurements of the global weights of a run."""

    def __init__(
        self, directory: RunWriter, model: Generator, *, device: torch.device, audits: bool
    ) -> None:
        """Make ready to draw.

        Args:
            directory: of the run, open.
            model: of the run; its weights are replaced for every picture and measurement.
            device: that draws and measures.
            audits: whether somebody can look for what the weights remember.
        """
        self._directory = directory
        self._audits = audits
        self._model = model
        self._device = device
        self._seconds_per_image: float | None = None

    @abstractmethod
    def is_metrics_due(self, server_round: int) -> bool:
        """Whether a round is to be measured at a small size; the full metrics need no second."""

    @abstractmethod
    def measure(self, server_round: int, weights: Mapping[str, Tensor]) -> str:
        """Measure `eval.num_images` images by what is quick; say the distance in few words."""

    @abstractmethod
    def measure_final(self, server_round: int, weights: Mapping[str, Tensor]) -> None:
        """Measure the final images as the configuration asks, record and log what is found."""

    @abstractmethod
    def num_final_images(self) -> int:
        """Return how many images `measure_final` draws."""

    def seconds_at_end(self) -> float:
        """Estimate how long `measure_final` draws."""
        return self.num_final_images() * self._expected_seconds_per_image()

    def seconds_of_grid(self) -> float:
        """Estimate how long `draw_grid` draws."""
        config = self._config
        num_images = len(config.data.classes) * config.eval.images_per_class
        return num_images * self._expected_seconds_per_image()

    @property
    def _config(self) -> Config:
        # Not kept: the precision of drawing may be settled later than this object is made.
        return self._directory.config

    def is_due(self, server_round: int) -> bool:
        """Whether a round is to be evaluated and has not been yet: its picture comes last."""
        every = self._config.eval.every
        due = self.is_metrics_due(server_round) or self.is_audit_due(server_round)
        chosen = server_round % every == 0 or due
        last = server_round == self._config.federation.rounds
        return server_round > 0 and (chosen or last) and not self._is_evaluated(server_round)

    def _is_evaluated(self, server_round: int) -> bool:
        return self._directory.samples_file(server_round).exists()

    def draw_grid(self, server_round: int, weights: Mapping[str, Tensor]) -> None:
        """Draw and save the picture of a round: a row per class, in every round of equal noise."""
        config, columns = self._config, self._config.eval.images_per_class
        labels = torch.arange(len(config.data.classes)).repeat_interleave(columns)
        images = self._draw(weights, labels, Stream.SAMPLE_GRID).images
        save_sample_grid(
            images,
            self._directory.samples_file(server_round),
            classes=config.data.classes,
            images_per_class=columns,
            title=f"{config.run_name}, round {server_round}",
        )
        pixels = torch.from_numpy(mosaic(images, columns)).permute(2, 0, 1)
        self._directory.record_picture(server_round, "samples", pixels)

    def is_audit_due(self, server_round: int) -> bool:
        """Whether it is to be looked for what the weights of a round remember."""
        audit, last = self._config.audit, self._config.federation.rounds
        every = audit.every is not None and server_round % audit.every == 0
        return self._audits and (every or (audit.at_end and server_round == last))

    def search(self, server_round: int, weights: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Search images of a round for copies, where real ones are at hand, and record it."""

    def _draw(self, weights: Mapping[str, Tensor], labels: Tensor, stream: Stream) -> ImageSet:
        model = with_weights(self._config, self._model, weights)
        start = time.monotonic()
        drawn = draw_images(self._config, model, labels, device=self._device, stream=stream)
        self._seconds_per_image = (time.monotonic() - start) / len(labels)
        return drawn

    def _expected_seconds_per_image(self) -> float:
        """Return what an image took when images were drawn last, or what a few steps say."""
        if self._seconds_per_image is None and self._device.type == "cuda":
            return 0.0  # a GPU would compile for the step, which takes longer than images do
        if self._seconds_per_image is None:
            precision = self._config.eval.precision
            self._seconds_per_image = seconds_to_draw(self._model, self._device, precision)
        return self._seconds_per_image


class NoImagesEvaluation(GlobalEvaluation):
    """That of a family that draws no images: there is nothing but the loss on held-out images."""

    def __init__(
        self, directory: RunWriter, model: Generator, *, device: torch.device, audits: bool
    ) -> None:
        """Find which rounds were evaluated; see `GlobalEvaluation`."""
        super().__init__(directory, model, device=device, audits=audits)
        file = directory.path / METRICS_FILE
        self._evaluated = {*read_records(file).by_round(SECONDS_EVALUATING)}

    def is_metrics_due(self, server_round: int) -> bool:
        """Nothing is measured."""
        return False

    def measure(self, server_round: int, weights: Mapping[str, Tensor]) -> str:
        """Nothing is measured."""
        raise RuntimeError("no images are drawn")

    def measure_final(self, server_round: int, weights: Mapping[str, Tensor]) -> None:
        """Nothing is measured."""

    def num_final_images(self) -> int:
        """Return 0."""
        return 0

    def seconds_at_end(self) -> float:
        """Return 0."""
        return 0.0

    def seconds_of_grid(self) -> float:
        """Return 0."""
        return 0.0

    def draw_grid(self, server_round: int, weights: Mapping[str, Tensor]) -> None:
        """Draw nothing, and note that the round was evaluated."""
        self._evaluated.add(server_round)

    def _is_evaluated(self, server_round: int) -> bool:
        return server_round in self._evaluated


class PooledEvaluation(GlobalEvaluation):
    """Measurements against real images that lie on this machine."""

    def __init__(
        self,
        directory: RunWriter,
        model: Generator,
        *,
        dataset: Dataset,
        device: torch.device,
        audits: bool,
    ) -> None:
        """Make ready what the run will look through; see `GlobalEvaluation`.

        Args:
            directory: of the run, open.
            model: of the run.
            dataset: the real images.
            device: that draws and measures.
            audits: see `GlobalEvaluation`.

        Raises:
            FileNotFoundError: files of the extractor are missing.
            ValueError: they are not what they should be.
        """
        super().__init__(directory, model, device=device, audits=audits)
        self._dataset = dataset
        self._extractor: FeatureExtractor | None = None
        self._real: RealFeatures | None = None
        if wants_metrics(self._config):
            check_numbers(self._config, dataset)
            self._extractor = build_extractor(self._config, dataset.train, device)

    def is_metrics_due(self, server_round: int) -> bool:
        """Whether a round is to be measured at a small size; the full metrics need no second."""
        every, last = self._config.eval.metrics_every, self._config.federation.rounds
        if every is None or server_round % every != 0:
            return False
        return server_round != last or not self._config.eval.final_metrics

    def num_final_images(self) -> int:
        """Return how many images `measure_final` draws."""
        config = self._config
        if config.eval.final_metrics:
            return len(full_labels(config, self._dataset))
        return config.eval.num_images

    def measure(self, server_round: int, weights: Mapping[str, Tensor]) -> str:
        """Measure `eval.num_images` images by what is quick; say the distance in few words."""
        found = self._evaluate(server_round, weights, Use.ROUNDS)
        return f"FD (train) {found.records.value('fid', reference=TRAIN):.2f}"

    def measure_final(self, server_round: int, weights: Mapping[str, Tensor]) -> None:
        """Measure the final images with all metrics, or by what costs little."""
        if self._config.eval.final_metrics:
            found = self._evaluate(server_round, weights, Use.EVALUATION)
            file = evaluation_file(self._directory.path, self._config)
            write_json(file, found.content())
            label = found.label
            fid, floor = (
                found.records.value("fid", reference=TRAIN, real=real) for real in (False, True)
            )
            log(
                f"FD (train) {fid:.2f} of {label.n_generated} images, {floor:.2f} of "
                f"{label.n_floor} real ones (extractor {label.extractor}, image range "
                f"{label.image_range}); all metrics: {file}"
            )
        elif self._config.eval.num_images > 0:
            self._measure_quickly(server_round, weights)

    def search(self, server_round: int, weights: Mapping[str, Tensor]) -> None:
        """Search `eval.num_images` images for copies, as at the end."""
        if self._config.eval.num_images == 0:
            return
        labels = balanced_labels(self._config.eval.num_images, len(self._config.data.classes))
        found = quick_measures(
            self._config,
            self._draw(weights, labels, Stream.FINAL_IMAGES),
            self._dataset,
            server_round=server_round,
            device=self._device,
            use=Use.AUDIT,
        )
        self._directory.record(found.all)

    def _measure_quickly(self, server_round: int, weights: Mapping[str, Tensor]) -> None:
        """Measure `eval.num_images` images by what costs little."""
        config, dataset = self._config, self._dataset
        labels = balanced_labels(config.eval.num_images, len(config.data.classes))
        images = self._draw(weights, labels, Stream.FINAL_IMAGES)
        found = quick_measures(
            config, images, dataset, server_round=server_round, device=self._device
        )
        self._directory.record(found.all)
        real = found.value("class_agreement", real=True)
        beside = "there are no real test images" if real is None else f"of real ones in {real:.1%}"
        log(
            f"a classifier trained on the real images finds the asked class in "
            f"{found.value('class_agreement'):.1%} of {len(images)} generated images ({beside}, "
            f"by chance in {found.value('chance_agreement'):.1%})"
        )

    def _evaluate(self, server_round: int, weights: Mapping[str, Tensor], use: Use) -> Evaluation:
        """Draw images, measure them through the extractor and record what is found."""
        config, dataset, extractor = self._config, self._dataset, self._extractor
        if extractor is None:
            raise RuntimeError("metrics need an extractor")
        if self._real is None:
            self._real = extract_real(config, dataset, extractor)
        if use is Use.EVALUATION:
            labels = full_labels(config, dataset)
        else:
            labels = balanced_labels(config.eval.num_images, len(config.data.classes))
        found = evaluate_images(
            config,
            self._draw(weights, labels, Stream.EVALUATED_IMAGES),
            dataset,
            extractor=extractor,
            server_round=server_round,
            real=self._real,
            use=use,
        )
        self._directory.record(found.records.all)
        return found


class HospitalEvaluation(GlobalEvaluation):
    """Measurements by hospitals, each against its own images, which stay there."""

    def __init__(
        self,
        directory: RunWriter,
        model: Generator,
        *,
        device: torch.device,
        audits: bool,
        ask: Callable[[int, ImageSet], list[HospitalScores]],
    ) -> None:
        """Make ready to draw; see `GlobalEvaluation`.

        Args:
            directory: of the run, open.
            model: of the run.
            device: that draws.
            audits: see `GlobalEvaluation`.
            ask: lets the hospitals score the images of a round.
        """
        super().__init__(directory, model, device=device, audits=audits)
        self._ask = ask

    def is_metrics_due(self, server_round: int) -> bool:
        """Whether a round is to be scored; the final images are scored in any case."""
        every, last = self._config.eval.metrics_every, self._config.federation.rounds
        return every is not None and server_round % every == 0 and server_round != last

    def num_final_images(self) -> int:
        """Return how many images `measure_final` draws."""
        return len(scored_labels(self._config, last=True)) if wants_scores(self._config) else 0

    def measure(self, server_round: int, weights: Mapping[str, Tensor]) -> str:
        """Let the hospitals score `eval.num_images` images; say the distance in few words."""
        found, num_hospitals = self._score(server_round, weights, last=False)
        if num_hospitals == 0:
            return "scored at no hospital"
        fid, floor = (found.value("fid", reference=HELD_OUT, real=real) for real in (False, True))
        return f"FD {fid:.2f} at {num_hospitals} hospitals (their own floor {floor:.2f})"

    def measure_final(self, server_round: int, weights: Mapping[str, Tensor]) -> None:
        """Let the hospitals score the final images, and log what they find together."""
        if not wants_scores(self._config):
            return
        found, num_hospitals = self._score(server_round, weights, last=True)
        if num_hospitals > 0:
            log(describe_scores(found, num_hospitals, self._config))
        else:
            log("no images are scored: no hospital said how they compare with its own")

    def _score(
        self, server_round: int, weights: Mapping[str, Tensor], *, last: bool
    ) -> tuple[Records, int]:
        """Return what hospitals say together, and how many of them have scored."""
        config = self._config
        images = self._draw(weights, scored_labels(config, last=last), Stream.EVALUATED_IMAGES)
        answers = self._ask(server_round, images)
        scores = [answer for answer in answers if answer[Key.NUM_EXAMPLES] > 0]
        if len(scores) < len(answers):
            without = len(answers) - len(scores)
            log(
                f"round {server_round}: {without} hospitals decline to score or have too few images"
            )
        n, found = len(images), []
        if scores:
            found = combined_records(server_round, scores, config, n=n)
        # Without any answer the scoring is still to be done: a resumed run asks again.
        if answers:
            context = scoring_settings(config)
            found.append(Record(server_round, SCORING_CLIENTS, len(scores), n=n, context=context))
        self._directory.record(found)
        return Records(tuple(found)), len(scores)
