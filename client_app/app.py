"""The ClientApp of feddm: what a hospital does with each message of the server."""

import os
import time
from typing import cast

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from client_app.audit import attack_own, tells_audit
from client_app.budget import charge_round
from client_app.encoded_weights import EncodedWeights
from client_app.failures import failures_stay_local
from client_app.hospital_scores import images_of, named_extractor, with_own_extractor
from client_app.last_reply import LastReply, keeps_replies, one_training_at_a_time
from client_app.local_model import keep_local_model
from client_app.local_state import LocalState
from client_app.log import logger
from client_app.secure_sums import SumPart, help_unmask, npy_array, own_keys
from client_app.workspace import Workspace, choose_precision, named_run, open_workspace
from task.code_version import code_fingerprint
from task.config import compose_run_config, package_of
from task.data import Dataset
from task.evaluation.hospital_scores import score_images
from task.protocol.node import NodeConfig, check_node, own_config, read_node_config
from task.protocol.secure_aggregation.fixed_point import NotFiniteError
from task.protocol.wire import AUDIT, SCORES, UNMASK, Key, from_npy
from task.protocol.wire_format import sent_weights
from task.randomness import Stream, torch_generator
from task.training.algorithms.registry import client_algorithm
from task.training.client_privacy import ClientPrivacy
from task.training.devices import device_name, move
from task.training.learning_rate import round_lr
from task.training.loop import fit, fit_options, held_out_losses
from task.training.private import (
    SecretDraws,
    gradients_as_updates,
    secret_generator,
    sums_gradients,
)

app = ClientApp()

# Flower loads this file before it starts a simulation's Ray, which would join any that runs on the
# machine, or wait for one that has run.
os.environ["RAY_ADDRESS"] = os.environ.get("RAY_ADDRESS") or "local"


@app.query()
@failures_stay_local
def introduce(message: Message, context: Context) -> Message:
    """Say which code this runs, and which share of a simulation this is, if it is one.

    A real node looks through its data first, as far as that goes without decoding it. Where its
    hospital allows it, it says how many training images of each class of `data.classes` it has,
    without the held-out ones. It says in any case how many images it has in all, and the server
    does not believe it if it claims more later. With differential privacy it says neither, and with
    secure aggregation not how many images it has.
    """
    said = ConfigRecord({Key.FINGERPRINT: code_fingerprint()})
    place = read_node_config(context.node_config)
    asked = cast(ConfigRecord, message.content[Key.CONFIG])
    if asked.get(Key.SECURE_AGGREGATION):
        node = place if isinstance(place, NodeConfig) else None
        said[Key.PEER_KEYS] = own_keys(context, node).to_bytes()
    if isinstance(place, NodeConfig):
        config = own_config(compose_run_config(named_run(context)), place)
        config = named_extractor(config, message)
        said[Key.FINGERPRINT] = code_fingerprint(package_of(config.model.family))
        counts = check_node(config, place)
        told = place.report_class_counts and not config.privacy.is_on
        if config.tells_of_clients:
            said[Key.NUM_IMAGES] = sum(counts.train) + sum(counts.held_out)
        if told:
            said[Key.CLASS_COUNTS] = list(counts.train)
        if keeps_replies(config, place):
            said[Key.KEEPS_REPLIES] = True
        logger.info(
            "ready for %s: %d training images and %d held out, of %s; class counts are %s",
            config.run_name,
            sum(counts.train),
            sum(counts.held_out),
            ", ".join(f"{c}: {n}" for c, n in zip(config.data.classes, counts.train, strict=True)),
            "told to the server" if told else "kept here",
        )
        for line in counts.files.describe():
            logger.info("data: %s", line)
    else:
        said[Key.PARTITION_ID], said[Key.NUM_PARTITIONS] = place.number, place.shares
    return Message(RecordDict({Key.CONFIG: said}), reply_to=message)


@app.train()
@failures_stay_local
def train(message: Message, context: Context) -> Message:
    """Run the local epochs from the global weights and reply the local weights."""
    with one_training_at_a_time(message, context):
        return _train(message, context)


