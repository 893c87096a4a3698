import csv
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from scipy.stats import ttest_ind_from_stats
from typer.testing import CliRunner

from task.cli.main import app
from task.cli.tables import csv_text
from task.config import load_config, write_config
from task.reporting.figures import Picture
from task.reporting.metric_table import Quantity
from task.reporting.published import PUBLISHED
from task.reporting.rendering import render
from task.reporting.tables import (
    KINDS,
    Cell,
    Table,
    best_verdict,
    build_tables,
    measurements,
    row_label,
    verdict,
)
from task.runs.checkpoint import save_weights
from task.runs.records import DIVERGENCE, TRAIN, Record
from task.runs.run import find_runs

SMALL = (
    *("data=digits", "model.width=8", "model.num_poolings=1", "federation.rounds=3"),
    "eval.extractor=classifier",
)
FULL = ("experiment=table1", "eval.extractor=inception", "eval.image_range=paper")
INCEPTION_SCORE, FID = Quantity("inception_score"), Quantity("fid", TRAIN)
FULL_COUNTS = {"n_generated": 10_000, "n_train": 50_000, "n_test": 10_000, "n_floor": 10_000}
FULL_COUNTS["n_scored"] = FULL_COUNTS["n_floor"]


class Sweep:
    """A folder of runs that were never trained."""

    def __init__(self, folder: Path, small: tuple[str, ...] = SMALL) -> None:
        self.folder, self.small = folder, small

    def add(self, name: str, *words: str, evaluated: bool = True, **found: Any) -> Path:
        small = () if "experiment=table1" in words else self.small
        config = load_config([*small, *words])
        run = self.folder / name
        run.mkdir(parents=True)
        write_config(config, run / "config.yaml")
        save_weights(run / "model.safetensors", {"weight": torch.zeros(1)}, {"round": "3"})
        if evaluated:
            self.evaluate(
                run,
                extractor=config.eval.extractor,
                image_range=config.eval.image_range,
                round=config.federation.rounds,
                **found,
            )
        return run

    def evaluate(self, run: Path, **found: Any) -> None:
        whole = {
            **{"data": "digits", "extractor": "classifier", "extractor_sha256": "0123456789abcdef"},
            **{"image_range": "correct", "real_flipped": False, "kid_subset_size": 100, "seed": 0},
            **{"n_generated": 200, "n_train": 1618, "n_test": 179, "n_floor": 179, "round": 3},
            "n_scored": 179,
            **{"inception_score": 3.0, "inception_score_std": 0.1, "fid_train": 20.0},
            **{"fid_test": 21.0, "precision": 0.5, "floor_inception_score": 9.0},
            **{"floor_inception_score_std": 0.2, "floor_fid_train": 1.5, "floor_fid_test": 0.75},
            **found,
        }
        name = f"evaluation-{whole['extractor']}-{whole['image_range']}.json"
        (run / name).write_text(json.dumps(whole))

    def tables(self) -> list[Table]:
        return build_tables(measurements(find_runs(self.folder))[0])

    def csv(self) -> list[dict[str, str]]:
        with (self.folder / "tables.csv").open(encoding="utf-8") as file:
            return [*csv.DictReader(file)]


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path / "sweep")


def feddm_tables(folder: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["tables", str(folder), *(options or ["--no-figures"])])


def measured(tables: list[Table]) -> list[Table]:
    return [table for table in tables if table.members]


def titles(tables: list[Table]) -> list[str]:
    return [table.title.split(":")[0] for table in measured(tables)]


def cells(table: Table, column: int, metric: Quantity) -> dict[str, str]:
    rows = table.columns[column].rows
    return {label: str(rows[label][metric]) for label in table.rows if metric in rows[label]}


