"""Training steps of every family, as its runs take them, against the machine's limit."""

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median

from safetensors.torch import save_file

from task.config import load_config
from task.training.devices import select_device
from tests.benchmarks.contestants import Contestant, take_turns
from tests.benchmarks.feddm import PAPER, Feddm, new_model
from tests.benchmarks.report import Figures, available_cores

CIFAR10 = ("data=cifar10", "train.accumulation=1")
# By name of a preset: all at 32x32 with 3 channels and 10 classes.
FAMILIES: Mapping[str, Sequence[str]] = {
    "feddm": PAPER,
    "attention_unet": (*CIFAR10, "model=attention_unet", "diffusion=survey"),
    "vae": (*CIFAR10, "model=vae"),
    "conv_vae": (*CIFAR10, "model=conv_vae"),
    "stylegan2_ada": (*CIFAR10, "model=stylegan2_ada"),
    "resnet_gan": (*CIFAR10, "model=resnet_gan"),
    "small_gan": (
        *(*CIFAR10, "data.horizontal_flip=false", "model=small_gan"),
        # The network that it looks through is in a package that may not be installed.
        "model.perceptual_weight=0",
    ),
}
# A turn of the fast ones has more steps, to be timed at all.
STEPS_OF_THE_FAST = 20
FAST = {"vae", "conv_vae"}


def write_pretrained(file: Path, words: Sequence[str]) -> str:
    """Write what a run of model=resnet_gan would, without training, for model=small_gan.

    Args:
        file: that is written.
        words: of the run with model=small_gan; data and the size of the model are as there.

    Returns:
        The word that makes that run take it up.
    """
    shared = [word for word in words if word.startswith(("data", "model.width", "model.latent_d"))]
    save_file(new_model(load_config([*shared, "model=resnet_gan"])).state_dict(), file)
    return f"model.pretrained={file}"


def measure(
    *,
    full: bool,
    device: str,
    families: Mapping[str, Sequence[str]] = FAMILIES,
    batch_size: int | None = None,
    num_threads: int | None = None,
) -> Figures:
    """Let each family train alone, in the precision that it settles for.

    Args:
        full: whether to take 5 turns and not 2.
        device: auto, cpu, cuda or cuda:N.
        families: overrides of each.
        batch_size: of all; None: 16 on a CPU, 128 on a GPU.
        num_threads: of each; None: a thread per core.
    """
    on_gpu = select_device(device).type == "cuda"
    batch = batch_size or (128 if on_gpu else 16)
    figures: Figures = {"families.batch_size": batch}
    with tempfile.TemporaryDirectory() as folder:
        for name, overrides in families.items():
            words = [*overrides]
            if name == "small_gan":
                words.append(write_pretrained(Path(folder) / "base.safetensors", words))
            steps = STEPS_OF_THE_FAST if on_gpu or name in FAST else 1
            with Contestant(Feddm, words, device, num_threads or available_cores()) as family:
                rates = take_turns(
                    {
                        "train": partial(family.call, "train", batch, steps),
                        "matmul": partial(family.call, "matmul_rate"),
                    },
                    5 if full else 2,
                )
                flop = family.call("flop_per_image")
                precision = family.call("settled_precision")
            rate, matmul = median(rates["train"]), median(rates["matmul"])
            figures |= {
                f"families.{name}.precision": precision,
                f"families.{name}.images_per_second": rate,
                f"families.{name}.gflop_per_image": flop / 1e9,
                f"families.{name}.share_of_matmul_peak": rate * flop / matmul,
            }
    return figures
