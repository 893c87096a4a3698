"""What secure aggregation costs a client: `python -m tests.benchmarks.masking`."""

import tempfile
import time
from pathlib import Path

import numpy as np

from task.protocol.secure_aggregation.fixed_point import UpdateFormat
from task.protocol.secure_aggregation.keys import Identity, new_identity_secret
from task.protocol.secure_aggregation.memory import FolderStore
from task.protocol.secure_aggregation.participant import Participant
from task.protocol.secure_aggregation.terms import Terms

NUM_WEIGHTS = 23_200_000
HOSPITALS = (3, 10, 50)


def measure_client(num_hospitals: int, folder: Path) -> str:
    """Encode and mask an update, and say what CPU time that took and what there is to send."""
    identities = [Identity(new_identity_secret()) for _ in range(num_hospitals)]
    form = UpdateFormat(update_range=1.0, max_images=10_000, num_clients=num_hospitals)
    peers = tuple(identity.public for identity in identities)
    terms = Terms("run", 1, 1, "train", peers, form, "model")
    participant = Participant(identities[0], FolderStore(folder))
    participant.begin(terms)
    rng = np.random.default_rng(0)
    update = rng.normal(0, 1e-3, NUM_WEIGHTS).astype(np.float32)
    start = time.process_time()
    values, _ = form.encode(update, 600)
    encoded = time.process_time()
    upload = participant.upload(terms, values, form.encode_measures(600, [0.1]))
    masked = time.process_time()
    shares = sum(map(len, (*upload.shares, *upload.commitments)))
    return (
        f"{num_hospitals} hospitals: encoding {encoded - start:.2f} s, masks and shares "
        f"{masked - encoded:.2f} s, upload {upload.values.nbytes / 1e6:.1f} MB (float32: "
        f"{update.nbytes / 1e6:.1f} MB), shares {shares / 1e3:.1f} kB"
    )


if __name__ == "__main__":
    for hospitals in HOSPITALS:
        with tempfile.TemporaryDirectory() as folder:
            print(measure_client(hospitals, Path(folder)))
