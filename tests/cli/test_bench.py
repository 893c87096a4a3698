import inspect
import json
import math
import os
import re
import subprocess
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from task.cli.bench import run_benchmarks
from tests.benchmarks import copying, families, loss_curves, peers, realism, sampling, training
from tests.benchmarks.__main__ import chosen_sections, main, run_section
from tests.benchmarks.contestants import Contestant, take_turns
from tests.benchmarks.feddm import PAPER, Feddm
from tests.benchmarks.flops import count_flop, matmul_rate
from tests.benchmarks.loss_curves import compare
from tests.benchmarks.report import (
    LONGER,
    SECTIONS,
    Figures,
    available_cores,
    describe_machine,
    goal,
    text_of,
    write_json,
    written,
)
from tests.processes import COMMANDS

CPU = torch.device("cpu")
TINY = (
    *("data.image_size=8", "model.width=4", "model.num_poolings=1", "train.batch_size=16"),
    *(
        "train.precision=float32",
        "diffusion.num_timesteps=30",
        "diffusion.num_inference_steps=null",
    ),
)


def assert_finite_and_positive(figures: Figures) -> None:
    numbers = [value for value in figures.values() if not isinstance(value, str)]
    assert numbers and all(math.isfinite(value) and value > 0 for value in numbers)


class Process:
    """Something that lives in a process of its own."""

    def __init__(self, value: int) -> None:
        if value < 0:
            raise ValueError(f"value must be >= 0, got {value}")
        self.value = value

    def add(self, number: int) -> int:
        self.value += number
        return self.value

    def pid(self) -> int:
        return os.getpid()

    def fail(self) -> None:
        raise KeyError("no such thing")


@pytest.mark.slow
def test_contestants_keep_their_state_in_processes_of_their_own() -> None:
    with Contestant(Process, 1) as one, Contestant(Process, 10) as two:
        assert [one.call("add", 1), two.call("add", 1), one.call("add", 1)] == [2, 11, 3]
        assert len({one.call("pid"), two.call("pid"), os.getpid()}) == 3
        with pytest.raises(KeyError, match="no such thing"):
            one.call("fail")
    with pytest.raises(ValueError, match="value must be >= 0, got -1"):
        Contestant(Process, -1)


def test_players_take_turns_and_the_first_turn_does_not_count() -> None:
    played: list[str] = []

    def play(name: str) -> float:
        played.append(name)
        return len(played)

    scores = take_turns({name: partial(play, name) for name in "abc"}, 2)
    assert "".join(played) == "abcabcabc"
    assert scores == {"a": [4, 7], "b": [5, 8], "c": [6, 9]}


def test_flop_of_the_papers_net_are_those_of_the_paper() -> None:
    found = Feddm((*PAPER, "train.precision=float32"), "cpu", 1).flop_per_image()
    assert found / 1e9 == pytest.approx(7.12, abs=0.005)


def test_flop_of_a_linear_layer_are_two_products_beside_the_forward_one() -> None:
    layer, rows = nn.Linear(8, 16, bias=False), torch.zeros(3, 8, requires_grad=True)
    assert count_flop(lambda: layer(rows).sum().backward()) == 3 * (2 * 3 * 8 * 16)


def test_matmul_rate_is_that_of_its_best_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.benchmarks.flops.MATRIX_SIZES", {"cpu": (8, 256)})
    monkeypatch.setattr("tests.benchmarks.flops.FLOP_AT_ONCE", {"cpu": 1})
    monkeypatch.setattr("tests.benchmarks.flops.LONGEST_SECONDS", 1e6)
    seconds = iter([4.0, 2.0, 4.0, 512.0, 512.0, 512.0])
    monkeypatch.setattr("tests.benchmarks.flops.timed", lambda _, work: (work(), next(seconds))[1])
    assert matmul_rate(CPU) == 2 * 256**3 / 512


def test_matmul_rate_leaves_sizes_out_that_would_take_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.benchmarks.flops.MATRIX_SIZES", {"cpu": (8, 256)})
    seconds = iter([4.0, 2.0, 4.0])
    monkeypatch.setattr("tests.benchmarks.flops.timed", lambda _, work: (work(), next(seconds))[1])
    assert matmul_rate(CPU) == 2 * 8**3 / 2


