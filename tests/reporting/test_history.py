import json
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest

from task.config import OWN_IMAGES, anchored, flat_values, load_config, read_config
from task.evaluation.metrics import METRICS
from task.progress import duration
from task.reporting.metric_table import Quantity
from task.reporting.run_summary import (
    describe_run,
    evaluated_metrics,
    found_metrics,
    key_figures,
    summary_lines,
)
from task.reporting.warning_signs import (
    Check,
    State,
    checks,
    far_rounds,
    image_checks,
    warning_signs,
)
from task.runs.evaluations import evaluation_of, read_evaluations
from task.runs.layout import run_path
from task.runs.records import HELD_OUT, TEST, TRAIN, Record, records_of
from task.runs.repeat import (
    PLACES,
    resubmitting_command,
    resuming_command,
    submitting_command,
    training_words,
)
from task.runs.resume import check_same_run
from task.runs.run import Run
from tests.helpers import evaluated, left_out, losses, written_run

NOISE_POSITION = Quantity("noise_position")


def test_history_holds_what_was_recorded_of_complete_rounds(tmp_path: Path) -> None:
    recorded = [
        *losses(1, {0: 0.5, 1: 0.7}),
        *losses(2, {0: 0.3}),
        left_out(2, 1, "node unavailable"),
        *losses(3, {0: 9.0, 1: 9.0}),
    ]
    files: dict[str, Any] = {"partition.json": {"train_counts": [[1] * 10, [2] * 10, [0] * 10]}}
    run = written_run(tmp_path / "run", recorded, rounds_done=2, files=files, federation__rounds=4)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"round": 3, "metr')
    history = Run(run)
    assert (history.rounds_done, history.finished, history.running) == (2, False, False)
    records = history.records
    assert records.series("loss", reference=TRAIN) == {1: pytest.approx(0.6), 2: 0.3}
    assert records.of_clients("loss", reference=TRAIN) == {0: {1: 0.5, 2: 0.3}, 1: {1: 0.7}}
    assert records.left_out == [left_out(2, 1, "node unavailable")]
    assert (history.clients, history.num_images) == ([0, 1, 2], 30)
    states = history.participation()
    assert (states[1, 1], states[2, 1], states[2, 2]) == ("trained", "left out", "not there")
    signs = "\n".join(warning_signs(history))
    for words in (
        "2 of 4 rounds are done",
        "Client 1 was left out once in 1 round",
        "Client 2 was",
    ):
        assert words in signs


def test_real_nodes_and_pooled_data_are_told_apart(tmp_path: Path) -> None:
    told = {"classes": ["0"], "clients": {"0": None, "1": [5] * 10}}
    files = {"nodes.json": {"123": 0, "456": 1}, "class_counts.json": told}
    nodes = Run(written_run(tmp_path / "nodes", [], rounds_done=0, files=files))
    assert (nodes.setting, nodes.clients, nodes.num_images) == ("real nodes", [0, 1], 50)
    pooled = {"pooled.json": {"train_counts": [7] * 10, "test_counts": [1] * 10}}
    run = written_run(
        tmp_path / "pooled", [], rounds_done=2, files=pooled, train__mode="centralized"
    )
    history = Run(run)
    assert (history.setting, history.clients, history.num_images) == ("centralized", [], 70)
    assert history.finished and warning_signs(history) == []


def test_run_that_no_client_has_answered_says_where_it_runs(tmp_path: Path) -> None:
    machine = {"device": "cpu", "setting": "real nodes", "versions": {"torch": "9"}, "code": "ab"}
    run = written_run(tmp_path / "run", [], rounds_done=0, files={"machine.json": machine})
    history = Run(run)
    assert (history.setting, history.clients) == ("real nodes", [])
    assert (history.versions, history.code) == ({"torch": "9"}, "ab")
    assert describe_run(history)[0].startswith("No client has answered yet. 0 of 2 rounds")
    assert "clients" not in dict(key_figures(history))


def test_what_hospitals_scored_is_read_from_the_run(tmp_path: Path) -> None:
    settings = {"extractor": "classifier", "image_range": "correct", "seed": 7}
    recorded = [
        each
        for number, n in ((1, 40), (2, 1200))
        for each in (
            Record(number, "fid", 2.0, reference=HELD_OUT, n=n, context=settings),
            Record(number, "num_scoring_clients", 2, n=n, context=settings),
        )
    ]
    run = written_run(tmp_path / "run", recorded, rounds_done=2)
    (fid,) = found_metrics(Run(run))
    assert fid.of == "hospitals, classifier, correct, n=1,200, seed 7"
    (check,) = found(Run(run), "fewer")
    assert "1,200 of 10 classes in the hospitals' scores" in check.says
    (fid,) = found_metrics(Run(written_run(tmp_path / "early", recorded, rounds_done=1)))
    assert fid.of == "hospitals, classifier, correct, n=40, seed 7"


