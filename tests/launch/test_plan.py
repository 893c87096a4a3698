"""What `feddm-train` chooses for own images, and what it says before it starts."""

import dataclasses
import shlex
from pathlib import Path

import pytest
import torch

from server_app.dataset import load_images
from server_app.launch.fit_to_images import as_begun, fit_to_images
from server_app.launch.plan import describe_plan, how_to_train_on
from server_app.launch.time_estimate import (
    Estimate,
    at_once,
    estimate_seconds,
    images_to_draw,
    seconds_per_image,
)
from task.config import Config, anchored, hydra_override, load_config, load_run_config, write_config
from task.data import build_dataset, list_dataset
from task.protocol.node import NodeConfig, count_images, own_config
from task.runs.layout import run_config, run_path
from task.runs.records import Record
from tests.data.test_data_files import write_tree
from tests.helpers import written_run


def own_images(root: Path, *words: str, name: str = "image_folder") -> Config:
    overrides = [f"data={name}", f"data.root={root}", f"output_dir={root.parent}", *words]
    overrides += [f"data.cache_dir={root.parent / 'cache'}"]
    return anchored(load_config(overrides, images_below=root.parent), root.parent)


def named_values(words: tuple[str, ...]) -> set[str]:
    return {word.split("=")[0] for word in words}


@pytest.mark.parametrize("layout", ["", "train/"])
def test_classes_left_open_are_the_names_of_the_folders(tmp_path: Path, layout: str) -> None:
    names = ["$q", "[z]", "a,b", "it's", "rote Zellen", "weiß", "x=y"]
    write_tree(tmp_path / "set", {f"{layout}{name}": 1 for name in reversed(names)})
    (tmp_path / "set" / layout / "stray.png").write_bytes(b"")
    config = own_images(tmp_path / "set")
    assert config.data.classes == names
    # As the job of a simulation reads them again.
    word = hydra_override("data.classes", config.data.classes)
    assert load_config(["data=image_folder", word]).data.classes == names
    given = own_images(tmp_path / "set", "data.classes=[weiß]")
    assert given.data.classes == ["weiß"]


def test_images_without_class_folders_are_refused_with_the_way_out(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {".": 2})
    with pytest.raises(FileNotFoundError, match=r"no class folders there; put the images of each"):
        own_images(tmp_path / "set")
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        own_images(tmp_path / "missing")
    write_tree(tmp_path / "set", {"a": 2})
    (tmp_path / "set" / "b").mkdir()
    with pytest.raises(ValueError, match=r"also \['b'\]; b: .*move folders without images out"):
        load_images(own_images(tmp_path / "set"))


def test_classes_are_taken_from_folders_only_where_the_images_are(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 1, "b": 1})
    words = {"overrides": f"data=image_folder data.root={tmp_path / 'set'}"}
    assert load_run_config(words, has_images=True).data.classes == ["a", "b"]
    with pytest.raises(ValueError, match=r"data\.classes must be at least one class"):
        load_run_config(words)


def test_real_node_holds_out_no_test_share_of_its_own_images(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 20})
    config = own_images(tmp_path / "set")
    assert [len(part) for part in list_dataset(config)] == [18, 2]
    counts = count_images(own_config(config, NodeConfig(str(tmp_path / "set"))))
    assert (counts.train, counts.held_out, counts.test) == ((18,), (2,), (0,))