def test_a_small_table_is_laid_out_as_the_papers(sweep: Sweep) -> None:
    sweep.add("c", "train.mode=centralized", fid_train=10.0, fid_test=11.0)
    sweep.add("f", inception_score=2.5)
    result = feddm_tables(sweep.folder)
    assert result.exit_code == 0, result.output
    text = (sweep.folder / "tables.md").read_text(encoding="utf-8")
    assert result.stdout.startswith(text)
    assert text.split("## ")[1] == (
        """\
Table I: centralized and federated

- R=3, E=5, N=10, beta=0.5, clients per round=10, batch=32, lr=0.001, width=8, poolings=1, \
bottom blocks=2, prediction=v_prediction, T=300, sampler=ddim.
- Centralized: R x E epochs on the pooled images, without N clients.
- digits: 16x16, 200 generated, 1,618 training and 179 test images; scores of 179 \
generated and floor of 179 real ones; 13,249 parameters; extractor classifier 0123456789ab.
- Image range correct; FD depends on n: compare equal n only.
- FD is not FID: the scores of the literature look through Inception.
- ±: the sample standard deviation over the seeds, where a cell says how many; of a single seed \
and of real images that of the inception score over its 10 splits.

|  | digits IS ↑ | digits FD (train) ↓ | digits FD (test) ↓ |
| --- | ---: | ---: | ---: |
| Centralized | 3.00 ± 0.10 | 10.00 | 11.00 |
| FedAvg | 2.50 ± 0.10 | 20.00 | 21.00 |
| real images (floor, n=179) | 9.00 ± 0.20 | 1.50 | 0.7500 |

- Centralized better than FedAvg, digits, IS: not shown (difference 0.5; a single \
seed, so that no interval is known)
- Centralized better than FedAvg, digits, FD (train): not shown (difference 10; a single seed, \
so that no interval is known)
- Centralized better than FedAvg, digits, FD (test): not shown (difference 10; a single seed, \
so that no interval is known)

"""
    )


def test_each_key_makes_its_table_with_rows_in_the_papers_order(sweep: Sweep) -> None:
    for value in ("5", "0.1", "0.5", "inf"):
        sweep.add(f"a{value}", f"partition.beta={value}")
    for value in (50, 30):
        sweep.add(
            f"b{value}",
            f"federation.num_supernodes={value}",
            "federation.clients_per_round=10",
        )
    for value in (10, 1):
        sweep.add(f"c{value}", f"train.local_epochs={value}")
    sweep.add("d", "train.mode=centralized")
    found = measured(sweep.tables())
    tables = dict(zip(titles(found), found, strict=True))
    assert [*tables["Table II"].rows[:-1]] == ["beta=0.1", "beta=0.5", "beta=5", "beta=inf"]
    # All of 10 clients are 10 clients per round.
    assert [*tables["Table III"].rows[:-1]] == ["N=10", "N=30", "N=50"]
    assert [*tables["Table IV"].rows[:-1]] == ["E=1", "E=5", "E=10"]
    # Of the federated runs that it fits, the paper's cell is the baseline's neighbor.
    assert [*tables["Table I"].rows[:-1]] == ["Centralized", "FedAvg"]
    assert "N=10, beta=0.5," in tables["Table I"].caption[0]


def test_baseline_without_the_papers_federation_goes_with_all_of_its_length(
    sweep: Sweep,
) -> None:
    sweep.add("a", "partition.beta=5")
    sweep.add("b", "partition.beta=0.1")
    sweep.add("c", "partition.beta=0.1", "train.local_epochs=2")
    sweep.add("d", "train.mode=centralized")
    found = [t for t in measured(sweep.tables()) if t.title.startswith("Table I ")]
    assert [*titles(found)] == ["Table I (1 of 2)", "Table I (2 of 2)"]
    assert all([*table.rows[:-1]] == ["Centralized", "FedAvg"] for table in found)


def test_all_of_ten_clients_goes_with_all_of_thirty_and_with_ten_of_thirty(sweep: Sweep) -> None:
    sweep.add("a", "federation.num_supernodes=10")
    sweep.add("b", "federation.num_supernodes=30", "federation.clients_per_round=10")
    sweep.add("c", "federation.num_supernodes=30")
    tables = measured(sweep.tables())
    assert titles(tables) == ["Table III (1 of 2)", "Table III (2 of 2)"]
    assert {words for table in tables for words in ("=10,", "=all,") if words in table.caption[0]}
    assert all("clients per round=" in table.caption[0] for table in tables)


