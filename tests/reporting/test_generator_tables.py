import json
from pathlib import Path
from typing import Any

import pytest
import torch

from task.config import load_config
from task.generation.grids import save_sample_grid
from task.generators.registry import build_generator
from task.reporting.generator_tables import generator_groups, generator_tables
from task.reporting.metric_table import Quantity
from task.reporting.rendering import render
from task.reporting.tables import Measurement, Table, measurements
from task.runs.records import TRAIN
from task.runs.run import find_runs
from tests.audit.test_records import attack
from tests.reporting.test_tables import Sweep, feddm_tables

SMALL = ("experiment=survey", "data=digits", "federation.rounds=3", "eval.extractor=classifier")
FD = Quantity("fid", TRAIN).heading
SEEN = {"extractor": "classifier", "image_range": "correct", "seed": 0}


@pytest.fixture
def survey(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path / "survey", SMALL)


def record(run: Path, metric: str, *values: float, **fields: Any) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        for number, value in enumerate(values, 1):
            line = {"round": number, "metric": metric, "value": value, **fields}
            file.write(json.dumps(line) + "\n")


def measured(sweep: Sweep) -> list[Measurement]:
    return measurements(find_runs(sweep.folder))[0]


def tables(sweep: Sweep) -> dict[str, Table]:
    return {table.title: table for table in generator_tables(generator_groups(measured(sweep)))}


def row(table: Table, label: str, column: int = 0) -> dict[str, str]:
    scores = table.columns[column].rows[label]
    return {each.heading: str(scores[each]) for each in table.metrics if each in scores}


def test_a_row_is_a_generator_in_a_mode_with_its_figures_and_costs(survey: Sweep) -> None:
    for seed, (fid, sent) in enumerate(((10.0, 1e6), (12.0, 2e6), (14.0, 3e6))):
        run = survey.add(f"v{seed}", "model=vae", f"seed={seed}", fid_train=fid, cas=0.5)
        record(run, "weight_bytes", sent, sent, sent)
        record(run, "seconds_training", 10.0, 20.0, 30.0 + seed)
        numbers = attack(0.6 + seed / 10).found.numbers()
        record(run, "member_auc SimA", *[0.5] * 3, n=200, context={"numbers": numbers})
        record(run, "num_attacks", 1, 1, 1)
    survey.add("c", "model=conv_vae", fid_train=30.0, floor_cas=0.9)
    survey.add("p", "model=vae", "train.mode=centralized", fid_train=5.0)
    survey.add("skewed", "model=conv_vae", "partition.beta=5")
    survey.add("long", "model=conv_vae", "train.mode=centralized", "train.local_epochs=3")
    found = tables(survey)
    assert [*found] == ["Generators: digits", "Costs of generators: digits"]
    quality, costs = found.values()
    floor = "real images (floor, n=179)"
    assert quality.rows == ["vae, Centralized", "conv_vae, FedAvg", "vae, FedAvg", floor]
    assert row(quality, "vae, FedAvg")[FD] == "12.00 ± 2.00 (3 seeds)"
    assert row(quality, "vae, FedAvg")["classification accuracy score ↑"] == (
        "0.5000 ± 0.0000 (3 seeds)"
    )
    assert row(quality, floor)[FD] == "1.50"
    assert "vae: batch=128, lr=0.001." in quality.caption
    assert quality.caption[0].startswith("R=3, E=2, N=4, beta=0.5, clients per round=4")
    model = build_generator(load_config([*SMALL, "model=vae"])).state_dict()
    size = sum(tensor.nbytes for tensor in model.values()) / 1e6
    own = {"MB of model ↓": f"{size:.2f}", "million parameters ↓": "1.88"}
    assert row(costs, "vae, FedAvg") == {
        FD: "12.00 ± 2.00 (3 seeds)",
        "seconds of training ↓": "61.00 ± 1.00 (3 seeds)",
        "MB sent ↓": "6.00 ± 3.00 (3 seeds)",
        "AUC of the strongest attack ↓": "0.7000 ± 0.1000 (3 seeds)",
        **own,
    }
    assert "AUC of the strongest attack ↓" not in row(costs, "conv_vae, FedAvg")
    assert costs.columns[0].score("vae, Centralized", costs.metrics[2]) is None
    assert quality.verdicts == [
        "Least FD (train), FedAvg: vae, not shown (difference 18; a single seed, so that no "
        "interval is known)",
        "Least FD (test), FedAvg: conv_vae, not shown (difference 0; a single seed, so that no "
        "interval is known)",
    ]