@pytest.mark.slow
def test_training_measures_ours_against_the_plain_recipe() -> None:
    figures = training.measure(
        full=True, device="cpu", overrides=TINY, batch_size=8, turns=1, num_threads=1
    )
    assert_finite_and_positive(figures)
    assert {"train.ratio", "train.images_per_second", "train.share_of_matmul_peak"} <= set(figures)
    ours, plain = figures["train.images_per_second"], figures["train.plain.images_per_second"]
    assert figures["train.ratio"] == pytest.approx(ours / plain)
    flop, peak = figures["train.gflop_per_image"], figures["train.matmul_tflops"]
    assert figures["train.share_of_matmul_peak"] == pytest.approx(ours * flop / peak / 1e3)
    assert "train.batch_16.hours_of_the_papers_cell" in figures


@pytest.mark.slow
def test_families_are_measured_with_a_base_for_the_one_that_needs_it() -> None:
    small = ("data=digits", "data.image_size=8", "model=small_gan", "model.width=2")
    words = (*small, "model.latent_dim=8", "model.perceptual_weight=0", "train.precision=float32")
    figures = families.measure(
        full=False, device="cpu", families={"small_gan": words}, batch_size=2, num_threads=1
    )
    assert_finite_and_positive(figures)
    assert {"families.small_gan.images_per_second"} <= set(figures)


def test_plain_recipe_takes_the_steps_of_adam_on_the_objective() -> None:
    recipe = training.PlainRecipe(TINY, "cpu", 1, 8)
    before = [p.clone() for p in recipe.model.parameters()]
    assert recipe.train(2) > 0
    steps = {int(state["step"]) for state in recipe.optimizer.state.values()}
    assert steps == {2}
    after = recipe.model.parameters()
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert recipe.model.training


def test_plain_recipe_sees_images_in_the_range_of_the_model() -> None:
    images, labels = next(training.PlainRecipe(TINY, "cpu", 1, 64).batches)
    assert images.shape == (64, 1, 8, 8) and images.dtype == torch.float32
    assert -1 <= images.min() < -0.9 and 0.9 < images.max() <= 1
    assert set(labels.tolist()) <= set(range(10))


def test_sampling_measures_drawing_against_the_network_alone() -> None:
    figures = sampling.measure(
        full=False, device="cpu", overrides=TINY, batch_size=4, turns=1, num_threads=1
    )
    assert_finite_and_positive(figures)
    per_call = figures["sample.images_per_second"] * figures["sample.steps"]
    calls = figures["sample.forward_images_per_second"]
    assert figures["sample.share_of_forward_rate"] == pytest.approx(per_call / calls)
    assert figures["sample.steps"] == 30
    assert figures["sample.taken"] == "measured in 4 steps, extrapolated to 30"


def test_loss_curves_are_compared_with_the_spread_of_seeds() -> None:
    float32 = np.array([[1.0, 2.0], [3.0, 2.0]])  # standard deviations of sqrt(2) and 0
    same = compare(float32, float32[::-1])
    assert same["train.bf16_loss_gap"] == 0
    assert same["train.float32_seed_spread"] == pytest.approx(math.sqrt(2) / 2)
    assert "within" in str(same["train.bf16_verdict"])
    apart = compare(float32, float32 + 0.8)
    assert apart["train.bf16_loss_gap"] == pytest.approx(0.8)
    assert "outside" in str(apart["train.bf16_verdict"])


@pytest.mark.slow
def test_loss_curves_come_from_training_on_digits() -> None:
    found = loss_curves.measure(
        full=False, device="cpu", num_threads=1, further=TINY, seeds=2, checkpoints=2, epochs=1
    )
    assert_finite_and_positive(found)


def test_peers_are_skipped_with_a_way_out_where_they_are_not_installed() -> None:
    if all(find_spec(library) for library in peers.NETS):
        pytest.skip("the dependency group peers is installed")
    figures = peers.measure(full=False, device="cpu")
    assert list(figures) == ["peers.skipped"]
    assert "--group peers" in str(figures["peers.skipped"])