def test_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"RUN: {tmp_path} holds no run"):
        Run(tmp_path)


@pytest.mark.parametrize(
    "content", [[], {"round": 3}, {**evaluated(), "records": []}, {**evaluated(), "round": "x"}]
)
def test_what_is_no_evaluation_is_refused_with_the_file(content: Any) -> None:
    with pytest.raises(ValueError, match=r"^file\.json is not what a run writes"):
        evaluation_of(content, Path("file.json"))


def test_evaluation_of_the_first_schema_is_read() -> None:
    run = Path(__file__).parents[1] / "runs" / "0.1.0-federated"
    (found,) = read_evaluations(run)
    old = json.loads((run / "evaluation-classifier-correct.json").read_text())
    assert found.label.n_floor == old["n_floor"] and found.round == old["round"]
    for name, reference in (("kid", TEST), ("fid", TRAIN), ("precision", None)):
        for real in (False, True):
            each = found.records.last(name, reference=reference, real=real)
            key = "floor_" * real + "_".join(filter(None, (name, reference)))
            assert each is not None and (each.value, each.std) == (old[key], old.get(f"{key}_std"))
    assert found.records.value("class_agreement", real=True) == old["agreement_real"]
    assert found.records.value("cas", real=True) == old["cas_real_same_n"]
    assert found.records.value("pixel_distance", real=True) == old["pixel_held_out"]
    assert {each.metric for each in found.records.all} <= METRICS.keys()
    assert evaluation_of(found.content(), Path(found.name)) == found
    # Floors of another number of images than the scores are none.
    del old["n_scored"]
    assert not any(
        each.real
        for each in evaluation_of({**old, "n_floor": 7}).records.all
        if each.metric == "fid"
    )


def found(history: Run, subject: str) -> list[Check]:
    return [check for check in checks(history) if subject in check.subject]


def test_copies_and_few_images_are_warned_of(tmp_path: Path) -> None:
    run = written_run(tmp_path / "run", losses(1, {0: 0.5}), rounds_done=2)
    file = run / "evaluation-classifier-correct.json"
    for p_value, state in ((0.02, State.CLEAR), (0.001, State.WARNING), (None, State.UNMEASURED)):
        content = evaluated(scores={Quantity("pixel_p_value"): (p_value, None)})
        file.write_text(json.dumps(content))
        assert [check.state for check in found(Run(run), "copies")] == [state]
        assert [check.state for check in found(Run(run), "fewer")] == [State.CLEAR]
    for few, said in (
        ({"n_generated": 499, "n_rarest": 49}, "499 of 10"),
        ({"n_rarest": 3}, "at least 3 of each"),
    ):
        file.write_text(json.dumps(evaluated(**few)))
        assert any(said in sign for sign in warning_signs(Run(run)))


def test_what_was_measured_before_a_run_was_prolonged_is_not_said_of_its_end(
    tmp_path: Path,
) -> None:
    lines = [*losses(1, {0: 0.5}), Record(1, "noise_position", 0.1, n=500), *losses(2, {0: 0.5})]
    run = written_run(tmp_path / "run", lines, rounds_done=2)
    file = run / "evaluation-classifier-correct.json"
    file.write_text(json.dumps(evaluated(1)))
    assert {check.state for check in image_checks(Run(run))} == {State.UNMEASURED}
    (found_before,) = found_metrics(Run(run), NOISE_POSITION)
    assert found_before.of.endswith("n=500, round 1")
    lines += [Record(2, "noise_position", 0.9, n=500)]
    run = written_run(tmp_path / "measured", lines, rounds_done=2)
    (run / file.name).write_text(file.read_text())
    history = Run(run)
    assert [check.state for check in found(history, "noise")] == [State.WARNING]
    assert [each.generated for each in evaluated_metrics(history, NOISE_POSITION)] == ["0.9"]
    before = image_checks(history.of_round(1))
    assert "0.10" in before[0].says and before[0].state is State.CLEAR


