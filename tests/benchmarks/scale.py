"""Seconds per round and memory of real runs of a tiny network by the number of clients."""

from tests.benchmarks.processes import after_the_first, rounds_of

SAMPLED = 10

# So little training that the machinery around it is what takes the time.
TINY = (
    *("partition.beta=inf", "data.image_size=8", "model.width=4", "model.num_poolings=1"),
    *("diffusion.num_timesteps=20", "diffusion.num_inference_steps=2", "train.local_epochs=1"),
    *("train.precision=float32", "train.device=cpu", "federation.rounds=4"),
    *("eval.every=1000", "eval.images_per_class=1", "eval.num_images=0"),
)


def measure(*, full: bool, device: str = "auto") -> dict[str, float]:
    """Run feddm-train over 10 and 100 virtual clients, with `full` over 1,000 as well.

    1,797 digits are dealt out evenly, so that a client has 161 images of 10, and 1 or 2 of 1,000.

    Args:
        full: with 1,000 clients.
        device: not used; the clients train on the CPU.

    Returns:
        `scale.seconds_per_round` (without evaluation) and `scale.peak_mib` (of all processes) by
        the number of clients: `.100.all` where all of 100 train, `.100.sampled` where 10 do.
    """
    found = {}
    for clients in (10, 100, 1000) if full else (10, 100):
        for training, name in {SAMPLED: "sampled", clients: "all"}.items():
            rounds, peak = rounds_of(
                f"federation.num_supernodes={clients}",
                f"federation.clients_per_round={training}",
                *TINY,
            )
            last = rounds[max(rounds)]
            found |= {
                f"scale.seconds_per_round.{clients}.{name}": after_the_first(
                    {n: told for n, told in rounds.items() if told is not last}, "round_seconds"
                ),
                f"scale.seconds_evaluating.{clients}.{name}": last["seconds_evaluating"],
                f"scale.peak_mib.{clients}.{name}": peak,
            }
    return found
