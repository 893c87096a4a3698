"""`feddm-train`: its command line, for one run or a sweep of runs.

What takes its arguments apart imports nothing of torch, which takes seconds: a wrong word is
answered at once.
"""

import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import cast

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from server_app.launch.fit_to_images import as_begun, fit_to_images
from task.checks import require
from task.config import (
    CONF_DIR,
    Config,
    anchored,
    compose_conf,
    config_from_hydra,
    hydra_override,
    load_config,
    path_of,
    preset_sweep,
    read_override,
    require_data_root,
    settle_frozen_file,
    words_of_family,
)
from task.processes import have_home, let_threads_sleep, write_any_letter
from task.runs.commands import resuming_command
from task.runs.layout import LOG_FILE, is_begun, run_path
from task.runs.resume import check_startable

# Hydra's own value that says what does not stand in the name of a job.
NAMING = "hydra.job.config.override_dirname.exclude_keys"

# Folders of the jobs of this process's sweep that failed: Hydra returns nothing of a sweep, and
# would answer an error with its own words and a traceback.
FAILED_JOBS: list[str] = []


def main() -> None:
    """Run `feddm-train`."""
    # So that a plain `kill` and a closed terminal also end the SuperLink that a job has started.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(ending, signal.default_int_handler)
    have_home()
    let_threads_sleep()
    write_any_letter()
    OmegaConf.register_new_resolver("one_folder", one_folder, replace=True)
    try:
        arguments = read_arguments(sys.argv[1:])
        if jobs := sweep_jobs(arguments):
            warn_of_wrong_jobs(jobs, arguments)
        else:
            # For an unknown value, Hydra itself would advise what does not help.
            compose_conf(overrides_among(arguments))
        sys.argv[1:] = name_by_what_is_swept(arguments)
    except ValueError as error:
        print(f"feddm-train: {error}", file=sys.stderr)
        sys.exit(1)
    _hydra_main()
    if FAILED_JOBS:
        print(f"feddm-train: {len(FAILED_JOBS)} failed: {'; '.join(FAILED_JOBS)}", file=sys.stderr)
        sys.exit(1)


def read_arguments(arguments: list[str]) -> list[str]:
    """Write the overrides of a command line in Hydra's grammar; see `task.config.read_override`.

    Raises:
        ValueError: a text cannot be kept in a configuration.
    """
    sweep = not {"-m", "--multirun", "hydra.mode=MULTIRUN"}.isdisjoint(arguments)
    for argument in arguments:
        if preset := re.fullmatch(r"experiment=['\"]?(\w+)['\"]?", argument):
            sweep = sweep or bool(preset_sweep(preset[1]))
    return [a if a.startswith("-") else read_override(a, sweep=sweep) for a in arguments]


def warn_of_wrong_jobs(jobs: list[list[str]], arguments: list[str]) -> None:
    """Say which jobs of a sweep cannot be trained, before hours of the others.

    Args:
        jobs: the overrides of each.
        arguments: of the command line, in Hydra's grammar.

    Raises:
        ValueError: none of them can be trained.
    """
    from task.generators.registry import weightless_generator

    wrong: dict[str, Exception] = {}
    for words in jobs:
        try:
            config = load_config(words_of_family(words), images_below=Path.cwd())
            weightless_generator(settle_frozen_file(anchored(config, Path.cwd())))
        except (ValueError, OSError) as error:
            wrong[" ".join(word for word in words if word not in arguments)] = error
    reasons = dict.fromkeys(str(error) for error in wrong.values())
    if len(wrong) == len(jobs):
        raise ValueError(f"none of the {len(jobs)} runs can be trained: {'; '.join(reasons)}")
    for swept, why in wrong.items():
        warning = f"warning: the run {swept} cannot be trained: {why}"
        print(f"feddm-train: {warning}", file=sys.stderr, flush=True)


def sweep_jobs(arguments: list[str]) -> list[list[str]]:
    """List the overrides of each job of a sweep; nothing where the arguments ask for none."""
    if "hydra.mode=RUN" in arguments:
        return []
    try:
        parsed = OverridesParser.create().parse_overrides(overrides_among(arguments))
    except OverrideParseException:
        return []  # Hydra reads them next, and says what is wrong.
    given = {override.key_or_group: override for override in parsed}
    preset = given.get("experiment")
    of_preset = {} if preset is None else preset_sweep(str(preset.value()))
    added = [f"{name}={values}" for name, values in of_preset.items() if name not in given]
    parsed += OverridesParser.create().parse_overrides(added)
    choices = [
        [f"{override.key_or_group}={value}" for value in override.sweep_string_iterator()]
        if override.is_sweep_override()
        else [str(override.input_line)]
        for override in parsed
    ]
    swept = any(len(each) > 1 for each in choices)
    return [list(job) for job in product(*choices)] if swept else []


def overrides_among(arguments: list[str]) -> list[str]:
    """Leave out the flags of a command line, what belongs to them, and the values of Hydra."""
    return [
        argument
        for argument in arguments
        if ("=" in argument or argument.startswith("~"))
        and not argument.startswith(("-", "hydra."))
    ]


def one_folder(overrides: str, number: int) -> str:
    """Name the folder of a job of a sweep by the values that were swept, if any were."""
    return overrides.replace("/", "_").replace('"', "") or f"job-{number}"