@pytest.mark.slow
def test_peers_are_measured_on_their_own_net_and_on_matched_operations() -> None:
    for library in peers.NETS:
        pytest.importorskip(library, reason="the dependency group peers is not installed")
    figures = peers.measure(
        full=False, device="cpu", overrides=TINY, batch_size=1, turns=1, num_threads=1
    )
    assert_finite_and_positive(figures)
    # One network, written twice, is one number of operations; but for the kernel of attention.
    ours, theirs = (
        figures[f"peers.{name}.float32.gflop_per_image"]
        for name in ("feddm.attention_unet", "denoising_diffusion_pytorch.own")
    )
    assert ours == pytest.approx(theirs, rel=0.02)
    for library in peers.NETS:
        for precision in peers.PRECISIONS:
            matched = figures[f"peers.{library}.matched.{precision}.gflop_per_image"]
            assert matched == pytest.approx(7.12, rel=0.1)


def test_same_network_is_compared_in_each_precision_and_each_in_its_own() -> None:
    rates = {"float32": (6.0, 4.0), "bfloat16": (10.0, 8.0)}
    figures: Figures = {}
    for precision, (ours, theirs) in rates.items():
        figures[f"peers.feddm.attention_unet.{precision}.images_per_second"] = ours
        figures[f"peers.denoising_diffusion_pytorch.own.{precision}.images_per_second"] = theirs
    assert peers.same_network(figures, "bfloat16") == {
        "peers.attention_unet.float32.ratio": 1.5,
        "peers.attention_unet.bfloat16.ratio": 1.25,
        "peers.attention_unet.default_precision": "bfloat16",
        "peers.attention_unet.default.ratio": 2.5,
    }


def test_peers_that_compute_faster_are_said_to_be_ahead() -> None:
    figures: Figures = {
        f"peers.{library}.{net}.{precision}.tflops": 0.5
        for library, nets in {**peers.NETS, "feddm": ["own"]}.items()
        for net in nets
        for precision in peers.PRECISIONS
    }
    figures["peers.diffusers.own.bfloat16.tflops"] = 0.75
    said = peers.verdicts(figures)
    assert said["peers.diffusers_bfloat16"] == (
        "ahead on its own network, 1.50 times feddm's FLOP/s; "
        "behind on its matched network, 1.00 times feddm's FLOP/s"
    )
    assert all(
        "ahead" not in str(said[name]) for name in said.keys() - {"peers.diffusers_bfloat16"}
    )


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("train.ratio", 2.345678, "2.346 x"),
        ("train.images_per_second", 54321.6, "54,322 images/s"),
        ("train.share_of_matmul_peak", 0.7512, "75.12 %"),
        ("round.overhead_share", 0.1, "10 %"),
        ("server.peak_mib.10", 812.25, "812.2 MiB"),
        ("train.batch_size", 128, "128"),
        ("train.precision", "bfloat16", "bfloat16"),
    ],
)
def test_figures_are_written_with_the_unit_that_their_name_says(
    name: str, value: float | str, expected: str
) -> None:
    assert written(name, value) == expected


@pytest.mark.parametrize(
    ("name", "value", "device_type", "expected"),
    [
        ("train.ratio", 2.3, "cpu", "goal: >= 2.2 x, reached"),
        ("train.ratio", 2.3, "cuda", "goal: >= 4 x, missed"),
        ("round.overhead_share", 0.1, "cuda", "goal: <= 15 %, reached"),
        ("round.overhead_share", 0.2, "cuda", "goal: <= 15 %, missed"),
        ("round.overhead_share", 0.2, "cpu", ""),
        ("train.matmul_tflops", 1.0, "cpu", ""),
    ],
)
def test_goals_are_those_of_the_device(
    name: str, value: float, device_type: str, expected: str
) -> None:
    assert goal(name, value, device_type) == expected


def test_names_of_more_than_two_parts_make_a_table() -> None:
    figures: Figures = {"server.rounds": 3, "server.peak_mib.10": 800, "server.peak_mib.200": 801}
    text = text_of("server_memory", figures, device_type="cpu")
    assert [line.split() for line in text.splitlines()] == [
        ["server_memory"],
        ["-------------"],
        ["server.rounds", "3"],
        [],
        ["10", "200"],
        ["server.peak_mib", "800", "MiB", "801", "MiB"],
    ]


