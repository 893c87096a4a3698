"""What remedies change: the values that conf/remedy sets, and what these are without a remedy."""

from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from task.config.compose import load_config, resolved
from task.config.schema import CONF_DIR, flat_values, leaves


@cache
def without_remedy() -> dict[str, Any]:
    """Return each value that some remedy changes, as it is without any, by path."""
    files = [_values_of(file) for file in sorted((CONF_DIR / "remedy").glob("*.yaml"))]
    chosen = [group for values in files for each in values.pop("defaults", []) for group in each]
    sections = tuple(f"{group.removeprefix('override /')}." for group in chosen)
    changed = {path for values in files for path in leaves(values)}
    return {
        path: value
        for path, value in flat_values(load_config()).items()
        if path in changed or path.startswith(sections)
    }


@cache
def strategy_preset(name: str) -> dict[str, Any]:
    """Return the values of a file of conf/strategy by path."""
    return leaves(_values_of(CONF_DIR / "strategy" / f"{name}.yaml"), "strategy.")


def _values_of(file: Path) -> dict[str, Any]:
    return resolved(OmegaConf.load(file))  # type: ignore[arg-type]