def name_by_what_is_swept(arguments: list[str]) -> list[str]:
    """Add the Hydra override that leaves what is the same in all jobs out of their names.

    Args:
        arguments: of the command line.

    Raises:
        ValueError: the presets of tables are swept, whose own sweeps Hydra would leave out.
    """
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException:
        return arguments  # Hydra reads them next, and says what is wrong.
    # Of a word that is given twice Hydra takes the last.
    last_given = {o.key_or_group: o for o in parsed if not o.is_delete()}
    fixed = {name for name, o in last_given.items() if not o.is_sweep_override()}
    for override in parsed:
        if override.key_or_group != "experiment":
            continue
        if override.is_sweep_override():
            swept = [str(choice) for choice in override.sweep_string_iterator()]
            sweeping = [name for name in swept if preset_sweep(name)]
            require(not sweeping, "experiment", "one at a time of those that sweep", swept)
        else:
            # A value of a preset's sweep that was given stays in the name of its run.
            fixed -= preset_sweep(str(override.value())).keys()
    last = max((i for i, a in enumerate(arguments) if not a.startswith("-")), default=-1)
    own = f"{NAMING}=[{','.join(sorted(fixed))}]"
    # Among the other overrides: argparse refuses them on both sides of a flag.
    return [*arguments[: last + 1], own, *arguments[last + 1 :]]


@hydra.main(config_path=str(CONF_DIR), config_name="config", version_base="1.3")
def _hydra_main(composed: DictConfig) -> None:
    job = HydraConfig.get()
    sweep = job.mode == RunMode.MULTIRUN
    # As they were given: an interpolation that a text only looks like stays escaped.
    words = cast(list[str], OmegaConf.to_container(job.overrides.task))
    config = None
    try:
        if sweep:
            words = words_of_family(words)
            asked = load_config(words, images_below=Path.cwd())
        else:
            asked = config_from_hydra(composed, words, images_below=Path.cwd())
        require_data_root(asked)
        if sweep:
            # The runs of a sweep lie side by side in its folder.
            asked = asked.changed({"output_dir": job.sweep.dir, "run_name": job.sweep.subdir})
        given = {path_of(word) for word in words}
        config = settle_frozen_file(as_begun(anchored(asked, Path.cwd()), given))
        with leaving_no_empty_run(run_path(config)):
            if not sweep:
                check_startable(config)
            from server_app.launch.job import equal_finished_run, go_on_with_sweep, run_job

            if sweep:
                config = go_on_with_sweep(config)
            config = fit_to_images(config, given)
            if sweep and (done := equal_finished_run(config)) is not None:
                print(f"finished already: {done}", flush=True)
                return
            run_job(config, words)
    except KeyboardInterrupt:
        print(f"feddm-train: interrupted; {how_to_go_on(config, sweep=sweep)}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # What is still to be printed goes nowhere, as Python's own flush at the end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        how = how_to_go_on(config, sweep=sweep)
        print(f"feddm-train: ended, because its output was closed; {how}", file=sys.stderr)
        sys.exit(1)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"feddm-train: {error}", file=sys.stderr, flush=True)
        if sweep:
            FAILED_JOBS.append(job.sweep.subdir)
            return
        # What is wrong in an input stays so, and what has diverged would do so again.
        if isinstance(error, RuntimeError) and config is not None and can_go_on(run_path(config)):
            how = how_to_go_on(config, sweep=sweep)
            print(f"feddm-train: {how}", file=sys.stderr, flush=True)
        sys.exit(1)


@contextmanager
def leaving_no_empty_run(path: Path) -> Iterator[None]:
    """Take the folder of a run away where the block has made it, and fails before the run begins.

    Raises:
        RuntimeError: that of the block, with where to read all that was said.
    """
    # Not Path's own, which raise where a name is too long; what follows says so.
    new, log_file = not os.path.exists(path), path / LOG_FILE
    try:
        yield
    except BaseException as error:
        failed = isinstance(error, RuntimeError) and os.path.exists(log_file)
        if new and os.path.isdir(path) and not is_begun(path):
            if failed:
                kept = Path(tempfile.gettempdir()) / f"feddm-{path.name}-{os.getpid()}.log"
                shutil.move(log_file, kept)
                log_file = kept
            shutil.rmtree(path, ignore_errors=True)
        if failed:
            raise RuntimeError(f"{error}\nall that was said: {log_file}") from error
        raise


def can_go_on(path: Path) -> bool:
    """Whether the run in a folder has begun, and has not diverged."""
    from task.runs.run import Run

    return is_begun(path) and Run(path).divergence is None


def how_to_go_on(config: Config | None, *, sweep: bool) -> str:
    """Say how to go on with a run that was ended.

    Args:
        config: of the run; None where there is none yet.
        sweep: whether it is a job of a sweep, which then goes on as a whole.
    """
    if sweep and config is not None:
        folder = Path(config.output_dir)
        settled = {"output_dir": str(folder.parent), "run_name": folder.name, "resume": True}
        typed = [word for word in sys.argv[1:] if path_of(word) not in {NAMING, *settled}]
        typed += [hydra_override(name, value) for name, value in settled.items()]
        return f"to go on: {shlex.join(['feddm-train', *typed])}"
    if config is None or not is_begun(run_path(config)):
        return "nothing of the run is left"
    return f"to go on: {resuming_command(config, run_path(config))}"
