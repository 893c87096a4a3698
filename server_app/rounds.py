"""What every run does, with clients or without: rounds, checkpoints, pictures, measurements."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from statistics import fmean

from server_app.evaluation import (
    GlobalEvaluation,
    NoImagesEvaluation,
    PooledEvaluation,
    is_measured,
)
from server_app.log import log
from server_app.timing import PhaseTimer
from task.audit.membership import Attack, Shares, attack_members
from task.audit.records import attack_records, audit_record
from task.code_version import code_fingerprint, installed_versions
from task.config import package_of, settle_extractor, settle_precisions
from task.data import Dataset
from task.evaluation.features import automatic_extractor
from task.generators.registry import can_draw, check_drawn, initial_generator, with_weights
from task.progress import duration, progress
from task.protocol.wire import Weights
from task.reporting.run_summary import summary_lines
from task.reporting.warning_signs import closing_lines
from task.runs.commands import describe_divergence, describe_report_of
from task.runs.layout import (
    MACHINE_FILE,
    PRIVATE_TRAININGS_FILE,
    REPORT_FILE,
    START_FILE,
    final_round,
)
from task.runs.records import DIVERGENCE, SECONDS_EVALUATING, SPENT_EPSILON, Record
from task.runs.run import Run
from task.runs.starting_weights import describe_starting_weights, load_starting_weights
from task.runs.writer import RunWriter
from task.training.devices import (
    device_name,
    is_compiled,
    missing_for_compiling,
    move,
    select_device,
)
from task.training.precision import fastest_precision
from task.training.private import check_private_run, epsilon_after, too_little_noise


class TooFewRepliesError(RuntimeError):
    """An attempt at a round that had fewer than `federation.min_replies` usable replies."""


class DivergedError(RuntimeError):
    """A training that cannot go on: see `Generator.why_diverged`, or weights are not finite."""


class RoundLoop(ABC):
    """The rounds of one run, from the first to the final weights.

    Attributes:
        config: of the run, resolved by `prepare`.
        weights: the global weights after the last complete round.
        dataset: all images; None with real nodes, whose images stay there.
        shares: of the simulated clients, as indices of the images.
        phases: of the round that is going on.
        seconds: of each round, "training", and of each evaluation, "evaluating".
        attempts: how often a round is tried.
    """

    attempts = 1

    def __init__(self, directory: RunWriter) -> None:
        """Make the initial weights of the run of an open directory; nothing is read yet."""
        config = directory.config
        self.config = directory.config = settle_extractor(config, automatic_extractor(config))
        self.dataset: Dataset | None = None
        self.shares: Shares = {}
        self.phases = PhaseTimer()
        self.seconds: dict[str, list[float]] = {"training": [], "evaluating": []}
        self.directory = directory
        self.device = select_device(self.config.train.device)
        self.model = initial_generator(self.config)
        if self.config.train.start_from and directory.last_round == 0:
            told = load_starting_weights(self.model, self.config.train.start_from)
            directory.write_json(START_FILE, told)
            log(f"{self.config.run_name} starts from {describe_starting_weights(told)}")
        check_private_run(self.model, self.config)
        check_drawn(self.model, self.config)
        self.weights: Weights = {n: t.clone() for n, t in self.model.state_dict().items()}

    @abstractmethod
    def gather(self) -> None:
        """Find what trains and, where it is on this machine, the data set; may settle `config`."""

    @abstractmethod
    def describe(self) -> str:
        """Say in a few words who trains."""

    @abstractmethod
    def train(self, server_round: int) -> str:
        """Train a round, move `weights`, record it, and say in a few words how it went.

        Enters the phases of a training and notes there how long was trained.

        Raises:
            TooFewRepliesError: nothing has changed, and it can be tried again.
        """

    @abstractmethod
    def evaluate(self, server_round: int) -> str | None:
        """Measure and record the loss on held-out images, and say it; None where there is none."""

    @abstractmethod
    def state(self) -> dict[str, Weights]:
        """Return what a checkpoint must hold besides the weights, by name."""

    @abstractmethod
    def restore(self, state: Mapping[str, Weights]) -> None:
        """Take up what `state` returned, after `weights` are those of the checkpoint."""

    def final_weights(self) -> Weights:
        """Return the weights that are drawn from, measured and given away."""
        return self.weights

    def run(self) -> None:
        """Run every round that is not complete yet, then measure and save the final weights.

        Raises:
            ValueError: the configuration does not fit the federation or the data.
            TimeoutError: the nodes did not come.
            RuntimeError: a round had fewer than `federation.min_replies` usable replies.
            DivergedError: a round has diverged; it is recorded, and the report is written.
        """
        for found in self.directory.damaged:
            log(found)
        rounds, done = self.config.federation.rounds, self.directory.last_round
        if done > rounds:
            raise ValueError(
                f"federation.rounds must be at least {done}, the last complete round of "
                f"{self.directory.path}, got {rounds}"
            )
        whole = final_round(self.directory.path) == rounds and not self.directory.damaged
        if whole and is_measured(self.directory.path, self.config):
            log(f"all {rounds} rounds are complete already; a larger federation.rounds goes on")
            if not (self.directory.path / REPORT_FILE).exists():
                self.report()
            return
        self.prepare()
        try:
            if self.evaluation.is_due(done):
                log(f"round {done}, once more: {self.evaluate_and_draw(done)}")
            for server_round in range(done + 1, rounds + 1):
                summary = self.play_round(server_round)
                left = duration(self.seconds_left(range(server_round + 1, rounds + 1)))
                images = self.evaluation.num_final_images()
                then = f", and {images:,} images to measure" if images else ""
                log(f"round {server_round}/{rounds}: {summary}, about {left} left{then}")
        except DivergedError:
            self.report()
            raise
        self.finish()

    def seconds_left(self, rounds: range) -> float:
        """Estimate the seconds until the rounds that are left and what follows are done."""
        training = fmean(self.seconds["training"] or [0.0])
        evaluating = fmean(self.seconds["evaluating"] or [self.evaluation.seconds_of_grid()])
        evaluations = sum(map(self.evaluation.is_due, rounds))
        at_end = self.evaluation.seconds_at_end()
        return len(rounds) * training + evaluations * evaluating + at_end

    def prepare(self) -> None:
        """Settle what depends on this machine and its nodes, and load the last complete round."""
        self.gather()
        # Real nodes settle the precision of their training themselves.
        settled_here = ("eval",) if self.dataset is None else ("train", "eval")
        if any(getattr(self.config, section).precision == "auto" for section in settled_here):
            with progress(1, "timing float32 and bfloat16"):
                precision = fastest_precision(self.config, self.model, self.device)
            self.config = settle_precisions(self.config, **dict.fromkeys(settled_here, precision))
        # Before anything is written: what it looks through may be missing.
        if can_draw(self.model, self.config):
            self.evaluation = self.open_evaluation()
        else:
            self.evaluation = NoImagesEvaluation(
                self.directory, self.model, device=self.device, audits=self.audits
            )
        self.directory.write_config(self.config)
        self.directory.write_json(MACHINE_FILE, self.describe_machine())
        train = self.config.train
        compiled = is_compiled(train.compile, self.device, deterministic=train.deterministic)
        if self.device.type == "cuda" and train.compile is None and not compiled:
            why = missing_for_compiling(self.device) or "code that is not train.deterministic"
            log(f"not compiled, which would train faster: no {why}")
        log(
            f"{self.config.run_name}: {self.describe()}, data {self.config.data.name}, "
            f"{sum(t.numel() for t in self.weights.values()):,} parameters, "
            f"{self.config.train.precision} on {self.device}{', compiled' if compiled else ''}"
        )
        stored = self.directory.load_checkpoint()
        if stored is not None:
            self.weights, state = stored
            self.restore(state)
            log(f"going on after round {self.directory.last_round}")

    def describe_machine(self) -> dict[str, object]:
        """Say what runs where, for those who read the run later."""
        if self.config.train.mode == "centralized":
            setting = "centralized"
        else:
            setting = "real nodes" if self.dataset is None else "simulation"
        return {
            "device": device_name(self.device),
            "setting": setting,
            "versions": installed_versions("feddm", "flwr", "torch"),
            "code": code_fingerprint(package_of(self.config.model.family)),
        }

    def open_evaluation(self) -> GlobalEvaluation:
        """Make ready what the run will measure its images by."""
        if self.dataset is None:
            raise RuntimeError("a run without images of its own must say who measures")
        return PooledEvaluation(
            self.directory,
            self.model,
            dataset=self.dataset,
            device=self.device,
            audits=self.audits,
        )

    def play_round(self, server_round: int) -> str:
        """Train, save, and evaluate where it is time to: a complete round.

        Returns:
            What happened, in one line.
        """
        self.phases = PhaseTimer()
        summary = self.train_and_retry(server_round)
        self.phases.enter("checkpoint")
        spent: dict[str, float] = {}

        def numbers() -> dict[str, float]:
            spent.update(self.phases.finish())
            return spent

        # Before the evaluation, so that no training is lost with it.
        self.directory.save_checkpoint(server_round, self.weights, self.state(), numbers=numbers)
        self.seconds["training"].append(spent["round_seconds"])
        if self.config.privacy.unit:
            summary += f", {self.record_privacy(server_round)}"
        summary += f", {duration(spent['round_seconds'])}"
        summary += f", {spent['overhead_share']:.0%} outside training"
        if self.evaluation.is_due(server_round):
            summary += f", {self.evaluate_and_draw(server_round)}"
        # Only now, because an evaluation can find that this round has diverged.
        self.directory.forget_checkpoints()
        self.directory.record_time()
        return summary

    def record_privacy(self, server_round: int) -> str:
        """Record what the rounds so far may have cost who is protected, and say it.

        With real nodes new noise is drawn for a round that is repeated, which costs once more.
        """
        times = server_round
        if self.dataset is None:
            times = max(times, self.private_trainings())
        epsilon = epsilon_after(self.config, times)
        if math.isinf(epsilon):
            return f"no privacy: there is {too_little_noise(self.config)}"
        context = {"delta": self.config.privacy.delta}
        self.directory.record([Record(server_round, SPENT_EPSILON, epsilon, context=context)])
        return f"epsilon {epsilon:.3g}"

    def private_trainings(self) -> int:
        """Return how often real nodes were asked to train, over all starts of the run."""
        return int((self.directory.read_json(PRIVATE_TRAININGS_FILE) or {"asked": 0})["asked"])

    def attempt(self, server_round: int) -> str:
        """Train a round; where it costs the privacy of real ones, count it first."""
        if self.config.privacy.unit and self.dataset is None:
            asked = {"asked": self.private_trainings() + 1}
            self.directory.write_json(PRIVATE_TRAININGS_FILE, asked)
        return self.train(server_round)

    def train_and_retry(self, server_round: int) -> str:
        """Train a round, and again, with the nodes that are there then, where too few replied.

        Raises:
            RuntimeError: too few did at every attempt.
        """
        for attempt in range(1, self.attempts):
            try:
                return self.attempt(server_round)
            except TooFewRepliesError as error:
                log(f"{error}; attempt {attempt} of {self.attempts}, nothing of it is kept")
        try:
            return self.attempt(server_round)
        except TooFewRepliesError as error:
            raise RuntimeError(f"{error}{self.what_is_saved()}") from error

    def what_is_saved(self) -> str:
        """Say after a failure what the run can go on from, if a round is complete."""
        last = self.directory.last_round
        if last == 0:
            return ""
        how = describe_report_of(self.directory.path)
        return f"; everything up to round {last} is saved, {how}"

    def diverged(
        self, server_round: int, reason: str, measured: Iterable[Record] = ()
    ) -> DivergedError:
        """Record that a round has diverged, and say what was saved before it and what to change.

        Args:
            server_round: 1-based.
            reason: what shows it.
            measured: what was measured of the round.
        """
        divergence = Record(server_round, DIVERGENCE, 1, context={"reason": reason})
        self.directory.record([*measured, divergence])
        return DivergedError(describe_divergence(self.config, self.directory.path, divergence))

    def evaluate_and_draw(self, server_round: int) -> str:
        """Measure a round and draw its picture; say in few words what was found."""
        start = time.monotonic()
        found = [self.evaluate(server_round) or "no test loss"]
        if self.evaluation.is_metrics_due(server_round):
            found.append(self.evaluation.measure(server_round, self.final_weights()))
        if self.evaluation.is_audit_due(server_round):
            found.append(self.audit(server_round))
        # Last, because it marks the round as evaluated.
        self.evaluation.draw_grid(server_round, self.final_weights())
        spent = time.monotonic() - start
        self.seconds["evaluating"].append(spent)
        self.directory.record([Record(server_round, SECONDS_EVALUATING, spent)])
        return ", ".join(found)

    @property
    def audits(self) -> bool:
        """Whether somebody can look for what the weights remember."""
        return self.dataset is not None or self.config.tells_of_clients

    def audit(self, server_round: int) -> str:
        """Look for what the weights of a round remember, record it, and say it in few words."""
        if server_round != self.config.federation.rounds:  # at the end it is done in any case
            self.evaluation.search(server_round, self.final_weights())
        attacks = self.attack(server_round)
        told = audit_record(server_round, attacks, self.attacked_clients())
        self.directory.record([*attack_records(server_round, attacks), told])
        if not attacks:
            return "not attacked"
        whole = [each for each in attacks if each.client is None]
        if not whole:
            return f"attacked by {len({each.client for each in attacks})} clients"
        strongest = min(whole, key=lambda each: each.found.p_value)
        return f"AUC of the strongest attack {strongest.found.auc:.2f} ({strongest.name})"

    def attacked_clients(self) -> list[int]:
        """List the clients each of whom is to be attacked by itself as well."""
        return [*self.shares] if self.config.tells_of_clients else []

    def attack(self, server_round: int) -> list[Attack]:
        """Attack the final weights of a round, as a whole and client by client."""
        if self.dataset is None:
            raise RuntimeError("a run without images of its own must say who attacks")
        model = with_weights(self.config, self.model, self.final_weights())
        move(model, self.device, channels_last=self.config.train.channels_last)
        return attack_members(
            model,
            self.dataset,
            num_images=self.config.audit.num_images,
            batch_size=self.config.train.batch_size,
            device=self.device,
            seed=self.config.eval.seed,
            # A simulation tells of single clients what a deployment would.
            shares={client: self.shares[client] for client in self.attacked_clients()},
        )

    def finish(self) -> None:
        """Save the final weights, and have their images measured."""
        last = self.directory.last_round
        self.directory.save_model(last, self.model.shared(self.final_weights()))
        self.evaluation.measure_final(last, self.final_weights())
        if can_draw(self.model, self.config):
            log(f"samples: {self.directory.samples_file(last)}")
        log(f"weights: {self.directory.model_file}")
        self.report()

    def report(self) -> None:
        """Sum the run up in the log, and write all that it left behind on one page."""
        # Imported here because it takes libraries that no round needs.
        from task.reporting.report import write_report

        path = self.directory.path
        self.directory.record_time()
        try:
            run = Run(path)
            for line in [*summary_lines(run), *closing_lines(run)]:
                log(line)
            log(f"report: {write_report(path)}")
        # Nothing of the run depends on it, and a run that fails at its end would be repeated.
        except (ValueError, OSError, RuntimeError) as error:
            log(f"no report: {error}; `feddm report {path}` writes it once that is mended")
