"""The data sets: read, brought to the shape that the model sees, split, normalised.

Images stay uint8 NCHW; batches are normalised on the device that trains. `packaged` reads what
comes with a library; what lies in files goes `listing` -> `decode` -> `cache`, joined in `files`.
"""

from task.config import FILE_SETS, Config
from task.data.duplicates import count_across_clients
from task.data.files import list_files, load_files, original_size
from task.data.images import Dataset, ImageSet, normalize, random_horizontal_flip, resize
from task.data.inventory import Inventory, inventory_of_dataset, inventory_of_listings
from task.data.listing import Listing, UnknownClassError
from task.data.packaged import load_dataset
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
    "list_files",
    "load_dataset",
    "load_files",
    "normalize",
    "original_size",
    "random_horizontal_flip",
    "resize",
    "split_validation",
    "take_inventory",
]


def build_dataset(config: Config, *, download: bool) -> Dataset:
    """Load the data set that the configuration names; see `load_dataset` and `load_files`."""
    data = config.data
    if data.name in FILE_SETS:
        return load_files(
            data.name,
            root=data.root,
            classes=data.classes,
            image_size=data.image_size,
            channels=data.channels,
            fit=data.fit,
            window=None if data.window is None else (data.window[0], data.window[1]),
            test_fraction=data.test_fraction,
            seed=config.data.split_seed,
            cache_dir=data.cache_dir,
            on_corrupt=data.on_corrupt,
        )
    return load_dataset(
        data.name,
        root=data.root,
        image_size=data.image_size,
        channels=data.channels,
        num_classes=len(data.classes),
        test_fraction=data.test_fraction,
        seed=config.data.split_seed,
        download=download,
    )


def list_dataset(config: Config) -> tuple[Listing, Listing]:
    """List the training and the test split that `build_dataset` would load, decoding no file.

    Nothing is downloaded. See `list_files` and `load_dataset`.
    """
    data = config.data
    if data.name in FILE_SETS:
        return list_files(
            data.name,
            root=data.root,
            classes=data.classes,
            test_fraction=data.test_fraction,
            seed=data.split_seed,
        )
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
