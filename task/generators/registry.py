"""The families of generators, by the name in `model.family`."""

from collections.abc import Callable

import torch

from task.config import Config
from task.generators.base import Generator
from task.generators.diffusion.generator import build_diffusion

GENERATORS: dict[str, Callable[[Config], Generator]] = {"diffusion": build_diffusion}


def weightless_generator(config: Config) -> Generator:
    """Make the generator of a configuration without memory for weights, to be asked what it is."""
    with torch.device("meta"):
        return build_generator(config)


def build_generator(config: Config) -> Generator:
    """Make the generator of a configuration, with weights from torch's global generator."""
    return GENERATORS[config.model.family](config)
