"""No step of any family waits for a number of the device."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from task.config import load_config
from task.generators.registry import initial_generator
from task.training import loop
from tests.benchmarks.families import write_pretrained

aten = torch.ops.aten
# Of these the result, or its shape, is known to the processor once the device has computed it.
WAITING = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
}
FAMILIES = {
    "tiny": ["model.width=8", "model.num_poolings=1"],
    "attention_unet": [
        *("diffusion=survey", "model.width=8", "model.width_multipliers=[1,2]"),
    ],
    "vae": ["model.hidden_dim=16"],
    "conv_vae": ["model.hidden_dim=16"],
    # Every batch has both regularizers, of which the first batch has one otherwise.
    "stylegan2_ada_tiny": [
        *("model.channel_max=8", "model.latent_dim=8", "model.r1_interval=1"),
        *("model.path_length_weight=2", "model.path_length_interval=1", "model.style_mixing=0.9"),
    ],
    "resnet_gan": ["model.width=2", "model.latent_dim=8"],
    "small_gan": ["model.width=2", "model.latent_dim=8", "model.perceptual_weight=0"],
}


class NoWaiting(TorchDispatchMode):
    """Refuses what would wait for a GPU, on a CPU as well."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        waits = func in WAITING or (
            func in (aten.index.Tensor, aten.index_put_.default)
            and any(each is not None and each.dtype == torch.bool for each in args[1])
        )
        if waits:
            raise AssertionError(f"a step waits for the device: {func}")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("preset", FAMILIES)
def test_step_of_a_family_never_waits_for_the_device(
    preset: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"model={preset}", *FAMILIES[preset], "data=digits", "data.image_size=16"]
    if preset == "small_gan":
        words.append(write_pretrained(tmp_path / "base.safetensors", words))
    config = load_config(words)
    generator = initial_generator(config)
    generator.prepare(8)
    steps, step = [], loop._step

    def watched(*arguments: Any) -> Tensor:
        with NoWaiting():
            steps.append(step(*arguments))
        return steps[-1]

    monkeypatch.setattr(loop, "_step", watched)
    loop.fit(
        generator,
        torch.zeros(8, 1, 16, 16, dtype=torch.uint8),
        torch.zeros(8, dtype=torch.int64),
        options=loop.fit_options(
            config, epochs=1, batch_size=4, accumulation=1, precision=precision
        ),
        optimizers=generator.optimizers(lr=1e-4),
        rng=torch.Generator().manual_seed(0),
    )
    assert len(steps) == 2


@pytest.mark.parametrize(
    "wait",
    [
        lambda numbers: numbers.sum().item(),
        lambda numbers: float(numbers[0]),
        lambda numbers: bool((numbers > 0).all()),
        lambda numbers: numbers[numbers > 0],
        lambda numbers: numbers.nonzero(),
    ],
)
def test_waiting_for_the_device_is_seen_on_a_cpu(wait: Any) -> None:
    with NoWaiting(), pytest.raises(AssertionError, match="a step waits for the device"):
        wait(torch.ones(3))
