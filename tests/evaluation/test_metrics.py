"""A metric is one entry in one registry, and stands everywhere from there."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from server_app.hospital_scores import combined_records, describe_scores, expected_scores
from task.config import load_config
from task.data import Dataset
from task.evaluation.comparison import Comparison
from task.evaluation.hospital_scores import score_images
from task.evaluation.metrics import METRICS, Metric, Score, Use
from task.reporting.metric_table import Quantity, quantities
from task.reporting.model_card import write_model_card
from task.reporting.report import write_report
from task.runs.records import HELD_OUT, Records
from task.runs.run import load_run
from tests.cli.test_cli import FILE, feddm, finished_run
from tests.helpers import digits_dataset

CPU = torch.device("cpu")


def brightness(comparison: Comparison) -> Iterator[Score]:
    for images, real in ((comparison.generated, False), (comparison.real.train, True)):
        yield Score(images.images.double().mean().item() / 255, n=len(images), real=real)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Metric:
    metric = Metric(
        "mean_brightness",
        "mean brightness",
        better=0.25,
        bounds=(0.0, 1.0),
        compute=brightness,
        uses=frozenset(Use),
        caption="mean brightness: of all pixels, 0 as black, 1 as white",
    )
    monkeypatch.setitem(METRICS, metric.name, metric)
    return metric


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("task.evaluation.metrics.KID_SUBSETS", 2)
    monkeypatch.setattr("task.evaluation.classifier.MAX_STEPS", 5)


def test_metric_of_one_entry_is_found_on_every_page(toy: Metric, tmp_path: Path) -> None:
    heading = "mean brightness ≈ 0.25"
    runs = []
    for beta in (1, 2):
        (folder := tmp_path / f"beta-{beta}").mkdir()
        words = ("data=digits", "data.test_fraction=0.1", f"partition.beta={beta}")
        run = finished_run(folder, *words, f"data.cache_dir={tmp_path / 'cache'}")
        (run / "metrics.jsonl").touch()
        result = feddm("evaluate", run, "--num-per-class", 2)
        assert result.exit_code == 0, result.output
        runs.append(run)
    assert f"\n{heading} " in result.stdout and f"- {toy.caption}\n" in result.stdout
    records = [
        r for r in json.loads((run / FILE).read_text())["records"] if r["metric"] == toy.name
    ]
    assert [each.get("real", False) for each in records] == [False, True]
    assert all(0 < each["value"] < 1 for each in records)
    report = write_report(run, file=tmp_path / "report.html").read_text()
    assert f">{heading}</th>" in report and toy.caption in report
    result = feddm("tables", tmp_path, "--no-figures")
    assert result.exit_code == 0, result.output
    assert f"digits {heading} |" in result.stdout
    write_model_card(
        load_run(run),
        tmp_path,
        usage="",
        library="onnx",
        exported={"by": "", "format": "", "round": 3, "client": None, "weights_sha256": ""},
    )
    card = (tmp_path / "README.md").read_text()
    assert f"| {heading} |" in card and toy.caption in card


def test_metric_of_one_entry_is_asked_of_hospitals(toy: Metric, tmp_path: Path) -> None:
    words = ["data=digits", "data.image_size=8", "eval.extractor=classifier"]
    config = load_config([*words, f"data.cache_dir={tmp_path}"])
    digits = digits_dataset(image_size=8, test_fraction=0.1)
    own = Dataset(digits.train.subset(torch.arange(200)), digits.test)
    scores = score_images(config, digits.train.subset(torch.arange(300, 500)), own, device=CPU)
    assert {"mean-brightness", "floor-mean-brightness"} <= scores.keys()
    bounds = expected_scores(scores)
    assert bounds["mean-brightness"] == (0, 1) and bounds.keys() < scores.keys()
    records = Records(tuple(combined_records(2, [scores], config, n=200)))
    assert records.value(toy.name, reference=HELD_OUT) == scores["mean-brightness"]
    assert "mean brightness 0." in describe_scores(records, 1, config)


def test_headings_tell_the_reference_and_what_is_better() -> None:
    headings = {each.heading for each in quantities(Use.TABLES)}
    assert {"IS ↑", "FD (train) ↓", "FD (test) ↓", "FD ↓"} <= headings
    assert Quantity("density").heading == "density ≈ 1"
    assert Quantity("chance_agreement").heading == "found in the class asked for by chance"


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_entries_are_whole(metric: Metric) -> None:
    least, most = metric.bounds
    assert least < most and metric.title and not metric.caption.endswith(".")
    assert metric.better in ("higher", "lower", None) or least <= float(metric.better) <= most
    assert Use.EVALUATION in metric.uses
    # Keys of messages are distinct, and those of real images none of generated ones.
    others = [each for each in METRICS.values() if each is not metric]
    assert not any(key in other.keys for other in others for key in metric.keys)
