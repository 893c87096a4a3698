"""What the paper printed, and at which scale.

Source: Tun et al. 2023, arXiv 2311.16538, Tables I to V.
"""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

from task.config import flat_values, load_config


class PublishedScores(NamedTuple):
    """One cell group of the paper; Table V has one FID, to the training images."""

    inception_score: float
    inception_score_std: float
    fid_train: float
    fid_test: float | None = None


PublishedRow = Mapping[str, PublishedScores]

# Training images, and generated ones, as many as test images (CT: as training images).
PAPER_SIZES = {
    "cifar10": (50_000, 10_000),
    "fashion_mnist": (60_000, 10_000),
    "svhn": (73_257, 26_032),
    "sars_cov_2_ct": (2_481, 2_481),
}


@lru_cache
def paper_values(data: str) -> list[dict[str, Any]]:
    """Return the configurations, flat, of the paper's FedAvg on one of `PAPER_SIZES`.

    One is as the released code trained, one as the paper's text says.
    """
    experiment = "table5" if data == "sars_cov_2_ct" else "paper"
    return [
        flat_values(
            load_config([f"experiment={experiment}", f"data={data}", f"diffusion={diffusion}"])
        )
        for diffusion in ("released", "paper")
    ]


def is_papers_federation(values: Mapping[str, Any]) -> bool:
    """Say whether a flat configuration has the clients of the cell that Tables I to IV share."""
    number, sampled = (
        values[f"federation.{name}"] for name in ("num_supernodes", "clients_per_round")
    )
    return (number, sampled or number, values["partition.beta"]) == (10, 10, 0.5)


def _row(
    cifar10: tuple[float, ...], fashion_mnist: tuple[float, ...], svhn: tuple[float, ...]
) -> PublishedRow:
    return {
        "cifar10": PublishedScores(*cifar10),
        "fashion_mnist": PublishedScores(*fashion_mnist),
        "svhn": PublishedScores(*svhn),
    }


# By table, then by the value that the table varies, then by data set.
PUBLISHED: dict[str, dict[str | float, PublishedRow]] = {
    "I": {
        "centralized": _row(
            (4.45, 0.12, 10.30, 11.70), (4.15, 0.08, 7.93, 8.92), (3.39, 0.04, 13.18, 13.13)
        ),
        "federated": _row(
            (3.69, 0.08, 21.42, 22.67), (4.11, 0.12, 17.03, 17.91), (3.07, 0.04, 15.64, 20.39)
        ),
    },
    "II": {
        0.1: _row(
            (3.65, 0.11, 25.40, 26.74), (3.94, 0.09, 20.01, 20.93), (3.14, 0.05, 20.15, 22.93)
        ),
        0.5: _row(
            (3.69, 0.08, 21.42, 22.67), (4.11, 0.07, 17.03, 17.91), (3.07, 0.04, 15.64, 20.39)
        ),
        5.0: _row(
            (3.66, 0.10, 20.57, 21.91), (3.93, 0.08, 15.58, 16.58), (3.12, 0.06, 12.28, 16.38)
        ),
    },
    "III": {
        10: _row(
            (3.69, 0.08, 21.42, 22.67), (4.11, 0.07, 17.03, 17.91), (3.07, 0.04, 15.64, 20.39)
        ),
        30: _row(
            (3.02, 0.05, 40.09, 41.57), (3.98, 0.11, 19.56, 20.50), (2.95, 0.04, 20.45, 23.48)
        ),
        50: _row(
            (2.81, 0.07, 48.69, 50.23), (4.21, 0.07, 35.61, 36.46), (2.96, 0.04, 23.76, 26.46)
        ),
    },
    "IV": {
        1: _row((2.49, 0.04, 79.79, 81.60), (4.01, 0.12, 36.36, 37.31), (2.33, 0.03, 48.16, 52.85)),
        5: _row((3.69, 0.08, 21.42, 22.67), (4.11, 0.07, 17.03, 17.91), (3.07, 0.04, 15.64, 20.39)),
        10: _row(
            (3.88, 0.12, 18.22, 19.51), (3.95, 0.07, 12.78, 13.75), (3.10, 0.04, 11.73, 17.31)
        ),
    },
    "V": {
        "centralized": {"sars_cov_2_ct": PublishedScores(1.72, 0.04, 48.17)},
        "federated": {"sars_cov_2_ct": PublishedScores(1.60, 0.03, 134.98)},
    },
}
