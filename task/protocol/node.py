"""A hospital's node: what it is told about itself, and whether it can take part in a run.

The ClientApp and `feddm check-node` both ask here, so that they cannot disagree.
"""

import dataclasses
import math
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np

from task.checks import require
from task.config import MIN_MEASURED_IMAGES, MIN_PEERS, Config, FrozenFile, anchored, flat_values
from task.data import Dataset, Inventory, inventory_of_listings, list_dataset, split_validation
from task.efficientnet import check_pretrained, suits
from task.generators.base import Generator
from task.generators.registry import initial_generator, weightless_generator
from task.privacy.accounting import epsilon_of
from task.privacy.ledger import BudgetExhaustedError, Ledger
from task.protocol.secure_aggregation.keys import Identity, load_identity, read_fingerprints
from task.protocol.secure_aggregation.memory import FolderStore, PeersRefusedError
from task.protocol.secure_aggregation.participant import Participant
from task.protocol.wire import Key
from task.randomness import Stream, numpy_generator
from task.training.algorithms.registry import client_algorithm
from task.training.devices import check_deterministic
from task.training.private import spending_of


class NodeKey(StrEnum):
    """What a SuperNode's `--node-config` may say."""

    DATA_PATH = "data-path"
    OUTPUT_PATH = "output-path"
    MIN_IMAGES = "min-images"
    REPORT_CLASS_COUNTS = "report-class-counts"
    SCORE_IMAGES = "score-images"
    AUDIT = "audit"
    INCEPTION_WEIGHTS = "inception-weights"
    PATIENTS = "patients"
    PRETRAINED_GENERATOR = "pretrained-generator"
    MAX_EPSILON = "max-epsilon"
    PRIVACY_DELTA = "privacy-delta"
    TRUSTED_PEERS = "trusted-peers"
    MINIMUM_PEERS = "minimum-peers"
    MINIMUM_COLLUDERS = "minimum-colluders"


# Below `output-path`. A run may be called ".privacy", and has no folder "ledger".
LEDGER_FOLDER = Path(".privacy", "ledger")
PEERS_FOLDER = Path(".privacy", "peers")
OWN_TEST_SPLIT = "in the test split of the data set, which a node does not use"


class TooFewImagesError(ValueError):
    """The node has fewer training images than its hospital wants it to take part with."""


@dataclass(frozen=True)
class NodeConfig:
    """What a real node is told about itself when it is started.

    Attributes:
        data_path: the hospital's own data set, in the form that the run's `data` names; None
            where the run's data set needs no files.
        output_path: folder of what stays at the hospital; None: nothing is kept.
        min_images: training images below which the node takes no part; at least 1.
        report_class_counts: whether the server learns how many images of each class there are.
        score_images: whether the node compares images that the server sends with its own.
        audit: whether the server learns how well the node can tell its own training images from
            those that it holds out, by the global weights and by its own ones.
        inception_weights: the file of Inception's weights, for runs that score images with them;
            None: the one in torch.hub's folder.
        patients: the hospital's own table of which file is of which patient, as `data.patients`;
            None: the run's `data.patient_pattern` says it, or nothing does.
        pretrained_generator: this node's copy of the `FrozenFile` of the run's family, for runs
            that train on top of one.
        max_epsilon: that no patient's epsilon may pass, over all runs, by the node's ledger in
            `output_path`; None: no limit.
        privacy_delta: at which that epsilon is computed.
        trusted_peers: fingerprints of the other hospitals whose updates may be in a sum with this
            one's, with commas; None: any. With it, and with minimum_peers, the node takes part in
            no run without secure aggregation.
        minimum_peers: how many hospitals a sum must be of at least; 0: as many as the run's, 3.
        minimum_colluders: with distributed noise the run must count on so many that tell theirs.

    Raises:
        ValueError: a value is out of range, or there is no place for the ledger.
    """

    data_path: str | None = None
    output_path: str | None = None
    min_images: int = 1
    report_class_counts: bool = False
    score_images: bool = True
    audit: bool = True
    inception_weights: str | None = None
    patients: str | None = None
    pretrained_generator: str | None = None
    max_epsilon: float | None = None
    privacy_delta: float = 1e-5
    trusted_peers: str | None = None
    minimum_peers: int = 0
    minimum_colluders: int = 1

    def __post_init__(self) -> None:
        paths = (NodeKey.DATA_PATH, NodeKey.OUTPUT_PATH, NodeKey.INCEPTION_WEIGHTS)
        for key in (*paths, NodeKey.PATIENTS, NodeKey.PRETRAINED_GENERATOR):
            value = getattr(self, _field(key))
            require(value != "", key, "a path", value)
        require(self.min_images >= 1, NodeKey.MIN_IMAGES, ">= 1", self.min_images)
        limit, delta = self.max_epsilon, self.privacy_delta
        require(limit is None or 0 < limit < math.inf, NodeKey.MAX_EPSILON, "a number > 0", limit)
        require(0 < delta < 1, NodeKey.PRIVACY_DELTA, "between 0 and 1, exclusive", delta)
        if limit is not None:
            ledger_of(self)
        colluders = self.minimum_colluders
        require(colluders >= 1, NodeKey.MINIMUM_COLLUDERS, ">= 1", colluders)
        minimum = self.minimum_peers
        expected = f"0, or at least {MIN_PEERS}, this hospital and others"
        require(minimum == 0 or minimum >= MIN_PEERS, NodeKey.MINIMUM_PEERS, expected, minimum)
        if self.trusted_peers is not None:
            trusted = read_fingerprints(self.trusted_peers)
            expected = f"the fingerprints of at least {MIN_PEERS - 1} other hospitals"
            enough = len(trusted) >= MIN_PEERS - 1
            require(enough, NodeKey.TRUSTED_PEERS, expected, self.trusted_peers)


