"""The samples of the generators of a comparison, side by side."""

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from task.generation.grids import Panel, grid_images, save_panels
from task.reporting.figures import SMALL_TILE, Picture
from task.reporting.generator_tables import GeneratorGroup
from task.runs.run import Run

MOST_COLUMNS = 5
MOST_PANELS_PER_LINE = 4


def draw_generators(
    groups: Sequence[GeneratorGroup], folder: Path, *, say: Callable[[str], object]
) -> list[Picture]:
    """Put the sample grids of each comparison side by side, as the runs drew them at their end.

    Of several seeds the lowest is shown.

    Args:
        groups: one picture each, but for those of the same runs.
        folder: in which the pictures come, as figures/generators-<number>.png.
        say: is told in a line whose samples a picture lacks, and why.
    """
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    by_runs: dict[tuple[Path, ...], GeneratorGroup] = {}
    for group in groups:
        # Several extractors look at the images of the same runs.
        by_runs.setdefault(tuple(each.run.path for each in group.members), group)
    pictures = []
    for number, group in enumerate(by_runs.values(), 1):
        file = Path("figures") / f"generators-{number}.png"
        grids: dict[str, Tensor] = {}
        for label, members in group.rows.items():
            try:
                grids[label] = _last_grid(members[0].run)
            except (ValueError, OSError) as error:
                say(f"{file} lacks {label}: {error}")
        if len(grids) > 1:
            _save_grids(group, grids, folder / file)
            pictures.append(_picture_of(group, file))
    return pictures


def _last_grid(run: Run) -> Tensor:
    """Read the samples of the last round.

    Raises:
        ValueError: there are none, or it is not told where they lie in their picture.
        OSError: their picture cannot be read.
    """
    file = run.grids.get(run.config.federation.rounds)
    if file is None:
        raise ValueError(f"no samples of the last round in {run.path}")
    return grid_images(file, run.config.data.image_size)


def _save_grids(group: GeneratorGroup, grids: dict[str, Tensor], file: Path) -> None:
    columns = min(MOST_COLUMNS, *(grid.shape[1] for grid in grids.values()))
    # A line for each mode, where that fits.
    longest = max(map(len, group.modes.values()))
    save_panels(
        [Panel(grid[:, :columns].flatten(0, 1), label) for label, grid in grids.items()],
        file,
        rows=group.members[0].run.config.data.classes,
        columns=columns,
        tile=SMALL_TILE,
        panels_per_line=min(longest, MOST_PANELS_PER_LINE),
    )


def _picture_of(group: GeneratorGroup, file: Path) -> Picture:
    rounds = group.members[0].run.config.federation.rounds
    seeds = sorted({members[0].run.config.seed for members in group.rows.values()})
    return Picture(
        file,
        f"Generators: {group.label}",
        f"Samples after round {rounds}, a row per class, as the runs drew them. {group.scale}, "
        f"seed {', '.join(map(str, seeds))}.",
    )
