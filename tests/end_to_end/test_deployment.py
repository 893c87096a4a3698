"""Hospitals in a bad night: real SuperLink and SuperNodes with TLS, authentication, a database."""

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from task.guard.approvals import Approvals
from task.guard.bundle import Bundle
from task.runs.checkpoint import load_weights
from task.runs.layout import MASKED_SUMS_FILE
from task.runs.records import IN_SUM, LEFT_OUT, SPENT_EPSILON, TRAIN, Records, read_records
from tests.deployment import (
    RUN_CONFIG,
    Deployment,
    app_with_faults,
    deployed,
    write_digit_folders,
)
from tests.processes import CHECKOUT, COMMANDS, feddm, wait_for

pytestmark = pytest.mark.slow

# Of which hospital has images: all of them, or some.
CLASSES = {"north": range(10), "south": range(5), "west": range(5, 10)}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of real digits for each hospital, no digit in two of them."""
    folder = tmp_path_factory.mktemp("images")
    return {
        name: write_digit_folders(folder / name, classes=classes, share=share, shares=len(CLASSES))
        for share, (name, classes) in enumerate(CLASSES.items())
    }


@pytest.fixture(scope="module")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, images: dict[str, Path]
) -> Iterator[Deployment]:
    """A federation with one hospital that is always there."""
    with deployed(tmp_path_factory.mktemp("deployment")) as started:
        started.add_node("north", data=images["north"])
        yield started


def records_of(run: Path) -> Records:
    return read_records(run / "metrics.jsonl")


def number_of(deployment: Deployment, run: Path, name: str) -> int:
    """Find out which client a hospital is, as a coordinator does."""
    numbers: dict[str, int] = json.loads((run / "nodes.json").read_text())
    return numbers[deployment.node_ids()[name]]


@pytest.fixture(scope="module")
def faulty_app(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The app with a client that goes wrong where its node's environment says so."""
    return app_with_faults(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a guard that has approved this checkout and lets no images be scored."""
    folder = tmp_path_factory.mktemp("guard")
    (folder / "policy.toml").write_text("[node-config]\nscore-images = false\n")
    fab = build_fab_from_disk(CHECKOUT)
    Approvals(folder).add(Bundle.of_fab(fab), fab)
    return folder


def guarded(guard: Path) -> dict[str, str]:
    """Return what makes flower-supernode start the guard, as the runbook says it."""
    path = f"{CHECKOUT / 'docker' / 'guard'}{os.pathsep}{COMMANDS}{os.pathsep}{os.environ['PATH']}"
    return {"FEDDM_GUARD": str(guard), "PATH": path}


def guard_log(guard: Path) -> list[str]:
    """Return what a guard has written of the runs that it has seen, a line each."""
    file = guard / "log" / "runs.jsonl"
    return file.read_text().splitlines() if file.exists() else []


PRIVATE_SUMS_ALONE = (
    "require-privacy = true\nrequire-secure-aggregation = true\n[node-config]\nmax-epsilon = 20.0\n"
)


def test_faulty_hospitals_are_left_out_and_named(
    deployment: Deployment, images: dict[str, Path], faulty_app: Path, guard: Path
) -> None:
    deployment.add_node("careful", data=images["south"], variables=guarded(guard))
    deployment.add_node(
        "broken", data=images["south"], variables={"FEDDM_FAULTS": "raise memory shape killed"}
    )
    deployment.add_node(
        "sick", data=images["west"], variables={"FEDDM_FAULTS": "nan norm none hang"}
    )
    deployment.add_node("unmounted", data=deployment.folder / "patient-4711")
    timeout = 150.0
    deployment.submit(
        "faults",
        app=faulty_app,
        **{
            "federation.rounds": 4,
            "federation.min_nodes": 3,
            "federation.round_attempts": 1,
            "federation.round_timeout": timeout,
            "federation.max_update_norm": 50.0,
        },
    )
    status = deployment.wait_for_end()
    for name in ("careful", "broken", "sick", "unmounted"):
        deployment.kill(name)
    assert status == "finished:completed"
    run = deployment.results / "faults"
    broken, sick = (number_of(deployment, run, name) for name in ("broken", "sick"))
    records = records_of(run)
    missed = {(e.round, e.client, e.context["activity"]): e for e in records.left_out}
    expected = {
        (1, broken): r"ValueError \(code 101\)",
        (2, broken): r"RuntimeError \(code 103\)",
        (3, broken): "of shape",
        (4, broken): "its ClientApp was killed",
        (1, sick): "not finite",
        (2, sick): "federation.max_update_norm=50",
        (4, sick): "no reply in time",
    }
    trained = {key[:2] for key in missed if key[2] == "train"}
    assert trained == expected.keys()
    for who, words in expected.items():
        assert re.search(words, missed[*who, "train"].context["reason"]), who
    assert [*records.series("num_clients").values()] == [1, 1, 2, 1]
    assert records.series("round_seconds")[4] < 1.5 * timeout
    # Who has let a round's time pass is not waited for a second time in it.
    assert (4, sick, "evaluate") not in missed
    printed = deployment.run_log() + deployment.log("superlink")
    assert f"client {broken} (broken) is left out" in printed
    assert "was refused: FileNotFoundError (code 102)" in printed
    # The guard looks before any of the app is loaded, which it would not be without an approval.
    assert "was refused: NotApprovedError (code 108)" in printed
    assert "is not on the list in" in deployment.log("careful")
    assert [*deployment.folder.glob("home-careful/guarded/*")] == []
    told = printed + "".join(file.read_text() for file in run.glob("*.json*"))
    assert "patient-4711" not in told and "patient-4711" in deployment.log("broken")


def test_run_survives_a_hospital_that_is_killed_and_one_that_comes_late(
    deployment: Deployment, images: dict[str, Path], guard: Path
) -> None:
    deployment.add_node("south", data=images["south"])
    # All that is kept, sent and averaged beside the weights.
    carried = "strategy=scaffold train.optimizer_state=averaged"
    deployment.submit(
        "night",
        **{
            "federation.rounds": 7,
            "federation.min_nodes": 2,
            "federation.round_timeout": 300.0,
            "federation.wire_dtype": "int8",
            "eval.num_images": 40,
            "overrides": f"{RUN_CONFIG['overrides']} {carried}",
        },
    )
    deployment.wait_for_round("night", 1)
    deployment.kill("south")
    deployment.add_node("west", data=images["west"], variables=guarded(guard))
    deployment.wait_for_round("night", 2)
    # Flower takes the node for present until a minute after its last sign of life.
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        deployment.start_node("south", data=images["south"])
        time.sleep(10)
        if deployment.is_running("south"):
            break
    assert deployment.is_running("south"), deployment.log("south")
    assert deployment.wait_for_end() == "finished:completed"
    run = deployment.results / "night"
    south, west = (number_of(deployment, run, name) for name in ("south", "west"))
    records = records_of(run)
    rounds_of = {
        client: set(records.series("loss", reference=TRAIN, client=client))
        for client in (south, west)
    }
    assert 2 not in rounds_of[south] and max(rounds_of[south]) > 2
    assert 1 not in rounds_of[west] and 7 in rounds_of[west]
    # Its guard has approved this app, and its policy stands above what the node was started with.
    assert "score-images=false declines" in deployment.log("west")
    assert '"runs": true' in guard_log(guard)[-1]
    # After the last round each hospital attacks the global weights, and before it its own.
    audited = {(r.client, r.local_model) for r in records.all if r.metric == "member_auc SimA"}
    assert audited >= {(client, own) for client in (south, west) for own in (False, True)}
    assert "attacked its own weights with" in deployment.log("west")
    assert (2, south) in [(each.round, each.client) for each in records.left_out]
    assert records.series("loss", reference=TRAIN)[7] > 0
    _, metadata = load_weights(run / "model.safetensors")
    assert metadata["round"] == "7"
    # An eighth of four bytes in 8 bits, and all of c_i and of two moments.
    weights = load_weights(run / "model.safetensors")[0]
    size = sum(tensor.nbytes for tensor in weights.values())
    sent = records.series("upload_bytes", client=west)
    assert sent[7] / size == pytest.approx(3.26, abs=0.15)


def test_private_masked_run_survives_a_hospital_that_is_killed_in_a_round(
    deployment: Deployment, images: dict[str, Path], guard: Path
) -> None:
    deployment.ensure_node("south", data=images["south"])
    deployment.ensure_node("west", data=images["west"], variables=guarded(guard))
    deployment.add_node("east", data=images["west"])
    (guard / "policy.toml").write_text(PRIVATE_SUMS_ALONE)
    seen = len(guard_log(guard))
    private = "privacy=dp_sgd privacy.noise_draws=1 privacy.epsilon=8"
    deployment.submit(
        "masked",
        **{
            "federation.secure_aggregation": True,
            "federation.rounds": 2,
            "federation.min_nodes": 4,
            "federation.round_attempts": 1,
            "federation.round_timeout": 300.0,
            "overrides": f"{RUN_CONFIG['overrides']} {private}",
        },
    )
    run = deployment.results / "masked"
    deployment.wait_for_round("masked", 1)
    # It is written when a round's hospitals are chosen, before any of them trains.
    wait_for(
        lambda: json.loads((run / MASKED_SUMS_FILE).read_text()) == {"last": 2},
        seconds=300,
        what="the second sum",
    )
    deployment.kill("east")
    assert deployment.wait_for_end() == "finished:completed", deployment.run_log()
    records = records_of(run)
    assert records.series("num_clients") == {1: 4, 2: 3}
    missed = {(each.round, each.client, each.context["activity"]) for each in records.left_out}
    assert missed == {(2, number_of(deployment, run, "east"), "train")}
    # Nothing is told of a single hospital but whether it took part, and no loss of all of them.
    alone = {each.metric for each in records.all if each.client is not None}
    assert alone == {IN_SUM, LEFT_OUT}
    assert not records.series("loss", reference=TRAIN)
    assert 0 < records.series(SPENT_EPSILON)[2] <= 8
    assert f"epsilon {records.value(SPENT_EPSILON):.3g} at delta 0.0001" in (
        run / "report.html"
    ).read_text(encoding="utf-8")
    # A mask that was left in the sum would move the weights by up to federation.update_range.
    one, two = (load_weights(run / "checkpoints" / f"round_000{n}.safetensors")[0] for n in (1, 2))
    assert 0 < max(float((two[name] - one[name]).abs().max()) for name in one) < 0.05
    assert '"runs": true' in guard_log(guard)[-1] and seen < len(guard_log(guard))
    # What the guarded hospital has spent: two rounds of five steps.
    spent = feddm("privacy", "--output-path", deployment.output("west"), "--max-epsilon", 20)
    assert spent.returncode == 0, spent.stderr
    assert re.search(r" masked +2 +10 ", spent.stdout), spent.stdout
