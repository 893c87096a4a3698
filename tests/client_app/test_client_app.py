import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from numpy.typing import NDArray
from torchvision import datasets

from client_app import workspace
from client_app.app import app
from client_app.failures import failure_code, failures_stay_local
from client_app.log import logger
from client_app.workspace import choose_precision, open_workspace
from server_app.audits import AUDIT_TYPE, read_attacks
from server_app.hospital_scores import SCORES_TYPE, expected_scores
from server_app.messages import addressed, images_record
from task.code_version import code_fingerprint
from task.config import Config, load_run_config, settle_extractor
from task.data import Dataset, ImageSet, UnknownClassError, build_dataset, split_validation
from task.data.partition import build_partition
from task.efficientnet import MissingWeightsError
from task.evaluation.hospital_scores import score_images
from task.generators.registry import initial_generator
from task.protocol.node import TooFewImagesError
from task.protocol.wire import FailureCode, Key, WeightLayout
from task.randomness import Stream, numpy_generator, torch_generator
from task.runs.checkpoint import load_weights
from task.training.loop import fit, fit_options, held_out_losses
from tests.data.test_data_files import write_tree
from tests.helpers import (
    SMALL_RUN,
    TRAINED_KEYS,
    Network,
    bound_by_modes,
    node_context,
    sent,
    simulated,
    write_digits_as_mnist,
)
from tests.processes import wait_for

ROOT = Path(__file__).resolve().parents[2]
CONFIG = load_run_config(SMALL_RUN)
HOSPITAL = "data=mnist data.test_fraction=null"
FOLDER_RUN = {"data.test_fraction": "null", "overrides": "data=image_folder data.classes=[a,b]"}
MODEL = initial_generator(CONFIG)
LAYOUT = WeightLayout.of(MODEL)
WEIGHTS = LAYOUT.pack(MODEL.state_dict())


@pytest.fixture(autouse=True)
def new_process() -> Iterator[None]:
    """Let every test begin as a node's process does, without a workspace."""
    workspace._build_workspace.cache_clear()
    yield
    workspace._build_workspace.cache_clear()
    for handler in [*logger.handlers]:
        logger.removeHandler(handler)
        logging.getLogger("task").removeHandler(handler)
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def context() -> Context:
    return node_context(SMALL_RUN, simulated(3)[1])


@pytest.fixture
def hospital(tmp_path: Path) -> Context:
    """A real node with 200 images of its own."""
    write_digits_as_mnist(tmp_path, train=200, test=50)
    return node_context({**SMALL_RUN, "overrides": HOSPITAL}, {"data-path": str(tmp_path)})


def message(
    message_type: str,
    *,
    server_round: int = 1,
    client: int = 1,
    precision: str = "float32",
    extractor: str = "classifier",
    weights: NDArray[np.floating] = WEIGHTS,
    audit: bool = False,
) -> Message:
    """Make a message as the server does, and let the network number it."""
    Network()
    config = ConfigRecord(
        {
            Key.SERVER_ROUND: server_round,
            Key.PRECISION: precision,
            Key.RUN_NAME: "run",
            Key.RUN_ID: "1",
            Key.EXTRACTOR: extractor,
            Key.AUDIT: audit,
        }
    )
    arrays = ArrayRecord({Key.PACKED: Array(weights)})
    made = addressed(
        RecordDict({Key.ARRAYS: arrays, Key.CONFIG: config}),
        node_id=7,
        message_type=message_type,
        timeout=60,
        entries={Key.CLIENT: client},
    )
    made.metadata.__dict__["_message_id"] = "asked"
    return made


def drawn_message(generated: ImageSet, extractor: str = "classifier") -> Message:
    """Make the message by which a node is to score images, as the server does."""
    Network()
    config = ConfigRecord({Key.EXTRACTOR: extractor})
    content = RecordDict({Key.ARRAYS: images_record(generated), Key.CONFIG: config})
    made = addressed(content, node_id=7, message_type=SCORES_TYPE, timeout=60)
    made.metadata.__dict__["_message_id"] = "asked"
    return made


def packed(reply: Message) -> NDArray[np.floating]:
    return reply.content.array_records[Key.ARRAYS][Key.PACKED].numpy()


def metrics(reply: Message) -> MetricRecord:
    return reply.content.metric_records[Key.METRICS]


def share_of(client: int, config: Config = CONFIG) -> tuple[ImageSet, ImageSet]:
    """Deal the images out once more, without the ClientApp."""
    dataset = build_dataset(config, download=False)
    partition = build_partition(
        dataset.train.labels.numpy(),
        dataset.test.labels.numpy(),
        num_classes=10,
        num_clients=3,
        beta=config.partition.beta,
        seed=config.seed,
    )
    return (
        dataset.train.subset(partition.train_indices[client]),
        dataset.test.subset(partition.test_indices[client]),
    )


