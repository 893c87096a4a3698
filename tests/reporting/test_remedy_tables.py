from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from task.reporting.metric_table import Quantity
from task.reporting.remedy_figure import side_by_side
from task.reporting.remedy_tables import remedy_groups, remedy_tables, seed_mean
from task.reporting.rendering import render
from task.reporting.tables import Measurement, Table
from task.runs.records import TRAIN
from tests.reporting.test_generator_tables import measured, record, row
from tests.reporting.test_tables import Sweep, feddm_tables, titles

SMALL = ("experiment=remedies", "federation.rounds=3", "eval.extractor=classifier")
FD, KID = Quantity("fid", TRAIN).heading, Quantity("kid", TRAIN).heading
FD_CLOSED, KID_CLOSED = "gap in FD (train) closed ↑", "gap in KID (train) closed ↑"
SENT, SECONDS = "MB sent ↓", "seconds of training ↓"


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    return Sweep(tmp_path / "sweep", SMALL)


def add(
    sweep: Sweep, *words: str, fids: Iterable[float], megabytes: float = 3, **found: Any
) -> None:
    """Add a run of each seed, 0 and up, by its FD."""
    for seed, fid in enumerate(fids):
        name = ",".join([*words, f"seed={seed}"]).replace("/", "_")
        run = sweep.add(name, *words, f"seed={seed}", fid_train=fid, **found)
        if "remedy=centralized" not in words:
            record(run, "weight_bytes", *[megabytes / 3 * 1e6] * 3)
        record(run, "seconds_training", 1.0, 2.0, 3.0)


def tables(runs: Iterable[Measurement]) -> dict[str, Table]:
    return {table.title: table for table in remedy_tables(remedy_groups(runs))}


def the_table(sweep: Sweep) -> Table:
    (table,) = tables(measured(sweep)).values()
    return table


def test_a_row_says_how_much_of_the_gap_a_remedy_closes_and_what_it_sends(sweep: Sweep) -> None:
    add(sweep, "remedy=none", fids=(20.0, 22.0, 24.0), kid_train=0.5)
    add(sweep, "remedy=centralized", fids=(10.0, 12.0, 14.0), kid_train=0.1)
    # It closes 0.2, 0.4 and 0.6 of the gaps, which are of 10.
    add(sweep, "remedy=scaffold", fids=(18.0, 18.0, 18.0), megabytes=6, kid_train=0.6)
    found = tables(measured(sweep))
    assert [*found] == ["Remedies: digits"]
    table = found["Remedies: digits"]
    floor = "real images (floor, n=179)"
    assert table.rows == ["FedAvg", "Centralized", "strategy=scaffold", floor]
    assert row(table, "FedAvg") == {
        **{FD: "22.00 ± 2.00 (3 seeds)", KID: "0.5000 ± 0.0000 (3 seeds)"},
        **{FD_CLOSED: "0.00", KID_CLOSED: "0.00", SENT: "3.00", SECONDS: "6.00"},
    }
    assert row(table, "Centralized") == {
        **{FD: "12.00 ± 2.00 (3 seeds)", KID: "0.1000 ± 0.0000 (3 seeds)"},
        **{FD_CLOSED: "1.00", KID_CLOSED: "1.00", SECONDS: "6.00"},
    }
    # t of 2 degrees of freedom at 97.5 % is 4.3027: 0.4 -+ 4.3027 * 0.2 / sqrt(3).
    assert row(table, "strategy=scaffold") == {
        **{FD: "18.00 ± 0.00 (3 seeds)", KID: "0.6000 ± 0.0000 (3 seeds)"},
        FD_CLOSED: "0.40 (-0.10 to 0.90; 3 seeds)",
        KID_CLOSED: "-0.25 (-0.25 to -0.25; 3 seeds)",
        **{SENT: "6.00", SECONDS: "6.00"},
    }
    assert row(table, floor) == {FD: "1.50"}
    assert table.verdicts == [
        "Gap in FD (train) between FedAvg and Centralized: 10, 95% interval 10 to 10, 3 paired "
        "seeds: shown",
        "Gap in KID (train) between FedAvg and Centralized: 0.4, 95% interval 0.4 to 0.4, 3 paired "
        "seeds: shown",
    ]
    assert table.caption[0].startswith("R=3, E=1, N=5, beta=0.1, clients per round=5")


