"""`feddm-train`: one run, or a sweep of runs: federated through `flwr run`, or centralised."""

import dataclasses
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig

from server_app.centralized_run import CentralizedRun
from server_app.evaluation import is_complete, wants_metrics
from server_app.simulation import load_images
from server_app.superlink import CONNECTION, SuperLink, private_superlink
from task.config import (
    CONF_DIR,
    Config,
    anchored,
    config_from_hydra,
    hydra_override,
    register_schema,
    require,
)
from task.features import build_extractor
from task.partition import partition_dataset
from task.run_directory import (
    HOW_TO_RESUME,
    RunDirectory,
    check_startable,
    different_values,
    run_path,
)
from task.runs import find_runs
from task.train import select_device

CHECKOUT = CONF_DIR.parent
POLL_SECONDS = 1.0


def main() -> None:
    """Run `feddm-train`."""
    # So that a plain `kill` also ends the SuperLink that a job has started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    register_schema()
    sys.argv += name_by_what_is_swept(sys.argv[1:])
    _hydra_main()


def name_by_what_is_swept(arguments: list[str]) -> list[str]:
    """Return the Hydra override that leaves what is the same in all jobs out of their names.

    Args:
        arguments: of the command line.
    """
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except OverrideParseException:
        return []  # Hydra reads them next, and says what is wrong.
    fixed = [o.get_key_element() for o in parsed if not o.is_sweep_override()]
    return [f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]"]


@hydra.main(config_path=str(CONF_DIR), config_name="config", version_base="1.3")
def _hydra_main(composed: DictConfig) -> None:
    job = HydraConfig.get()
    sweep = job.mode == RunMode.MULTIRUN
    try:
        config = config_from_hydra(composed)
        if sweep:
            # The runs of a sweep lie side by side in its folder.
            config = dataclasses.replace(
                config,
                output_dir=job.sweep.dir,
                # Empty where every value of a preset's sweep was given.
                run_name=job.sweep.subdir or f"job-{job.job.num}",
            )
        config = anchored(config, Path.cwd())
        if sweep:
            config = go_on_with_sweep(config)
            if (done := equal_finished_run(config)) is not None:
                print(f"finished already: {done}", flush=True)
                return
        train(config, list(job.overrides.task))
    except KeyboardInterrupt:
        print("feddm-train: interrupted; to go on, " + HOW_TO_RESUME, file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"feddm-train: {error}", file=sys.stderr, flush=True)
        if sweep:
            # Hydra goes on with the next job and ends with status 1.
            raise
        sys.exit(1)


def go_on_with_sweep(config: Config) -> Config:
    """Let `resume` of a sweep go on with the runs that it had begun and start the rest."""
    begun = (run_path(config) / "config.yaml").exists()
    return dataclasses.replace(config, resume=config.resume and begun)


def equal_finished_run(config: Config) -> Path | None:
    """Find the run of a sweep's folder that a job would only repeat; None if there is none.

    Several tables of the paper share cells, and a sweep that was ended has finished some.

    Args:
        config: of the job, with absolute folders.
    """
    for run in find_runs(Path(config.output_dir)):
        if not different_values(run.config, config) and is_complete(run.path, run.config):
            return run.path
    return None


def train(config: Config, overrides: list[str]) -> None:
    """Run the job of a configuration to its end.

    Args:
        config: of the run, with absolute folders.
        overrides: the Hydra overrides that it was composed from.

    Raises:
        FileNotFoundError: the data set is not there.
        ValueError: the run cannot be started or resumed as configured.
        RuntimeError: the run failed.
    """
    if not (CHECKOUT / "pyproject.toml").is_file():
        raise RuntimeError(
            f"feddm-train runs from a checkout of feddm, and {CHECKOUT} is none; "
            "clone the repository and install it with `pip install -e .`"
        )
    select_device(config.train.device)
    require(
        config.federation.min_nodes <= config.federation.num_supernodes,
        "federation.min_nodes",
        f"at most federation.num_supernodes={config.federation.num_supernodes} in a simulation",
        config.federation.min_nodes,
    )
    dataset = load_images(config)
    if wants_metrics(config) and config.eval.extractor != "classifier":
        # The classifier is trained on the images; the others come from files that may be missing.
        build_extractor(config, dataset.train, "cpu")
    check_startable(config)
    print(f"results: {run_path(config)}", flush=True)
    if config.train.mode == "centralized":
        train_here(config)
    else:
        partition_dataset(config, dataset, config.federation.num_supernodes)
        submit(config, overrides)
    print(f"results: {run_path(config)}", flush=True)


