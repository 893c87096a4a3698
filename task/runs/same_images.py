"""Whether a data set is the one that a run was trained on, by the hashes in its data.json."""

from pathlib import Path

from task.data import Dataset
from task.data.source import hash_images
from task.runs.layout import DATA_FILE, read_json

SPLIT = (
    "the same images, split otherwise than in training: give data.patients (or data.root with its "
    "folders train/ and test/) as it was when the run began"
)
IMAGES = (
    "other images, or labels, than the run was trained on: give data.root as it was when the run "
    "began"
)


def describe_differences(run: Path, dataset: Dataset) -> str:
    """Say in what a data set differs from that of a run, and the way out.

    Args:
        run: its folder.
        dataset: as its configuration loads it now.

    Returns:
        `SPLIT`, `IMAGES`, or "" where nothing differs or the run has written down no hashes, as
        those of real nodes do.
    """
    stored = (read_json(run / DATA_FILE) or {}).get("sha256")
    if stored is None:
        return ""
    found = hash_images(dataset)
    if stored == found:
        return ""
    return SPLIT if stored["all"] == found["all"] else IMAGES
