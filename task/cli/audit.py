"""`feddm audit`: what a model remembers of the images that it was trained on."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from task.audit.findings import AuditFinding, findings
from task.audit.membership import Attack, Shares, attack_members
from task.audit.pairs import save_pairs
from task.audit.records import audit_content
from task.audit.searches import MeasuredSearch, search_copies, single_images
from task.checks import require
from task.config import Config
from task.data import Dataset, build_dataset
from task.data.partition import partition_dataset
from task.evaluation.copy_measures import QUANTILES
from task.evaluation.features import build_extractor
from task.files import write_json
from task.generation.draw_images import draw_images, full_labels
from task.generators.base import Generator
from task.randomness import Stream
from task.reporting.audit_section import ATTACK_HEADS, attack_rows
from task.reporting.metric_table import lay_out
from task.runs.layout import AUDIT_FILE, DATA_FILE, PAIRS_FILE, PARTITION_FILE, read_json
from task.runs.run import Run, kept_clients, trained_model
from task.runs.same_images import describe_differences
from task.training.devices import move, select_device

# Under the table of the searches.
SEARCH_CAPTION = """\
ratio: distance to the nearest training image over the mean to the {} nearest, quantiles; 0: copies
authentic: farther from the nearest training image than this one is from the next; 0 %: all copies
C_T: far below 0 where many are copies, far above 0 where images are unlike the training images
These figures describe; findings are made by a test of the ratios."""


def audit_run(
    run: Path, config: Config, *, num_images: int, say: Callable[[str], object]
) -> list[AuditFinding]:
    """Attack the final weights of a run and search what they draw for copies.

    Args:
        run: the folder of a finished run whose images lie on this machine; `audit.json` is
            written there, and `audit-pairs.png`, which its owner alone may read.
        config: see `task.cli.evaluate.evaluation_config`.
        num_images: training images that are attacked at most, and held-out ones.
        say: takes the text for the reader.

    Raises:
        FileNotFoundError: files of the data set or of the extractor are missing.
        ValueError: no images are held out, or they are others than those of the run.
    """
    device = select_device(config.train.device)
    model, last = trained_model(run, config)
    dataset = audited_images(run, config)
    # First, for its files may be missing.
    extractor = build_extractor(config, dataset.train, device) if config.model.draws else None
    shares = shares_of(run, config, dataset)
    attacks = _attacked(run, config, model, dataset, shares, num_images=num_images, say=say)
    attacked = {each.client for each in attacks if not each.is_local}
    skipped = [client for client in shares if client not in attacked] if attacks else []
    searches: list[MeasuredSearch] = []
    if config.model.draws:
        labels = full_labels(config, dataset)
        say(f"drawing {len(labels):,} images and searching them for copies")
        drawn = draw_images(config, model, labels, device=device, stream=Stream.EVALUATED_IMAGES)
        searched = Dataset(dataset.train, single_images(dataset.test, config.eval.seed))
        searches, nearest = search_copies(
            config, drawn.images, searched, extractor=extractor, device=device
        )
        save_pairs(drawn.images, dataset.train.images, nearest, run / PAIRS_FILE)
    found = findings(attacks, searches, skipped=skipped)
    say(f"\n{run.resolve().name}, round {last} of {config.federation.rounds}\n")
    for line in audit_lines(attacks, searches, found, model.title):
        say(line)
    told = {"round": last, **audit_content(attacks, searches, found)}
    write_json(run / AUDIT_FILE, told | {"clients_not_looked_at": skipped})
    say(written(run))
    return found


def _attacked(
    run: Path,
    config: Config,
    model: Generator,
    dataset: Dataset,
    shares: Shares,
    *,
    num_images: int,
    say: Callable[[str], object],
) -> list[Attack]:
    """Attack the weights of a run, and those of its clients that were kept."""
    if shares and model.kept_parts:
        say(f"not attacked: {', '.join(config.federation.local)} stayed at the clients")
        return []
    device = select_device(config.train.device)
    attack = partial(
        attack_members,
        num_images=num_images,
        batch_size=config.train.batch_size,
        device=device,
        seed=config.eval.seed,
    )
    say(f"attacking up to {num_images:,} training images on {device}")
    move(model, device, channels_last=config.train.channels_last)
    attacks = attack(model, dataset, shares=shares)
    for client in kept_clients(run):
        local, _ = trained_model(run, config, client)
        move(local, device, channels_last=config.train.channels_last)
        train, test = shares[client]
        own = Dataset(dataset.train.subset(train), dataset.test.subset(test))
        attacks += attack(local, own, local_of=client)
    return attacks


def audited_images(run: Path, config: Config) -> Dataset:
    """Load the images that a run was trained on, and those that it held out.

    Raises:
        FileNotFoundError: they are not there.
        ValueError: the run is one of real nodes, the images are others, or none were held out.
    """
    require(
        Run(run).setting != "real nodes",
        f"the run {run}",
        "a simulation or centralized: images of real nodes are not here to be compared with",
        "one of real nodes",
    )
    dataset = build_dataset(config, download=True)
    known = (read_json(run / DATA_FILE) or {}).get("sha256") is not None
    require(known, str(run / DATA_FILE), "the run's, with hashes of its images", "none")
    different = describe_differences(run, dataset)
    if different:
        raise ValueError(f"data.root={config.data.root} holds {different}")
    require(
        len(dataset.test) > 0,
        "data.test_fraction",
        "one of the run's: an audit compares with images that were held out",
        config.data.test_fraction,
    )
    return dataset


def shares_of(run: Path, config: Config, dataset: Dataset) -> Shares:
    """Return which images each client of a simulation had; of centralized training none.

    Raises:
        ValueError: the run was dealt from other data.
    """
    if config.train.mode == "centralized":
        return {}
    partition = partition_dataset(config, dataset, config.federation.num_supernodes)
    require(
        Run(run).partition == partition.describe(),
        "data.root",
        f"where the images are that {run / PARTITION_FILE} counts",
        config.data.root,
    )
    return partition.shares


def written(folder: Path) -> str:
    """Say where the files of an audit are."""
    pairs = folder / PAIRS_FILE
    beside = f"; pairs to look at, for you alone: {pairs}" if pairs.exists() else ""
    return f"\nwritten to {folder / AUDIT_FILE}{beside}"


def audit_lines(
    attacks: Sequence[Attack],
    searches: Sequence[MeasuredSearch],
    found: Sequence[AuditFinding],
    title: str,
) -> list[str]:
    """Lay an audit out for a reader: tables of the attacks and searches, then the findings."""
    made = (
        lay_out([ATTACK_HEADS, *attack_rows(attacks)])
        if attacks
        else f"No attack was made: none is known for a {title}, or too few patients are held out."
    )
    return [f"{made}\n", *search_lines(searches, found)]


def search_lines(searches: Sequence[MeasuredSearch], found: Sequence[AuditFinding]) -> list[str]:
    """Lay searches for copies out for a reader: a table of their figures, then the findings."""
    lines = [f"- {each.line}" for each in found]
    if not searches:
        return lines
    heads = ("images", "n", *(f"ratio, {share:.0%}" for share in QUANTILES), "authentic", "C_T")
    table = lay_out([heads, *(row for each in searches for row in _search_rows(each))])
    neighbors = " or ".join(map(str, dict.fromkeys(each.measures.neighbors for each in searches)))
    return [f"{table}\n\n{SEARCH_CAPTION.format(neighbors)}\n", *lines]


def _search_rows(search: MeasuredSearch) -> list[tuple[str, ...]]:
    """Return the figures of generated images, then those of held-out ones."""
    measures = search.measures
    c_t = "too few" if measures.c_t is None else f"{measures.c_t:.1f}"
    rows = []
    for kind, number, last in (
        ("generated", search.generated, c_t),
        ("held_out", search.held_out, ""),
    ):
        ratios = (f"{getattr(both, kind):.3f}" for both in measures.ratios.values())
        share = f"{getattr(measures.authenticity, kind):.1%}"
        name = f"{search.space}, {kind.replace('_', ' ')}"
        rows.append((name, f"{number:,}", *ratios, share, last))
    return rows