def test_files_make_table_v_and_any_data_the_others(sweep: Sweep) -> None:
    files = ("data=chest_xray",)
    sweep.add("c", *files, "train.mode=centralized")
    sweep.add("f", *files)
    sweep.add("g", *files, "partition.beta=5")
    assert titles(sweep.tables()) == ["Table II", "Table V"]


def test_a_measure_that_nobody_has_is_left_out_and_one_that_some_lack_is_a_dash(
    sweep: Sweep,
) -> None:
    sweep.add("a", "partition.beta=5")
    run = sweep.add("b", "partition.beta=1", evaluated=False)
    sweep.evaluate(run)
    for file in sweep.folder.rglob("evaluation-*.json"):
        found = json.loads(file.read_text())
        found.pop("fid_test")
        if file.parent.name == "b":
            found.pop("inception_score")
        file.write_text(json.dumps(found))
    (table,) = measured(sweep.tables())
    assert table.metrics == [INCEPTION_SCORE, FID]
    assert "| beta=1 | - | 20.00 |" in as_markdown(table)


def test_seeds_are_averaged_with_their_sample_deviation_and_number(sweep: Sweep) -> None:
    for seed, fid in enumerate((10.0, 12.0, 14.0)):
        sweep.add(f"a{seed}", f"seed={seed}", fid_train=fid)
    sweep.add("b", "partition.beta=5", fid_train=8.0)
    (table,) = measured(sweep.tables())
    assert cells(table, 0, FID)["beta=0.5"] == "12.00 ± 2.00 (3 seeds)"
    assert cells(table, 0, FID)["beta=5"] == "8.00"
    assert cells(table, 0, INCEPTION_SCORE)["beta=5"] == "3.00 ± 0.10"
    assert "sample standard deviation over the seeds" in table.caption[-1]


def test_equal_runs_of_one_seed_are_no_seeds(sweep: Sweep) -> None:
    sweep.add("a", "train.mode=centralized", "partition.beta=1")
    sweep.add("b", "train.mode=centralized", "partition.beta=2", "train.num_threads=2")
    sweep.add("c")
    (table,) = measured(sweep.tables())
    assert cells(table, 0, FID)["Centralized"] == "20.00"
    assert f"{sweep.folder / 'b'} (of {sweep.folder / 'a'})" in feddm_tables(sweep.folder).stdout


@pytest.mark.parametrize("word", ["train.lr=0.1", "model.dropout=0.2", "diffusion.eta=0.5"])
def test_other_settings_make_another_table_that_says_so(sweep: Sweep, word: str) -> None:
    for beta in (1, 5):
        sweep.add(f"a{beta}", f"partition.beta={beta}")
        sweep.add(f"b{beta}", f"partition.beta={beta}", word)
    tables = measured(sweep.tables())
    assert titles(tables) == ["Table II (1 of 2)", "Table II (2 of 2)"]
    assert word.removeprefix("train.") in tables[1].caption[0]


@pytest.mark.parametrize("found", [{"image_range": "paper"}, {"extractor": "inception"}])
def test_ranges_and_extractors_are_never_in_one_table(sweep: Sweep, found: dict[str, str]) -> None:
    for beta in (1, 5):
        sweep.evaluate(sweep.add(f"{beta}", f"partition.beta={beta}"), **found, fid_train=99.0)
    tables = measured(sweep.tables())
    assert titles(tables) == ["Table II (1 of 2)", "Table II (2 of 2)"]
    for table, fid in zip(tables, ("20.00", "99.00"), strict=True):
        values = cells(table, 0, FID)
        assert {values["beta=1"], values["beta=5"]} == {fid}
        assert len(table.columns) == 1


