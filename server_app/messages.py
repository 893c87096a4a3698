"""The records of messages as the server writes and reads them."""

from typing import TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.constant import SType
from numpy.typing import NDArray

from task.data import ImageSet
from task.protocol.wire import Key, from_npy, to_npy

FlowerRecord = TypeVar("FlowerRecord", ArrayRecord, MetricRecord, ConfigRecord)


def record_of(content: RecordDict, name: str, kind: type[FlowerRecord]) -> FlowerRecord:
    """Return a record of a message; an empty one where there is none of that name and kind.

    Flower's own views, such as `content.array_records`, refer to the content and to themselves:
    the weights of many replies would stay in memory until Python looks for circles.
    """
    found = content.get(name)
    return found if isinstance(found, kind) else kind()


def packed_record(packed: NDArray[np.floating]) -> ArrayRecord:
    """Make the record of packed weights that travels."""
    shape = (len(packed),)
    return ArrayRecord({Key.PACKED: Array(str(packed.dtype), shape, SType.NUMPY, to_npy(packed))})


def images_record(images: ImageSet) -> ArrayRecord:
    """Make the record of images that travels, with their labels."""
    arrays = {Key.IMAGES: images.images.numpy(), Key.LABELS: images.labels.numpy()}
    return ArrayRecord(
        {
            str(name): Array(str(array.dtype), array.shape, SType.NUMPY, to_npy(array))
            for name, array in arrays.items()
        }
    )


def packed_weights(content: RecordDict) -> NDArray[np.floating]:
    """Return the packed weights of a reply that was checked, without a copy."""
    return from_npy(record_of(content, Key.ARRAYS, ArrayRecord)[Key.PACKED].data)