@pytest.mark.parametrize(
    ("per_class", "words", "expected"),
    [
        # 540 training images bear two hospitals of 270, who take 9 of their 80 steps an epoch.
        (300, (), (2, 9)),
        # 54 are one hospital's, who takes 2 of its 160 steps an epoch.
        (30, (), (1, 80)),
        (30, ("federation.num_supernodes=10",), (10, 40)),
        (300, ("federation.num_supernodes=10",), (10, 20)),
        (300, ("train.local_epochs=9",), (2, 9)),
        (300, ("train.batch_size=270",), (2, 80)),
        (300, ("train.mode=centralized",), (2, 9)),
        (300, ("federation.images_per_client=100",), (5, 10)),
        (300, ("federation.images_per_client=1",), (10, 20)),
        (300, ("federation.images_per_client=null", "train.steps_per_round=null"), (10, 5)),
        (30, ("federation.clients_per_round=3",), (3, 53)),
        (30, ("partition.beta=null", "partition.counts=[[27,0],[0,27]]"), (2, 80)),
        (30, ("experiment=paper",), (10, 5)),
    ],
)
def test_hospitals_and_epochs_fit_the_images_unless_they_are_given(
    tmp_path: Path, per_class: int, words: tuple[str, ...], expected: tuple[int, int]
) -> None:
    write_tree(tmp_path / "set", {"a": per_class, "b": per_class})
    config = fit_to_images(own_images(tmp_path / "set", *words), named_values(words))
    assert (config.federation.num_supernodes, config.train.local_epochs) == expected
    assert fit_to_images(config, named_values(words)) == config


@pytest.mark.parametrize(
    "name", ["digits", "mnist", "cifar10", "chest_xray", "blood_cells", "odir"]
)
def test_known_sets_keep_the_numbers_of_conf(name: str) -> None:
    config = load_config([f"data={name}"])
    assert fit_to_images(config, ()) is config
    federation, train = config.federation, config.train
    assert (federation.num_supernodes, federation.rounds) == (10, 20)
    assert (train.local_epochs, train.batch_size) == (5, 32)


def test_resumed_run_keeps_what_it_began_with(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 30, "b": 30})
    words = ("run_name=x", "resume=true")
    config = own_images(tmp_path / "set", *words)
    assert as_begun(config, ()) == config
    run_path(config).mkdir()
    begun = config.changed({"federation.num_supernodes": 3, "train.local_epochs": 2})
    write_config(begun, run_path(config) / "config.yaml")
    resumed = as_begun(config, ("train.local_epochs",))
    assert (resumed.federation.num_supernodes, resumed.train.local_epochs) == (3, 5)
    assert fit_to_images(as_begun(config, ()), ()) == begun


@pytest.mark.parametrize(("position", "said"), [(0.8, "0.80 of the way"), (0.1, "if the images")])
def test_finished_run_says_how_to_train_longer(tmp_path: Path, position: float, said: str) -> None:
    recorded = [Record(2, "noise_position", position)]
    path = written_run(tmp_path / "x", recorded, rounds_done=2)
    text = how_to_train_on(run_config(path))
    assert said in text
    words = shlex.split(text)
    assert words[-3:] == [f"output_dir={tmp_path}", "run_name=x", "resume=true"]
    assert "federation.rounds=4" in words


def test_plan_says_images_hospitals_training_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tree(tmp_path / "set", {"rote Zellen": 20, "weiß": 10})
    words = ("federation.num_supernodes=2", "partition.beta=inf", "data.image_size=8", "run_name=x")
    config = fit_to_images(own_images(tmp_path / "set", *words), named_values(words))
    monkeypatch.setattr(
        "server_app.launch.plan.estimate_seconds",
        lambda config, sizes, rounds: Estimate(100.0, 20.0),
    )
    dataset = build_dataset(config, download=False)
    images, hospitals, training, time = describe_plan(config, dataset)
    assert images == (
        "images: 30, seen as 8x8 color (rote Zellen 20, weiß 10); 27 to train on, "
        "3 held out to test"
    )
    gray = dataset.train.images[:, :1].expand(-1, 3, -1, -1)
    gray_set = dataclasses.replace(dataset.train, images=gray)
    images, *_ = describe_plan(config, dataclasses.replace(dataset, train=gray_set))
    assert "8x8 color, although they are gray (data.channels=1 keeps them so)" in images
    assert hospitals == "hospitals: 2 simulated, with 13 to 14 training images each"
    assert (
        training == "training: 20 rounds of 80 epochs in batches of 32, 1,600 steps at a hospital"
    )
    halves = config.changed({"train.batch_size": 16, "train.accumulation": 2})
    assert training in [*describe_plan(halves, dataset)]
    assert time.startswith("time: about 2:00 on this machine")
    slow = Estimate(20 * 400.0, 20.0)
    monkeypatch.setattr(
        "server_app.launch.plan.estimate_seconds", lambda config, sizes, rounds: slow
    )
    *_, warning = describe_plan(config, build_dataset(config, download=False))
    assert warning.startswith("warning: a round takes about 6:40, and is over after")
    pooled = config.changed({"train.mode": "centralized"})
    lines = list(describe_plan(pooled, build_dataset(pooled, download=False)))
    assert [line.split(":")[0] for line in lines] == ["images", "training", "time"]