def train_here(config: Config) -> None:
    """Train the centralised baseline in this process."""
    directory = RunDirectory(config)
    try:
        CentralizedRun(directory).run()
    finally:
        directory.close()


def submit(config: Config, overrides: list[str]) -> None:
    """Submit a federated run to a SuperLink of its own and follow it to its end.

    Args:
        config: of the run, with absolute folders.
        overrides: the Hydra overrides that it was composed from.

    Raises:
        RuntimeError: the run failed.
    """
    # The ServerApp composes the configuration again, in another working directory.
    settled = {
        "output_dir": config.output_dir,
        "run_name": config.run_name,
        "data.root": config.data.root,
        "resume": config.resume,
        "data.cache_dir": config.data.cache_dir,
    }
    job = [o for o in overrides if o.split("=")[0].lstrip("+") not in settled]
    job += [hydra_override(key, value) for key, value in settled.items()]
    with private_superlink() as superlink:
        follow(superlink, config, job)


def follow(superlink: SuperLink, config: Config, overrides: list[str]) -> None:
    """Run the app on a SuperLink until it has finished.

    Raises:
        RuntimeError: it did not finish as completed.
    """
    federation = config.federation
    run_config = superlink.folder / "run-config.toml"
    # Flower loses keys where --run-config is repeated, so everything goes into one.
    run_config.write_text(f"overrides = {json.dumps(shlex.join(overrides))}\n", encoding="utf-8")
    federation_config = (
        f"num-supernodes={federation.num_supernodes} "
        f"client-resources-num-cpus={federation.cpus_per_client} "
        f"client-resources-num-gpus={gpus_per_client(config)}"
    )
    command = ["flwr", "run", str(CHECKOUT), CONNECTION, "--stream"]
    command += ["--run-config", str(run_config), "--federation-config", federation_config]
    submitted = subprocess.run(command, env=superlink.environment, check=False)
    if submitted.returncode != 0:
        raise RuntimeError(f"`flwr run` ended with status {submitted.returncode}")
    # `flwr run` ends with 0 when the run has failed as well; the list of runs knows.
    while not (run := only_run(superlink))["status"].startswith("finished"):
        time.sleep(POLL_SECONDS)
    if run["status"] != "finished:completed":
        raise RuntimeError(f"the run ended as {run['status']}: {run.get('status-details', '')}")


def gpus_per_client(config: Config) -> float:
    """Return what to reserve for a client; Ray hides every GPU from one that reserves none."""
    if config.federation.gpus_per_client is not None:
        return config.federation.gpus_per_client
    return 1.0 if select_device(config.train.device).type == "cuda" else 0.0


def only_run(superlink: SuperLink) -> dict[str, Any]:
    """Return what Flower says of the one run of a private SuperLink.

    Raises:
        RuntimeError: Flower does not answer as expected.
    """
    command = ["flwr", "list", CONNECTION, "--format", "json"]
    listed = subprocess.run(
        command, env=superlink.environment, capture_output=True, text=True, check=False
    )
    try:
        runs: list[dict[str, Any]] = json.loads(listed.stdout)["runs"]
        return runs[0]
    except (json.JSONDecodeError, KeyError, IndexError) as error:
        raise RuntimeError(f"`flwr list` said {listed.stdout!r} {listed.stderr!r}") from error
