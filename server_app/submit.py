"""`feddm-train`: one run, or a sweep of runs: federated through `flwr run`, or centralised."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from server_app.centralized_run import CentralizedRun
from server_app.evaluation import check_numbers, is_complete, wants_metrics
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
from task.parallel import count_processes
from task.partition import partition_dataset
from task.run_directory import (
    HOW_TO_RESUME,
    RunDirectory,
    check_startable,
    different_values,
    run_path,
)
from task.runs import find_runs
from task.train import is_compiled, select_device, torch_configured

CHECKOUT = CONF_DIR.parent
POLL_SECONDS = 1.0


def main() -> None:
    """Run `feddm-train`."""
    # So that a plain `kill` also ends the SuperLink that a job has started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    register_schema()
    OmegaConf.register_new_resolver("one_folder", one_folder, replace=True)
    try:
        sys.argv[1:] = name_by_what_is_swept(sys.argv[1:])
    except ValueError as error:
        print(f"feddm-train: {error}", file=sys.stderr)
        sys.exit(1)
    _hydra_main()


def one_folder(overrides: str, number: int) -> str:
    """Name the folder of a job of a sweep by the values that were swept, if any were."""
    return overrides.replace("/", "_") or f"job-{number}"


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
    fixed = {o.key_or_group for o in parsed if not o.is_sweep_override() and not o.is_delete()}
    for override in parsed:
        if override.key_or_group != "experiment":
            continue
        if override.is_sweep_override():
            swept = [str(choice) for choice in override.sweep_string_iterator()]
            sweeping = [name for name in swept if preset_sweep(name)]
            require(not sweeping, "experiment", "one at a time of those that sweep", swept)
        else:
            # A value of a preset's sweep that was given stays in the name of its run.
            fixed -= preset_sweep(str(override.value()))
    last = max((i for i, a in enumerate(arguments) if not a.startswith("-")), default=-1)
    own = f"hydra.job.config.override_dirname.exclude_keys=[{','.join(sorted(fixed))}]"
    # Among the other overrides: argparse refuses them on both sides of a flag.
    return [*arguments[: last + 1], own, *arguments[last + 1 :]]


def preset_sweep(experiment: str) -> set[str]:
    """Return the paths of the values that a preset sweeps by itself; none where it is unknown."""
    file = CONF_DIR / "experiment" / f"{experiment}.yaml"
    if not file.is_file():
        return set()
    params = OmegaConf.select(OmegaConf.load(file), "hydra.sweeper.params")
    return {str(key) for key in params or {}}


@hydra.main(config_path=str(CONF_DIR), config_name="config", version_base="1.3")
def _hydra_main(composed: DictConfig) -> None:
    job = HydraConfig.get()
    sweep = job.mode == RunMode.MULTIRUN
    try:
        config = config_from_hydra(composed)
        if sweep:
            # The runs of a sweep lie side by side in its folder.
            config = dataclasses.replace(
                config, output_dir=job.sweep.dir, run_name=job.sweep.subdir
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
    check_machine(config)
    require(
        config.federation.min_nodes <= config.federation.num_supernodes,
        "federation.min_nodes",
        f"at most federation.num_supernodes={config.federation.num_supernodes} in a simulation",
        config.federation.min_nodes,
    )
    check_images(config)
    check_startable(config)
    print(f"results: {run_path(config)}", flush=True)
    if config.train.mode == "centralized":
        train_here(config)
    else:
        submit(config, overrides)
    print(f"results: {run_path(config)}", flush=True)


def check_machine(config: Config) -> None:
    """Check that what trains is there; a simulation's own processes would say so late.

    Raises:
        ValueError: a GPU, GPUs enough or a compiler is missing.
    """
    device = select_device(config.train.device)
    is_compiled(config.train.compile, device, deterministic=config.train.deterministic)
    count_processes(config.train.num_processes, device, one_per_gpu=False)
    if config.train.mode == "federated" and device.type == "cuda":
        require(
            not device.index,
            "train.device",
            "auto, cpu or cuda in a simulation, where Ray shows each client its own GPU as cuda:0 "
            "(CUDA_VISIBLE_DEVICES=1 feddm-train ... leaves one to all of them)",
            config.train.device,
        )
        share = gpus_per_client(config)
        # Ray hides every GPU from a client that reserves none, and would train it on the CPU.
        require(
            0 < share <= 1 or share == int(share) > 0,
            "federation.gpus_per_client",
            "a fraction > 0 of a GPU or a whole number of them, or train.device=cpu",
            share,
        )
        num_gpus = torch.cuda.device_count()
        require(
            share <= num_gpus or "RAY_ADDRESS" in os.environ,
            "federation.gpus_per_client",
            f"at most {num_gpus}, the GPUs of this machine (or RAY_ADDRESS that of a cluster)",
            share,
        )
        require(
            (config.train.num_processes or 1) <= max(1, share),
            "train.num_processes",
            f"at most {max(1, int(share))}, the GPUs of a client's federation.gpus_per_client",
            config.train.num_processes,
        )


def check_images(config: Config) -> None:
    """Check the data set of a run, and what it is to be dealt out to and measured with.

    Raises:
        FileNotFoundError: the data set, or a file of the extractor, is not there.
        ValueError: they do not fit the configuration.
    """
    dataset = load_images(config)
    if config.train.mode == "federated":
        partition_dataset(config, dataset, config.federation.num_supernodes)
    if wants_metrics(config):
        check_numbers(config, dataset)
        # The classifier is trained on the images; the others come from files.
        if config.eval.extractor != "classifier":
            build_extractor(config, dataset.train, "cpu")


def train_here(config: Config) -> None:
    """Train the centralised baseline in this process."""
    directory = RunDirectory(config)
    deterministic = config.train.deterministic
    try:
        # All of it, because cuBLAS reads once whether it must be deterministic.
        with torch_configured(num_threads=torch.get_num_threads(), deterministic=deterministic):
            CentralizedRun(directory).run()
    finally:
        directory.close()
        # The clients of the next job of a sweep may share the GPU.
        torch.cuda.empty_cache()


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