@dataclass(frozen=True)
class Share:
    """Which client of a simulation a node is.

    Attributes:
        number: of the share, 0-based.
        shares: how many there are.
    """

    number: int
    shares: int


def read_node_config(given: Mapping[str, object]) -> NodeConfig | Share:
    """Check what a node was started with.

    Args:
        given: Flower's `context.node_config`. A simulation fills it with the numbers of a share;
            a real node's holds the words of `--node-config` and nothing of Flower's.

    Raises:
        TypeError: a value is of another type.
        ValueError: a key is unknown or a value out of range.
    """
    if Key.PARTITION_ID in given or Key.NUM_PARTITIONS in given:
        _check(given, {Key.PARTITION_ID: int, Key.NUM_PARTITIONS: int}, "a simulated node")
        missing = {Key.PARTITION_ID, Key.NUM_PARTITIONS} - given.keys()
        require(not missing, "node config", f"given {', '.join(missing)} as well", dict(given))
        return Share(given[Key.PARTITION_ID], given[Key.NUM_PARTITIONS])  # type: ignore[arg-type]
    defaults = {key: getattr(NodeConfig, _field(key)) for key in NodeKey}
    types: dict[str, type] = {
        key: str if value is None else type(value) for key, value in defaults.items()
    }
    types[NodeKey.MAX_EPSILON] = float
    _check(given, types, "a node")
    return NodeConfig(**{_field(key): value for key, value in given.items()})  # type: ignore[arg-type]


def _field(key: str) -> str:
    return key.replace("-", "_")


def _check(given: Mapping[str, object], types: Mapping[str, type], whose: str) -> None:
    unknown = sorted(given.keys() - types.keys())
    require(
        not unknown,
        "node config",
        f"of the keys {', '.join(types)} for {whose}",
        ", ".join(unknown),
    )
    for key, value in given.items():
        # Not isinstance: True is an int to Python. 8 is a number as 8.0 is.
        if type(value) is not types[key] and (type(value), types[key]) != (int, float):
            raise TypeError(
                f"node config: {key} must be of type {types[key].__name__}, got {value!r} "
                "(strings stand in quotes, true and false and numbers do not)"
            )


def identity_of(node: NodeConfig) -> Identity:
    """Return who the hospital is in runs with secure aggregation; the first time it is made.

    Raises:
        ValueError: the node has no place for it, or the file is damaged.
        OSError: it cannot be read or written.
    """
    return load_identity(_peers_folder(node))


def participant_of(node: NodeConfig) -> Participant:
    """Return what takes part in masked sums for the hospital, as far as it lets it.

    Raises:
        OSError, ValueError: see `identity_of`.
    """
    folder = _peers_folder(node)
    return Participant(
        load_identity(folder),
        FolderStore(folder),
        minimum_peers=node.minimum_peers,
        trusted=read_fingerprints(node.trusted_peers or ""),
    )