def test_machine_and_figures_are_written_as_one_flat_object(tmp_path: Path) -> None:
    machine = describe_machine(CPU)
    write_json(tmp_path / "bench.json", {**machine, "train.ratio": 2.5})
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["train.ratio"] == 2.5
    assert found["machine.cores"] == available_cores()
    assert found["versions.torch"] == torch.__version__
    assert {"date", "revision", "machine.cpu", "machine.memory_mib", "machine.gpu"} <= set(found)
    assert [file.name for file in tmp_path.iterdir()] == ["bench.json"]


def test_sections_are_chosen_by_name_and_run_in_their_order() -> None:
    assert chosen_sections("sampling, training", full=False) == ["training", "sampling"]
    assert chosen_sections(None, full=True) == list(SECTIONS)
    assert set(SECTIONS) - set(chosen_sections(None, full=False)) == set(LONGER)
    assert chosen_sections("loss_curves", full=False) == ["loss_curves"]


@pytest.mark.parametrize("name", SECTIONS)
def test_every_section_is_a_module_with_a_measure(name: str) -> None:
    module = import_module(f"tests.benchmarks.{name}")
    assert {"full", "device"} <= set(inspect.signature(module.measure).parameters)


def test_faults_lie_between_real_images_and_noise_in_their_order() -> None:
    found = realism.measure(full=False, device="cpu")
    names = ("held_out", "blurred_by_1_pixel", "blurred_by_4_pixels", "noise_smoothed_over_3x3")
    places = [float(found[f"realism.{name}"]) for name in names]
    assert places == sorted(places) and places[0] < 0.1 < 0.5 < places[2] < 1 < places[3]


def test_search_for_copies_finds_them_and_seldom_alarms_otherwise() -> None:
    found = copying.measure(full=False, device="cpu", held_out=(30,), trials=20, copies=(0.5,))
    assert float(found["copying.false_alarm_share_of_30"]) <= 0.1
    assert found["copying.found_50_percent_share_of_30"] == 1
    # What the search replaces: a threshold at the nearest 1 % of 30 images.
    assert float(found["copying.threshold_false_alarm_share_of_30"]) > 0.2


def test_failure_of_a_section_is_its_figure() -> None:
    found = run_section("training", full=False, device="elsewhere")
    assert list(found) == ["training.failed"]
    assert "elsewhere" in str(found["training.failed"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--only", "training,speed"], "--only must be of training"),
        (["--only", ""], "--only must be of training"),
        (["--json", "/missing/bench.json"], "--json must be a file in a folder that can be"),
        (["--json", "/"], "--json must be a file, got '/'"),
        (["--device", "cuda:99"], "train.device must be auto or cpu"),
        (["--device", "tpu"], "train.device must be auto, cpu, cuda or cuda:N"),
    ],
)
def test_command_refuses_what_it_cannot_do_before_it_measures(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda:99" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    status, (out, err) = main(words), capsys.readouterr()
    assert (status, out) == (1, "")
    assert err.startswith("feddm bench: ") and err.count("\n") == 1
    assert expected in err


def test_command_keeps_what_it_measured_where_another_section_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.benchmarks.__main__.SECTIONS", {"lost": "", "echo": ""})
    package = tmp_path / "echo.py"
    package.write_text("def measure(*, full, device): return {'echo.ratio': 2.0}")
    monkeypatch.setattr("tests.benchmarks.__path__", [str(tmp_path)])
    file = tmp_path / "bench.json"
    assert main(["--json", str(file)]) == 1
    out, err = capsys.readouterr()
    assert re.search(r"echo\.ratio +2 x", out) and err == "feddm bench: failed: lost\n"
    found = json.loads(file.read_text())
    assert found["echo.ratio"] == 2.0 and "tests.benchmarks.lost" in found["lost.failed"]
    assert main(["--only", "echo"]) == 0


def test_command_runs_from_anywhere_and_says_how_long_it_takes(tmp_path: Path) -> None:
    # Another package of that name is not taken for the project's.
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "__init__.py").write_text("raise SystemExit(7)")
    result = subprocess.run(
        [COMMANDS / "feddm", "bench", "--help"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "17 minutes" in result.stdout and "peers: " in result.stdout


def test_command_needs_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("task.cli.bench.ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"runs from a checkout .*clone the repository"):
        run_benchmarks([])
