"""By what the ledger knows the patients of a hospital's images again."""

import hashlib

import torch

from task.data import ImageSet


def names_of_patients(images: ImageSet) -> list[list[bytes]]:
    """Return the names of each patient: the files and the pixels of the patient's images.

    The pixels are those of a run's size and channels. By the files a patient is known to a run of
    another size, by the pixels to one for which files were moved.

    Args:
        images: that are trained on; without `groups` each image is a patient.

    Returns:
        For `Ledger.charge`, in the order of the groups' numbers, or of the images.
    """
    pixels = images.images.contiguous().numpy()
    names: list[list[bytes]] = [
        [b"pixels " + hashlib.sha256(image.tobytes()).digest()] for image in pixels
    ]
    for number, file in enumerate(images.names if images.names is not None else ()):
        names[number].append(b"file " + str(file).encode(errors="surrogateescape"))
    if images.groups is None:
        return names
    patients: list[list[bytes]] = []
    _, members = torch.unique(images.groups, return_inverse=True)
    patients.extend([] for _ in range(int(members.max()) + 1 if len(members) else 0))
    for number, patient in enumerate(members.tolist()):
        patients[patient].extend(names[number])
    return patients
