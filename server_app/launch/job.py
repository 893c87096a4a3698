"""One run of `feddm-train`: federated through `flwr run`, or centralized in this process."""

import os
import shlex
import socket
from pathlib import Path

import torch

from server_app.centralized import CentralizedTraining
from server_app.dataset import load_images
from server_app.evaluation import check_numbers, is_complete, wants_metrics
from server_app.launch.plan import describe_plan, how_to_train_on
from server_app.launch.simulation import simulate
from task.checks import require
from task.code_version import ROOT
from task.config import (
    FITTED_VALUES,
    OWN_IMAGES,
    Config,
    flat_values,
    hydra_override,
    path_of,
)
from task.data import Dataset
from task.data.partition import partition_dataset
from task.evaluation.features import build_extractor
from task.generators.registry import check_drawn, initial_generator, weightless_generator
from task.runs.commands import as_toml
from task.runs.layout import LOG_FILE, is_begun, last_complete_round, run_path
from task.runs.resume import check_startable, different_values
from task.runs.run import find_runs
from task.runs.starting_weights import load_starting_weights
from task.runs.writer import RunWriter
from task.training.devices import (
    check_deterministic,
    is_compiled,
    select_device,
    torch_configured,
)
from task.training.distributed import count_processes

RAY_ANSWER_SECONDS = 10.0


def go_on_with_sweep(config: Config) -> Config:
    """Let `resume` of a sweep go on with the runs that it had begun and start the rest."""
    begun = (run_path(config) / "config.yaml").exists()
    return config.changed({"resume": config.resume and begun})


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


def run_job(config: Config, overrides: list[str]) -> None:
    """Run the job of a configuration to its end.

    Args:
        config: of the run, with absolute folders.
        overrides: the Hydra overrides that it was composed from.

    Raises:
        FileNotFoundError: the data set is not there.
        ValueError: the run cannot be started or resumed as configured.
        RuntimeError: the run failed.
    """
    if not (ROOT / "pyproject.toml").is_file():
        raise RuntimeError(
            f"feddm-train runs from a checkout of feddm, and {ROOT} is none; "
            "clone the repository and install it with `pip install -e .`"
        )
    check_machine(config)
    require(
        config.federation.min_nodes <= config.federation.num_supernodes,
        "federation.min_nodes",
        f"at most federation.num_supernodes={config.federation.num_supernodes} in a simulation",
        config.federation.min_nodes,
    )
    dataset = check_images(config)
    check_startable(config)
    print(f"results: {run_path(config)}", flush=True)
    for line in describe_plan(config, dataset):
        print(line, flush=True)
    if config.train.mode == "centralized":
        train_centralized(config)
    else:
        train_federated(config, overrides)
    if config.data.name in OWN_IMAGES:
        print(how_to_train_on(config), flush=True)
    print(f"results: {run_path(config)}", flush=True)


def check_machine(config: Config) -> None:
    """Check that what trains is there; a simulation's own processes would say so late.

    Raises:
        ValueError: a GPU, GPUs enough or a compiler is missing.
    """
    device = select_device(config.train.device)
    is_compiled(config.train.compile, device, deterministic=config.train.deterministic)
    count_processes(config.train.num_processes, device, one_per_gpu=False)
    if config.train.mode == "federated":
        check_ray()
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
            share <= num_gpus or asked_for_ray() is not None,
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


def asked_for_ray() -> str | None:
    """Return the address of the Ray to join, which the environment asks for; None for one's own."""
    address = os.environ.get("RAY_ADDRESS", "")
    return None if address in ("", "local") else address


def check_ray() -> None:
    """Check that the Ray that a simulation is to join is there; joining would wait for minutes.

    Raises:
        ValueError: nothing answers.
    """
    address = asked_for_ray()
    host, _, port = (address or "").rpartition(":")
    if address is None or not port.isdecimal():
        return  # "auto", or what Ray itself has to understand
    try:
        socket.create_connection((host.strip("[]"), int(port)), RAY_ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"RAY_ADDRESS must be the address of a running Ray, got {address!r} ({error}); unset "
            "it, and the simulation starts a Ray of its own"
        ) from error


def check_images(config: Config) -> Dataset:
    """Load the data set of a run, and check what it is to be dealt out to and measured with.

    Raises:
        FileNotFoundError: the data set, or a file of weights or of the extractor, is not there.
        ValueError: they do not fit the configuration.
    """
    generator = weightless_generator(config)
    if generator.reads_files:
        generator = initial_generator(config)
    check_deterministic(generator, config)
    check_drawn(generator, config)
    if config.train.start_from and last_complete_round(run_path(config)) == 0:
        load_starting_weights(generator, config.train.start_from)
    dataset = load_images(config)
    if config.train.mode == "federated":
        partition_dataset(config, dataset, config.federation.num_supernodes)
    if wants_metrics(config):
        check_numbers(config, dataset)
        # The classifier is trained on the images, and auto takes what is there; the others come
        # from files.
        if config.eval.extractor not in ("auto", "classifier"):
            build_extractor(config, dataset.train, "cpu")
    return dataset


def train_centralized(config: Config) -> None:
    """Train the centralized baseline in this process."""
    directory = RunWriter(config)
    deterministic = config.train.deterministic
    try:
        # All of it, because cuBLAS reads once whether it must be deterministic.
        with torch_configured(num_threads=torch.get_num_threads(), deterministic=deterministic):
            CentralizedTraining(directory).run()
    finally:
        directory.close()
        # The clients of the next job of a sweep may share the GPU.
        torch.cuda.empty_cache()


def train_federated(config: Config, overrides: list[str]) -> None:
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
        "data.patients": config.data.patients,
        "data.cache_dir": config.data.cache_dir,
        "train.start_from": config.train.start_from,
        "eval.inception_weights": config.eval.inception_weights,
        "eval.exported_program": config.eval.exported_program,
    }
    values = flat_values(config)
    if (frozen := config.model.frozen_file) is not None:
        settled |= {path: values[path] for path in (frozen.path_value, frozen.sha256_value)}
    if config.data.name in OWN_IMAGES:
        settled |= {path: values[path] for path in ("data.classes", *FITTED_VALUES)}
    job = [override for override in overrides if path_of(override) not in {*settled, "resume"}]
    job += [hydra_override(key, value) for key, value in settled.items()]
    federation = config.federation
    print("starting the simulation", flush=True)

    def run_config() -> str:
        """Say what is to be run, now; Flower loses keys where --run-config is repeated."""
        begun = hydra_override("resume", config.resume or is_begun(run_path(config)))
        return as_toml({"overrides": shlex.join([*job, begun])})

    simulate(
        ROOT,
        run_config=run_config,
        federation_config=f"num-supernodes={federation.num_supernodes} "
        f"client-resources-num-cpus={federation.cpus_per_client} "
        f"client-resources-num-gpus={gpus_per_client(config)}",
        log_file=run_path(config) / LOG_FILE,
    )


def gpus_per_client(config: Config) -> float:
    """Return what to reserve for a client; Ray hides every GPU from one that reserves none."""
    if config.federation.gpus_per_client is not None:
        return config.federation.gpus_per_client
    return 1.0 if select_device(config.train.device).type == "cuda" else 0.0