@pytest.mark.parametrize(
    "found", [{"n_generated": 500}, {"extractor_sha256": "ff"}, {"n_train": 9}, {"seed": 7}]
)
def test_unlike_measurements_are_never_in_one_column(sweep: Sweep, found: dict[str, Any]) -> None:
    sweep.add("a", "partition.beta=1")
    sweep.add("b", "partition.beta=2", fid_train=30.0)
    sweep.add("c", "partition.beta=5", **found)
    (table,) = measured(sweep.tables())
    assert len(table.columns) == 1  # alone in its column, it is compared with nothing
    assert "beta=5" not in table.rows
    sweep.add("d", "partition.beta=7", **found)
    (table,) = measured(sweep.tables())
    assert len(table.columns) == 2
    assert not {"beta=1", "beta=2"} & {
        row for row, scores in table.columns[1].rows.items() if scores
    }
    (name, value), *_ = found.items()
    assert f"{name}={value}" in table.columns[1].label
    for name in ("b", "d"):
        (sweep.folder / name / "config.yaml").unlink()
    assert measured(sweep.tables()) == []


def test_data_sets_are_columns(sweep: Sweep) -> None:
    for data in ("mnist", "svhn"):
        for beta in (1, 5):
            sweep.add(f"{data}{beta}", f"data={data}", f"partition.beta={beta}")
    (table,) = measured(sweep.tables())
    assert [column.label for column in table.columns] == ["mnist", "svhn"]
    verdicts = " ".join(table.verdicts)
    assert "in the paper it" not in verdicts  # which has beta=0.1
    sweep.add("svhn0.1", "data=svhn", "partition.beta=0.1")
    (table,) = measured(sweep.tables())
    assert " ".join(table.verdicts).count("in the paper it") == 3  # of svhn


def test_published_values_are_the_papers() -> None:
    assert PUBLISHED["I"]["federated"]["cifar10"] == (3.69, 0.08, 21.42, 22.67)
    assert PUBLISHED["II"][0.1]["svhn"] == (3.14, 0.05, 20.15, 22.93)
    assert PUBLISHED["III"][50]["fashion_mnist"] == (4.21, 0.07, 35.61, 36.46)
    assert PUBLISHED["IV"][10]["svhn"] == (3.10, 0.04, 11.73, 17.31)
    assert PUBLISHED["V"]["federated"]["sars_cov_2_ct"] == (1.60, 0.03, 134.98, None)
    assert [row_label(kind, value) for kind in KINDS for value in PUBLISHED[kind.number]] == [
        *("Centralized", "FedAvg", "beta=0.1", "beta=0.5", "beta=5", "N=10", "N=30", "N=50"),
        *("E=1", "E=5", "E=10", "Centralized", "FedAvg"),
    ]


@pytest.mark.parametrize("diffusion", ["released", "paper"])
def test_published_values_stand_beside_measured_ones_of_the_papers_scale(
    sweep: Sweep, diffusion: str
) -> None:
    for name, beta in (("a", 0.1), ("b", 5)):
        words = (f"partition.beta={beta}", f"diffusion={diffusion}")
        sweep.add(name, *FULL, *words, **FULL_COUNTS)
    (table,) = sweep.tables()
    assert [column.label for column in table.columns] == ["cifar10", "cifar10 (paper)"]
    assert cells_of(table, "cifar10 (paper)", "beta=0.1") == ["3.65 ± 0.11", "25.40", "26.74"]
    assert "| beta=5 | 3.00 ± 0.10 | 20.00 | 21.00 | 3.66 ± 0.10 | 20.57 | 21.91 |" in as_markdown(
        table
    )


def as_markdown(table: Table) -> str:
    return render("tables.md", title="", tables=[table], left_out={}, pictures=[])


def cells_of(table: Table, label: str, row: str) -> list[str]:
    (column,) = [column for column in table.columns if column.label == label]
    return [str(column.rows[row][metric]) for metric in table.metrics]


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("federation.rounds=299",), {}),
        (("train.lr=1e-4",), {}),
        (("model.width=32",), {}),
        (("model.dropout=0.5",), {}),
        (("diffusion=fast",), {}),
        (("federation.ema_decay=0.999",), {}),
        (("federation.wire_dtype=float16",), {}),
        (("data.horizontal_flip=false",), {}),
        (("train.local_epochs=1",), {}),
        (("eval.image_range=correct",), {}),
        (("eval.extractor=classifier",), {}),
        (("data=mnist",), {}),
        ((), {"n_generated": 1_000}),
        ((), {"n_train": 40_000}),
    ],
)
def test_published_values_stand_apart_at_any_other_scale(
    sweep: Sweep, words: tuple[str, ...], found: dict[str, int]
) -> None:
    for beta in ("0.1", "5"):
        sweep.add(beta, *FULL, f"partition.beta={beta}", *words, **{**FULL_COUNTS, **found})
    table, published = sweep.tables()
    assert len(table.columns) == 1
    assert published.title.startswith("Published values of Table II")
    assert "not comparable with the measured figures" in published.caption[0]
    assert [column.label.split()[0] for column in published.columns] == [
        *("cifar10", "fashion_mnist", "svhn"),
    ]


