"""What a real node is told about itself, and whether it can take part in a run."""

import os
from pathlib import Path

import numpy as np
import pytest

from task.config import Config, SmallGANConfig, load_config
from task.data import UnknownClassError, build_dataset
from task.efficientnet import MissingWeightsError, pretrained_file
from task.protocol.node import (
    NodeConfig,
    Share,
    TooFewImagesError,
    check_extractor,
    check_node,
    count_images,
    hold_out,
    output_folder,
    own_config,
    read_node_config,
)
from tests.data.test_data_files import eyes, write_odir, write_tree
from tests.helpers import write_digits_as_mnist


def of_folder(root: Path, *overrides: str) -> Config:
    words = ["data=image_folder", "data.classes=[a,b,c]", f"data.cache_dir={root.parent / 'cache'}"]
    return own_config(load_config([*words, *overrides]), NodeConfig(str(root)))


def test_node_config_is_read_as_it_is_given() -> None:
    given = {
        "data-path": "/data",
        "output-path": "/out",
        "min-images": 50,
        "report-class-counts": True,
        "max-epsilon": 8,
    }
    assert read_node_config(given) == NodeConfig("/data", "/out", 50, True, max_epsilon=8.0)
    assert read_node_config({}) == NodeConfig(None, None, 1, False)
    assert read_node_config({"partition-id": 2, "num-partitions": 3}) == Share(2, 3)


@pytest.mark.parametrize(
    ("given", "kind", "expected"),
    [
        ({"data-pth": "/x"}, ValueError, "of the keys data-path, output-path, .* got 'data-pth'"),
        ({"data-path": 3}, TypeError, "data-path must be of type str, got 3"),
        ({"data-path": ""}, ValueError, "data-path must be a path, got ''"),
        ({"patients": ""}, ValueError, "patients must be a path, got ''"),
        ({"min-images": True}, TypeError, "min-images must be of type int, got True"),
        ({"min-images": "50"}, TypeError, "min-images must be of type int, got '50'"),
        ({"min-images": 0}, ValueError, "min-images must be >= 1, got 0"),
        ({"max-epsilon": 0.0, "output-path": "/x"}, ValueError, "max-epsilon must be a number > 0"),
        ({"max-epsilon": "8"}, TypeError, "max-epsilon must be of type float, got '8'"),
        ({"max-epsilon": 8.0}, ValueError, "output-path: what private runs spend on each patient"),
        ({"privacy-delta": 1}, ValueError, "privacy-delta must be between 0 and 1, exclusive, got"),
        ({"minimum-peers": 2}, ValueError, "minimum-peers must be 0, or at least 3"),
        ({"trusted-peers": "abc"}, ValueError, "trusted-peers must be fingerprints of 32"),
        ({"report-class-counts": 1}, TypeError, "report-class-counts must be of type bool, got 1"),
        ({"partition-id": 0}, ValueError, "num-partitions as well"),
        (
            {"partition-id": 0, "num-partitions": 2, "data-path": "/x"},
            ValueError,
            "for a simulated node, got 'data-path'",
        ),
    ],
)
def test_wrong_node_configs_are_refused_by_key(
    given: dict[str, object], kind: type[Exception], expected: str
) -> None:
    with pytest.raises(kind, match=expected):
        read_node_config(given)


def test_images_are_counted_undecoded_as_they_are_trained_on(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"A": 20, "c": 10})
    config = of_folder(tmp_path / "set")
    counts = count_images(config)
    assert not (tmp_path / "cache").exists()
    assert (counts.train, counts.held_out, counts.test) == ((18, 0, 9), (2, 0, 1), (0, 0, 0))
    labels = build_dataset(config, download=False).train.labels.numpy()
    kept, held_out = hold_out(config, labels, None)
    assert np.bincount(labels[kept], minlength=3).tolist() == list(counts.train)
    assert np.bincount(labels[held_out], minlength=3).tolist() == list(counts.held_out)


def test_packaged_sets_are_counted_too(tmp_path: Path) -> None:
    write_digits_as_mnist(tmp_path, train=200, test=50, classes=5)
    counts = count_images(own_config(load_config(["data=mnist"]), NodeConfig(str(tmp_path))))
    assert (sum(counts.train), sum(counts.held_out), sum(counts.test)) == (180, 20, 50)
    assert len(counts.train) == 10 and not any(counts.train[5:])