def _train(message: Message, context: Context) -> Message:
    start = time.perf_counter()
    workspace = open_workspace(context)
    asked = cast(ConfigRecord, message.content[Key.CONFIG])
    server_round = int(asked[Key.SERVER_ROUND])  # type: ignore[arg-type]
    config = workspace.config
    images, held_out = workspace.images(context)
    last = LastReply(workspace, message, context, images)
    if (told := last.take()) is not None:
        return Message(told, reply_to=message)
    generator = workspace.generator
    # First, for a round that is refused costs no patient anything.
    part = SumPart.of(workspace, context, message)
    charge_round(workspace, asked, images)
    with LocalState(workspace, asked, images).held() as state:
        generator.prepare(len(images))
        received = receive_weights(workspace, message)
        # Before the optimizers, whose state lies in memory as the weights do.
        place = workspace.device if workspace.num_processes == 1 else torch.device("cpu")
        move(generator, place, channels_last=config.train.channels_last)
        optimizers = generator.optimizers(round_lr(config, server_round))
        if sums_gradients(config):
            optimizers = gradients_as_updates(optimizers)
        state.load(optimizers)
        algorithm = client_algorithm(config)
        precision = choose_precision(workspace, context, str(asked[Key.PRECISION]))
        # The server knows the run's seed. It could take noise that comes from it out again, and see
        # in all draws that follow who was there before.
        secret = config.privacy.is_on and workspace.node is not None
        rng = (
            secret_generator(workspace.device)
            if secret
            else torch_generator(
                config.seed,
                Stream.TRAIN,
                server_round,
                int(asked[Key.CLIENT]),  # type: ignore[arg-type]
                device=workspace.device,
            )
        )
        result = fit(
            generator,
            images.images,
            images.labels,
            options=fit_options(config, precision=precision, num_processes=workspace.num_processes),
            optimizers=optimizers,
            rng=rng,
            callbacks=algorithm.callbacks,
            received={**received_beside(message), **state.kept},
            patients=images.groups,
            private_draws=SecretDraws() if secret else None,
        )
        upload = EncodedWeights.of(workspace, received, asked, state.kept)
        kept = {name: result.tensors[name] for name in algorithm.kept} | upload.kept
        # What a round that has diverged would leave behind would spoil those after it as well.
        if kept and not all(bool(each.isfinite().all()) for each in kept.values()):
            raise NotFiniteError("what is kept of a round is not finite: training has diverged")
        state.save(optimizers, kept)
    keep_local_model(workspace, server_round, precision)
    packed = upload.packed
    records = RecordDict()
    if part is None:
        beside = {name: result.tensors[name].numpy() for name in algorithm.sent}
        arrays = {str(Key.PACKED): packed, **beside}
        if asked.get(Key.LOCAL) and config.federation.drawn_by == "clients":
            arrays[str(Key.LOCAL)] = workspace.personal.pack(generator.state_dict())
        records[Key.ARRAYS] = ArrayRecord({name: npy_array(a) for name, a in arrays.items()})
    if asked.get(Key.AUDIT) and tells_audit(workspace):
        client = int(asked[Key.CLIENT])  # type: ignore[arg-type]
        own = Dataset(images, held_out)
        records[Key.AUDIT] = attack_own(workspace, own, client=client, is_local=True)
    # Whatever is said beside the weights tells of images, and has no noise.
    if part is None and not config.privacy.is_on:
        records[Key.METRICS] = MetricRecord(
            {
                Key.NUM_EXAMPLES: len(images),
                Key.LOSS: result.loss,
                Key.SECONDS: result.seconds,
                Key.SECONDS_BESIDE: time.perf_counter() - start - result.seconds,
                Key.IMAGES_PER_SECOND: result.images_per_second,
                **result.measures,
            }
        )
    logger.info(
        "round %d: trained on %d images (epochs: %d) in %.1f s, with all around it %.1f s: "
        "loss %.5g, %.0f images/s on %s in %s (processes: %d)",
        server_round,
        len(images),
        config.train.local_epochs,
        result.seconds,
        time.perf_counter() - start,
        result.loss,
        result.images_per_second,
        device_name(workspace.device),
        precision,
        workspace.num_processes,
    )
    if part is not None:
        if (privacy := ClientPrivacy.of(config)) is not None:
            # The server, which clips what it can see, does not see it.
            packed = privacy.clipped(packed, part.sent)
        if config.privacy.is_on:
            return part.reply(packed, 1, [])
        measured = [result.loss, *(result.measures[name] for name in generator.measures)]
        return part.reply(packed, len(images), measured)
    last.keep(records)
    return Message(records, reply_to=message)


@app.train(UNMASK)
@failures_stay_local
def unmask(message: Message, context: Context) -> Message:
    """Help to take the masks off the sum that this client was asked for last."""
    place = read_node_config(context.node_config)
    return help_unmask(message, context, place if isinstance(place, NodeConfig) else None)


