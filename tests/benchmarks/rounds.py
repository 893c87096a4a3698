"""Where the time of a round goes: a real run of the paper's network, phase by phase."""

from task.training.devices import select_device
from tests.benchmarks.processes import after_the_first, rounds_of

# A client of the paper trains 5 epochs on 5,000 images between two messages.
IMAGES_OF_THE_PAPER = 25_000

PAPERS_NET = (
    *("model=feddm", "data.image_size=32", "data.channels=3", "partition.beta=inf"),
    *("federation.rounds=3", "diffusion.num_inference_steps=2"),
    *("eval.every=1000", "eval.images_per_class=1", "eval.num_images=0", "data.test_fraction=0.1"),
)


def measure(*, full: bool, device: str = "auto") -> dict[str, float]:
    """Run three rounds of feddm-train with the paper's network on digits of 32x32 pixels.

    On a GPU two clients, one after the other, train on 25,000 images each, as in a round of the
    paper: 31 epochs of 809 digits. A CPU would need hours for that; there two of 40 clients, side
    by side, train on 40 images each. That overhead is one of the paper's network, its share is
    not one of the paper's load, and is estimated from both.

    Args:
        full: not used.
        device: "auto" or a torch device, on which the clients train.

    Returns:
        Medians over the rounds but the first: `round.seconds` and its phases, with evaluation
        apart; `round.overhead_seconds`, outside training, and `round.overhead_share`, its share
        of this round of `round.images_per_client`; on a CPU also an estimate of the share, with
        the training that 25,000 images would take at this speed.
    """
    on_gpu = select_device(device).type == "cuda"
    clients, epochs = (2, 31) if on_gpu else (40, 1)
    rounds, _ = rounds_of(
        *PAPERS_NET,
        f"federation.num_supernodes={clients}",
        "federation.clients_per_round=2",
        f"train.local_epochs={epochs}",
        f"train.device={device}",
        f"train.batch_size={512 if on_gpu else 128}",
        f"train.precision={'auto' if on_gpu else 'float32'}",
    )
    phases = ("training", "sending", "waiting", "aggregating", "checkpoint")
    found = {f"round.seconds_{p}": after_the_first(rounds, f"seconds_{p}") for p in phases}
    # The sum of the server's phases; clients train while it sends, waits and adds up.
    seconds = sum(found.values()) - found["round.seconds_training"]
    overhead = seconds - found["round.seconds_training"]
    images = epochs * 1618 / clients
    estimate = overhead / (
        overhead + found["round.seconds_training"] * IMAGES_OF_THE_PAPER / images
    )
    return {
        **found,
        "round.seconds": seconds,
        "round.overhead_seconds": overhead,
        "round.images_per_client": images,
        "round.overhead_share": overhead / seconds,
    } | ({} if on_gpu else {"round.estimated_share_at_25000_images": estimate})
