"""`feddm check-node`: whether a hospital's machine can take part in a run, told on the spot."""

import statistics
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path

from task.cli.check_superlink import check_superlink
from task.cli.findings import (
    GIB,
    Finding,
    Findings,
    free_disk,
    gpu_memory,
    memory,
    pretrained,
    versions,
)
from task.cli.training_trial import Trial, try_step
from task.config import MIN_PEERS, Config, load_config
from task.data import (
    Inventory,
    Listing,
    build_dataset,
    list_dataset,
    original_size,
    take_inventory,
)
from task.progress import tracked
from task.protocol.node import (
    ImageCounts,
    NodeConfig,
    check_budget,
    check_extractor,
    check_number,
    check_output_path,
    check_peers,
    check_state_path,
    count_images,
    identity_of,
    output_folder,
    own_config,
    own_images,
)
from task.protocol.secure_aggregation.keys import read_fingerprints
from task.reporting.metric_table import Row, lay_out
from task.training.devices import device_name, select_device


class NodeCheck(Findings):
    """A check of one node; its problems keep the node from taking part."""

    def __init__(self, config: Config, node: NodeConfig, say: Callable[[str], object]) -> None:
        """Start without findings.

        Args:
            config: of `own_config`.
            node: what the node is going to be started with.
            say: takes the text for the reader.
        """
        super().__init__(say)
        self._config, self._node = config, node
        self._counts: ImageCounts | None = None

    def data(self) -> Iterator[Finding]:
        """Count the images of each class, read their sizes, and decode all of them."""
        config = self._config
        yield "data", f"{config.data.name} in {config.data.root}"
        self._counts = counts = count_images(config)
        yield "", format_counts(config.data.classes, counts)
        yield from found_files(counts.files)
        train, test = list_dataset(config)
        if train.paths:
            yield "original sizes", describe_sizes(config, train)
        check_number(counts, self._node)
        if sum(counts.held_out) == 0:
            yield "held out", "none: there are too few images for a test loss and for scores"
        listed = len(train) + len(test)
        yield "decoding", f"{listed} images into {config.data.cache_dir}, once"
        dataset = build_dataset(config, download=False)
        unreadable = listed - len(dataset.train) - len(dataset.test)
        yield "unreadable files", f"{unreadable}" + (" (named above)" if unreadable else "")
        inventory = take_inventory(config, own_images(config, dataset))
        yield from found_files(inventory, said=counts.files.describe())

    def places(self) -> Iterator[Finding]:
        """Look at the disks."""
        check_state_path(self._config, self._node)
        yield "free, cache", free_disk(Path(self._config.data.cache_dir))
        if self._node.output_path is None:
            yield "output-path", "none: the node keeps no local model"
            return
        check_output_path(self._node)
        yield "free, output-path", free_disk(output_folder(self._node.output_path))

    def peers(self) -> Iterator[Finding]:
        """Say who the hospital is to others, and whose updates may be in a sum with its own."""
        node = self._node
        check_peers(self._config, node)
        check_budget(self._config, node)
        if node.output_path is None:
            yield "fingerprint", "none: without output-path there is no place for its keys"
            return
        yield "fingerprint", f"{identity_of(node).public.fingerprint}, to tell the other hospitals"
        trusted = read_fingerprints(node.trusted_peers or "")
        yield "trusted-peers", ", ".join(sorted(trusted)) or "none named: any"
        minimum = max(MIN_PEERS, node.minimum_peers)
        yield "smallest sum", f"of {minimum} hospitals, and more than half of those of a round"

    def scoring(self) -> Iterator[Finding]:
        """Look for what images are to be scored through."""
        if not self._node.score_images:
            yield "scores", "none: score-images=false"
            return
        check_extractor(self._config, self._node)
        extractor = self._config.eval.extractor
        yield "extractor", "the server's choice" if extractor == "auto" else extractor
        yield from pretrained()

    def training(self) -> Iterator[Finding]:
        """Look at device and memory, and train a step."""
        device = select_device(self._config.train.device)
        yield "device", device_name(device)
        yield from memory()
        yield from gpu_memory(device)
        trial = try_step(self._config)
        yield "a training step", describe_trial(trial)
        if self._counts is not None:
            yield from expected_round(self._config, trial, sum(self._counts.train))


