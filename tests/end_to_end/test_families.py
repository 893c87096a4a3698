"""Every family of generators: resumed to the bit, and through the real commands."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from client_app import workspace
from task.config import load_config
from task.generators.registry import initial_generator
from task.runs.records import TEST, TRAIN, read_records
from task.runs.run import Run
from tests.helpers import SMALL_RUN, ClientNodes, Network, played, simulated
from tests.processes import SMALL, feddm, feddm_train

# Preset, values that make it small, what it measures of each training, and the parts of its loss.
FAMILIES = {
    "attention_unet": (
        [
            *("diffusion=survey", "diffusion.num_inference_steps=4"),
            *("model.width=8", "model.width_multipliers=[1,2]"),
            "audit.at_end=false",  # which takes minutes, and seconds in the other families
        ],
        set(),
        set(),
    ),
    "conv_vae": (["model.hidden_dim=64"], {"reconstruction", "kl"}, {"reconstruction", "kl"}),
    "stylegan2_ada_tiny": (
        [
            *("model.channel_max=8", "model.latent_dim=8", "federation.local=[discriminator]"),
            *("model.ada_target=-0.99", "model.ada_kimg=1"),  # augments from the first round on
        ],
        {"discriminator_loss", "generator_loss", "augmentation_probability", "real_sign"},
        set(),
    ),
    "resnet_gan": (
        ["model.width=2", "model.latent_dim=8"],
        {"discriminator_loss", "generator_loss", "real_sign"},
        set(),
    ),
    "small_gan": (
        ["model.width=2", "model.latent_dim=8", "model.perceptual_weight=0"],
        {"reconstruction", "latent_distance"},
        set(),
    ),
}
FEW = ["data.image_size=16", "data.test_fraction=0.9"]
OTHERWISE = ("model", "diffusion", "federation.r", "eval.num_images")
COMMON = [word for word in SMALL if not word.startswith(OTHERWISE)]


def write_pretrained(file: Path) -> Path:
    """Write what a run of model=resnet_gan would, of ten digits, without training."""
    config = load_config(["model=resnet_gan", *FAMILIES["resnet_gan"][0]])
    save_file(initial_generator(config).state_dict(), file)
    return file


def small_words(preset: str, folder: Path) -> list[str]:
    """Return what makes a family small, with the file that it trains on top of."""
    small = ["model.network=small"] if preset == "classifier" else FAMILIES[preset][0]
    if preset == "small_gan":
        small = [*small, f"model.pretrained={write_pretrained(folder / 'base.safetensors')}"]
    return [f"model={preset}", *small, *FEW]


def check_run(preset: str, whole: Path) -> None:
    """Check what a family measures, that others can draw from its run, and that it is reported."""
    _, measures, parts = FAMILIES[preset]
    generator = Run(whole).generator
    assert not any(generator.stays(name) for name in load_file(whole / "model.safetensors"))
    records = read_records(whole / "metrics.jsonl")
    for reference, names in ((TRAIN, measures), (TEST, parts)):
        for name in names:
            assert set(records.series(name, reference=reference)) <= {1, 2}
            assert records.last(name, reference=reference) is not None, name
    drawn, exported = whole.parent / "drawn", whole.parent / "exported"
    for command in (
        ("generate", whole, "--num", 2, "--out", drawn),
        ("export", whole, "--to", "safetensors", "--out", exported),
    ):
        done = feddm(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    with Image.open(drawn / "1" / "000001.png") as image:
        assert image.size == (16, 16)
    assert generator.title in (whole / "report.html").read_text(encoding="utf-8")
    assert (exported / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize("preset", [*FAMILIES, "classifier"])
def test_family_resumes_to_the_bit_draws_and_is_exported(preset: str, tmp_path: Path) -> None:
    words = small_words(preset, tmp_path)
    left_out = ("model", "diffusion", *["eval.num_images"] * (preset == "classifier"))
    common = {k: v for k, v in SMALL_RUN.items() if not k.startswith(left_out)}
    common |= {"overrides": " ".join(words), "output_dir": str(tmp_path)}
    del common["data.image_size"], common["data.test_fraction"]
    for name, rounds, resume in (("whole", 2, False), ("parts", 1, False), ("parts", 2, True)):
        workspace._build_workspace.cache_clear()  # another process
        run = {**common, "run_name": name, "federation.rounds": rounds, "resume": resume}
        nodes = ClientNodes(Network(), run, *simulated(2))
        played(run, nodes, nodes)
    expected, found = (
        load_file(tmp_path / name / "model.safetensors") for name in ("whole", "parts")
    )
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    if preset == "classifier":
        records = [read_records(tmp_path / n / "metrics.jsonl") for n in ("whole", "parts")]
        assert 0 <= records[0].series("accuracy", reference=TEST)[2] <= 1
        assert all(each.series("accuracy", reference=TEST) for each in records)
    else:
        check_run(preset, tmp_path / "parts")


# What a client keeps between rounds, and a file that all processes read: the processes of a real
# simulation may go about both in another way than one process does.
@pytest.mark.slow
@pytest.mark.parametrize("preset", ["stylegan2_ada_tiny", "small_gan"])
def test_family_trains_in_a_real_simulation(preset: str, tmp_path: Path) -> None:
    # A relative path, as people type it: processes of the simulation run in other folders.
    small = [word.replace(f"{tmp_path}/", "") for word in small_words(preset, tmp_path)]
    words = [*small, *COMMON, "run_name=whole", "federation.rounds=2", "eval.num_images=0"]
    done = feddm_train(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    run = Run(tmp_path / "runs" / "whole")
    assert run.rounds_done == 2
    assert not any(run.generator.stays(name) for name in load_file(run.path / "model.safetensors"))
    assert run.generator.title in (run.path / "report.html").read_text(encoding="utf-8")
    for name in FAMILIES[preset][1]:
        assert run.records.last(name, reference=TRAIN) is not None, name