def test_a_mean_over_seeds_has_the_interval_of_student() -> None:
    found = seed_mean([1.0, 2.0, 3.0, 6.0])
    # Variance 14 / 3; t of 3 degrees of freedom at 97.5 % is 3.18245.
    half = 3.18245 * (14 / 3 / 4) ** 0.5
    assert found.low == pytest.approx(3 - half, abs=1e-4)
    assert found.high == pytest.approx(3 + half, abs=1e-4)
    assert (found.mean, found.seeds) == (3, 4)
    assert str(seed_mean([1.0, 2.0])) == "1.50 (2 seeds)"


def test_shares_are_of_paired_seeds(sweep: Sweep) -> None:
    add(sweep, "remedy=none", fids=(20.0, 30.0))
    add(sweep, "remedy=centralized", fids=(10.0, 10.0, 9.0))
    add(sweep, "remedy=ema", fids=(15.0, 15.0, 1.0))
    add(sweep, "remedy=cosine", fids=(15.0,))
    table = the_table(sweep)
    assert row(table, "ema_decay=0.5")[FD_CLOSED] == "0.62 (2 seeds)"
    assert row(table, "lr_schedule=cosine, warmup_rounds=1")[FD_CLOSED] == "0.50"
    assert table.verdicts == [
        "Gap in FD (train) between FedAvg and Centralized: 15, not shown (paired seeds: 2, too few "
        "for an interval); whether its shares mean anything is not known"
    ]
    assert any("fewer have no interval" in line for line in table.caption)


def test_shares_of_a_gap_that_is_not_shown_are_said_to_mean_nothing(sweep: Sweep) -> None:
    add(sweep, "remedy=none", fids=(20.0, 20.0, 20.0))
    add(sweep, "remedy=centralized", fids=(10.0, 19.0, 30.0))
    add(sweep, "remedy=int8", fids=(20.0, 20.0, 20.0))
    (said,) = the_table(sweep).verdicts
    assert said.startswith(
        "Gap in FD (train) between FedAvg and Centralized: 0.3333, 95% interval -"
    )
    assert said.endswith("3 paired seeds: not shown, so that its shares mean nothing")


def test_a_centralized_run_that_is_worse_is_no_end_of_a_scale(sweep: Sweep) -> None:
    add(sweep, "remedy=none", fids=(20.0, 20.0, 20.0))
    add(sweep, "remedy=centralized", fids=(29.0, 30.0, 31.0))
    add(sweep, "remedy=int8", fids=(20.0, 20.0, 20.0))
    (said,) = the_table(sweep).verdicts
    assert said.endswith(": the opposite is shown, so that its shares mean nothing")


def test_without_a_gap_there_are_no_shares(sweep: Sweep) -> None:
    add(sweep, "remedy=none", fids=(20.0,))
    add(sweep, "remedy=int4", fids=(20.0,), megabytes=0.6)
    alone = the_table(sweep)
    assert alone.rows[:2] == ["FedAvg", "wire_dtype=int4"]
    assert row(alone, "wire_dtype=int4") == {FD: "20.00", SENT: "0.6000", SECONDS: "6.00"}
    assert alone.verdicts == []
    assert any(line.startswith("There is no centralized run") for line in alone.caption)
    add(sweep, "remedy=centralized", fids=(20.0,))
    assert FD_CLOSED not in row(the_table(sweep), "wire_dtype=int4")


def test_a_row_is_named_by_all_that_its_runs_change(sweep: Sweep) -> None:
    add(sweep, "remedy=none", fids=(20.0,))
    add(sweep, "remedy=fedprox", "strategy.proximal_mu=0.5", fids=(19.0,))
    add(
        sweep,
        "remedy=scaffold",
        "federation.wire_dtype=int8",
        "train.lr_schedule=cosine",
        fids=(18.0,),
    )
    add(sweep, "remedy=int4_feedback", fids=(17.0,))
    add(sweep, "remedy=centralized", "train.lr_schedule=cosine", "strategy=feddyn", fids=(9.0,))
    assert the_table(sweep).rows[:-1] == [
        "FedAvg",
        "Centralized, lr_schedule=cosine",
        "strategy=fedprox, proximal_mu=0.5",
        "strategy=scaffold, lr_schedule=cosine, wire_dtype=int8",
        "wire_dtype=int4, error_feedback=True",
    ]