def test_what_a_round_or_a_seed_lacks_is_no_number(survey: Sweep) -> None:
    record(survey.add("c", "model=conv_vae"), "fid", 9.0, reference=TRAIN, n=60, context=SEEN)
    for seed in (0, 1):
        run = survey.add(f"v{seed}", "model=vae", f"seed={seed}")
        record(run, "weight_bytes", *[1e6] * (2 + seed))
        record(run, "seconds_training", *[1.0] * (3 * seed))
        record(run, "fid", *[8.0] * seed, reference=TRAIN, n=60, context=SEEN)
    by_round = tables(survey)["Generators by round: digits"]
    assert [*by_round.columns[0].rows] == ["conv_vae, FedAvg"]
    costs = tables(survey)["Costs of generators: digits"]
    assert not {"MB sent ↓", "seconds of training ↓"} & row(costs, "vae, FedAvg").keys()
    page = render("tables.md", title="", tables=[costs], left_out={}, pictures=[])
    assert "| vae, FedAvg | 20.00 ± 0.00 (2 seeds) | - | - | 7.52" in page


def test_rounds_and_budgets_say_which_generator_was_ahead(survey: Sweep) -> None:
    courses = {"vae": ((50.0, 45.0), (1.0, 1.0, 1.0)), "conv_vae": ((60.0, 40.0), (9.0, 9.0, 9.0))}
    for model, (course, seconds) in courses.items():
        run = survey.add(model, f"model={model}", fid_train=39.0)
        record(run, "fid", *course, reference=TRAIN, n=60, context=SEEN)
        other = {**SEEN, "extractor": "inception"}
        record(run, "fid", 1.0, round=3, reference=TRAIN, n=60, context=other)
        record(run, "seconds_training", *seconds)
    table = tables(survey)["Generators by round: digits"]
    assert [column.label for column in table.columns] == [
        *("round 1 (n=60)", "round 2 (n=60)", "round 3 (n=179)"),
    ]
    assert row(table, "conv_vae, FedAvg", 1) == {FD: "40.00", "seconds of training ↓": "18.00"}
    assert row(table, "vae, FedAvg", 2) == {FD: "39.00", "seconds of training ↓": "3.00"}
    assert table.verdicts == [
        "Least FD (train), n=60, FedAvg, by rounds: from 1 vae (50); from 2 conv_vae (40)",
        "Least FD (train), n=60, FedAvg, by seconds of training: from 1 vae (50); "
        "from 18 conv_vae (40)",
    ]


def test_the_order_of_the_runs_makes_no_difference(survey: Sweep) -> None:
    for mode in ("federated", "centralized"):
        for seed in (1, 0):
            for model in ("vae", "conv_vae"):
                words = (f"model={model}", f"train.mode={mode}", f"seed={seed}")
                run = survey.add(f"{model}-{mode}-{seed}", *words, fid_train=20.0 + 0.1 * seed)
                record(run, "fid", 40.0 + seed, reference=TRAIN, n=60, context=SEEN)
    runs = measured(survey)
    pages = {
        render(
            "tables.md",
            title="",
            tables=[*generator_tables(generator_groups(order))],
            left_out={},
            pictures=[],
        )
        for order in (runs, runs[::-1], [*runs[3:], *runs[:3]])
    }
    assert len(pages) == 1
    assert pages.pop().count("(2 seeds)") > 20


def test_runs_of_one_generator_or_of_other_images_are_no_comparison(survey: Sweep) -> None:
    survey.add("a", "model=vae")
    survey.add("b", "model=vae", "train.lr=0.1")
    survey.add("c", "model=conv_vae", "data.horizontal_flip=true")
    survey.add("d", "model=conv_vae", "federation.rounds=4")
    survey.add("e", "model=conv_vae", n_generated=500)
    assert tables(survey) == {}
    survey.add("f", "model=conv_vae", "data.horizontal_flip=true", "model.latent_dim=7")
    table = tables(survey)["Generators: digits"]
    assert table.rows[:2] == [
        "conv_vae (model.latent_dim=128), FedAvg",
        "conv_vae (model.latent_dim=7), FedAvg",
    ]
    survey.add("g", "model=resnet_gan", "model.width=4")
    found = [title for title in tables(survey) if title.startswith("Generators (")]
    assert found == [
        "Generators (1 of 2): digits (data.horizontal_flip=False)",
        "Generators (2 of 2): digits (data.horizontal_flip=True)",
    ]
    assert tables(survey)[found[0]].rows[:3] == [
        *("resnet_gan (model.width=4), FedAvg", "vae (train.lr=0.001), FedAvg"),
        "vae (train.lr=0.1), FedAvg",
    ]