def _peers_folder(node: NodeConfig) -> Path:
    if node.output_path is None:
        raise ValueError(
            f"{NodeKey.OUTPUT_PATH.value}: the hospital's keys for secure aggregation are kept "
            f"there; start the node with --node-config '{NodeKey.OUTPUT_PATH.value}=\"/folder\"'"
        )
    folder = output_folder(node.output_path) / PEERS_FOLDER
    # The folder itself is not made: it may be a disk that is not mounted.
    for made in (folder.parent, folder):
        made.mkdir(mode=0o700, exist_ok=True)
    return folder


def check_peers(config: Config, node: NodeConfig) -> None:
    """Check that the server is to see of this hospital what the hospital lets it see.

    Raises:
        PeersRefusedError: it would see the hospital's own update, and is to see sums alone.
        ValueError: there is no place for the hospital's keys.
    """
    if config.federation.secure_aggregation:
        identity_of(node)
        if config.privacy.is_distributed and node.trusted_peers is None:
            raise PeersRefusedError(
                "privacy.noise=distributed: this hospital's share of the noise protects its "
                "patients together with those of the others alone, whom a server could invent; "
                f"name them by {NodeKey.TRUSTED_PEERS.value}"
            )
        colluders = int(config.privacy.colluders or 0)
        if config.privacy.is_distributed and colluders < node.minimum_colluders:
            raise PeersRefusedError(
                f"privacy.colluders={colluders}: {NodeKey.MINIMUM_COLLUDERS.value}="
                f"{node.minimum_colluders} wants the noise of the others to be enough without more"
            )
    elif node.trusted_peers is not None or node.minimum_peers > 0:
        raise PeersRefusedError(
            f"{NodeKey.TRUSTED_PEERS.value} and {NodeKey.MINIMUM_PEERS.value} admit runs with "
            "federation.secure_aggregation=true alone"
        )


def check_budget(config: Config, node: NodeConfig) -> None:
    """Check that a node which limits what is spent on a patient has room for a run and its ledger.

    What earlier runs have spent is checked with each round, as it depends on the patients.

    Raises:
        BudgetExhaustedError: the run spends without limit, or all of its rounds more than allowed.
        ValueError: there is no place for the ledger.
    """
    limit = node.max_epsilon
    if config.privacy.is_on:
        ledger_of(node)
    if limit is None:
        return
    where = f"{NodeKey.MAX_EPSILON.value}={limit:g}"
    if not config.privacy.is_on:
        raise BudgetExhaustedError(
            f"{where}: a run with privacy.mechanism={config.privacy.mechanism} spends without "
            "limit on patients; take part in runs with "
            f"privacy=dp_sgd alone, or leave {NodeKey.MAX_EPSILON.value} out"
        )
    whole = epsilon_of([spending_of(config, rounds=config.federation.rounds)], node.privacy_delta)
    if whole > limit:
        raise BudgetExhaustedError(
            f"{where}: all rounds of this run spend {whole:.4g} at "
            f"{NodeKey.PRIVACY_DELTA.value}={node.privacy_delta:g}; ask the coordinator for a "
            "smaller privacy.epsilon, or allow more"
        )


def ledger_of(node: NodeConfig) -> Ledger:
    """Return the ledger of what runs spend on the node's patients.

    Raises:
        ValueError: the node has no place for it.
    """
    if node.output_path is None:
        raise ValueError(
            f"{NodeKey.OUTPUT_PATH.value}: what private runs spend on each patient is written down "
            f"there; start the node with --node-config '{NodeKey.OUTPUT_PATH.value}=\"/folder\"'"
        )
    folder = output_folder(node.output_path) / LEDGER_FOLDER
    return Ledger(folder, node.max_epsilon, node.privacy_delta)


