import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from task.config import load_config, write_config
from task.generation.draw_images import draw_images
from task.generation.grids import GAP, MARGIN, PANEL_GAP, TITLE_HEIGHT, mosaic
from task.generators.registry import build_generator
from task.randomness import Stream
from task.reporting.figures import Picture, draw_figures
from task.runs.checkpoint import save_weights
from task.runs.run import Run, final_model, find_runs, kept_clients, weights_file

TINY = [
    *("model.width=4", "model.num_poolings=1", "data.image_size=8"),
    *("diffusion.num_timesteps=20", "diffusion.num_inference_steps=2", "eval.images_per_class=2"),
    *("diffusion.schedule=cosine", "federation.num_supernodes=2", "train.precision=float32"),
]
CPU = torch.device("cpu")
CENTRAL = "train.mode=centralized"

Maker = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> Maker:
    """Make the folder of a finished run of random weights."""

    def make(name: str, *overrides: str, clients: tuple[int, ...] = ()) -> Path:
        path = tmp_path / "sweep" / name
        (path / "local").mkdir(parents=True)
        config = load_config([*TINY, f"run_name={name}", *overrides])
        write_config(config, path / "config.yaml")
        for client in (None, *clients):
            torch.manual_seed(len(name) if client is None else client)
            weights = build_generator(config).state_dict()
            save_weights(weights_file(path, client), weights, {"round": "1"})
        if config.train.mode == "federated":
            counts = [[client + 1] * len(config.data.classes) for client in range(2)]
            content = f'{{"num_clients": 2, "train_counts": {counts}, "test_counts": []}}'
            (path / "partition.json").write_text(content)
        return path

    return make


def draw(tmp_path: Path) -> tuple[dict[str, Picture], list[str]]:
    said: list[str] = []
    runs = find_runs(tmp_path / "sweep")
    pictures = draw_figures(runs, tmp_path / "out", device=CPU, say=said.append)
    assert all(picture.file.parent == Path("figures") for picture in pictures)
    assert all(picture.title and picture.caption.endswith(".") for picture in pictures)
    placed = [dataclasses.replace(each, file=tmp_path / "out" / each.file) for each in pictures]
    return {picture.file.stem: picture for picture in placed}, said


def pixels(picture: Picture) -> np.ndarray:
    with Image.open(picture.file) as image:
        return np.asarray(image.convert("RGB"))


def expected_grid(run: Run, client: int | None = None, tile: int = 80) -> np.ndarray:
    labels = torch.arange(10).repeat_interleave(2)
    model, _ = final_model(run.path, run.config, client)
    drawn = draw_images(run.config, model, labels, device=CPU, stream=Stream.SAMPLE_GRID)
    return mosaic(drawn.images, 2, tile=tile)


def test_figure2_shows_the_pair_of_equal_settings(tmp_path: Path, make_run: Maker) -> None:
    make_run("a-skewed", "partition.beta=0.1")
    make_run("b-long", "train.local_epochs=10")
    make_run("c-many", "federation.num_supernodes=3")
    make_run("d-fedavg", "train.num_threads=2", "eval.batch_size=3")
    make_run("e-central", CENTRAL)
    pictures, _ = draw(tmp_path)
    runs = {run.path.name: run for run in find_runs(tmp_path / "sweep")}
    picture = pixels(pictures["figure2-digits"])
    central = expected_grid(runs["e-central"])
    fedavg = Run(runs["d-fedavg"].path)
    fedavg.config = runs["e-central"].config
    height, width, _ = central.shape
    body = picture[TITLE_HEIGHT : TITLE_HEIGHT + height, :-MARGIN]
    # The noise is the same.
    assert np.array_equal(body[:, -width:], expected_grid(fedavg))
    step = width + PANEL_GAP
    assert np.array_equal(body[:, -width - step : -step], central)
    assert "beta=0.5" in pictures["figure2-digits"].caption


def test_figures_take_the_lowest_seed(tmp_path: Path, make_run: Maker) -> None:
    for seed in (3, 12, 1):
        make_run(f"fed-{seed}", f"seed={seed}", clients=(0,))
        make_run(f"central-{seed}", f"seed={seed}", CENTRAL)
    pictures, said = draw(tmp_path)
    assert set(pictures) == {f"figure{number}-digits" for number in (2, 3, 4, 5)}
    assert said == []
    for picture in pictures.values():
        assert "seed 1." in picture.caption.lower() or "seed 1;" in picture.caption