def test_a_generator_that_several_words_are_equally_like_has_the_name_of_its_family(
    survey: Sweep,
) -> None:
    for model in ("stylegan2_ada_64", "stylegan2_ada_tiny", "attention_unet"):
        survey.add(model, f"model={model}", "data.image_size=64")
    assert tables(survey)["Generators: digits"].rows[:3] == [
        *("attention_unet, FedAvg", "stylegan2_ada, FedAvg", "stylegan2_ada_tiny, FedAvg"),
    ]


def test_what_fits_one_family_alone_parts_no_comparison(survey: Sweep) -> None:
    survey.add("v", "model=vae", "train.start_from=/one")
    survey.add("vc", "model=vae", "train.mode=centralized", "train.start_from=/one")
    for local in ("[]", "[discriminator]"):
        survey.add(f"g{local}", "model=stylegan2_ada_tiny", f"federation.local={local}")
    survey.add("gc", "model=stylegan2_ada_tiny", "train.mode=centralized")
    for seed in (0, 1):
        # The same file, which has moved.
        base = (f"model.pretrained=/{seed}/base", f"model.pretrained_sha256={'0' * 64}")
        survey.add(f"s{seed}", "model=small_gan", f"seed={seed}", *base)
    (table,) = (each for title, each in tables(survey).items() if title == "Generators: digits")
    assert table.rows[:6] == [
        *("stylegan2_ada_tiny, Centralized", "vae, Centralized", "small_gan, FedAvg"),
        "stylegan2_ada_tiny (federation.local=['discriminator']), FedAvg",
        "stylegan2_ada_tiny (federation.local=[]), FedAvg",
        "vae, FedAvg",
    ]
    assert row(table, "small_gan, FedAvg")[FD].endswith("(2 seeds)")


def test_comparisons_say_what_sets_them_apart(survey: Sweep) -> None:
    for model in ("vae", "conv_vae"):
        survey.add(f"{model}-1", f"model={model}")
        survey.add(f"{model}-2", f"model={model}", "federation.max_update_norm=3")
    captions = {
        table.caption[0]
        for title, table in tables(survey).items()
        if title.startswith("Generators (")
    }
    scale = "R=3, E=2, N=4, beta=0.5, clients per round=4, federation.max_update_norm="
    assert captions == {f"{scale}3.", f"{scale}null."}


def test_the_command_lays_generators_out_beside_the_papers_tables(survey: Sweep) -> None:
    for model in ("vae", "conv_vae"):
        run = survey.add(model, f"model={model}")
        (run / "samples").mkdir()
        save_sample_grid(
            torch.randint(0, 255, (20, 1, 16, 16), dtype=torch.uint8),
            run / "samples/round_0003.png",
            classes=[str(number) for number in range(10)],
            images_per_class=2,
        )
    survey.add("skewed", "model=vae", "partition.beta=0.1")
    survey.add("small_gan", "model=resnet_gan", "model.width=4")
    survey.add("alone", "federation.rounds=2")
    result = feddm_tables(survey.folder, "--figures", "--device", "cpu")
    assert result.exit_code == 0, result.output
    lacks = "figures/generators-1.png lacks resnet_gan (model.width=4), FedAvg: "
    assert f"{lacks}no samples of the last round" in result.stdout
    page = (survey.folder / "tables.md").read_text(encoding="utf-8")
    for title in ("Table II: skew", "Generators: digits", "Costs of generators: digits"):
        assert f"## {title}" in page
    assert "](figures/generators-1.png)" in page
    assert (survey.folder / "figures/generators-1.png").stat().st_size > 1000
    assert str(survey.folder / "alone") in page.split("## In no table")[1]
    assert {line["run"]: line["tables"] for line in survey.csv()} == {
        **{"alone": "", "conv_vae": "Generators", "skewed": "II", "small_gan": "Generators"},
        "vae": "Generators, II",
    }