def examine_node(
    overrides: Iterable[str],
    node: NodeConfig,
    *,
    superlink: str | None,
    root_certificates: Path | None,
    private_key: Path | None,
    say: Callable[[str], object],
) -> None:
    """Check a hospital's machine before it takes part in a run, and say what was found.

    Args:
        overrides: of the run's configuration, as the coordinator passes them.
        node: what the node is going to be started with.
        superlink: "host:port" to connect to; None: not tried.
        root_certificates: of the SuperLink's authority; None: those that the system trusts.
        private_key: file of the node's key; None: not checked.
        say: takes the text for the reader.

    Raises:
        ValueError: the configuration is wrong, or the node cannot take part; the text names the
            first reason and the way out.
    """
    check = NodeCheck(own_config(load_config(overrides), node), node, say)
    check.section("versions", versions())
    check.section("images", check.data())
    check.section("disks", check.places())
    check.section("secure aggregation", check.peers())
    check.section("scores", check.scoring())
    check.section("training", check.training())
    if superlink is not None:
        check.section("connection", check_superlink(superlink, root_certificates))
    if private_key is not None:
        # Imported here because it takes a library that nothing else needs.
        from task.cli.check_key import check_private_key

        check.section("key", check_private_key(private_key))
    if check.problems:
        first, *others = check.problems
        more = f" (and {len(others)} more, see above)" if others else ""
        raise ValueError(f"this node cannot take part yet: {in_one_line(first)}{more}")
    say("\nthis node can take part")


def format_counts(classes: Iterable[str], counts: ImageCounts) -> str:
    """Lay the numbers of images out, a class of the run per line."""
    rows: list[Row] = [("class", "training", "held out", "test")]
    numbers = zip(counts.train, counts.held_out, counts.test, strict=True)
    for name, each in zip(classes, numbers, strict=True):
        rows.append((name if any(each) else f"{name} (none here)", *map(str, each)))
    sums = (sum(counts.train), sum(counts.held_out), sum(counts.test))
    return lay_out([*rows, ("all", *map(str, sums))])


def found_files(inventory: Inventory, said: Collection[str] = ()) -> Iterator[Finding]:
    """Say what became of every file, a line for each finding that has not been said."""
    new = (line for line in inventory.describe() if line not in said)
    for number, line in enumerate(new):
        yield "files" if number == 0 else "", line


def describe_sizes(config: Config, listing: Listing) -> str:
    """Say how large the original images are, from their headers."""
    paths = tracked(listing.paths, len(listing.paths), "reading the sizes of images")
    sizes = [size for path in paths if (size := original_size(config.data.name, path))]
    if not sizes:
        return "unknown, no header can be read"
    said = [
        f"{name} {look(w for w, _ in sizes):.0f}x{look(h for _, h in sizes):.0f}"
        for name, look in (("min", min), ("median", statistics.median), ("max", max))
    ]
    seen = config.data.image_size
    return f"{', '.join(said)} (width x height); the model sees {seen}x{seen}"


def describe_trial(trial: Trial) -> str:
    """Say what a training step took."""
    peak = "" if trial.peak_memory is None else f", {trial.peak_memory / GIB:.1f} GiB at its peak"
    return (
        f"{trial.seconds:.3g} s for {trial.batch_size} images in {trial.precision}, processes: "
        f"{trial.num_processes}; it fits{peak}"
    )


def expected_round(config: Config, trial: Trial, num_images: int) -> Iterator[Finding]:
    """Say how long a round takes on so many training images.

    Raises:
        ValueError: longer than the server waits.
    """
    epochs, patience = config.train.local_epochs, config.federation.round_timeout
    seconds = epochs * num_images / trial.batch_size * trial.seconds
    yield "a round, about", f"{seconds:.0f} s: {epochs} epochs of {num_images} images"
    if seconds > patience:
        raise ValueError(
            f"federation.round_timeout={patience:g} s is over before this node has trained, which "
            f"takes about {seconds:.0f} s; ask the coordinator for more time, fewer "
            "train.local_epochs or a smaller model"
        )


def in_one_line(problem: str) -> str:
    """Shorten a problem that lists files to what it is and the way out."""
    lines = problem.splitlines()
    return problem if len(lines) == 1 else f"{lines[0]} see above. {lines[-1]}"