def test_train_replies_the_records_allowed_and_nothing_else(context: Context) -> None:
    reply = app(message("train"), context)
    assert not reply.has_error()
    assert set(reply.content) == {Key.ARRAYS, Key.METRICS}
    assert list(reply.content.array_records[Key.ARRAYS]) == [Key.PACKED]
    assert set(metrics(reply)) == TRAINED_KEYS
    assert packed(reply).shape == (LAYOUT.size,) and packed(reply).dtype == np.float32
    assert metrics(reply)[Key.NUM_EXAMPLES] == len(share_of(1)[0])
    assert metrics(reply)[Key.SECONDS] > 0 and metrics(reply)[Key.IMAGES_PER_SECOND] > 0


def test_train_runs_the_local_epochs_on_the_clients_own_share(context: Context) -> None:
    reply = app(message("train", server_round=3, client=1), context)
    images, _ = share_of(1)
    expected = initial_generator(CONFIG)
    result = fit(
        expected,
        images.images,
        images.labels,
        options=fit_options(CONFIG, precision="float32"),
        optimizers=expected.optimizers(CONFIG.train.lr),
        rng=torch_generator(CONFIG.seed, Stream.TRAIN, 3, 1),
    )
    assert np.array_equal(packed(reply), LAYOUT.pack(expected.state_dict()))
    assert metrics(reply)[Key.LOSS] == result.loss
    assert not np.array_equal(packed(reply), WEIGHTS)


def test_same_message_twice_gives_the_same_bits_whatever_came_between(context: Context) -> None:
    first = app(message("train"), context)
    torch.manual_seed(123)
    app(message("train", server_round=2, weights=packed(first)), context)
    app(message("evaluate", weights=packed(first)), context)
    again = app(message("train"), context)
    assert np.array_equal(packed(first), packed(again))
    assert metrics(first)[Key.LOSS] == metrics(again)[Key.LOSS]


def test_process_whose_first_message_is_evaluate_trains_all_the_same(context: Context) -> None:
    expected = app(message("train"), context)
    workspace._build_workspace.cache_clear()
    assert not app(message("evaluate"), context).has_error()
    reply = app(message("train"), context)
    assert not reply.has_error(), reply.error
    assert np.array_equal(packed(reply), packed(expected))


@pytest.mark.parametrize("changed", [{"server_round": 2}, {"client": 2}])
def test_other_rounds_and_clients_draw_other_numbers(
    context: Context, changed: dict[str, int]
) -> None:
    first, other = app(message("train"), context), app(message("train", **changed), context)  # type: ignore[arg-type]
    assert not np.array_equal(packed(first), packed(other))


def test_shares_of_a_simulation_are_apart_and_whole() -> None:
    counts = [
        metrics(app(message("train"), node_context(SMALL_RUN, share)))[Key.NUM_EXAMPLES]
        for share in simulated(3)
    ]
    assert sum(counts) == len(build_dataset(CONFIG, download=False).train)  # type: ignore[arg-type]
    assert counts == [len(share_of(client)[0]) for client in range(3)]


def test_weights_travel_as_float16_where_asked(context: Context) -> None:
    full = app(message("train"), context)
    context.run_config["federation.wire_dtype"] = "float16"
    half = app(message("train"), context)
    assert packed(half).dtype == np.float16
    assert np.array_equal(packed(half), packed(full).astype(np.float16))
    # And are read from it: the server sends them so as well.
    back = app(message("evaluate", weights=packed(half)), context)
    assert not back.has_error()


def test_evaluate_replies_the_held_out_loss_and_no_weights(context: Context) -> None:
    reply = app(message("evaluate"), context)
    assert set(reply.content) == {Key.METRICS}
    assert set(metrics(reply)) == {Key.NUM_EXAMPLES, Key.LOSS}
    _, held_out = share_of(1)
    assert metrics(reply)[Key.NUM_EXAMPLES] == len(held_out) > 0
    expected = held_out_losses(
        initial_generator(CONFIG),
        held_out.images,
        held_out.labels,
        options=fit_options(CONFIG, precision="float32"),
        rng=torch_generator(CONFIG.seed, Stream.EVALUATE, 1),
    )
    assert expected == {"loss": metrics(reply)[Key.LOSS]}


def test_evaluate_draws_alike_in_every_round(context: Context) -> None:
    losses = [
        metrics(app(message("evaluate", server_round=r), context))[Key.LOSS] for r in (1, 2, 9)
    ]
    assert len(set(losses)) == 1
    moved = app(message("evaluate", weights=WEIGHTS * np.float32(1.1)), context)
    assert metrics(moved)[Key.LOSS] != losses[0]


def test_evaluate_hides_no_labels(context: Context) -> None:
    context.run_config["diffusion.label_dropout"] = 0.9
    config = load_run_config(context.run_config)
    model = initial_generator(config)
    weights = WeightLayout.of(model).pack(model.state_dict())
    _, held_out = share_of(1)
    expected = held_out_losses(
        model,
        held_out.images,
        held_out.labels,
        options=fit_options(config, precision="float32"),
        rng=torch_generator(config.seed, Stream.EVALUATE, 1),
    )
    reply = app(message("evaluate", weights=weights), context)
    assert expected == {"loss": metrics(reply)[Key.LOSS]}