def test_images_drawn_otherwise_do_not_hide_what_the_run_measured(tmp_path: Path) -> None:
    quick = Record(2, "noise_position", 0.1, n=500)
    run = written_run(tmp_path / "run", [quick], rounds_done=2)
    content = json.dumps(evaluated(scores={NOISE_POSITION: (0.9, 0.03)}))
    (run / "evaluation-classifier-correct-sampler=ddpm.json").write_text(content)
    states = [check.state for check in found(Run(run), "noise")]
    assert states == [State.WARNING, State.CLEAR]
    (run / "evaluation-classifier-correct.json").write_text(content)
    first, second = evaluated_metrics(Run(run), NOISE_POSITION)
    assert first.of.startswith("pixels and spectra, n=")
    assert (first.of + ", drawn with sampler=ddpm") == second.of
    assert {check.state for check in found(Run(run), "noise")} == {State.WARNING}


def test_place_between_real_and_noise_names_the_numbers_that_it_is_of(tmp_path: Path) -> None:
    quick = [
        Record(2, "noise_position", 0.1, n=1000),
        Record(2, "noise_position", 0.03, real=True, n=179),
    ]
    history = Run(written_run(tmp_path / "run", quick, rounds_done=2))
    said = "other real images at 0.03 (n=1,000, 500 of them compared, 179 real ones)"
    assert said in found(history, "noise")[0].says
    assert found_metrics(history, NOISE_POSITION)[0].of == "pixels and spectra, n=500"


@pytest.mark.parametrize(
    ("recorded", "noise", "classes", "copies"),
    [
        ({}, State.UNMEASURED, State.UNMEASURED, State.UNMEASURED),
        (
            {"noise_position": 0.9, "class_agreement": 0.14},
            State.WARNING,
            State.WARNING,
            State.UNMEASURED,
        ),
        (
            {
                **{"noise_position": 0.2, "class_agreement": 0.6, "pixel_copied": 0.01},
                **{"pixel_p_value": 0.3, "num_held_out": 179},
            },
            State.CLEAR,
            State.CLEAR,
            State.CLEAR,
        ),
        # What a classifier finds in noise says nothing.
        (
            {"noise_position": 0.9, "class_agreement": 1.0},
            State.WARNING,
            State.UNMEASURED,
            State.UNMEASURED,
        ),
        (
            {
                **{"of_real": 0.1, "class_agreement": 0.5},
                **{"pixel_copied": 0.5, "pixel_p_value": 0.3, "num_held_out": 2},
            },
            State.UNMEASURED,
            State.UNMEASURED,
            State.UNMEASURED,
        ),
    ],
)
def test_nothing_is_called_clear_that_was_not_looked_at(
    tmp_path: Path, recorded: dict[str, float], noise: State, classes: State, copies: State
) -> None:
    values = recorded | {"chance_agreement": 0.1} if recorded else {}
    real = Record(2, "class_agreement", values.pop("of_real", 1.0), real=True)
    lines = [*losses(2, {0: 0.5}), *records_of(2, values, n=500), real]
    history = Run(written_run(tmp_path / "run", lines, rounds_done=2))
    for subject, state in (("noise", noise), ("other classes", classes), ("copies", copies)):
        assert [check.state for check in found(history, subject)] == [state]
    assert [check.state for check in found(history, "drift")] == [State.UNMEASURED]


def test_hospitals_scores_are_checked_one_by_one(tmp_path: Path) -> None:
    mean = {"noise_position": 0.8, "class_agreement": 1.0, "chance_agreement": 1.0}
    lines = [
        *losses(2, {0: 0.5, 1: 0.5}),
        *records_of(2, mean, reference=HELD_OUT, n=500),
        Record(2, "num_scoring_clients", 2, n=500),
    ]
    for client, p_value in ((0, 0.001), (1, 0.5)):
        told = {"pixel_copied": 0.1, "pixel_p_value": p_value}
        lines += records_of(2, told, client=client, reference=HELD_OUT, n=500)
        lines += [Record(2, "num_held_out", 200, client=client)]
    history = Run(written_run(tmp_path / "run", lines, rounds_done=2))
    copies = found(history, "copies")
    assert [check.state for check in copies] == [State.WARNING, State.CLEAR]
    assert "at client 0" in copies[0].says and "n=500, 200 held out" in copies[0].says
    assert [check.state for check in found(history, "noise")] == [State.WARNING]
    assert "2 hospitals" in found(history, "noise")[0].says
    # Of one class alone nothing is shown by finding it.
    assert [check.state for check in found(history, "other classes")] == [State.UNMEASURED]