def test_table_v_is_at_full_scale_with_the_papers_split(sweep: Sweep) -> None:
    words = (*FULL, "data=sars_cov_2_ct", "train.batch_size=128")
    counts = {"n_generated": 2481, "n_train": 2481, "n_test": 0, "n_floor": 0}
    sweep.add("a", *words, "train.mode=centralized", **counts)
    sweep.add("b", *words, "partition=table5", **counts)
    (table,) = sweep.tables()
    assert table.title.startswith("Table V")
    assert table.columns[1].label == "sars_cov_2_ct (paper)"


@pytest.mark.parametrize(
    ("means", "std", "seeds", "metric", "expected"),
    [
        ((30.0, 20.0, 10.0), 1.0, 3, FID, "shown (difference 10, 95% interval 7.7"),
        ((21.0, 20.0, 10.0), 1.0, 3, FID, "not shown (difference 1, 95% interval -1.2"),
        # Further apart than the two deviations together, which is not enough with three seeds.
        ((22.0, 20.0, 10.0), 1.0, 3, FID, "not shown (difference 2, 95% interval -0.26"),
        ((19.5, 20.0, 10.0), 1.0, 3, FID, "not shown (difference -0.5"),
        ((10.0, 20.0, 30.0), 1.0, 3, FID, "the opposite is shown (difference -20"),
        ((30.0, 20.0, 10.0), None, 1, FID, "not shown (difference 10; a single seed"),
        ((2.0, 3.0, 4.0), 0.1, 2, INCEPTION_SCORE, "shown (difference 1, 95% interval 0.5"),
        ((4.0, 3.0, 2.0), None, 1, INCEPTION_SCORE, "not shown (difference -2; a single seed"),
    ],
)
def test_verdicts_rest_on_the_interval_of_the_difference(
    means: tuple[float, ...], std: float | None, seeds: int, metric: Quantity, expected: str
) -> None:
    scores = [Cell(mean, std, seeds) for mean in means]
    assert verdict(scores, 0, metric).startswith(expected)
    assert verdict(scores[::-1], -1, metric).startswith(expected)


def test_p_value_of_a_verdict_is_that_of_welchs_test() -> None:
    worse, better = Cell(9.0, 2.5, 3), Cell(5.0, 0.5, 4)
    expected = ttest_ind_from_stats(9.0, 2.5, 3, 5.0, 0.5, 4, equal_var=False).pvalue
    assert f"p={expected:.2g})" in verdict([worse, better], 0, FID)
    for metric, best in ((FID, 1), (INCEPTION_SCORE, 0)):
        same = verdict([worse, better], 1 - best, metric)
        assert best_verdict([worse, better], best, metric) == same


def test_floor_of_another_number_of_images_is_left_out(sweep: Sweep) -> None:
    sweep.add("c", "train.mode=centralized", n_scored=200)
    sweep.add("f", n_scored=200)
    (table,) = measured(sweep.tables())
    assert not any("real images" in row for row in table.rows)
    assert any("cannot be compared and is left out" in line for line in table.caption)