def test_share_without_held_out_images_replies_that_and_no_loss() -> None:
    skewed = {**SMALL_RUN, "partition.beta": 0.01, "data.test_fraction": 0.01}
    dataset = build_dataset(load_run_config(skewed), download=False)
    assert len(dataset.test) == 20  # fewer than the 30 clients
    replies = [
        app(message("evaluate"), node_context(skewed, share)) for share in simulated(30)[:12]
    ]
    counts = [metrics(reply)[Key.NUM_EXAMPLES] for reply in replies]
    assert 0 in counts and any(count != 0 for count in counts)
    for reply, count in zip(replies, counts, strict=True):
        assert (Key.LOSS in metrics(reply)) == (count != 0)


def test_hospital_trains_on_its_own_images_minus_the_held_out_share(hospital: Context) -> None:
    trained, evaluated = app(message("train"), hospital), app(message("evaluate"), hospital)
    labels = build_dataset(
        load_run_config(
            {**hospital.run_config, "data.root": str(hospital.node_config["data-path"])}
        ),
        download=False,
    ).train.labels
    assert len(labels) == 200
    kept, held_out = split_validation(
        labels.numpy(), 0.1, generator=numpy_generator(0, Stream.HOLD_OUT)
    )
    assert metrics(trained)[Key.NUM_EXAMPLES] == len(kept) == 180
    assert metrics(evaluated)[Key.NUM_EXAMPLES] == len(held_out) == 20


def test_hospital_holds_the_same_images_out_in_every_process(hospital: Context) -> None:
    first = app(message("evaluate"), hospital)
    workspace._build_workspace.cache_clear()
    assert metrics(app(message("evaluate"), hospital)) == metrics(first)
    one, held_out = open_workspace(hospital).images(hospital)
    seen = {bytes(image.numpy()) for image in one.images.flatten(1)}
    assert not seen & {bytes(image.numpy()) for image in held_out.images.flatten(1)}


def test_hospital_that_has_never_seen_the_last_class_trains(tmp_path: Path) -> None:
    # Five of ten classes: skewed shares are what federations are about.
    write_digits_as_mnist(tmp_path, train=200, test=50, classes=5)
    context = node_context({**SMALL_RUN, "overrides": HOSPITAL}, {"data-path": str(tmp_path)})
    reply = app(message("train"), context)
    assert not reply.has_error(), reply.error
    assert metrics(reply)[Key.NUM_EXAMPLES] == 180


@pytest.fixture
def scoring(hospital: Context, tmp_path: Path) -> Context:
    """The hospital, with a cache of its own."""
    hospital.run_config["data.cache_dir"] = str(tmp_path / "cache")
    return hospital


def other_digits(number: int = 100) -> ImageSet:
    return build_dataset(CONFIG, download=False).test.subset(torch.arange(number))


def test_node_scores_the_images_of_a_message_against_its_own(scoring: Context) -> None:
    reply = app(drawn_message(other_digits()), scoring)
    assert not reply.has_error(), reply.error
    assert set(reply.content) == {Key.METRICS}
    assert set(metrics(reply)) == {Key.NUM_EXAMPLES, *expected_scores(["class-agreement"])}
    opened = open_workspace(scoring)
    own = Dataset(*opened.images(scoring))
    settled = settle_extractor(opened.config, "classifier")
    expected = score_images(settled, other_digits(), own, device=torch.device("cpu"))
    assert dict(metrics(reply)) == expected
    assert expected[Key.NUM_EXAMPLES] == 20
    workspace._build_workspace.cache_clear()  # as a new process for the next message
    assert metrics(app(drawn_message(other_digits()), scoring)) == metrics(reply)


def test_node_with_too_few_images_to_score_says_that_alone(scoring: Context) -> None:
    scoring.run_config["data.val_fraction"] = 0.01  # one of each class
    few = app(drawn_message(other_digits(3)), scoring)
    assert dict(metrics(few)) == {Key.NUM_EXAMPLES: 0}


def test_node_whose_hospital_declines_scores_no_images(scoring: Context) -> None:
    scoring.node_config["score-images"] = False
    declined = app(drawn_message(other_digits()), scoring)
    assert dict(metrics(declined)) == {Key.NUM_EXAMPLES: 0}


ATTACKS = {*(f"loss at log-SNR {level}" for level in (4, 2, 0, -2)), "SimA", "PIA", "SecMI"}


def test_node_attacks_weights_with_its_own_images_and_tells_numbers(hospital: Context) -> None:
    reply = app(message(AUDIT_TYPE), hospital)
    assert not reply.has_error(), reply.error
    assert {*reply.content} == {Key.AUDIT}
    found = read_attacks(reply.content, ATTACKS)
    _, held_out = open_workspace(hospital).images(hospital)
    assert {*found} == ATTACKS and len(held_out) == 20
    for each in found.values():
        assert (each.members, each.others) == (2 * len(held_out), len(held_out))
    assert read_attacks(app(message(AUDIT_TYPE), hospital).content, ATTACKS) == found
    # Its own weights are attacked before they leave, and leave as they would have.
    plain = app(message("train"), hospital)
    audited = app(message("train", audit=True), hospital)
    assert {*audited.content} - {*plain.content} == {Key.AUDIT}
    assert np.array_equal(*(packed(each) for each in (plain, audited)))
    own = read_attacks(audited.content, ATTACKS)
    assert {*own} == ATTACKS and own != found


