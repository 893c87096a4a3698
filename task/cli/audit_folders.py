"""`feddm audit --images`: copies of training images among those of any generator."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from task.audit.findings import AuditFinding, findings
from task.audit.pairs import save_pairs
from task.audit.records import audit_content
from task.audit.searches import search_copies, single_images
from task.checks import require
from task.cli.audit import search_lines, written
from task.config import Config, changed_config, hydra_override, load_config, settle_extractor
from task.data import Dataset, ImageSet, original_size
from task.data.duplicates import find_duplicates
from task.data.file_kinds import PICTURES
from task.data.files import read_split
from task.data.listing import Listing, list_one_split
from task.data.patients import patients_of
from task.evaluation.features import FeatureExtractor, automatic_extractor, build_extractor
from task.files import write_json
from task.runs.layout import AUDIT_FILE, PAIRS_FILE
from task.training.devices import select_device

# The preset of conf/data/ that says how pictures are read.
PRESET = "image_folder"
# Of images that are compared, where nothing says otherwise: larger ones are made smaller.
LARGEST_SIDE = 128
# Images have sides of multiples of it; see `data.image_size`.
SIDE_STEP = 8
# What may be chosen otherwise than conf/ says.
CHANGEABLE = frozenset(
    {
        *("data.image_size", "data.fit", "data.horizontal_flip", "data.on_corrupt"),
        *(
            "data.patient_pattern",
            "data.cache_dir",
            "eval.extractor",
            "eval.inception_weights",
            "eval.exported_program",
        ),
        *("eval.batch_size", "eval.seed", "train.device"),
    }
)
# Where no folder of classes is there to name them.
ONE_CLASS = ["images"]
NOT_ATTACKED = (
    "Membership is not tested, which needs the model: feddm audit RUN does, for a run of feddm."
)
NO_FEATURES = (
    "Pixels alone are compared: --train has no folders of two classes to train a classifier of "
    "features on, and eval.extractor names no other."
)


@dataclass(frozen=True)
class AuditedFolders:
    """Absolute paths of folders of pictures, each in folders of classes or without.

    Attributes:
        images: of the generator.
        train: that it was trained on.
        held_out: of the same kind, that it was not trained on.
    """

    images: Path
    train: Path
    held_out: Path

    @property
    def options(self) -> dict[str, Path]:
        """The folders by their options."""
        return {"--images": self.images, "--train": self.train, "--held-out": self.held_out}


def audit_folders(
    folders: AuditedFolders,
    overrides: Sequence[str],
    *,
    out: Path,
    device: str | None,
    say: Callable[[str], object],
) -> list[AuditFinding]:
    """Search the pictures of a folder for copies of training pictures.

    Args:
        folders: of the pictures.
        overrides: `name=value`, of `CHANGEABLE`.
        out: folder that gets `audit.json`, and `audit-pairs.png`, which its owner alone may read;
            made if need be.
        device: that computes; None: `train.device` of conf/.
        say: takes the text for the reader.

    Raises:
        FileNotFoundError: a folder is not there, or holds no pictures.
        ValueError: files cannot be read, a value is wrong, all held-out pictures are training
            pictures, or `out` lies in the folder of the generated ones.
    """
    require(
        not out.resolve().is_relative_to(folders.images.resolve()),
        "--out",
        "a folder outside of --images: the pairs show training images, and must not be passed on "
        "with the generated ones",
        str(out),
    )
    require(
        not (out / "config.yaml").exists(),
        "--out",
        "another folder than that of a run, whose own audit lies there",
        str(out),
    )
    listings = {option: _found_in(option, folder) for option, folder in folders.options.items()}
    classes = listings["--train"][1] or ONE_CLASS
    config = _config(folders, listings, classes, overrides, device)
    generated, train, held_out = (
        _read(config, option, folder, listings[option], say)
        for option, folder in folders.options.items()
    )
    _check_held_out(Dataset(train, held_out), say)
    held_out = single_images(held_out, config.eval.seed)
    if all(_is_gray(each.images) for each in (generated, train, held_out)):
        config = config.changed({"data.channels": 1})
        generated, train, held_out = map(_one_channel, (generated, train, held_out))
    extractor = _extractor(config, train, say)
    size, channels = config.data.image_size, config.data.channels
    say(f"searching for copies at {size}x{size} pixels, {channels} channel(s)")
    searches, nearest = search_copies(
        config,
        generated.images,
        Dataset(train, held_out),
        extractor=extractor,
        device=select_device(config.train.device),
    )
    found = findings([], searches)
    say("")
    for line in [*search_lines(searches, found), NOT_ATTACKED]:
        say(line)
    out.mkdir(parents=True, exist_ok=True)
    save_pairs(generated.images, train.images, nearest, out / PAIRS_FILE)
    told = {
        "folders": {option[2:]: str(folder) for option, folder in folders.options.items()},
        "num_train": len(train),
        "image_size": size,
        "channels": channels,
        **audit_content([], searches, found),
    }
    write_json(out / AUDIT_FILE, told)
    say(written(out))
    return found


def _found_in(option: str, folder: Path) -> tuple[Listing, list[str]]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{option}: there is no folder {folder}")
    for split in ("train", "test"):
        require(
            not (folder / split).is_dir(),
            option,
            f"the folder of one split, such as {folder / split}",
            str(folder),
        )
    listing, classes = list_one_split(folder, PICTURES)
    if len(listing) == 0:
        raise FileNotFoundError(
            f"{option}: {folder} holds no pictures; they lie in it or in a folder of each class"
        )
    return listing, classes


def _config(
    folders: AuditedFolders,
    listings: dict[str, tuple[Listing, list[str]]],
    classes: list[str],
    overrides: Sequence[str],
    device: str | None,
) -> Config:
    """Compose how pictures are read and compared."""
    side = min(_usual_side(listings[option][0]) for option in ("--images", "--train"))
    values = {
        "data.root": str(folders.train),
        "data.classes": classes,
        "data.image_size": min(LARGEST_SIDE, -(-side // SIDE_STEP) * SIDE_STEP),
        "data.channels": 3,
    }
    words = [hydra_override(name, value) for name, value in values.items()]
    config = load_config([f"data={PRESET}", *words])
    return changed_config(config, overrides, options={"train.device": device}, names=CHANGEABLE)


def _usual_side(listing: Listing) -> int:
    """Return the median of the shorter sides of pictures; 1 where no header can be read."""
    sizes = (original_size(PRESET, path) for path in listing.paths)
    return int(median([min(size) for size in sizes if size is not None] or [1]))


def _read(
    config: Config,
    option: str,
    folder: Path,
    listed: tuple[Listing, list[str]],
    say: Callable[[str], object],
) -> ImageSet:
    listing, classes = listed
    own = config.changed({"data.root": str(folder), "data.classes": classes or ONE_CLASS})
    if option == "--held-out":
        listing = replace(listing, groups=patients_of(listing.paths, own.data))
    images, read = read_split(listing, own.data)
    least = 2 if option == "--train" else 1
    expected = f"a folder with pictures that can be read, {least} at least"
    require(len(images) >= least, option, expected, len(images))
    left_out = read.left_out.total()
    said = f", {left_out:,} files left out" if left_out else ""
    say(f"{option}: {len(images):,} pictures in {folder}{said}")
    return images


def _is_gray(images: Tensor) -> bool:
    return all(bool((each == each[:1]).all()) for each in images)


def _one_channel(images: ImageSet) -> ImageSet:
    return replace(images, images=images.images[:, :1].contiguous())


def _check_held_out(dataset: Dataset, say: Callable[[str], object]) -> None:
    """Refuse or name held-out pictures that are training pictures, beside which no copy shows."""
    number = len(dataset.test)
    same = sum(find_duplicates(dataset, 1).in_both)
    require(same < number, "--held-out", "of other pictures than --train", "the same")
    if same:
        say(
            f"WARNING: {same:,} of {number:,} held-out pictures are training pictures too, pixel "
            "by pixel: fewer copies show beside them; take them out of one of the folders"
        )


def _extractor(
    config: Config, train: ImageSet, say: Callable[[str], object]
) -> FeatureExtractor | None:
    """Make the extractor of features; None where a classifier has no classes to learn."""
    config = settle_extractor(config, automatic_extractor(config))
    if config.eval.extractor == "classifier" and len(torch.unique(train.labels)) < 2:
        say(NO_FEATURES)
        return None
    return build_extractor(config, train, select_device(config.train.device))