def test_client_far_from_all_others_drifts_and_a_spread_of_clients_does_not() -> None:
    spread = {client: {1: 1 + 0.1 * client, 2: 1 + 0.1 * client} for client in range(6)}
    assert {far for far, _ in far_rounds(spread).values()} == {0}
    drifted = far_rounds({**spread, 5: {1: 9.0, 2: 9.0}})
    assert drifted[5] == (2, 2) and drifted[0] == (0, 2)
    alike = {client: {1: 1.0} for client in range(5)}
    assert far_rounds({**alike, 5: {1: 1.05}})[5] == (0, 1)
    assert far_rounds({client: alike[client] for client in range(3)})[0] == (0, 0)


@pytest.mark.parametrize(
    "words",
    [
        ["experiment=table1", "data=mnist", "model=tiny", "federation.keep_local_models=[0,1]"],
        [
            "data=image_folder",
            "data.classes=['it\\'s \"a\"','007','null','<x>']",
            "data.root='/a b'",
        ],
        [
            "partition.beta=inf",
            "seed=3",
            "train.lr=1e-5",
            "diffusion=paper",
        ],
        ["experiment=table5", "data.root=/x", "train.precision=bfloat16"],
    ],
)
def test_words_of_a_run_compose_its_configuration(words: list[str]) -> None:
    config = load_config([*words, "run_name=given"])
    repeated = training_words(config)
    wanted, found = flat_values(config), flat_values(load_config(repeated))
    assert {key for key in wanted if wanted[key] != found[key]} <= PLACES
    # Of own images it says as well what feddm-train would otherwise fit to them.
    fitted = 2 * (config.data.name in OWN_IMAGES)
    assert len(repeated) <= len(words) + 2 + fitted


def test_words_that_resume_a_run_name_its_folder_of_now(tmp_path: Path) -> None:
    run = written_run(tmp_path / "old", losses(1, {0: 0.5}), rounds_done=1)
    moved = run.rename(tmp_path / "it's new")
    history = Run(moved)
    command = shlex.split(resuming_command(history.config, moved))
    assert command[0] == "feddm-train"
    resumed = anchored(load_config(command[1:]), tmp_path)
    assert resumed.resume and run_path(resumed) == moved
    check_same_run(resumed, moved)
    words = {"output_dir": "/gone", "run_name": "old", "train.lr": 0.1}
    command = resubmitting_command(words, moved, connection="it's")
    toml = command.partition("<<'END'\n")[2].partition("\nEND\n")[0]
    assert tomllib.loads(toml) == {
        "train": {"lr": 0.1},
        "output_dir": str(tmp_path),
        "run_name": "it's new",
        "resume": True,
    }
    assert command.endswith("""\nflwr run . 'it'"'"'s' --run-config words.toml""")
    # A key of a file that was tampered with ends no line of what a reader may paste into a shell.
    hostile = {"a\nEND\ntouch owned\nb": "c\nEND\n"}
    lines = submitting_command(hostile).splitlines()
    assert lines[0].endswith("<<'END'") and lines[2] == "END" and len(lines) == 4
    assert tomllib.loads(lines[1]) == hostile


def test_test_images_that_were_trained_on_are_warned_of(tmp_path: Path) -> None:
    for name, number in (("none", 0), ("some", 21)):
        found = {"in_both": [number] + [0] * 9}
        files: dict[str, object] = {"data.json": {"duplicates": found}}
        run = written_run(tmp_path / name, losses(1, {0: 0.5}), rounds_done=2, files=files)
        (leak,) = [each for each in checks(Run(run)) if "trained on" in each.subject]
        assert leak.state is (State.WARNING if number else State.CLEAR)
        assert ("(0 21)" in leak.says) == (number > 0)


def test_run_ends_with_few_lines_of_what_it_found(tmp_path: Path) -> None:
    report = evaluation_of(evaluated())
    recorded = [
        *losses(1, {0: 0.5, 1: 0.7}),
        *losses(2, {0: 0.25, 1: 0.35}),
        *records_of(2, {"round_seconds": 100.0, "seconds_training": 75.0}),
        Record(2, "loss", 0.4, reference=TEST),
        *report.records.all,
        Record(2, "seconds_evaluating", 25.0),
    ]
    run = written_run(tmp_path / "run", recorded, rounds_done=2)
    text = "\n".join(lines := summary_lines(Run(run)))
    assert len(lines) <= 15
    for words in (
        "2 of 2",
        "0.3 (round 2)",
        "2:05",
        "25%",
        "2.5 (real images 2.5; classifier, correct, n=897)",
    ):
        assert words in text
    assert duration(3723) == "1:02:03"
    assert read_config(run / "config.yaml").run_name == "run"
