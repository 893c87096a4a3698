"""The families of generators, by the name in `model.family`."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch

from task.checks import require
from task.config import MEASURING_OFF, MODELS, Config, ModelConfig, flat_values
from task.generators.base import Generator
from task.generators.classifier import build_classifier_family
from task.generators.diffusion.generator import build_diffusion
from task.generators.ensemble import Ensemble, count_members
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


def drawing_generator(config: Config, weights: Iterable[str]) -> Generator:
    """Make the generator that draws from weights; see `build_generator`.

    Args:
        config: of their run.
        weights: their names; where they are of several models, it is an `Ensemble` of these.
    """
    members = [build_generator(config) for _ in range(count_members(weights))]
    if members:
        return Ensemble(members, len(config.data.classes))
    return build_generator(config)


def with_weights(
    config: Config, generator: Generator, weights: Mapping[str, torch.Tensor]
) -> Generator:
    """Return a generator with weights: the given one, or an ensemble where they are of several.

    Args:
        config: of the run.
        generator: of one model.
        weights: a `state_dict`.
    """
    if count_members(weights):
        generator = drawing_generator(config, weights)
    generator.load_state_dict(weights)
    return generator


def check_drawn(generator: Generator, config: Config) -> None:
    """Check that a federated run can draw what it is to measure.

    Raises:
        ValueError: the parts that images are drawn from stay at the clients.
    """
    if not config.model.draws:
        return
    local, federation = config.federation.local, config.federation
    unused = [part for part in generator.kept_parts if part in generator.undrawn]
    require(
        not unused or federation.drawn_by == "global",
        "federation.local",
        "of parts that images are drawn from with federation.drawn_by=clients, for which they are "
        f"sent ({', '.join(p for p in generator.parts if p not in generator.undrawn)})",
        local,
    )
    if can_draw(generator, config):
        return
    require(
        not federation.keep_local_models,
        "federation.keep_local_models",
        f"[] with federation.local={local}, which clients do not send",
        federation.keep_local_models,
    )
    asked = flat_values(config)
    for name, off in MEASURING_OFF.items():
        require(
            asked[name] == off,
            name,
            f"{off} with federation.local={local}, from which images are drawn "
            "(with federation.drawn_by=clients the hospitals send these parts)",
            asked[name],
        )


def can_draw(generator: Generator, config: Config) -> bool:
    """Whether the server of a run has what images are drawn from."""
    drawn_by_clients = config.federation.drawn_by == "clients"
    return config.model.draws and (generator.draws_by_itself or drawn_by_clients)


def keep_local(generator: Generator, parts: Sequence[str]) -> None:
    """Let parts of a generator stay at each client.

    Args:
        generator: of any family.
        parts: see `Generator.parts`.

    Raises:
        ValueError: there is no such part.
    """
    expected = (
        f"of the parts of a {generator.title}, {', '.join(generator.parts)}"
        if generator.parts
        else f"[] with a {generator.title}, which has no parts"
    )
    for part in parts:
        require(part in generator.parts, "federation.local", expected, part)
    generator.kept_parts = tuple(parts)
    generator.local |= {*generator.beginnings(parts)}