def test_what_is_no_remedy_parts_comparisons(sweep: Sweep) -> None:
    add(sweep, "remedy=none", fids=(20.0,))
    add(sweep, "remedy=centralized", fids=(10.0,))
    assert tables(measured(sweep)) == {}
    add(sweep, "remedy=int8", "train.local_epochs=3", fids=(20.0,))
    add(sweep, "remedy=int8", "partition.beta=5", fids=(20.0,))
    assert tables(measured(sweep)) == {}
    for remedy in ("none", "ema", "fedyogi"):
        add(sweep, f"remedy={remedy}", "partition.beta=0.5", fids=(20.0,))
    add(sweep, "remedy=ema", fids=(20.0,))
    found = tables(measured(sweep))
    assert {title: table.rows[:-1] for title, table in found.items()} == {
        "Remedies (1 of 2): digits": ["FedAvg", "Centralized", "ema_decay=0.5", "strategy=fedyogi"],
        "Remedies (2 of 2): digits": ["FedAvg", "Centralized", "ema_decay=0.5"],
    }


def test_the_order_of_remedies_makes_no_difference(sweep: Sweep) -> None:
    for number, remedy in enumerate(("none", "centralized", "scaffold", "int8", "ema")):
        fids = (30.0 - number, 30.0 - 2 * number, 30.0 - 1.5 * number)
        add(sweep, f"remedy={remedy}", fids=fids)
    runs = measured(sweep)
    pages = {
        render("tables.md", title="", tables=[*tables(order).values()], left_out={}, pictures=[])
        for order in (runs, runs[::-1], [*runs[4:], *runs[:4]])
    }
    assert len(pages) == 1


def test_the_papers_tables_have_no_row_of_a_remedy(sweep: Sweep) -> None:
    for remedy in ("none", "centralized", "scaffold", "int8", "ema", "cosine"):
        add(sweep, f"remedy={remedy}", fids=(20.0,))
    assert titles(sweep.tables()) == ["Table I"]
    (table,) = (each for each in sweep.tables() if each.members)
    assert {each.run.values["federation.wire_dtype"] for each in table.members} == {"float32"}
    assert len(table.members) == 2


def test_a_strategy_beside_a_centralized_run_alone_is_no_row_of_fedavg(sweep: Sweep) -> None:
    add(sweep, "remedy=centralized", fids=(10.0,))
    add(sweep, "remedy=scaffold", fids=(20.0,))
    assert sweep.tables() == []
    # FedAvg, if in a smaller format.
    add(sweep, "remedy=int8", fids=(20.0,))
    assert titles(sweep.tables()) == ["Table I"]


def test_the_command_draws_what_each_remedy_sends(sweep: Sweep) -> None:
    add(sweep, "remedy=none", fids=(20.0, 21.0))
    add(sweep, "remedy=centralized", fids=(10.0, 11.0))
    add(sweep, "remedy=int8", fids=(20.0, 22.0), megabytes=1)
    sweep.add("unmeasured-traffic", "remedy=ema")
    result = feddm_tables(sweep.folder, "--figures", "--device", "cpu")
    assert "figures/remedies-1.png lacks ema_decay=0.5: FD (train) or the bytes" in result.output
    page = (sweep.folder / "tables.md").read_text(encoding="utf-8")
    assert "## Remedies: digits" in page
    assert "](figures/remedies-1.png)" in page
    assert (sweep.folder / "figures/remedies-1.png").stat().st_size > 1000
    assert {line["tables"] for line in sweep.csv()} == {"Remedies", "Remedies, I"}


def test_points_of_equal_traffic_stand_side_by_side() -> None:
    assert side_by_side([100.0, 50.0, 100.0, 100.0]) == pytest.approx([98, 50, 100, 102])
    assert side_by_side([0.0, 0.0]) == [0, 0]