def test_node_whose_hospital_declines_tells_of_no_attack(hospital: Context) -> None:
    hospital.node_config["audit"] = False
    assert {*app(message(AUDIT_TYPE), hospital).content} == set()
    assert Key.AUDIT not in app(message("train", audit=True), hospital).content
    # Nor in a run that does not say that it audits.
    hospital.node_config["audit"] = True
    hospital.run_config["audit.at_end"] = False
    assert {*app(message(AUDIT_TYPE), hospital).content} == set()


def test_node_looks_through_the_network_that_the_server_has_settled(
    scoring: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def score(config: Config, *_: object, **__: object) -> dict[str, float]:
        seen.append(config.eval.extractor)
        return {}

    monkeypatch.setattr("client_app.app.score_images", score)
    for asked in ("efficientnet", "classifier"):
        assert not app(message("query", extractor=asked), scoring).has_error()
        app(drawn_message(other_digits(), asked), scoring)
    scoring.run_config["eval.extractor"] = "classifier"
    app(drawn_message(other_digits(), "efficientnet"), scoring)
    assert seen == ["efficientnet", "classifier", "classifier"]


def test_node_without_the_settled_network_says_so_before_it_trains(
    scoring: Context, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("task.efficientnet.pretrained_file", lambda: None)
    scoring.run_config["eval.num_images"] = 20
    assert not app(message("query"), scoring).has_error()
    refused = app(message("query", extractor="efficientnet"), scoring)
    assert refused.error.code == FailureCode.MISSING_WEIGHTS
    said = capsys.readouterr().err
    assert "feddm[pretrained]" in said and "score-images=false" in said
    scoring.node_config["score-images"] = False
    assert not app(message("query", extractor="efficientnet"), scoring).has_error()


@pytest.mark.parametrize(
    ("run_config", "node_config", "code", "reason"),
    [
        (
            {"eval.extractor": "exported", "eval.exported_program": "/program.pt2"},
            {},
            FailureCode.BAD_INPUT,
            "ValueError",
        ),
        ({"eval.extractor": "inception"}, {}, FailureCode.DATA_UNREADABLE, "FileNotFoundError"),
        (
            {"eval.extractor": "inception", "eval.inception_weights": __file__},
            {"inception-weights": "missing"},
            FailureCode.DATA_UNREADABLE,
            "FileNotFoundError",
        ),
        # A file that is there is read, and found to be another.
        (
            {"eval.extractor": "inception"},
            {"inception-weights": __file__},
            FailureCode.BAD_INPUT,
            "ValueError",
        ),
        ({"data.image_size": 16}, {}, FailureCode.BAD_INPUT, "ValueError"),
    ],
)
def test_node_scores_through_files_of_its_own_alone(
    run_config: dict[str, Any],
    node_config: dict[str, str],
    code: FailureCode,
    reason: str,
    scoring: Context,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    fetched: list[object] = []
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *args, **_: fetched.append(args))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    scoring.run_config.update(run_config)
    scoring.node_config.update(node_config)
    reply = app(drawn_message(other_digits()), scoring)
    assert (reply.error.code, reply.error.reason) == (code, reason)
    assert fetched == []


@pytest.fixture
def no_internet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home and a working directory of the test's own, and no way out."""
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


def test_hospital_may_name_its_folder_by_its_home(no_internet: Path) -> None:
    write_digits_as_mnist(no_internet / "images", train=200, test=50)
    context = node_context({**SMALL_RUN, "overrides": HOSPITAL}, {"data-path": "~/images"})
    reply = app(message("train"), context)
    assert not reply.has_error(), reply.error
    assert [path.name for path in no_internet.iterdir()] == ["images"]


def test_hospital_without_its_images_downloads_no_others(
    no_internet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A folder misspelled in a node's configuration must not end in training on public images.
    asked: list[object] = []
    monkeypatch.setattr(datasets.MNIST, "download", lambda self: asked.append(self.root))
    context = node_context(
        {**SMALL_RUN, "overrides": HOSPITAL}, {"data-path": str(no_internet / "imagse")}
    )
    reply = app(message("train"), context)
    assert asked == []
    assert reply.error.code == FailureCode.DATA_UNREADABLE


def test_query_says_code_and_share_and_nothing_else(context: Context, hospital: Context) -> None:
    said = app(message("query"), context).content
    assert set(said) == {Key.CONFIG}
    assert dict(said.config_records[Key.CONFIG]) == {
        Key.FINGERPRINT: code_fingerprint(),
        Key.PARTITION_ID: 1,
        Key.NUM_PARTITIONS: 3,
    }
    said = app(message("query"), hospital).content
    train, held_out = open_workspace(hospital).images(hospital)
    assert dict(said.config_records[Key.CONFIG]) == {
        Key.FINGERPRINT: code_fingerprint(),
        Key.NUM_IMAGES: len(train) + len(held_out),
    }


def test_workspace_is_built_once_for_all_messages_of_a_process(context: Context) -> None:
    built = open_workspace(context)
    app(message("train"), context)
    assert open_workspace(node_context(SMALL_RUN, simulated(3)[2])) is built
    assert open_workspace(node_context({**SMALL_RUN, "seed": 1}, simulated(3)[2])) is not built


def test_class_counts_are_told_only_where_the_hospital_says_so(hospital: Context) -> None:
    hospital.node_config["report-class-counts"] = True
    said = app(message("query"), hospital).content.config_records[Key.CONFIG]
    assert set(said) == {Key.FINGERPRINT, Key.NUM_IMAGES, Key.CLASS_COUNTS}
    images, _ = open_workspace(hospital).images(hospital)
    assert said[Key.CLASS_COUNTS] == images.labels.bincount(minlength=10).tolist()
    hospital.node_config["report-class-counts"] = False
    said = app(message("query"), hospital).content.config_records[Key.CONFIG]
    assert set(said) == {Key.FINGERPRINT, Key.NUM_IMAGES}


@pytest.mark.parametrize(
    ("folders", "node_config", "code", "reason"),
    [
        ({"a": 2, "odd": 1}, {}, FailureCode.UNKNOWN_CLASS, "UnknownClassError"),
        ({"a": 5}, {"min-images": 5}, FailureCode.TOO_FEW_IMAGES, "TooFewImagesError"),
        ({}, {}, FailureCode.DATA_UNREADABLE, "FileNotFoundError"),
        ({"a": 2}, {"output-path": "/dev/null"}, FailureCode.BAD_INPUT, "ValueError"),
        ({"a": 2}, {"min-imags": 1}, FailureCode.BAD_INPUT, "ValueError"),
        ({"a": 2}, {"min-images": "1"}, FailureCode.BAD_INPUT, "TypeError"),
    ],
)
def test_introduction_says_early_what_keeps_a_hospital_out(
    folders: dict[str, int],
    node_config: dict[str, object],
    code: FailureCode,
    reason: str,
    tmp_path: Path,
) -> None:
    write_tree(tmp_path / "set", folders)
    run_config = {**SMALL_RUN, **FOLDER_RUN, "data.cache_dir": str(tmp_path / "cache")}
    context = node_context(run_config, {"data-path": str(tmp_path / "set"), **node_config})
    reply = app(message("query"), context)
    assert (reply.error.code, reply.error.reason) == (code, reason)
    assert not (tmp_path / "cache").exists()  # nothing was decoded


def test_every_reply_of_a_hospital_is_free_of_paths_and_names(tmp_path: Path) -> None:
    home = tmp_path / "hospital-secret"
    write_tree(home / "patients-secret", {"a": 120, "b": 110})
    (home / "patients-secret" / "a" / "000.png").rename(
        home / "patients-secret" / "a" / "jane-doe-secret.png"
    )
    (home / "out-secret").mkdir()
    run_config = {**SMALL_RUN, **FOLDER_RUN, "data.cache_dir": str(home / "cache")}
    node_config = {
        "data-path": str(home / "patients-secret"),
        "output-path": str(home / "out-secret"),
        "report-class-counts": True,
    }
    config = load_run_config(run_config)
    model = initial_generator(config)
    weights = WeightLayout.of(model).pack(model.state_dict())
    agreed = {
        "query": {
            Key.CONFIG: {
                Key.FINGERPRINT,
                Key.NUM_IMAGES,
                Key.CLASS_COUNTS,
                Key.KEEPS_REPLIES,
            }
        },
        "train": {Key.ARRAYS: {Key.PACKED}, Key.METRICS: TRAINED_KEYS},
        "evaluate": {Key.METRICS: {Key.NUM_EXAMPLES, Key.LOSS}},
        SCORES_TYPE: {Key.METRICS: {Key.NUM_EXAMPLES, *expected_scores(["class-agreement"])}},
        AUDIT_TYPE: {Key.AUDIT: ATTACKS},
    }
    shape = (60, config.data.channels, config.data.image_size, config.data.image_size)
    generated = ImageSet(torch.zeros(shape, dtype=torch.uint8), torch.arange(60) % 2)
    asked = {kind: message(kind, weights=weights) for kind in agreed if kind != SCORES_TYPE}
    asked[SCORES_TYPE] = drawn_message(generated)
    for kind, records in agreed.items():
        reply = app(asked[kind], node_context(run_config, node_config))
        assert not reply.has_error(), reply.error
        assert {name: set(record) for name, record in reply.content.items()} == records
        assert b"secret" not in sent(reply)
    (home / "patients-secret" / "odd-secret").mkdir()
    workspace._build_workspace.cache_clear()
    for kind in agreed:
        reply = app(asked[kind], node_context(run_config, node_config))
        assert reply.has_error() and not reply.has_content()
        assert b"UnknownClassError" in sent(reply) and b"secret" not in sent(reply)


def test_no_reply_tells_of_the_table_of_patients(tmp_path: Path) -> None:
    home = tmp_path / "hospital-secret"
    write_tree(home / "set", {"a": 12, "b": 10})
    files = [path.relative_to(home / "set") for path in sorted((home / "set").rglob("*.png"))]
    rows = [f"{file},jane-secret-{number // 2}" for number, file in enumerate(files)]
    run_config = {**SMALL_RUN, **FOLDER_RUN, "data.cache_dir": str(home / "cache")}
    node_config = {"data-path": str(home / "set"), "patients": str(home / "secret.csv")}
    for number, reason in ((22, ""), (21, "ValueError"), (None, "FileNotFoundError")):
        workspace._build_workspace.cache_clear()
        (home / "secret.csv").unlink(missing_ok=True)
        if number is not None:
            table = "\n".join(["file,patient", *rows[:number]])
            (home / "secret.csv").write_text(table, encoding="utf-8")
        reply = app(message("query"), node_context(run_config, node_config))
        assert (reply.error.reason if reply.has_error() else "") == reason
        assert b"secret" not in sent(reply)


def test_hospital_keeps_its_newest_own_weights(hospital: Context, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    hospital.node_config["output-path"] = str(tmp_path / "out")
    hospital.run_config["run_name"] = "lungs"
    file = tmp_path / "out" / "lungs" / "local-model.safetensors"
    for server_round in (1, 2):
        reply = app(message("train", server_round=server_round), hospital)
        weights, metadata = load_weights(file)
        assert np.array_equal(LAYOUT.pack(weights), packed(reply))
        assert metadata["round"] == str(server_round)
    config = json.loads(metadata["config"])
    assert (config["run_name"], config["data"]["name"]) == ("lungs", "mnist")
    assert str(tmp_path) not in metadata["config"]
    kept = {path.name for path in (tmp_path / "out").rglob("*")}
    assert kept == {"lungs", file.name, "last-reply-1.safetensors", ".training-1.lock"}
    assert file.parent.stat().st_mode & 0o077 == 0


def test_repeated_question_is_answered_without_training_again(
    hospital: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    hospital.node_config["output-path"] = str(tmp_path / "out")
    hospital.run_config["run_name"] = "lungs"
    fits = Mock(side_effect=fit)
    monkeypatch.setattr("client_app.app.fit", fits)
    first = app(message("train", audit=True), hospital)
    file = tmp_path / "out" / "lungs" / "last-reply-1.safetensors"
    kept = file.read_bytes()
    workspace._build_workspace.cache_clear()  # as where the node was started again
    hospital.run_config["resume"] = True
    again = app(message("train", audit=True), hospital)
    assert fits.call_count == 1
    assert np.array_equal(packed(again), packed(first))
    assert dict(metrics(again)) == dict(metrics(first))
    # Once: the server may have refused it.
    assert not file.exists()
    app(message("train", audit=True), hospital)
    assert fits.call_count == 2
    for number, asked in enumerate(
        (
            message("train", audit=True, server_round=2),
            message("train", audit=True, weights=WEIGHTS + np.float32(0.01)),
            message("train"),
        )
    ):
        file.write_bytes(kept)
        app(asked, hospital)
        assert fits.call_count == 3 + number
    # What is kept is readable for the node's user alone, and damaged it is not believed.
    assert file.parent.stat().st_mode & 0o077 == 0
    file.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert not app(message("train", audit=True), hospital).has_error() and fits.call_count == 6
    file.unlink()
    file.mkdir()
    assert not app(message("train", audit=True), hospital).has_error() and fits.call_count == 7
    # Other images, or other words of the run, are another question.
    file.rmdir()
    file.write_bytes(kept)
    hospital.run_config["train.local_epochs"] = 2
    assert not app(message("train", audit=True), hospital).has_error() and fits.call_count == 8


def test_second_process_waits_for_the_first_and_sends_what_that_has_trained(
    hospital: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hospital.node_config["output-path"] = str(tmp_path)
    hospital.run_config["run_name"] = "lungs"
    trained = threading.Event()
    fits = Mock(side_effect=lambda *given, **named: trained.wait(30) and fit(*given, **named))
    monkeypatch.setattr("client_app.app.fit", fits)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(app, message("train"), hospital)
        wait_for(lambda: fits.call_count == 1, seconds=60, what="the first training")
        second = pool.submit(app, message("train"), hospital)
        time.sleep(1)
        assert not second.done()
        trained.set()
        replies = first.result(), second.result()
    assert fits.call_count == 1
    assert not any(reply.has_error() for reply in replies)
    assert np.array_equal(packed(replies[0]), packed(replies[1]))


def test_run_without_a_name_is_kept_under_flowers_number(hospital: Context, tmp_path: Path) -> None:
    hospital.node_config["output-path"] = str(tmp_path)
    app(message("train"), hospital)
    assert (tmp_path / f"run-{hospital.run_id}" / "local-model.safetensors").is_file()


def test_local_model_that_cannot_be_written_costs_no_round(
    hospital: Context, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hospital.node_config["output-path"] = str(tmp_path)
    (tmp_path / f"run-{hospital.run_id}").write_text("in the way")
    reply = app(message("train"), hospital)
    assert not reply.has_error() and metrics(reply)[Key.NUM_EXAMPLES] == 180
    said = [record for record in caplog.records if record.levelname == "ERROR"]
    assert [record.getMessage().split(",")[0] for record in said] == [
        "round 1: the local model is NOT kept",
        "the reply is NOT kept",
    ]
    assert all(record.exc_info for record in said)


def test_log_of_a_hospital_has_a_line_per_message(
    hospital: Context, context: Context, capsys: pytest.CaptureFixture[str]
) -> None:
    app(message("train"), context)
    assert capsys.readouterr().err == ""  # a simulation's clients would flood it
    for kind in ("query", "train", "evaluate"):
        app(message(kind, server_round=3), hospital)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" feddm INFO: ")[1][:30] for line in lines] == [
        "ready for run-4711: 180 traini",
        "data: 250 in all: 200 images a",
        "data: 250 in all: 200 images a",
        "round 3: trained on 180 images",
        "round 3: evaluated 20 held-out",
    ]
    assert "loss 0." in lines[3] and "on cpu in float32" in lines[3] and "loss 0." in lines[4]


@pytest.mark.parametrize("message_type", ["query", "train", "evaluate"])
def test_failing_hospital_says_a_class_and_a_code_and_no_path(
    message_type: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = tmp_path / "patient-4711"
    secret.write_text("a file in the place of the folder")
    run_config = {**SMALL_RUN, "overrides": HOSPITAL}
    reply = app(message(message_type), node_context(run_config, {"data-path": str(secret)}))
    assert reply.has_error() and not reply.has_content()
    assert reply.error.code == FailureCode.DATA_UNREADABLE
    assert reply.error.reason == "FileNotFoundError"
    assert "patient-4711" not in repr(reply)
    assert "patient-4711" in caplog.text  # whoever runs the node can read why


@pytest.mark.parametrize("shut", [False, True])
@pytest.mark.parametrize("message_type", ["query", "train", "evaluate"])
def test_names_of_files_and_folders_that_fail_stay_with_the_hospital(
    message_type: str, shut: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tree(tmp_path / "set", {"a": 12, "b": 12, "a/jane-doe": 1})
    (tmp_path / "set" / "a" / "jane-doe" / "jane-doe-1950.png").write_text("damaged")
    if shut:
        (tmp_path / "set" / "a" / "jane-doe").chmod(0)
    run_config = {**SMALL_RUN, **FOLDER_RUN, "data.cache_dir": str(tmp_path / "cache")}
    context = node_context(run_config, {"data-path": str(tmp_path / "set")})

    def answer() -> tuple[bytes, str]:
        caplog.clear()
        return sent(app(message(message_type), context)), caplog.text

    reply, log = bound_by_modes(answer)
    assert b"jane-doe" not in reply
    if shut:
        assert b"PermissionError" in reply and "jane-doe: this folder may not be read" in log
    elif message_type != "query":  # which decodes nothing
        assert b"ValueError" in reply and "jane-doe-1950.png: Unidentified" in log


def test_hospital_works_again_once_its_data_is_there(tmp_path: Path) -> None:
    (tmp_path / "images").write_text("in the way")
    context = node_context(
        {**SMALL_RUN, "overrides": HOSPITAL}, {"data-path": str(tmp_path / "images")}
    )
    assert app(message("train"), context).has_error()
    (tmp_path / "images").unlink()
    write_digits_as_mnist(tmp_path / "images", train=200, test=50)
    assert not app(message("train"), context).has_error()


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (WEIGHTS[:-1], "ValueError"),
        (WEIGHTS.reshape(-1, 1), "ValueError"),
        (np.zeros(0, np.float32), "ValueError"),
    ],
)
def test_weights_of_another_model_are_refused(
    context: Context, weights: NDArray[np.floating], reason: str
) -> None:
    reply = app(message("train", weights=weights), context)
    assert (reply.error.code, reply.error.reason) == (FailureCode.BAD_INPUT, reason)


def test_incomplete_message_is_an_error_reply(context: Context) -> None:
    asked = message("train")
    del asked.content.config_records[Key.CONFIG][Key.CLIENT]
    reply = app(asked, context)
    assert (reply.error.code, reply.error.reason) == (FailureCode.OTHER, "KeyError")


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA"), FailureCode.OUT_OF_MEMORY),
        (MemoryError(), FailureCode.OUT_OF_MEMORY),
        (RuntimeError("DefaultCPUAllocator: not enough memory"), FailureCode.OUT_OF_MEMORY),
        (UnknownClassError("x"), FailureCode.UNKNOWN_CLASS),
        (TooFewImagesError("x"), FailureCode.TOO_FEW_IMAGES),
        (MissingWeightsError("x"), FailureCode.MISSING_WEIGHTS),
        (FileNotFoundError("/secret"), FailureCode.DATA_UNREADABLE),
        (PermissionError("/secret"), FailureCode.DATA_UNREADABLE),
        (ValueError("x"), FailureCode.BAD_INPUT),
        (UnicodeDecodeError("utf-8", b"/secret", 0, 1, "x"), FailureCode.BAD_INPUT),
        (TypeError("x"), FailureCode.BAD_INPUT),
        (KeyError("x"), FailureCode.OTHER),
        (RuntimeError("x"), FailureCode.OTHER),
    ],
)
def test_failures_are_sorted_into_codes(
    error: Exception, code: FailureCode, context: Context
) -> None:
    @failures_stay_local
    def failing(asked: Message, _: Context) -> Message:
        raise error

    assert failure_code(error) == code
    reply = failing(message("train"), context)
    assert (reply.error.code, reply.error.reason) == (code, type(error).__name__)
    assert reply.metadata.reply_to_message_id == "asked"


def test_end_of_the_process_is_no_failure_of_the_client(context: Context) -> None:
    @failures_stay_local
    def interrupted(asked: Message, _: Context) -> Message:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted(message("train"), context)


def test_precision_that_is_asked_for_is_taken_untimed(context: Context) -> None:
    opened = open_workspace(context)
    for precision in ("float32", "bfloat16"):
        assert choose_precision(opened, context, precision) == precision
    assert Key.PRECISION not in context.state


def test_precision_auto_is_timed_once_and_kept_by_the_node(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[str] = []
    really = workspace.fastest_precision

    def counting(*args: Any, **options: Any) -> str:
        timed.append(really(*args, **options))
        return timed[-1]

    monkeypatch.setattr(workspace, "fastest_precision", counting)
    replies = [app(message("train", precision="auto"), context)]
    workspace._build_workspace.cache_clear()  # as a new process for the next message
    replies += [app(message(kind, precision="auto"), context) for kind in ("train", "evaluate")]
    assert not any(reply.has_error() for reply in replies)
    assert len(timed) == 1 and timed[0] in ("float32", "bfloat16")
    assert dict(context.state.config_records[Key.PRECISION]) == {Key.PRECISION: timed[0]}
    asked = app(message("train", precision=timed[0]), context)
    assert np.array_equal(packed(replies[0]), packed(asked))
    assert np.array_equal(packed(replies[1]), packed(asked))


def test_kept_precision_is_the_one_that_trains(context: Context) -> None:
    context.state[Key.PRECISION] = ConfigRecord({Key.PRECISION: "bfloat16"})
    automatic = app(message("train", precision="auto"), context)
    asked = app(message("train", precision="bfloat16"), context)
    assert np.array_equal(packed(automatic), packed(asked))
    full = app(message("train", precision="float32"), context)
    assert not np.array_equal(packed(automatic), packed(full))


def test_unknown_precision_is_an_error_reply(context: Context) -> None:
    reply = app(message("train", precision="int8"), context)
    assert (reply.error.code, reply.error.reason) == (FailureCode.BAD_INPUT, "ValueError")


def test_processes_of_a_client_reply_what_one_replies(context: Context) -> None:
    context.run_config["model.dropout"] = 0.0
    alone = app(message("train"), context)
    context.run_config["train.num_processes"] = 2
    together = app(message("train"), context)
    assert set(metrics(together)) == TRAINED_KEYS
    assert metrics(together)[Key.LOSS] == pytest.approx(metrics(alone)[Key.LOSS], rel=1e-6)
    np.testing.assert_allclose(packed(together), packed(alone), atol=1e-5)
    assert not np.array_equal(packed(together), WEIGHTS)


def test_failure_in_one_of_a_clients_processes_is_told_by_its_class(context: Context) -> None:
    context.run_config["train.num_processes"] = 2
    reply = app(message("train", precision="int8"), context)
    assert (reply.error.code, reply.error.reason) == (FailureCode.BAD_INPUT, "ValueError")


BUNDLE = """
import importlib, sys
if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])  # as Flower does with what it has unpacked
    case = importlib.import_module("tests.client_app.test_client_app")
    config = {**case.SMALL_RUN, "train.num_processes": 2}
    reply = case.app(case.message("train"), case.node_context(config, case.simulated(3)[1]))
    assert not reply.has_error(), reply.error
"""


@pytest.mark.slow
def test_processes_run_the_code_of_the_bundle_that_their_parent_runs(tmp_path: Path) -> None:
    bundle, elsewhere = tmp_path / "bundle", tmp_path / "elsewhere"
    for package in ("task", "client_app", "server_app", "conf", "tests"):
        shutil.copytree(ROOT / package, bundle / package)
    with (bundle / "task" / "generators" / "diffusion" / "network.py").open("a") as file:
        # In one call: several processes write at once.
        file.write("\nimport os\nos.write(1, b'the bundle in process %d\\n' % os.getpid())\n")
    (elsewhere / "task").mkdir(parents=True)  # a decoy
    (elsewhere / "task" / "__init__.py").write_text("raise ImportError")
    (tmp_path / "main").write_text(BUNDLE)
    ran = subprocess.run(
        [sys.executable, tmp_path / "main", bundle],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        check=True,
    )
    assert len({*filter(lambda line: "the bundle" in line, ran.stdout.splitlines())}) == 3


def test_simulation_by_flower_alone_has_a_ray_of_its_own() -> None:
    code = "import os, client_app.app; print(os.environ['RAY_ADDRESS'])"
    for given, expected in (("", "local"), ("10.0.0.1:6379", "10.0.0.1:6379")):
        said = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "RAY_ADDRESS": given},
            capture_output=True,
            text=True,
            check=True,
        )
        assert said.stdout.strip() == expected
