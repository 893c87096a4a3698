"""The data sets: read, brought to the shape that the model sees, split, normalized.

Images stay uint8 NCHW; batches are normalized on the device that trains. `packaged` reads what
comes with a library; what lies in files goes `walk` and `listing` (which file is of which class)
-> `pictures` or `dicom` -> `shape` -> `cache`, joined in `files`. `inventory` tells what became of
each file, `source` where images are from.
"""

from task.config import FILE_SETS, Config
from task.data.duplicates import count_across_clients
from task.data.files import list_files, load_files, original_size
from task.data.images import Dataset, ImageSet, normalize, random_horizontal_flip, resize
from task.data.inventory import Inventory, inventory_of_dataset, inventory_of_listings
from task.data.listing import Listing, UnknownClassError
from task.data.packaged import load_packaged
from task.data.split import split_validation

__all__ = [
    "Dataset",
    "ImageSet",
    "Inventory",
    "Listing",
    "UnknownClassError",
    "build_dataset",
    "count_across_clients",
    "inventory_of_listings",
    "list_dataset",
    "normalize",
    "original_size",
    "random_horizontal_flip",
    "resize",
    "split_validation",
    "take_inventory",
]


def build_dataset(config: Config, *, download: bool) -> Dataset:
    """Load the data set of a configuration; see `load_packaged` and `load_files`."""
    if config.data.name in FILE_SETS:
        return load_files(config.data)
    return load_packaged(config.data, download=download)


def list_dataset(config: Config) -> tuple[Listing, Listing]:
    """List the training and the test split that `build_dataset` would load, decoding no file.

    Nothing is downloaded. See `list_files` and `load_packaged`.
    """
    if config.data.name in FILE_SETS:
        return list_files(config.data)
    dataset = build_dataset(config, download=False)
    return Listing([], dataset.train.labels.numpy()), Listing([], dataset.test.labels.numpy())


def take_inventory(config: Config, dataset: Dataset | None = None) -> Inventory:
    """Count every file of a data set, and the images that are the same pixel by pixel.

    Args:
        config: of the run.
        dataset: of `build_dataset`; None: files are counted and not decoded.
    """
    if dataset is None:
        return inventory_of_listings(config.data.classes, *list_dataset(config))
    return inventory_of_dataset(config.data.classes, dataset)