def own_config(config: Config, node: NodeConfig) -> Config:
    """Point the configuration of a run to the node's own files, with paths of this machine.

    Of its images a node holds out `data.val_fraction`; a `data.test_fraction` is a simulation's,
    and that of the digits, which have no files. Its own table of patients goes before what the run
    says of them; a `data.patients` of the run is a file of another machine.

    Raises:
        ValueError: the node was started without saying where they are, or who its patients are in
            a run with `data.patients`, or with a table of patients in a run that takes none; or the
            run without saying which file its model is trained on top of.
    """
    if node.data_path is not None:
        fraction = config.data.test_fraction if config.data.name == "digits" else None
        config = config.changed({"data.root": node.data_path, "data.test_fraction": fraction})
    elif config.data.name != "digits":
        raise ValueError(
            "a node needs its own images: start it with --node-config 'data-path=\"/folder\"'"
        )
    if node.patients is not None:
        require(
            config.data.in_class_folders,
            f"{NodeKey.PATIENTS.value} in --node-config",
            f"left out with data={config.data.name}, which takes no table of patients",
            node.patients,
        )
        config = config.changed({"data.patients": node.patients, "data.patient_pattern": ""})
    elif config.data.patients:
        raise ValueError(
            "data.patients: a node needs its own table of patients: start it with --node-config "
            "'patients=\"/file.csv\"'"
        )
    if (frozen := config.model.frozen_file) is not None:
        config = config.changed({frozen.path_value: _own_copy(config, frozen, node)})
    return anchored(config, Path.home())


def _own_copy(config: Config, frozen: FrozenFile, node: NodeConfig) -> str:
    """Return this node's copy of what a run freezes, which must be known to be the same."""
    sha256 = flat_values(config)[frozen.sha256_value]
    require(
        sha256 != "",
        frozen.sha256_value,
        f"the SHA-256 of the file of {frozen.path_value}, by which a hospital's node knows its "
        "copy",
        sha256,
    )
    if node.pretrained_generator is None:
        raise ValueError(
            "a node needs a copy of the generator that model.family="
            f"{config.model.family} freezes: start it with --node-config "
            f"'{NodeKey.PRETRAINED_GENERATOR.value}=\"/file\"'"
        )
    return node.pretrained_generator


@dataclass(frozen=True)
class ImageCounts:
    """How many images a node has, of each class of `data.classes`.

    Files are counted and not opened: those that turn out to be damaged are among them.

    Attributes:
        train: to be trained on, without the held-out ones.
        held_out: for the test loss.
        test: of the data set's own test split.
        files: what becomes of every file.
    """

    train: tuple[int, ...]
    held_out: tuple[int, ...]
    test: tuple[int, ...]
    files: Inventory


