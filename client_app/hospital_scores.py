"""What a node needs to score the server's images: the images, and an extractor of its own."""

from pathlib import Path
from typing import cast

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message

from task.checks import require
from task.config import Config, anchored, settle_extractor
from task.data import ImageSet
from task.evaluation.features import hub_inception_file
from task.protocol.wire import Key, from_npy


def images_of(message: Message) -> ImageSet:
    """Return the images of a message, with their labels.

    Raises:
        TypeError: an array has another dtype.
        ValueError: an array cannot be read or has another shape.
    """
    arrays = cast(ArrayRecord, message.content[Key.ARRAYS])
    # Copied, because torch warns of tensors over memory that cannot be written.
    images, labels = (
        torch.from_numpy(from_npy(arrays[name].data).copy()) for name in (Key.IMAGES, Key.LABELS)
    )
    return ImageSet(images, labels)


def named_extractor(config: Config, message: Message) -> Config:
    """Settle an extractor that the configuration leaves open as the server has.

    All nodes look through the same network: what they measure is averaged.
    """
    asked = cast(ConfigRecord, message.content[Key.CONFIG])
    return settle_extractor(config, str(asked[Key.EXTRACTOR]))


def with_own_extractor(config: Config, inception_weights: str | None) -> Config:
    """Let a configuration look through files of this node alone.

    Args:
        config: of the run, with a settled extractor.
        inception_weights: this node's file; None: the one in torch.hub's folder.

    Raises:
        ValueError: the run would have the node run a program from outside.
        FileNotFoundError: Inception's weights are asked for and are not on this node.
    """
    require(
        config.eval.extractor != "exported",
        "eval.extractor",
        "classifier, efficientnet or inception on a hospital's node, which loads no program from "
        "outside",
        config.eval.extractor,
    )
    file = inception_weights or str(hub_inception_file())
    config = anchored(config.changed({"eval.inception_weights": file}), Path.home())
    if config.eval.extractor == "inception" and not Path(config.eval.inception_weights).is_file():
        raise FileNotFoundError(
            f"eval.extractor=inception needs Inception's weights, and {file} is not there: nothing "
            "is downloaded here; start the node with --node-config 'inception-weights=\"/file\"'"
        )
    return config
