"""The paper's baseline: the same training on the pooled data, without clients."""

import math
import time
from collections.abc import Mapping

from server_app.dataset import check_privacy, load_images, record_data
from server_app.rounds import RoundLoop
from task.data import Dataset
from task.progress import progress
from task.protocol.wire import Weights
from task.randomness import Stream, torch_generator
from task.runs.layout import POOLED_FILE
from task.runs.records import TEST, TRAIN, Record, records_of
from task.runs.writer import RunWriter
from task.training.devices import compile_where_wanted, keep_freed_memory, move, torch_configured
from task.training.distributed import count_processes
from task.training.learning_rate import adopt_learning_rates, round_lr
from task.training.loop import fit, fit_options, held_out_losses
from task.training.optimizer_state import load_optimizer_tensors, optimizer_tensors


class CentralizedTraining(RoundLoop):
    """`federation.rounds` times `train.local_epochs` epochs with the same optimizers.

    What a federated run calls a round is a stretch of `train.local_epochs` epochs here, so that
    equal rounds have seen equally many images and both are drawn and measured at the same points.

    Source: the row "Centralized" of Tables I and V of the paper.
    """

    dataset: Dataset

    def __init__(self, directory: RunWriter) -> None:
        """Load the images.

        Args:
            directory: of the run, open.

        Raises:
            FileNotFoundError: the data set is not there.
            ValueError: it does not fit the configuration.
        """
        super().__init__(directory)
        keep_freed_memory()
        self.dataset = load_images(self.config)
        train = self.config.train
        self.model.prepare(len(self.dataset.train))
        move(self.model, self.device, channels_last=train.channels_last)
        compile_where_wanted(
            self.model, train.compile, self.device, deterministic=train.deterministic
        )
        self._num_processes = count_processes(train.num_processes, self.device, one_per_gpu=False)
        self._optimizers = self.model.optimizers(train.lr)

    def gather(self) -> None:
        """Write down how many images of each class there are.

        Raises:
            ValueError: a resumed run was trained on others.
        """
        check_privacy(self.config, self.dataset, None)
        num_classes = len(self.config.data.classes)
        described = {
            f"{split}_counts": images.labels.bincount(minlength=num_classes).tolist()
            for split, images in (("train", self.dataset.train), ("test", self.dataset.test))
        }
        stored = self.directory.read_json(POOLED_FILE) if self.config.resume else described
        if stored not in (None, described):
            raise ValueError(
                f"resume: {self.directory.path} was trained on other images, {stored}, than those "
                f"of data.root={self.config.data.root}, {described}; start it with the same data"
            )
        self.directory.write_json(POOLED_FILE, described)
        record_data(self.config, self.dataset, self.directory, None)

    def describe(self) -> str:
        """Say how many images are pooled."""
        return f"centralized on {len(self.dataset.train):,} images"

    def train(self, server_round: int) -> str:
        """Run `train.local_epochs` epochs."""
        config = self.config
        self.phases.enter("epochs")
        start = time.monotonic()
        with (
            torch_configured(
                num_threads=config.train.num_threads, deterministic=config.train.deterministic
            ),
            progress(1, f"round {server_round}: training"),
        ):
            new = self.model.optimizers(round_lr(config, server_round))
            adopt_learning_rates(self._optimizers, new)
            result = fit(
                self.model,
                self.dataset.train.images,
                self.dataset.train.labels,
                options=fit_options(config, num_processes=self._num_processes),
                optimizers=self._optimizers,
                rng=torch_generator(config.seed, Stream.TRAIN, server_round, device=self.device),
                patients=self.dataset.train.groups,
            )
        self.phases.trained(result.seconds, since=start, until=time.monotonic())
        n = len(self.dataset.train)
        losses = {"loss": result.loss, **result.measures}
        finite = {name: each for name, each in losses.items() if math.isfinite(each)}
        measured = [
            Record(server_round, "images_per_second", result.images_per_second),
            *records_of(server_round, finite, reference=TRAIN, n=n),
        ]
        if why := self.why_diverged(losses):
            raise self.diverged(server_round, why, measured)
        self.weights = {n: t.detach().cpu().clone() for n, t in self.model.state_dict().items()}
        self.directory.record(measured)
        epochs = server_round * config.train.local_epochs
        return f"train loss {result.loss:.4f}, {epochs} epochs"

    def why_diverged(self, losses: Mapping[str, float]) -> str:
        """Say why the losses of a round or the weights after it show no training; else nothing."""
        if why := self.model.why_diverged(losses):
            return why
        finite = all(bool(t.isfinite().all()) for t in self.model.state_dict().values())
        return "" if finite else "weights that are not finite"

    def evaluate(self, server_round: int) -> str | None:
        """Measure the loss on the test split, if there are both, drawn alike in every round."""
        test = self.dataset.test
        if len(test) == 0:
            return None
        losses = held_out_losses(
            self.model,
            test.images,
            test.labels,
            options=fit_options(self.config),
            rng=torch_generator(self.config.seed, Stream.EVALUATE, device=self.device),
        )
        if losses is None:
            return None
        if not all(map(math.isfinite, losses.values())):
            told = ", ".join(f"{name} {value}" for name, value in losses.items())
            raise self.diverged(server_round, f"test {told}")
        self.directory.record(records_of(server_round, losses, reference=TEST, n=len(test)))
        return f"test loss {losses['loss']:.4f}"

    def state(self) -> dict[str, Weights]:
        """Return what each optimizer has gathered."""
        return {name: optimizer_tensors(each) for name, each in self._optimizers.items()}

    def restore(self, state: Mapping[str, Weights]) -> None:
        """Put the weights into the model and what the optimizers had gathered into them."""
        self.model.load_state_dict(self.weights)
        for name, optimizer in self._optimizers.items():
            load_optimizer_tensors(optimizer, state[name])
