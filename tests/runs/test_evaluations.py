import json
from pathlib import Path
from typing import Any

import pytest

from task.evaluation.metrics import METRICS
from task.runs.evaluations import evaluation_of, read_evaluations
from task.runs.records import TEST, TRAIN
from tests.helpers import evaluated


@pytest.mark.parametrize(
    "content", [[], {"round": 3}, {**evaluated(), "records": []}, {**evaluated(), "round": "x"}]
)
def test_what_is_no_evaluation_is_refused_with_the_file(content: Any) -> None:
    with pytest.raises(ValueError, match=r"^file\.json is not what a run writes"):
        evaluation_of(content, Path("file.json"))


def test_evaluation_of_the_first_schema_is_read() -> None:
    run = Path(__file__).parent / "0.1.0-federated"
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
