"""Training steps beside denoising-diffusion-pytorch and diffusers, on their nets and on ours.

`attention_unet` is feddm's training of the very network of denoising-diffusion-pytorch.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from task.training.devices import autocast, select_device
from tests.benchmarks.contestants import Contestant, take_turns, timed
from tests.benchmarks.feddm import PAPER, Feddm
from tests.benchmarks.flops import count_flop
from tests.benchmarks.report import Figures, available_cores

IMAGE_SIZE = 32
PRECISIONS = ("float32", "bfloat16")
# The network that denoising_diffusion_pytorch.own trains, by feddm, which also averages it. A step
# of either is on one batch.
SAME_NETWORK = (
    *("data=cifar10", "model=attention_unet", "model.class_conditional=false"),
    *("diffusion=survey", "data.horizontal_flip=false"),
    *("train.accumulation=1", "train.clip_norm=null"),
)
Loss = Callable[[Tensor], Tensor]


def denoising_diffusion_pytorch(
    device: torch.device, *, dim_mults: tuple[int, ...]
) -> tuple[nn.Module, Loss, Any]:
    """Make the network, the loss and the optimizer of its README and its Trainer.

    Args:
        device: that trains.
        dim_mults: channels of each level over the first one's 64; its README has (1, 2, 4, 8).
    """
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    unet = Unet(dim=64, dim_mults=dim_mults, flash_attn=device.type == "cuda").to(device)
    diffusion = GaussianDiffusion(unet, image_size=IMAGE_SIZE, timesteps=1000).to(device)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=1e-4, betas=(0.9, 0.99))
    return diffusion, diffusion, optimizer


def diffusers(device: torch.device, *, width: int, layers: int) -> tuple[nn.Module, Loss, Any]:
    """Make the network of google/ddpm-cifar10-32, and loss and optimizer of its training example.

    Args:
        device: that trains.
        width: channels at full resolution; that network has 128.
        layers: residual blocks of a level; that network has 2.
    """
    from diffusers import DDPMScheduler, UNet2DModel

    down, up = "DownBlock2D", "UpBlock2D"
    unet = UNet2DModel(
        sample_size=IMAGE_SIZE,
        layers_per_block=layers,
        block_out_channels=(width, 2 * width, 2 * width, 2 * width),
        down_block_types=(down, "AttnDownBlock2D", down, down),
        up_block_types=(up, up, "AttnUpBlock2D", up),
        attention_head_dim=None,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    ).to(device)
    scheduler = DDPMScheduler(num_train_timesteps=1000)

    def loss(images: Tensor) -> Tensor:
        x_start, noise = 2 * images - 1, torch.randn_like(images)
        timesteps = torch.randint(1000, (len(images),), device=device)
        noisy = scheduler.add_noise(x_start, noise, timesteps)
        output = unet(noisy, timesteps, return_dict=False)[0]
        return nn.functional.mse_loss(output.float(), noise)

    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
    )
    return unet, loss, optimizer


# Each library's usual network, and a smaller one of about the operations of the paper's per image,
# in widths that processors like.
NETS = {
    "denoising_diffusion_pytorch": {
        "own": partial(denoising_diffusion_pytorch, dim_mults=(1, 2, 4, 8)),
        "matched": partial(denoising_diffusion_pytorch, dim_mults=(1, 2, 2, 4)),
    },
    "diffusers": {
        "own": partial(diffusers, width=128, layers=2),
        "matched": partial(diffusers, width=64, layers=1),
    },
}


class Peer:
    """The networks of a library, trained step by step as its users do."""

    def __init__(self, library: str, device: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self.device = select_device(device)
        self.makers = NETS[library]
        self.made = {
            (net, precision): make(self.device)
            for (net, make), precision in product(self.makers.items(), PRECISIONS)
        }

    def flop_per_image(self, net: str) -> int:
        """Count what a training step computes for an image."""
        _, loss, _ = self.makers[net](torch.device("cpu"))
        return count_flop(lambda: loss(torch.rand(1, 3, IMAGE_SIZE, IMAGE_SIZE)).backward())

    def train(self, batch_size: int, steps: int, net: str, precision: str) -> float:
        """Train for some steps and return the images per second.

        Args:
            batch_size: images of a step.
            steps: how many.
            net: "own" or "matched".
            precision: "float32" as it comes, or "bfloat16": autocast over channels_last weights.
        """
        model, loss, optimizer = self.made[net, precision]
        images = torch.rand(batch_size, 3, IMAGE_SIZE, IMAGE_SIZE, device=self.device)
        if precision == "bfloat16":
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            images = images.to(memory_format=torch.channels_last)

        def work() -> None:
            for _ in range(steps):
                with autocast(self.device, precision):
                    error = loss(images)
                optimizer.zero_grad()
                error.backward()
                optimizer.step()

        return steps * batch_size / timed(self.device, work)


def measure(
    *,
    full: bool,
    device: str,
    overrides: Sequence[str] = PAPER,
    batch_size: int | None = None,
    turns: int | None = None,
    num_threads: int | None = None,
) -> Figures:
    """Let the project and its peers train in turns.

    Args:
        full: whether to take 5 turns and not 2, where `turns` does not say.
        device: auto, cpu, cuda or cuda:N.
        overrides: of the project's network.
        batch_size: of all; None: 16 on a CPU, 128 on a GPU.
        turns: that count.
        num_threads: of each; None: a thread per core.
    """
    missing = [library for library in NETS if find_spec(library) is None]
    if missing:
        return {
            "peers.skipped": f"{' and '.join(missing)} not installed; `uv sync --group peers` or "
            "`pip install --group peers` lets it measure them, too"
        }
    on_gpu = select_device(device).type == "cuda"
    batch, steps = batch_size or (128 if on_gpu else 16), 20 if on_gpu else 1
    threads = num_threads or available_cores()
    with ExitStack() as stack:
        # Every call says its precision, so none is settled.
        settled = (*overrides, "train.precision=float32")
        ours = stack.enter_context(Contestant(Feddm, settled, device, threads))
        same = stack.enter_context(Contestant(Feddm, SAME_NETWORK, device, threads))
        peers = {
            library: stack.enter_context(Contestant(Peer, library, device, threads))
            for library in NETS
        }
        feddm = {"feddm.own": ours, "feddm.attention_unet": same}
        flops = {name: each.call("flop_per_image") for name, each in feddm.items()}
        trains = {name: partial(each.call, "train", batch, steps) for name, each in feddm.items()}
        settled_precision = same.call("settled_precision")
        for library, nets in NETS.items():
            for net in nets:
                name, peer = f"{library}.{net}", peers[library]
                flops[name] = peer.call("flop_per_image", net)
                trains[name] = partial(peer.call, "train", batch, steps, net)
        players = {
            f"{name}.{precision}": partial(train, precision)
            for (name, train), precision in product(trains.items(), PRECISIONS)
        }
        matmul = partial(ours.call, "matmul_rate")
        rates = take_turns({**players, "matmul": matmul}, turns or (5 if full else 2))
    figures = _figures({name: median(scores) for name, scores in rates.items()}, flops, batch)
    return figures | same_network(figures, settled_precision)


def same_network(figures: Figures, precision: str) -> Figures:
    """Compare how fast feddm and denoising-diffusion-pytorch train the network of the latter.

    Args:
        figures: images per second of both.
        precision: what feddm trains it in where nobody says another; the package's is float32.

    Returns:
        feddm's images per second over the package's, in each precision and each in its own.
    """

    def rate(name: str, precision: str) -> float:
        return float(figures[f"peers.{name}.{precision}.images_per_second"])

    ours, theirs = "feddm.attention_unet", "denoising_diffusion_pytorch.own"
    return {
        **{
            f"peers.attention_unet.{each}.ratio": rate(ours, each) / rate(theirs, each)
            for each in PRECISIONS
        },
        "peers.attention_unet.default_precision": precision,
        "peers.attention_unet.default.ratio": rate(ours, precision) / rate(theirs, "float32"),
    }


def _figures(rates: dict[str, float], flops: dict[str, int], batch_size: int) -> Figures:
    matmul = rates.pop("matmul")
    figures: Figures = {
        "peers.batch_size": batch_size,
        "peers.matmul_tflops": matmul / 1e12,
        "peers.setup": "feddm as its runs train (fused Adam, channels_last, kept memory, compiled "
        "on a GPU); peers eager with their optimizers, bfloat16 with channels_last, without EMA, "
        "clipping and loader",
        **{f"peers.version_{library}": version(library) for library in NETS},
    }
    for name, rate in rates.items():
        flop = flops[name.rpartition(".")[0]]
        figures |= {
            f"peers.{name}.images_per_second": rate,
            f"peers.{name}.gflop_per_image": flop / 1e9,
            f"peers.{name}.tflops": rate * flop / 1e12,
            f"peers.{name}.share_of_matmul_peak": rate * flop / matmul,
        }
    return figures | verdicts(figures)


def verdicts(figures: Figures) -> Figures:
    """Say of each peer and precision whether it computes faster than feddm in the same one."""
    said: Figures = {}
    for (library, nets), precision in product(NETS.items(), PRECISIONS):
        ours = float(figures[f"peers.feddm.own.{precision}.tflops"])
        ratios = {
            net: float(figures[f"peers.{library}.{net}.{precision}.tflops"]) / ours for net in nets
        }
        said[f"peers.{library}_{precision}"] = "; ".join(
            f"{'ahead' if ratio > 1 else 'behind'} on its {net} network, "
            f"{ratio:.2f} times feddm's FLOP/s"
            for net, ratio in ratios.items()
        )
    return said
