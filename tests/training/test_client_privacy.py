import numpy as np
import pytest
import torch

from server_app.build_strategy import build_strategy
from server_app.weighting import Weighting
from task.config import Config, load_config
from task.protocol.wire import WeightLayout
from task.training.client_privacy import ClientPrivacy, check_clients
from task.training.private import SeededDraws, epsilon_after

WORDS = ["privacy=dp_clients", "model=vae", "federation.rounds=7"]
SIZE = 5


def configured(*words: str) -> Config:
    return load_config([*WORDS, *words])


def draws(seed: int = 3) -> SeededDraws:
    return SeededDraws(torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("aggregation", ["fedavg", "bounded_mean"])
def test_round_is_the_mean_of_clipped_updates_and_the_noise_of_their_sum(aggregation: str) -> None:
    config = configured(
        f"federation.aggregation={aggregation}",
        *("privacy.epsilon=null", "privacy.noise_multiplier=3", "privacy.clipping_norm=0.5"),
    )
    layout = WeightLayout({"weight": torch.Size([SIZE])})
    strategy = build_strategy(config, layout, Weighting.of(config, simulated=True))
    start = torch.linspace(-1, 1, SIZE)
    updates = np.zeros((3, SIZE), np.float32)
    updates[0, :2] = 3, 4  # five long, and clipped to 0.5
    updates[1, 2] = 0.25
    strategy.broadcast({"weight": start}, 3)
    # Numbers of images make no difference.
    for client, images in ((2, 10), (0, 900), (1, 1)):
        strategy.add(client, start.numpy() + updates[client], images)
    found = strategy.finish(draws())["weight"]
    noise = torch.randn(SIZE, generator=torch.Generator().manual_seed(3)).numpy()
    total = np.array([0.3, 0.4, 0.25, 0, 0]) + 3 * 0.5 * noise
    assert found.numpy() == pytest.approx(start.numpy() + total / 3, abs=1e-5)
    with pytest.raises(ValueError, match="draws"):
        strategy.broadcast({"weight": start}, 3)
        strategy.add(0, start.numpy(), 1)
        strategy.finish()


def test_no_update_is_longer_than_the_norm_and_a_short_one_stays() -> None:
    privacy = ClientPrivacy(clipping_norm=0.5, noise_multiplier=1.0)
    rng = np.random.default_rng(0)
    sent = rng.normal(0, 1, 1000).astype(np.float32)
    long, short = (sent + rng.normal(0, std, 1000).astype(np.float32) for std in (1.0, 1e-3))
    distance = np.linalg.norm(privacy.clipped(long, sent).astype(np.float64) - sent)
    assert 0.4999 < distance <= 0.5
    assert privacy.clipped(short, sent) == pytest.approx(short, abs=1e-6)
    assert np.array_equal(privacy.clipped(sent, sent), sent)


def test_epsilon_is_that_of_every_client_in_every_round() -> None:
    # Source: Balle & Wang 2018 (arXiv 1805.06530), Theorem 8; seven rounds are one with less noise.
    from scipy.stats import norm

    config = configured("privacy.epsilon=null", "privacy.noise_multiplier=4")
    epsilon, shift = epsilon_after(config, 7), np.sqrt(7) / 4
    delta = norm.cdf(shift / 2 - epsilon / shift) - np.exp(epsilon) * norm.cdf(
        -shift / 2 - epsilon / shift
    )
    assert delta == pytest.approx(1e-3, rel=0.02)
    assert epsilon_after(configured("privacy.epsilon=2"), 7) == pytest.approx(2, abs=0.25)
    assert ClientPrivacy.of(load_config(["model=vae"])) is None


def test_delta_that_gives_a_client_away_is_refused() -> None:
    check_clients(999, configured())
    with pytest.raises(ValueError, match=r"privacy\.delta must be below 1 / 1000"):
        check_clients(1000, configured())