def test_figure3_shows_each_beta_of_equal_numbers_of_clients(
    tmp_path: Path, make_run: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for beta in ("5", "0.1", "0.5"):
        make_run(f"beta-{beta}", f"partition.beta={beta}", "train.local_epochs=1")
    lonely = make_run("more-clients", "partition.beta=7", "federation.num_supernodes=3")
    (lonely / "partition.json").write_text(
        f'{{"num_clients": 3, "train_counts": {[[9] * 10] * 3}}}'
    )
    shown: dict[str, np.ndarray] = {}
    monkeypatch.setattr(
        "task.reporting.figures.save_partition_heatmaps",
        lambda maps, *_, **__: shown.update(maps),
    )
    draw(tmp_path)
    assert [*shown] == ["beta=0.1", "beta=0.5", "beta=5"]
    assert all(counts.tolist() == [[1] * 10, [2] * 10] for counts in shown.values())


def test_figure4_shows_the_global_model_and_every_kept_client(
    tmp_path: Path, make_run: Maker
) -> None:
    make_run("beta-0.1", "partition.beta=0.1", clients=(0, 1))
    make_run("fedavg", clients=(1,))
    make_run("central", CENTRAL)
    pictures, _ = draw(tmp_path)
    runs = {run.path.name: run for run in find_runs(tmp_path / "sweep")}
    assert kept_clients(runs["fedavg"].path) == [1]
    picture = pixels(pictures["figure4-digits"])
    everyone, client = (expected_grid(runs["fedavg"], who, tile=48) for who in (None, 1))
    body = picture[-MARGIN - len(client) : -MARGIN]
    # A title can be wider than two small tiles, and makes its panel wider.
    assert 0 < place_of(everyone, body) < place_of(client, body)
    assert "beta=0.5" in pictures["figure4-digits"].caption


def place_of(part: np.ndarray, picture: np.ndarray) -> int:
    width = part.shape[1]
    starts = range(picture.shape[1] - width + 1)
    return next(x for x in starts if np.array_equal(picture[:, x : x + width], part))


def test_figure5_shows_one_class_that_the_seed_decides(tmp_path: Path, make_run: Maker) -> None:
    for seed in range(4):
        make_run(f"run-{seed}", f"seed={seed}", clients=(0,))
    runs = find_runs(tmp_path / "sweep")
    titles = []
    for run in [*runs, runs[0]]:
        pictures = draw_figures([run], tmp_path / "out", device=CPU, say=str)
        (figure5,) = (
            dataclasses.replace(each, file=tmp_path / "out" / each.file)
            for each in pictures
            if "figure5" in each.file.name
        )
        titles.append(figure5.title)
    assert titles[-1] == titles[0] and len(set(titles)) > 1
    side = 2 * 48 + GAP
    assert pixels(figure5).shape[0] == TITLE_HEIGHT + 24 + 2 * GAP + side + MARGIN


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Gray images of two classes, of which one has more than the other."""
    for label, name in enumerate(("normal", "pneumonia")):
        folder = tmp_path / "scans" / "train" / name
        folder.mkdir(parents=True)
        for number in range(3 - label):
            Image.new("L", (8, 8), 40 + 100 * label + number).save(folder / f"{number}.png")
    return tmp_path / "scans"


def medical(tmp_path: Path, root: Path) -> list[str]:
    return [
        *("data=chest_xray", "data.image_size=8", "data.test_fraction=null"),
        *(f"data.root={root}", f"data.cache_dir={tmp_path / 'cache'}", "eval.images_per_class=3"),
    ]


def test_figure6_shows_real_images_beside_samples(
    tmp_path: Path, make_run: Maker, scans: Path
) -> None:
    make_run("fedavg", *medical(tmp_path, scans))
    make_run("central", *medical(tmp_path, scans), CENTRAL)
    pictures, said = draw(tmp_path)
    assert [*pictures] == ["figure2-chest_xray", "figure3-chest_xray", "figure6-chest_xray"]
    assert len(said) == 3 and "is readable for you alone" in said[-1]
    assert pictures["figure6-chest_xray"].file.stat().st_mode & 0o077 == 0
    picture = pixels(pictures["figure6-chest_xray"])
    # Two columns, as the smaller class has two images; the first row is of its class alone.
    assert picture.shape[0] == TITLE_HEIGHT + 2 * 48 + GAP + MARGIN
    row = picture[TITLE_HEIGHT : TITLE_HEIGHT + 48, :, 0]
    assert len({40, 41, 42} & {*row[24].tolist()}) >= 2
    below = picture[TITLE_HEIGHT + 48 + GAP : -MARGIN, :, 0]
    assert {140, 141} <= {*below[24].tolist()}


def test_lost_scans_lose_only_their_own_figure(tmp_path: Path, make_run: Maker) -> None:
    for name in ("fedavg", "central"):
        mode = [CENTRAL] if name == "central" else []
        make_run(name, *medical(tmp_path, tmp_path / "nowhere"), *mode)
    pictures, said = draw(tmp_path)
    assert [*pictures] == ["figure2-chest_xray", "figure3-chest_xray"]
    assert any(line.startswith("figure 6 of chest_xray is not drawn: ") for line in said)
    assert all("\n" not in line for line in said)
    assert any("nowhere" in line for line in said)


def test_what_is_missing_is_said(tmp_path: Path, make_run: Maker) -> None:
    make_run("central", CENTRAL)
    pictures, said = draw(tmp_path)
    assert pictures == {}
    assert [line.split(" is not drawn: ")[0] for line in said] == [
        f"figure {number} of digits" for number in (2, 3, 4, 5)
    ]
    assert "keep_local_models" in said[2]


def test_each_data_set_has_its_pictures(tmp_path: Path, make_run: Maker) -> None:
    make_run("digits")
    make_run("mnist", "data=mnist", "data.image_size=8")
    pictures, _ = draw(tmp_path)
    assert [*pictures] == ["figure3-digits", "figure3-mnist"]


def test_no_runs_give_no_pictures(tmp_path: Path) -> None:
    assert draw(tmp_path) == ({}, [])


def test_weights_of_another_network_are_refused(tmp_path: Path, make_run: Maker) -> None:
    run = make_run("fedavg", clients=(0,))
    save_weights(weights_file(run, 0), {"other": torch.zeros(1)}, {"round": "1"})
    with pytest.raises(ValueError, match="does not fit the network"):
        draw(tmp_path)


def test_data_sets_of_one_name_get_pictures_of_their_own(
    tmp_path: Path, make_run: Maker, scans: Path
) -> None:
    other = tmp_path / "other"
    scans.rename(other)
    scans.symlink_to(other)
    for number, root in enumerate((scans, other)):
        make_run(f"fedavg-{number}", *medical(tmp_path, root))
        make_run(f"central-{number}", *medical(tmp_path, root), CENTRAL)
    pictures, _ = draw(tmp_path)
    assert {"figure2-chest_xray", "figure2-chest_xray-2", "figure6-chest_xray-2"} <= set(pictures)