def test_the_csv_has_a_line_per_run_and_evaluation(sweep: Sweep) -> None:
    run = sweep.add("a", "partition.beta=1", "seed=4")
    sweep.evaluate(run, image_range="paper", seed=2)
    costs = [Record(r, "seconds_training", 1.5) for r in (1, 2, 3)]
    costs.append(Record(1, "weight_bytes", 1e6))
    (run / "metrics.jsonl").write_text("".join(each.line() for each in costs))
    sweep.add("sub/b", "partition.beta=5", "seed=4")
    sweep.add("c", "federation.rounds=7")
    sweep.add("d", evaluated=False)
    assert feddm_tables(sweep.folder).exit_code == 0
    lines = {(line["run"], line["image_range"]): line for line in sweep.csv()}
    assert [*lines] == [
        *(("a", "correct"), ("a", "paper"), ("c", "correct"), ("d", ""), ("sub/b", "correct")),
    ]
    first = lines["a", "correct"]
    assert (first["tables"], first["seed"], first["eval.seed"]) == ("II", "4", "0")
    assert (first["partition.beta"], first["fid_train"], first["precision"]) == (
        "1.0",
        "20.0",
        "0.5",
    )
    assert lines["a", "paper"]["eval.seed"] == "2"
    # The bytes of two of its rounds are not known.
    assert (first["seconds_training"], first["megabytes_sent"]) == ("4.5", "")
    assert [lines[key]["tables"] for key in (("a", "paper"), ("c", "correct"), ("d", ""))] == [
        *("", "", ""),
    ]


def test_csv_holds_no_formula() -> None:
    texts = ["=1+1", "+1", "-1+1", "@SUM(A1)", "\t=1"]
    rows = [{"run": text, "loss": -0.5} for text in texts]
    for text, line in zip(texts, csv.DictReader(csv_text(rows).splitlines()), strict=True):
        assert line == {"run": f"'{text}", "loss": "-0.5"}


def test_what_is_in_no_table_is_named(sweep: Sweep) -> None:
    sweep.add("a", "partition.beta=1")
    sweep.add("b", "partition.beta=5")
    sweep.add("other", "federation.rounds=7")
    sweep.add("unmeasured", evaluated=False)
    sweep.evaluate(sweep.add("stale", "partition.beta=9", evaluated=False), round=2)
    (sweep.add("unfinished") / "model.safetensors").unlink()
    diverged = sweep.add("lost")
    (diverged / "model.safetensors").unlink()
    record = Record(2, DIVERGENCE, 1, context={"reason": "kl is inf"})
    (diverged / "metrics.jsonl").write_text(record.line())
    output = feddm_tables(sweep.folder).stdout.split("## In no table")[1].replace("\\", "")
    for reason, run in (
        ("finished, not measured", "unmeasured"),
        ("measured before the last round", "stale"),
        ("unfinished (feddm", "unfinished"),
        ("diverged", "lost (in round 2)"),
        ("with no other run to compare with", "other"),
    ):
        assert f"- {sweep.folder / run}" in output.split(reason)[1].split(":\n\n")[1]