def hold_out(
    config: Config, labels: np.ndarray, groups: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Part a node's images into those to train on and those held out, alike in every process.

    Args:
        config: of the run.
        labels: [N] int64.
        groups: [N] int64, equal for the images of one patient, or None.

    Returns:
        The indices of both, sorted, [M] int64.
    """
    # Not the run's seed: runs of several seeds are measured on the same images.
    generator = numpy_generator(config.data.split_seed, Stream.HOLD_OUT)
    return split_validation(labels, config.data.val_fraction, generator=generator, groups=groups)


def count_images(config: Config) -> ImageCounts:
    """Count a node's images of each class without decoding files, which could take minutes.

    Args:
        config: of `own_config`.

    Raises:
        FileNotFoundError: the data set is not there.
        UnknownClassError: there are images of a class that `data.classes` does not name.
        ValueError: the data set does not fit the run in another way.
    """
    train, test = list_dataset(config)
    kept, held_out = hold_out(config, train.labels, train.groups)

    def counted(labels: np.ndarray) -> tuple[int, ...]:
        return tuple(np.bincount(labels, minlength=len(config.data.classes)).tolist())

    files = inventory_of_listings(
        config.data.classes,
        dataclasses.replace(
            train.subset(kept), left_out=train.left_out + test.left_out + unused(len(test))
        ),
        dataclasses.replace(train.subset(held_out), note=test.note),
    )
    return ImageCounts(
        counted(train.labels[kept]), counted(train.labels[held_out]), counted(test.labels), files
    )


def own_images(config: Config, dataset: Dataset) -> Dataset:
    """Return the images that a node trains on, and those that it holds out; see `hold_out`."""
    train = dataset.train
    groups = None if train.groups is None else train.groups.numpy()
    kept, held_out = hold_out(config, train.labels.numpy(), groups)
    left_out = dataset.left_out + unused(len(dataset.test))
    return Dataset(train.subset(kept), train.subset(held_out), left_out, dataset.note)


def unused(number: int) -> Counter[tuple[str, str]]:
    """Count images of the data set's own test split as left out."""
    return Counter({("", OWN_TEST_SPLIT): number})


def check_number(counts: ImageCounts, node: NodeConfig) -> None:
    """Check that there are enough images to train on.

    Raises:
        TooFewImagesError: there are not.
    """
    if sum(counts.train) < node.min_images:
        raise TooFewImagesError(
            f"{NodeKey.MIN_IMAGES.value}: the node takes part with at least {node.min_images} "
            f"training images, and data-path={node.data_path} has {sum(counts.train)} "
            f"({sum(counts.held_out)} more are held out); add images or lower it "
            f"({'; '.join(counts.files.describe())})"
        )


def check_output_path(node: NodeConfig) -> None:
    """Check that what stays at the hospital can be written; nothing to do without `output-path`.

    Raises:
        ValueError: the folder is not there or cannot be written.
    """
    if node.output_path is None:
        return
    try:
        # The folder itself is not made: it may be a disk that is not mounted.
        tempfile.TemporaryFile(dir=output_folder(node.output_path)).close()
    except OSError as error:
        raise ValueError(
            f"{NodeKey.OUTPUT_PATH.value} must be a folder that the node can write to, "
            f"got {node.output_path!r} ({error.strerror}); make it, or mount and own it"
        ) from error


def output_folder(output_path: str) -> Path:
    """Return `output-path` as an absolute path; relative ones count from the home directory."""
    return (Path.home() / Path(output_path).expanduser()).absolute()


def check_extractor(config: Config, node: NodeConfig) -> None:
    """Check that what a node is to score images through is installed.

    What "auto" stands for the server says, by what is installed there: EfficientNet must be here
    where it may choose it.

    Raises:
        MissingWeightsError: it is not.
    """
    scores = config.eval.final_metrics or config.eval.num_images >= MIN_MEASURED_IMAGES
    extractor, data = config.eval.extractor, config.data
    chosen = extractor == "efficientnet"
    may_be = extractor == "auto" and suits(data.channels, data.image_size)
    if (chosen or may_be) and scores and node.score_images:
        check_pretrained(
            "eval.extractor=efficientnet"
            + (", which the server may choose with eval.extractor=auto," if may_be else ""),
            f"{NodeKey.SCORE_IMAGES.value}=false in --node-config, and this node scores nothing "
            "(or have the whole run take eval.extractor=classifier)",
        )


def check_training(config: Config) -> None:
    """Check that the model of a run can be trained here, as far as no image is needed.

    Raises:
        FileNotFoundError: what it is trained on top of, or what its loss looks through, is missing.
        ValueError: that file is another one, or this machine cannot train as the run wants it.
    """
    generator = weightless_generator(config)
    check_deterministic(generator, config)
    if generator.reads_files:
        initial_generator(config)


def check_state_path(config: Config, node: NodeConfig) -> None:
    """Check that what a run has a client keep between rounds has a place.

    Raises:
        ValueError: it has none.
    """
    what = without_place(config, weightless_generator(config))
    if what and node.output_path is None:
        raise missing_output_path(what)


def without_place(config: Config, generator: Generator) -> str:
    """Say what of a run needs a place for what a client keeps between rounds; "" if nothing does.

    Args:
        config: of the run.
        generator: of the run.
    """
    if generator.keeps_state:
        return f"a {generator.title} keeps a part of its training"
    if client_algorithm(config).needs_place:
        return f"strategy.name={config.strategy.name} keeps a term of its loss"
    return ""


def missing_output_path(what: str) -> ValueError:
    """Make the error of a node that has no place for what a client keeps; see `without_place`."""
    return ValueError(
        f"{NodeKey.OUTPUT_PATH.value}: {what} at each "
        f"hospital; start the node with --node-config '{NodeKey.OUTPUT_PATH.value}=\"/folder\"'"
    )


def check_node(config: Config, node: NodeConfig) -> ImageCounts:
    """Check early that a node can take part in a run, and count its images.

    Args:
        config: of `own_config`.
        node: what it was started with.

    Raises:
        FileNotFoundError: see `check_extractor`, `check_training` and `count_images`.
        ValueError: see `check_output_path`, `check_state_path`, `check_training`, `count_images`
            and `check_number`; or the run needs to know the class counts, which are kept here.
    """
    check_output_path(node)
    check_state_path(config, node)
    check_peers(config, node)
    check_budget(config, node)
    check_extractor(config, node)
    check_training(config)
    require(
        node.report_class_counts or config.federation.drawn_by == "global",
        NodeKey.REPORT_CLASS_COUNTS.value,
        "true in --node-config for a run with federation.drawn_by=clients, whose images each "
        "hospital's model draws by the classes that it has",
        node.report_class_counts,
    )
    counts = count_images(config)
    check_number(counts, node)
    return counts
