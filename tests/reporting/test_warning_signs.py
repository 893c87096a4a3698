import json
from pathlib import Path

import pytest

from task.reporting.audit_section import audit_section
from task.reporting.metric_table import Quantity
from task.reporting.report import report_page
from task.reporting.run_summary import (
    evaluated_metrics,
    found_metrics,
)
from task.reporting.warning_signs import (
    Check,
    State,
    checks,
    far_rounds,
    image_checks,
    warning_signs,
)
from task.runs.records import HELD_OUT, Record, records_of
from task.runs.run import Run
from tests.audit.test_records import attack, recorded
from tests.helpers import evaluated, losses, written_run

NOISE_POSITION = Quantity("noise_position")


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


def found(history: Run, subject: str) -> list[Check]:
    return [check for check in checks(history) if subject in check.subject]


def test_what_was_not_audited_is_not_called_clear(tmp_path: Path) -> None:
    subject = "can be told from others"
    for name, attacks, state, said in (
        ("none", None, State.UNMEASURED, "The run did not look for them."),
        ("few", [], State.UNMEASURED, "No attack is known for a diffusion model, or too few"),
        ("quiet", [attack(0.52)], State.CLEAR, "Attacks do not tell training images by the gl"),
        ("loud", [attack(0.9, 1e-9)], State.WARNING, "Attacks tell training images by the global"),
        ("client", [attack(0.9, 1e-9, client=2)], State.WARNING, "Attacks tell training images of"),
    ):
        audited = [] if attacks is None else recorded({2: attacks})
        run = Run(written_run(tmp_path / name, [*losses(1, {0: 0.5}), *audited], rounds_done=2))
        (check,) = found(run, subject)
        assert check.state == state and check.says.startswith(said)
        assert check.client == (2 if name == "client" else None)
    off = written_run(tmp_path / "off", losses(1, {0: 0.5}), rounds_done=2, audit__at_end=False)
    (check,) = found(Run(off), subject)
    assert check.says == "audit.at_end=false: look with feddm audit."


def test_page_says_after_which_round_members_can_be_told(tmp_path: Path) -> None:
    tested = [Record(number, "loss", value, reference="test") for number, value in TEST_LOSSES]
    told = recorded({1: [attack(0.5)], 2: [attack(0.7, 1e-6)], 3: [attack(0.9, 1e-9)]})
    run = Run(written_run(tmp_path / "run", [*tested, *told], rounds_done=3))
    section = audit_section(run)
    assert section["course"] == [
        "Audited were rounds 1 2 3. That training images can be told from held-out ones was "
        "detected first after round 2. That copies show in pixels was detected after none of them. "
        "The test loss was least after round 2, 0.3; after round 3 it is 0.4."
    ]
    assert section["rows"][0][:4] == ("all", "SimA", "0.900", "0.800 to 1.000")
    page = report_page(run)
    assert "What it remembers" in page and "How well attacks tell training images" in page


TEST_LOSSES = [(1, 0.5), (2, 0.3), (3, 0.4)]


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


def test_test_images_that_were_trained_on_are_warned_of(tmp_path: Path) -> None:
    for name, number in (("none", 0), ("some", 21)):
        found = {"in_both": [number] + [0] * 9}
        files: dict[str, object] = {"data.json": {"duplicates": found}}
        run = written_run(tmp_path / name, losses(1, {0: 0.5}), rounds_done=2, files=files)
        (leak,) = [each for each in checks(Run(run)) if "trained on" in each.subject]
        assert leak.state is (State.WARNING if number else State.CLEAR)
        assert ("(0 21)" in leak.says) == (number > 0)
