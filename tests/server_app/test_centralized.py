import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from server_app.app import app as server_app
from server_app.centralized import CentralizedTraining
from server_app.rounds import DivergedError
from task.config import Config, load_config, load_run_config, read_config
from task.data import build_dataset
from task.generators.registry import initial_generator
from task.randomness import Stream, torch_generator
from task.runs.checkpoint import load_weights
from task.runs.evaluations import evaluation_of
from task.runs.records import TRAIN, read_records
from task.runs.run import Run
from task.runs.writer import RunWriter
from task.training.loop import fit, fit_options
from tests.end_to_end.test_families import FAMILIES, write_pretrained
from tests.helpers import SMALL_RUN, Network, node_context

Weights = dict[str, torch.Tensor]


def configured(folder: Path, name: str = "run", **changes: Any) -> Config:
    own = {"output_dir": str(folder), "run_name": name, "train.mode": "centralized"}
    own["data.cache_dir"] = str(folder / "cache")
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return load_run_config({**SMALL_RUN, **own, **dotted})


def play(config: Config) -> Path:
    with closing(RunWriter(config)) as directory:
        CentralizedTraining(directory).run()
    return directory.path


def final_weights(folder: Path) -> Weights:
    return load_weights(folder / "model.safetensors")[0]


def same_bits(one: Weights, other: Weights) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def recorded(folder: Path, name: str) -> dict[int, Any]:
    """Values by round of one name, such as "train loss"."""
    reference, _, metric = name.rpartition(" ")
    return read_records(folder / "metrics.jsonl").series(metric, reference=reference or None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Path:
    """A run of three rounds, drawn and measured in each."""
    return play(configured(folder, federation__rounds=3, eval__every=1))


def test_learning_rates_follow_the_rounds_and_go_on_after_a_kill_to_the_same_bits(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"train__lr_schedule": "cosine", "train__warmup_rounds": 1, "eval__every": 9}
    config = configured(folder, "cosine", federation__rounds=3, **changes)
    train = CentralizedTraining.train

    def killed(self: CentralizedTraining, server_round: int) -> str:
        if server_round == 3:
            raise KeyboardInterrupt
        return train(self, server_round)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(CentralizedTraining, "train", killed)
        play(config)
    found = final_weights(play(config.changed({"resume": True})))
    images, model = build_dataset(config, download=False).train, initial_generator(config)
    (adam,) = (optimizers := model.optimizers(config.train.lr)).values()
    for server_round, share in ((1, 0.5), (2, 1.0), (3, 0.5)):
        adam.param_groups[0]["lr"] = share * config.train.lr
        fit(
            *(model, images.images, images.labels),
            options=fit_options(config),
            optimizers=optimizers,
            rng=torch_generator(config.seed, Stream.TRAIN, server_round),
        )
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_rounds_are_stretches_of_epochs_with_one_adam(folder: Path, reference: Path) -> None:
    config = configured(folder)
    train = build_dataset(config, download=False).train
    expected: dict[bool, Weights] = {}
    for adam_is_kept in (True, False):
        model = initial_generator(config)
        optimizers = model.optimizers(config.train.lr)
        for server_round in (1, 2, 3):
            fit(
                model,
                train.images,
                train.labels,
                options=fit_options(config),
                optimizers=optimizers if adam_is_kept else model.optimizers(config.train.lr),
                rng=torch_generator(config.seed, Stream.TRAIN, server_round),
            )
        expected[adam_is_kept] = model.state_dict()
    found = final_weights(reference)
    for name, tensor in expected[True].items():
        torch.testing.assert_close(found[name], tensor)
    assert not all(torch.allclose(found[n], t) for n, t in expected[False].items())


def test_neither_a_pause_nor_pictures_change_the_weights(folder: Path, reference: Path) -> None:
    paused = play(configured(folder, "paused", federation__rounds=1))
    play(configured(folder, "paused", federation__rounds=3, resume=True))
    assert same_bits(final_weights(paused), final_weights(reference))
    assert recorded(paused, "train loss") == recorded(reference, "train loss")


@pytest.mark.parametrize("preset", FAMILIES)
def test_family_goes_on_with_all_that_it_has_gathered(preset: str, tmp_path: Path) -> None:
    words = [f"model={preset}", *FAMILIES[preset][0], "data.test_fraction=0.95"]
    if preset == "small_gan":
        words.append(f"model.pretrained={write_pretrained(tmp_path / 'base.safetensors')}")
    # Of 6 batches, so that what comes every 4 of them is under way where a round ends.
    words += ["train.batch_size=15", "train.local_epochs=1", "train.mode=centralized"]
    words += ["train.precision=float32", "eval.precision=float32", "eval.num_images=0"]
    for name, rounds in (("whole", (1, 2)), ("parts", (1,)), ("parts", (2,))):
        resume = rounds == (2,)
        own = [f"output_dir={tmp_path}", f"run_name={name}", f"resume={resume}".lower()]
        config = load_config(["experiment=demo", *words, *own])
        with closing(RunWriter(config)) as directory:
            training = CentralizedTraining(directory)
            training.prepare()
            for server_round in rounds:
                training.play_round(server_round)
    whole, parts = (
        load_weights(tmp_path / name / "checkpoints" / "round_0002.safetensors")[0]
        for name in ("whole", "parts")
    )
    assert same_bits(whole, parts)
    # It holds what stays at clients and what each optimizer has gathered.
    held = {f"{optimizer}/" for optimizer in training.state()} | training.model.local
    assert all(any(name.startswith(beginning) for name in whole) for beginning in held)


@pytest.mark.slow
def test_two_processes_go_on_with_one_adam(folder: Path) -> None:
    settings: dict[str, Any] = {"federation__rounds": 2, "model__dropout": 0.0}
    alone = final_weights(play(configured(folder, "alone", **settings)))
    together = play(configured(folder, "together", train__num_processes=2, **settings))
    for name, tensor in final_weights(together).items():
        torch.testing.assert_close(tensor, alone[name], rtol=0, atol=1e-5)
    assert recorded(together, "train loss")[2] < recorded(together, "train loss")[1]


def test_another_seed_gives_other_weights(folder: Path, reference: Path) -> None:
    other = play(configured(folder, "seed-1", federation__rounds=1, seed=1))
    assert not same_bits(final_weights(other), final_weights(reference))


def test_every_round_is_written_down_and_drawn(reference: Path) -> None:
    for name in ("train loss", "test loss", "round_seconds", "images_per_second"):
        assert set(recorded(reference, name)) == {1, 2, 3}
    assert recorded(reference, "train loss")[3] < recorded(reference, "train loss")[1]
    assert len([*(reference / "samples").glob("round_*.png")]) == 3
    assert not (reference / "partition.json").exists()


def test_small_and_full_metrics_come_when_they_are_due(folder: Path) -> None:
    config = configured(
        folder,
        "measured",
        federation__rounds=3,
        eval__metrics_every=1,
        eval__num_images=40,
        eval__final_metrics=True,
        eval__num_per_class=3,
    )
    path = play(config)
    fids = read_records(path / "metrics.jsonl").by_round("fid", reference=TRAIN)
    assert {number: each.n for number, each in fids.items()} == {1: 40, 2: 40, 3: 30}
    # Of the full metrics alone.
    assert set(recorded(path, "cas")) == {3} == set(recorded(path, "class_agreement"))
    found = json.loads((path / "evaluation-classifier-correct.json").read_text())
    assert (found["round"], found["n_generated"]) == (3, 30)
    assert evaluation_of(found).records.value("fid", reference=TRAIN) == fids[3].value


def test_full_metrics_that_were_not_taken_are_made_up_for(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {"eval__final_metrics": True, "eval__num_per_class": 3}
    path = play(configured(folder, "made-up", federation__rounds=1))
    assert not [*path.glob("evaluation-*.json")]
    play(configured(folder, "made-up", federation__rounds=1, resume=True, **settings))
    written = (path / "evaluation-classifier-correct.json").read_bytes()
    capsys.readouterr()
    play(configured(folder, "made-up", federation__rounds=1, resume=True, **settings))
    assert "all 1 rounds are complete already" in capsys.readouterr().out
    assert (path / "evaluation-classifier-correct.json").read_bytes() == written


def test_run_ends_all_the_same_where_its_report_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    broken = tmp_path / "run" / "evaluation-inception-correct.json"
    broken.write_text("{}")
    path = play(configured(tmp_path, federation__rounds=1))
    said = capsys.readouterr().out
    assert f"no report: {broken} is not what a run writes" in said
    assert f"`feddm report {path}` writes it" in said and not (path / "report.html").exists()


@pytest.mark.parametrize("change", [{"eval__num_per_class": 4}, {"eval__seed": 7}])
def test_metrics_that_were_taken_otherwise_are_taken_anew(
    folder: Path, change: dict[str, int]
) -> None:
    (name,) = change
    settings = {"federation__rounds": 1, "eval__final_metrics": True, "eval__num_per_class": 3}
    path = play(configured(folder, name, **settings))
    play(configured(folder, name, resume=True, **{**settings, **change}))
    found = json.loads((path / "evaluation-classifier-correct.json").read_text())
    asked = {key.removeprefix("eval__"): value for key, value in {**settings, **change}.items()}
    assert found["num_per_class"] == asked["num_per_class"]
    assert found["n_generated"] == 10 * asked["num_per_class"]
    assert found["seed"] == asked.get("seed", 0)


def test_other_images_are_no_resumption(tmp_path: Path) -> None:
    play(configured(tmp_path, federation__rounds=1))
    counts = json.loads((tmp_path / "run" / "pooled.json").read_text())
    counts["train_counts"][3] += 1
    (tmp_path / "run" / "pooled.json").write_text(json.dumps(counts))
    with pytest.raises(ValueError, match="was trained on other images"):
        play(configured(tmp_path, federation__rounds=2, resume=True))


def test_extractor_auto_is_settled_when_a_run_begins_and_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for installed, resume in (("efficientnet", False), ("classifier", True)):
        monkeypatch.setattr("server_app.rounds.automatic_extractor", lambda _, name=installed: name)
        with closing(RunWriter(configured(tmp_path, resume=resume))) as directory:
            CentralizedTraining(directory).prepare()
        assert read_config(tmp_path / "run" / "config.yaml").eval.extractor == "efficientnet"


def test_missing_extractor_ends_the_run_before_it_begins(folder: Path) -> None:
    config = configured(
        folder,
        "blind",
        eval__final_metrics=True,
        eval__extractor="inception",
        eval__inception_weights=str(folder / "none.pth"),
    )
    with pytest.raises(FileNotFoundError, match=r"none\.pth: there is no such file"):
        play(config)
    assert not (folder / "blind" / "config.yaml").exists()


def test_pooled_data_without_a_test_split_has_no_test_loss(tmp_path: Path) -> None:
    images = build_dataset(configured(tmp_path), download=False).train
    for label in (0, 1):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        chosen = images.images[images.labels == label][:12]
        for number, image in enumerate(chosen):
            file = tmp_path / "images" / str(label) / f"{number}.png"
            Image.fromarray(image[0].numpy()).save(file)
    config = configured(
        tmp_path,
        federation__rounds=1,
        data__root=str(tmp_path / "images"),
        data__test_fraction="null",
        overrides="data=image_folder data.classes=['0','1'] data.channels=1",
    )
    path = play(config)
    assert recorded(path, "test loss") == {}
    assert read_config(path / "config.yaml").train.mode == "centralized"


def test_divergence_is_named_with_the_last_good_checkpoint_and_what_to_change(
    tmp_path: Path,
) -> None:
    config = configured(tmp_path, federation__rounds=3, train__lr=1e25)
    message = r"in round 1 \(.*\); no checkpoint is good; .* such as train\.lr=1e\+24$"
    with pytest.raises(DivergedError, match=message):
        play(config)
    said = Run(tmp_path / "run").divergence
    assert said is not None and (said.round, said.context["reason"]) == (1, "loss is nan")
    report = (tmp_path / "run" / "report.html").read_text()
    assert "Training has diverged in round 1 (loss is nan); no checkpoint is good;" in report
    with pytest.raises(DivergedError, match=message):
        play(config.changed({"resume": True}))
    found = read_records(tmp_path / "run" / "metrics.jsonl").all
    assert [each.metric for each in found] == ["images_per_second", "divergence"]


def test_test_loss_that_is_not_finite_is_a_divergence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "server_app.centralized.held_out_losses", lambda *_, **__: {"loss": float("inf")}
    )
    config = configured(tmp_path, federation__rounds=2, federation__keep_checkpoints=1)
    good = tmp_path / "run" / "checkpoints" / "round_0001.safetensors"
    message = (
        rf"training has diverged in round 2 \(test loss inf\); the last good checkpoint is {good}; "
    )
    with pytest.raises(DivergedError, match=message):
        play(config)
    assert good.exists()
    run = Run(tmp_path / "run")
    assert run.divergence is not None and run.divergence.round == run.rounds_done == 2
    assert run.divergence.context == {"reason": "test loss inf"}
    # Whether it does so again, a resumed run finds out.
    with closing(RunWriter(config.changed({"resume": True}))):
        assert Run(run.path).divergence is None


def test_flower_refuses_the_baseline(folder: Path) -> None:
    run_config = {**SMALL_RUN, "output_dir": str(folder), "train.mode": "centralized"}
    with pytest.raises(ValueError, match=r"train\.mode must be federated under `flwr run`"):
        server_app(Network().grid, node_context(run_config, {}))