class Tags(HTMLParser):
    """Lists the tags of a page and what they carry."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_html_page_stands_alone_and_says_what_heads_what(sweep: Sweep) -> None:
    sweep.add("a", "partition.beta=1")
    sweep.add("b", "partition.beta=5")
    assert feddm_tables(sweep.folder).exit_code == 0
    page = (sweep.folder / "tables.html").read_text(encoding="utf-8")
    tags = Tags(page).found
    assert not {"script", "link", "img"} & {tag for tag, _ in tags}
    assert "http" not in page
    scopes = [attributes["scope"] for tag, attributes in tags if tag == "th"]
    assert {scope: scopes.count(scope) for scope in scopes} == {
        **{"colgroup": 4, "col": 12, "row": 6},
    }
    named = [attributes["aria-label"] for tag, attributes in tags if tag == "table"]
    assert [str(name).split(":")[0] for name in named] == [
        "Table II",
        "Published values of Table II",
    ]


def test_text_of_others_is_shown_and_not_obeyed() -> None:
    words = '<b>"x"</b>|*y*'
    table = Table(title=words, rows=[words], metrics=[], columns=[], caption=[words])
    page = {"title": words, "tables": [table], "left_out": {words: [words]}}
    pictures = [Picture(Path('a b"<.png'), words, words)]
    html, markdown = (
        render(template, **page, pictures=pictures) for template in ("tables.html.md", "tables.md")
    )
    tags = Tags(html).found
    assert "b" not in {tag for tag, _ in tags}
    (image,) = [attributes for tag, attributes in tags if tag == "img"]
    assert image == {"src": "a%20b%22%3C.png", "alt": words}
    assert "\\<b\\>" in markdown
    assert '| \\<b\\>"x"\\</b\\>\\|\\*y\\* |' in markdown
    assert "](a%20b%22%3C.png)" in markdown


def assert_fails_in_one_line(result: Result, *expected: str) -> None:
    assert result.exit_code == 1
    assert result.stderr.startswith("feddm: SWEEP_DIR: ")
    assert result.stderr.count("\n") == 1
    for words in expected:
        assert words in result.stderr


def test_a_folder_without_measured_runs_is_an_error_of_one_line(sweep: Sweep) -> None:
    assert_fails_in_one_line(feddm_tables(sweep.folder), f"there is no folder {sweep.folder}")
    run = sweep.add("a", evaluated=False)
    assert_fails_in_one_line(
        feddm_tables(sweep.folder), "feddm evaluate RUN", "eval.final_metrics=true", str(run)
    )
    sweep.evaluate(run, round=2)
    assert_fails_in_one_line(feddm_tables(sweep.folder), f"last round (feddm evaluate RUN): {run}")
    (run / "model.safetensors").unlink()
    assert_fails_in_one_line(feddm_tables(sweep.folder), f"no finished run in {sweep.folder} (unf")
    assert [*sweep.folder.glob("tables.*")] == []


def test_runs_that_cannot_be_read_are_named_and_left_out(sweep: Sweep) -> None:
    for beta in (1, 2):
        sweep.add(f"beta-{beta}", f"partition.beta={beta}")
    broken = [sweep.add(name, "partition.beta=3") for name in "abcd"]
    (broken[0] / "config.yaml").write_text("seed: [")
    (broken[1] / "evaluation-classifier-correct.json").write_text("[]")
    (broken[2] / "evaluation-classifier-correct.json").write_text('{"round": 3')
    (broken[3] / "evaluation-classifier-correct.json").write_text('{"round": 3}')
    result = feddm_tables(sweep.folder)
    assert result.exit_code == 0, result.output
    assert len({row["run"] for row in sweep.csv() if row["tables"]}) == 2
    page = (sweep.folder / "tables.md").read_text(encoding="utf-8")
    for run in broken:
        assert f"{run} (" in page and f"{run} (" in result.stdout


def test_runs_that_make_no_table_are_listed_and_written_as_csv(sweep: Sweep) -> None:
    sweep.add("a", "federation.rounds=2")
    sweep.add("b", "federation.rounds=4")
    result = feddm_tables(sweep.folder)
    assert_fails_in_one_line(result, "there is no table", str(sweep.folder / "tables.csv"))
    assert str(sweep.folder / "a") in result.stdout
    assert [line["run"] for line in sweep.csv()] == ["a", "b"]
    assert [file.name for file in sweep.folder.glob("tables.*")] == ["tables.csv"]


def test_figures_stand_below_the_tables(sweep: Sweep) -> None:
    for beta in (0.1, 5):
        run = sweep.add(f"beta-{beta}", f"partition.beta={beta}")
        (run / "partition.json").write_text(json.dumps({"train_counts": [[3] * 10] * 10}))
    result = feddm_tables(sweep.folder, "--figures", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "figure 2 of digits is not drawn: it takes a centralized" in result.stdout
    file = "figures/figure3-digits.png"
    assert (sweep.folder / file).stat().st_size > 1000
    assert f"]({file})" in (sweep.folder / "tables.md").read_text(encoding="utf-8")
    assert f'<img src="{file}"' in (sweep.folder / "tables.html").read_text(encoding="utf-8")


def test_weights_that_cannot_be_drawn_from_cost_no_table(sweep: Sweep) -> None:
    sweep.add("a", "train.mode=centralized")
    sweep.add("b")
    result = feddm_tables(sweep.folder, "--figures")
    assert result.exit_code == 1
    assert "a/model.safetensors does not fit the network" in result.stderr
    assert "## Table I" in (sweep.folder / "tables.md").read_text(encoding="utf-8")
