"""`feddm audit`: what a model remembers of the images that it was trained on."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from task.audit.findings import AuditFinding, Search, findings
from task.audit.membership import Attack, Shares, attack_members, one_of_each_patient
from task.audit.pairs import save_pairs
from task.audit.roc import FEWEST_PATIENTS
from task.checks import require
from task.config import Config
from task.data import Dataset, build_dataset
from task.data.partition import partition_dataset
from task.evaluation.comparison import extract_real, looked_at
from task.evaluation.features import build_extractor, extract
from task.evaluation.near_copies import feature_copying, pixel_copying
from task.files import write_json
from task.generation.draw_images import draw_images, full_labels
from task.randomness import Stream
from task.reporting.metric_table import lay_out
from task.runs.layout import AUDIT_FILE, DATA_FILE, PAIRS_FILE, PARTITION_FILE, read_json
from task.runs.run import Run, final_model, kept_clients
from task.runs.same_images import describe_differences
from task.training.devices import select_device

# Of images, to either side, at which a copy is still one.
MOST_SHIFTED = 1
ATTACK_HEADS = (
    *("images of", "attack", "AUC", "95 % interval", "TPR at 1 % FPR", "at 0.1 %"),
    *("members", "held out"),
)


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
    model, last = final_model(run, config)
    dataset = audited_images(run, config)
    extractor = build_extractor(config, dataset.train, device)
    shares = shares_of(run, config, dataset)
    say(f"attacking up to {num_images:,} training images on {device}")
    attacks = attack_members(
        model, dataset, num_images=num_images, device=device, seed=config.eval.seed, shares=shares
    )
    for client in kept_clients(run):
        local, _ = final_model(run, config, client)
        train, test = shares[client]
        own = Dataset(dataset.train.subset(train), dataset.test.subset(test))
        attacks += attack_members(
            local,
            own,
            num_images=num_images,
            device=device,
            seed=config.eval.seed,
            local_of=client,
        )
    audited = {each.client for each in attacks if not each.is_local}
    skipped = [client for client in shares if client not in audited]
    labels = full_labels(config, dataset)
    say(f"drawing {len(labels):,} images and searching them for copies")
    drawn = draw_images(config, model, labels, device=device, stream=Stream.EVALUATED_IMAGES)
    # Images of one patient are alike: more of them would count one look several times.
    searched = Dataset(dataset.train, one_of_each_patient(dataset.test, config.eval.seed))
    real = extract_real(config, searched, extractor)
    seen = looked_at(config, extractor, drawn.images, 9)
    features = extract(extractor, seen, batch_size=config.eval.batch_size)
    pixels = pixel_copying(
        drawn.images,
        dataset.train.images,
        searched.test.images,
        horizontal_flip=config.data.horizontal_flip,
        device=device,
        most_shifted=MOST_SHIFTED,
    )
    numbers = len(drawn), len(searched.test)
    searches = [
        Search("pixels", pixels, *numbers),
        Search(
            f"features ({extractor.name})",
            feature_copying(features, real.train, real.held_out),
            *numbers,
        ),
    ]
    found = findings(attacks, searches)
    say(f"\n{run.resolve().name}, round {last} of {config.federation.rounds}\n")
    for line in audit_lines(attacks, found, skipped, model.title):
        say(line)
    save_pairs(
        drawn.images,
        dataset.train.images,
        run / PAIRS_FILE,
        horizontal_flip=config.data.horizontal_flip,
        most_shifted=MOST_SHIFTED,
    )
    told = {
        "round": last,
        "attacks": [asdict(each) for each in attacks],
        "searches": [{**asdict(each), "found": each.found._asdict()} for each in searches],
        "findings": [asdict(each) for each in found],
        "clients_not_looked_at": skipped,
    }
    write_json(run / AUDIT_FILE, told)
    say(f"\nwritten to {run / AUDIT_FILE}; pairs to look at, for you alone: {run / PAIRS_FILE}")
    return found


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
    return dict(enumerate(zip(partition.train_indices, partition.test_indices, strict=True)))


def audit_lines(
    attacks: Sequence[Attack], found: Sequence[AuditFinding], skipped: Sequence[int], title: str
) -> list[str]:
    """Lay an audit out for a reader: a table of the attacks, then the findings."""
    made = (
        lay_out([ATTACK_HEADS, *map(_attack_row, attacks)])
        if attacks
        else f"No attack was made: none is known for a {title}, or too few patients are held out."
    )
    lines = [f"{made}\n"] + [
        f"- {'DETECTED' if each.is_detected else 'not detected'}: {each.says}" for each in found
    ]
    if skipped:
        clients = " ".join(map(str, skipped))
        lines.append(
            f"- not looked at: images of clients {clients}, of whom fewer than {FEWEST_PATIENTS} "
            "patients were attacked or held out."
        )
    return lines


def _attack_row(attack: Attack) -> tuple[str, ...]:
    found = attack.found
    shares = (found.true_positives.get(rate) for rate in (0.01, 0.001))
    whose = "all" if attack.client is None else f"client {attack.client}"
    return (
        f"{whose}, own model" if attack.is_local else whose,
        attack.name,
        f"{found.auc:.3f}",
        f"{found.low:.3f} to {found.high:.3f}",
        *("too few" if share is None else f"{share:.1%}" for share in shares),
        f"{found.members:,}",
        f"{found.others:,}",
    )
