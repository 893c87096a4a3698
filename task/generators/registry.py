"""The families of generators, by the name in `model.family`."""

from collections.abc import Callable, Sequence

import torch

from task.checks import require
from task.config import MODELS, Config, ModelConfig
from task.generators.base import Generator
from task.generators.classifier import build_classifier_family
from task.generators.diffusion.generator import build_diffusion
from task.generators.resnet_gan import build_resnet_gan
from task.generators.small_gan import build_small_gan
from task.generators.stylegan2_ada.generator import build_stylegan2_ada
from task.generators.vae import build_vae
from task.randomness import Stream, seeded_global_generator, torch_generator

GENERATORS: dict[str, Callable[[Config], Generator]] = {
    "diffusion": build_diffusion,
    "attention_unet": build_diffusion,
    "vae": build_vae,
    "stylegan2_ada": build_stylegan2_ada,
    "resnet_gan": build_resnet_gan,
    "small_gan": build_small_gan,
    "classifier": build_classifier_family,
}


def register(family: str, schema: type[ModelConfig], build: Callable[[Config], Generator]) -> None:
    """Add a family of generators.

    A package beside feddm does so in a module that it names in its entry points, in the group
    "feddm.generators". Nothing that a run's folder or a message holds can name a class.

    Args:
        family: its name, the word of `model.family`.
        schema: of the section `model`.
        build: makes a generator, with weights from torch's global generator.

    Raises:
        ValueError: there is a family of this name.
    """
    require(family not in MODELS, "family", f"another name than {', '.join(MODELS)}", family)
    MODELS[family], GENERATORS[family] = schema, build


def initial_generator(config: Config) -> Generator:
    """Make the generator that round 1 starts from, with weights of the seed and what is frozen.

    Raises:
        FileNotFoundError: a file of what is frozen is not there.
        ValueError: it does not fit the model.
    """
    with seeded_global_generator(torch_generator(config.seed, Stream.MODEL_INIT)):
        generator = build_generator(config)
    generator.load_frozen()
    return generator


def weightless_generator(config: Config) -> Generator:
    """Make the generator of a configuration on the meta device, without memory for weights."""
    with torch.device("meta"):
        return build_generator(config)


def build_generator(config: Config) -> Generator:
    """Make the generator of a configuration, with weights from torch's global generator.

    Raises:
        ValueError: `federation.local` names what is no such part of it.
    """
    generator = GENERATORS[config.model.family](config)
    if config.train.mode == "federated" and config.federation.local:
        keep_local(generator, config.federation.local)
    return generator


def keep_local(generator: Generator, parts: Sequence[str]) -> None:
    """Let parts of a generator stay at each client.

    Args:
        generator: of any family.
        parts: of those that images are not drawn from, see `Generator.undrawn`.

    Raises:
        ValueError: one is another.
    """
    possible = sorted(beginning.removesuffix(".") for beginning in generator.undrawn)
    expected = (
        f"of the parts of a {generator.title} that images are not drawn from, {', '.join(possible)}"
        if possible
        else f"[] with a {generator.title}, no part of which may stay at a client"
    )
    for part in parts:
        require(part in possible, "federation.local", expected, part)
    generator.local |= {f"{part}." for part in parts}