@app.evaluate()
@failures_stay_local
def evaluate(message: Message, context: Context) -> Message:
    """Reply the loss of the global weights on held-out images, drawn alike in every round."""
    start = time.perf_counter()
    asked = cast(ConfigRecord, message.content[Key.CONFIG])
    workspace = open_workspace(context)
    config = workspace.config
    if config.privacy.is_on:
        return nothing_told(message)
    images, held_out = workspace.images(context)
    part = SumPart.of(workspace, context, message)
    losses = None
    # A small share of a skewed partition can be without held-out images.
    if len(held_out) > 0:
        workspace.generator.prepare(len(images))
        receive_weights(workspace, message)
        LocalState(workspace, asked, images).load()
        precision = choose_precision(workspace, context, str(asked[Key.PRECISION]))
        losses = held_out_losses(
            workspace.generator,
            held_out.images,
            held_out.labels,
            options=fit_options(config, precision=precision, batch_size=config.train.batch_size),
            rng=torch_generator(
                config.seed,
                Stream.EVALUATE,
                int(asked[Key.CLIENT]),  # type: ignore[arg-type]
                device=workspace.device,
            ),
        )
    metrics = MetricRecord({Key.NUM_EXAMPLES: 0 if losses is None else len(held_out)})
    for name, loss in (losses or {}).items():
        metrics[name] = loss
    logger.info(
        "round %s: evaluated %d held-out images in %.1f s: loss %s on %s",
        asked[Key.SERVER_ROUND],
        len(held_out),
        time.perf_counter() - start,
        "unknown" if losses is None else f"{losses[Key.LOSS]:.5g}",
        device_name(workspace.device),
    )
    if part is not None:
        names = (Key.LOSS, *workspace.generator.loss_parts)
        measured = [0.0 if losses is None else losses[name] for name in names]
        return part.reply(None, 0 if losses is None else len(held_out), measured)
    return Message(RecordDict({Key.METRICS: metrics}), reply_to=message)


@app.evaluate(AUDIT)
@failures_stay_local
def audit(message: Message, context: Context) -> Message:
    """Reply how well this client's images are told by the global weights, and nothing else."""
    asked = cast(ConfigRecord, message.content[Key.CONFIG])
    workspace = open_workspace(context)
    records = RecordDict()
    if tells_audit(workspace):
        own = Dataset(*workspace.images(context))
        workspace.generator.prepare(len(own.train))
        receive_weights(workspace, message)
        LocalState(workspace, asked, own.train).load()
        client = int(asked[Key.CLIENT])  # type: ignore[arg-type]
        records[Key.AUDIT] = attack_own(workspace, own, client=client, is_local=False)
    return Message(records, reply_to=message)


@app.evaluate(SCORES)
@failures_stay_local
def score(message: Message, context: Context) -> Message:
    """Reply how images that the server drew compare with the node's own, and nothing else."""
    start = time.perf_counter()
    place = read_node_config(context.node_config)
    if not isinstance(place, NodeConfig):
        raise ValueError("images are scored by real nodes; a simulation's server has all images")
    if not place.score_images:
        logger.info("the server asked to score images, and score-images=false declines")
        return nothing_told(message)
    workspace = open_workspace(context)
    if not workspace.config.tells_of_clients:
        return nothing_told(message)
    config = named_extractor(workspace.config, message)
    config = with_own_extractor(config, place.inception_weights)
    own = Dataset(*workspace.images(context))
    generated = images_of(message)
    scores = score_images(config, generated, own, device=workspace.device)
    logger.info(
        "scored %d generated images against %d held-out ones in %.1f s: %s",
        len(generated),
        len(own.test),
        time.perf_counter() - start,
        ", ".join(f"{name} {value:.4g}" for name, value in scores.items()),
    )
    metrics = MetricRecord({str(name): value for name, value in scores.items()})
    return Message(RecordDict({Key.METRICS: metrics}), reply_to=message)


def nothing_told(message: Message) -> Message:
    """Make the reply of a client that has measured nothing, or tells nothing of it."""
    metrics = MetricRecord({Key.NUM_EXAMPLES: 0})
    return Message(RecordDict({Key.METRICS: metrics}), reply_to=message)


def receive_weights(workspace: Workspace, message: Message) -> NDArray[np.floating]:
    """Put the weights of a message into the model, and return them: [P].

    Raises:
        ValueError: they are not the weights of this model.
    """
    # Flower's view `content.array_records` would keep the array in memory, in a circle.
    arrays = cast(ArrayRecord, message.content[Key.ARRAYS])
    packed = sent_weights(workspace.layout, from_npy(arrays[Key.PACKED].data))
    workspace.generator.load_shared(workspace.layout.unpack(packed, workspace.device))
    return packed


def received_beside(message: Message) -> dict[str, torch.Tensor]:
    """Return what the strategy of the run sends beside the weights, flat, by name."""
    arrays = cast(ArrayRecord, message.content[Key.ARRAYS])
    return {
        name: torch.from_numpy(from_npy(array.data).copy())
        for name, array in arrays.items()
        if name != Key.PACKED
    }