def test_classes_that_the_run_does_not_name_are_refused(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 1, "d": 1})
    with pytest.raises(UnknownClassError, match="which holds 'd', got"):
        count_images(of_folder(tmp_path / "set"))
    write_odir(tmp_path / "eyes", [(1, "1_left.jpg", "['X']")])
    odir = load_config(["data=odir", "data.test_fraction=null"])
    with pytest.raises(UnknownClassError, match="line 2: labels must be one of"):
        count_images(own_config(odir, NodeConfig(str(tmp_path / "eyes"))))
    write_digits_as_mnist(tmp_path / "mnist", train=200, test=50)
    fewer = load_config(["data=mnist", "data.classes=[zero,one]"])
    with pytest.raises(UnknownClassError, match="at least 10 names for data=mnist, got 2"):
        count_images(own_config(fewer, NodeConfig(str(tmp_path / "mnist"))))


def test_odir_counts_hold_whole_patients_out(tmp_path: Path) -> None:
    write_odir(tmp_path / "set", eyes(20))
    words = ["data=odir", "data.classes=[N,D]", "data.test_fraction=null", "data.val_fraction=0.3"]
    counts = count_images(own_config(load_config(words), NodeConfig(str(tmp_path / "set"))))
    assert sum(counts.train) + sum(counts.held_out) == 40
    assert sum(counts.held_out) % 2 == 0


def test_min_images_counts_training_images_alone(tmp_path: Path) -> None:
    write_tree(tmp_path / "set", {"a": 20})
    config = of_folder(tmp_path / "set")
    check_node(config, NodeConfig(str(tmp_path / "set"), min_images=18))
    with pytest.raises(TooFewImagesError, match=r"at least 19 training images, .* has 18"):
        check_node(config, NodeConfig(str(tmp_path / "set"), min_images=19))


def test_output_path_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_tree(tmp_path / "set", {"a": 3})
    config = of_folder(tmp_path / "set")
    (tmp_path / "out").mkdir()
    check_node(config, NodeConfig(str(tmp_path / "set"), "out"))
    assert output_folder("~/out") == output_folder("out") == tmp_path / "out"
    assert os.listdir(tmp_path / "out") == []
    for wrong in ("missing", "set/a/000.png"):
        with pytest.raises(ValueError, match="output-path must be a folder that the node can"):
            check_node(config, NodeConfig(str(tmp_path / "set"), wrong))


def test_node_trains_on_top_of_its_own_copy_of_a_generator(tmp_path: Path) -> None:
    words = ["data=digits", "model=small_gan", "model.pretrained=/theirs"]
    places = {"output_path": str(tmp_path), "pretrained_generator": "/own/model.safetensors"}
    copied = NodeConfig(**places)
    with pytest.raises(ValueError, match=r"model\.pretrained_sha256 must be the SHA-256 of"):
        own_config(load_config(words), copied)
    known = load_config([*words, f"model.pretrained_sha256={'0' * 64}"])
    with pytest.raises(ValueError, match="start it with --node-config 'pretrained-generator="):
        own_config(known, NodeConfig())
    own = own_config(known, copied).model
    assert isinstance(own, SmallGANConfig)
    assert own.pretrained == "/own/model.safetensors"
    with pytest.raises(FileNotFoundError, match=r"/own/model\.safetensors"):
        check_node(own_config(known, copied), copied)


def test_weights_that_the_server_may_choose_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(*words: str, score_images: bool = True) -> None:
        check_extractor(load_config(words), NodeConfig(score_images=score_images))

    colored = ("data=cifar10", "eval.extractor=auto")
    check(*colored) if pretrained_file() else None
    monkeypatch.setattr("task.efficientnet.pretrained_file", lambda: None)
    with pytest.raises(MissingWeightsError, match=r"the server may choose with .*=auto, needs the"):
        check(*colored)
    with pytest.raises(MissingWeightsError, match=r"^eval\.extractor=efficientnet needs .*extra"):
        check("data=cifar10", "eval.extractor=efficientnet")
    check(*colored, score_images=False)
    check(*colored, "eval.num_images=0")
    check("data=digits", "eval.extractor=auto", "data.image_size=16")  # which are not suited
    check("data=cifar10", "eval.extractor=classifier")


def test_node_without_images_of_its_own_is_refused() -> None:
    with pytest.raises(ValueError, match="a node needs its own images: start it with"):
        own_config(load_config(["data=mnist"]), NodeConfig())
    assert own_config(load_config(["data=digits"]), NodeConfig()).data.name == "digits"


def test_held_out_images_are_the_same_for_every_seed_of_a_run() -> None:
    labels = np.arange(200) % 2
    found = {
        words: hold_out(load_config(words.split()), labels, None)[1].tolist()
        for words in ("seed=0", "seed=1", "seed=1 data.split_seed=1")
    }
    assert found["seed=0"] == found["seed=1"] != found["seed=1 data.split_seed=1"]
