import json
from pathlib import Path

import pytest

from task.runs.records import HELD_OUT, TEST, TRAIN, Record, Records, read_records

RUNS = Path(__file__).parent


def test_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = [
        Record(1, "loss", 0.5, client=0, reference=TRAIN, n=100),
        Record(1, "kid", 0.1, reference=TEST, real=True, std=0.0, n=897, context={"seed": 0}),
        Record(2, "fid", 0.0, client=3, local_model=True, reference=HELD_OUT),
    ]
    file = tmp_path / "metrics.jsonl"
    # The end of a process may cut the last line off.
    file.write_text("".join(map(Record.line, written)) + '{"round": 2, "met')
    assert list(read_records(file).all) == written
    assert read_records(tmp_path / "none.jsonl").all == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_record_of_no_number_is_refused_with_its_subject(value: float) -> None:
    with pytest.raises(ValueError, match="round 2: loss of client 3 must be finite, got"):
        Record(2, "loss", value, client=3)


def test_records_are_found_by_what_tells_them_apart() -> None:
    records = Records(
        (
            Record(1, "fid", 5.0, reference=TRAIN),
            Record(2, "fid", 4.0, reference=TRAIN),
            Record(2, "fid", 3.0, reference=TRAIN),  # measured once more
            Record(2, "fid", 1.0, reference=TRAIN, real=True),
            Record(2, "fid", 9.0, client=3, reference=HELD_OUT),
            Record(2, "left_out", 1, client=1, context={"activity": "train", "reason": "a"}),
        )
    )
    assert records.series("fid", reference=TRAIN) == {1: 5.0, 2: 3.0}
    assert records.value("fid", reference=TRAIN, real=True) == 1.0
    assert records.last("fid") is None and records.value("fid", reference=TEST) is None
    assert records.of_clients("fid", reference=HELD_OUT) == {3: {2: 9.0}}
    assert records.clients == [1, 3] and len(records.left_out) == 1
    assert records.up_to(1).series("fid", reference=TRAIN) == {1: 5.0}


def test_lines_of_the_first_schema_become_records() -> None:
    records = read_records(RUNS / "0.1.0-federated" / "metrics.jsonl")
    old = [json.loads(line) for line in (RUNS / "0.1.0-federated" / "metrics.jsonl").open()]
    values = {(each["round"], each["who"], each["name"]): each["value"] for each in old}
    loss = records.by_round("loss", reference=TRAIN, client=0)[2]
    assert loss.value == values[2, "client-0", "train_loss"]
    assert loss.n == values[2, "client-0", "train_num_examples"]
    kid = records.last("kid", reference=TEST, real=True)
    assert kid is not None and kid.n == values[2, "global", "n_scored"]
    assert kid.value == values[2, "global", "floor_kid_test"]
    assert kid.std == values[2, "global", "floor_kid_test_std"]
    norms = records.of_clients("update_norm")
    assert norms[1][1] == values[1, "client-1", "train_update_norm"]
    # A name of the old lines that no rule takes apart would show as one that holds a field.
    assert not [each for each in records.all if each.metric.startswith(("floor", "train", "test"))]


def test_scores_of_hospitals_of_the_first_schema_become_records(tmp_path: Path) -> None:
    lines = [
        ("client-0", "quality_num_examples", 40),
        ("client-0", "quality_floor_fid", 2.5),
        ("client-1", "quality_left_out", "no reply"),
        ("global", "quality_held_out_accuracy", 0.9),
        ("global", "quality_num_hospitals", 4),
        ("global", "quality_num_class_hospitals", 3),
        ("global", "quality_scored", "500 images, extractor classifier, image range paper, seed 7"),
    ]
    file = tmp_path / "metrics.jsonl"
    with file.open("w") as out:
        for who, name, value in lines:
            out.write(json.dumps({"round": 5, "who": who, "name": name, "value": value}) + "\n")
    scored = {"extractor": "classifier", "image_range": "paper", "seed": 7}
    left_out = {"activity": "scores", "reason": "no reply"}
    assert list(read_records(file).all) == [
        Record(5, "num_held_out", 40, client=0),
        Record(
            *(5, "fid", 2.5),
            client=0,
            reference=HELD_OUT,
            real=True,
            n=500,
            context=scored,
        ),
        Record(5, "left_out", 1, client=1, context=left_out),
        Record(
            *(5, "class_agreement", 0.9),
            reference=HELD_OUT,
            real=True,
            n=500,
            context={"num_clients": 3, **scored},
        ),
        Record(5, "num_scoring_clients", 4, n=500, context=scored),
    ]