def test_estimate_grows_with_rounds_images_and_what_is_drawn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("server_app.launch.time_estimate.seconds_to_train", lambda *a: 0.01)
    monkeypatch.setattr("server_app.launch.time_estimate.seconds_to_draw", lambda *a: 0.1)
    monkeypatch.setattr("server_app.launch.time_estimate.at_once", lambda *a: 2)
    config = load_config(["federation.num_supernodes=4", "train.local_epochs=3"])
    equal = estimate_seconds(config, [100] * 4, rounds=range(1, 21))
    assert equal.training == pytest.approx(20 * 3 * 200 * 0.01)
    # 10 images of 10 classes in rounds 5, 10, 15, 20, and 500 that are measured.
    assert equal.drawing == pytest.approx((4 * 100 + 500) * 0.1)
    assert equal.total == pytest.approx(equal.training + equal.drawing)
    skewed = estimate_seconds(config, [370, 10, 10, 10], rounds=range(19, 21))
    assert skewed.training == pytest.approx(2 * 3 * 370 * 0.01)
    half = load_config(
        ["federation.num_supernodes=4", "federation.clients_per_round=2", "train.local_epochs=3"]
    )
    sampled = estimate_seconds(half, [100] * 4, rounds=range(1, 21))
    assert sampled.training == pytest.approx(equal.training / 2)


def test_images_to_draw_are_those_of_grids_and_measurements() -> None:
    words = ["federation.rounds=7", "eval.every=3", "eval.images_per_class=2", "eval.num_images=50"]
    # Grids in rounds 3, 6 and 7.
    assert images_to_draw(load_config(words), range(1, 8)) == 3 * 20 + 50
    assert images_to_draw(load_config(words), range(4, 8)) == 2 * 20 + 50
    often = load_config([*words, "eval.metrics_every=2"])
    assert images_to_draw(often, range(1, 8)) == 3 * 20 + 3 * 50 + 50
    full = load_config([*words, "eval.final_metrics=true", "eval.num_per_class=9"])
    assert images_to_draw(full, range(1, 8)) == 3 * 20 + 90


def test_steps_are_timed_on_this_machine() -> None:
    words = ["model.width=4", "model.num_poolings=1", "data.image_size=8", "train.device=cpu"]
    config = load_config([*words, "train.precision=float32", "diffusion.num_inference_steps=2"])
    found = estimate_seconds(config, [32], rounds=range(1, 21))
    assert 0 < found.training < 60 and 0 < found.drawing < 60
    assert at_once(load_config(["train.mode=centralized"]), torch.device("cpu")) == 1


@pytest.mark.parametrize(
    "device, slow", [("cpu", [5.0, 2.0]), ("cuda", [5.0, 0.02, 0.02, 0.02, 5.0])]
)
def test_one_slow_step_does_not_stand_for_all(
    monkeypatch: pytest.MonkeyPatch, device: str, slow: list[float]
) -> None:
    """On a busy machine a step may take long, on a GPU the first one of each size does."""
    now = 0.0
    took = iter([*slow, *[0.02] * 1000])

    def step(num_images: int) -> None:
        nonlocal now
        now += next(took) * num_images

    monkeypatch.setattr("server_app.launch.time_estimate.time.perf_counter", lambda: now)
    assert seconds_per_image(step, 32, torch.device(device)) == pytest.approx(0.02)
