"""The generator of the paper: a network that denoises, its loss, and its samplers."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from task.checks import require
from task.config import AttentionUNetConfig, Config, require_diffusion
from task.generators.base import Advance, Batch, Generator, NoiseSource, Projection, Restore
from task.generators.diffusion.attention_unet import AttentionUNet
from task.generators.diffusion.membership import member_scores, noise_predictor
from task.generators.diffusion.network import UNet
from task.generators.diffusion.noise_schedule import build_schedule
from task.generators.diffusion.objective import DiffusionObjective
from task.generators.diffusion.repaint import (
    JUMP_LENGTH,
    NUM_RESAMPLES,
    repaint_moves,
    repaint_sample,
)
from task.generators.diffusion.samplers import Predict, guide, sample_along, sampling_steps

# Of the network's tensors, which no file and no message has.
PREFIX = "network."
# Of what a moving average adds to them, and which files and messages do have.
AVERAGE = "average."
AVERAGE_WEIGHT = "average_weight"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How images are drawn; arguments as in `task.generators.diffusion.samplers`.

    Attributes:
        sampler: "ddpm", "ddim" or "dpmpp_2m".
        num_inference_steps: 1 to T.
        eta: of "ddim".
        variance: of "ddpm".
        clip_x_start: whether to clamp each prediction of the clean images to [-1, 1].
        guidance_scale: >= 0; 1: no guidance.
    """

    sampler: str
    num_inference_steps: int
    eta: float
    variance: str
    clip_x_start: bool
    guidance_scale: float


class Diffusion(Generator):
    """A denoising diffusion model.

    Its `state_dict` names the tensors of the network without a prefix.

    Attributes:
        network: predicts from noisy images, see `task.generators.diffusion.objective`.
        average: moving average of the network, from which it draws; None: from the network itself.
        average_weight: [1] float32, the share of the average that is of training: 1 - decay^steps.
            It travels with the average, so that the mean over clients of both is that of a run.
        objective: the loss of a batch.
        sampling: how `sample` draws.
    """

    title = "diffusion model"
    private = frozenset({"adam"})
    average_weight: Tensor

    def __init__(
        self,
        network: nn.Module,
        objective: DiffusionObjective,
        sampling: Sampling,
        *,
        image_shape: tuple[int, int, int],
        null_label: int | None = None,
        ema_decay: float | None = None,
        network_arguments: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Join a network, a loss and a sampler.

        Args:
            network: a model of the prediction type of the objective.
            objective: the loss of a batch.
            sampling: how images are drawn.
            image_shape: (C, H, W).
            null_label: what stands for "no class", None where there is none.
            ema_decay: of the moving average of the network, in each step; None: there is none.
            network_arguments: what the network was made with, for an export.

        Raises:
            ValueError: a word of `sampling` is unknown, a number out of range, or guidance is
                asked of a network without a null label.
        """
        super().__init__()
        require(
            sampling.guidance_scale == 1 or null_label is not None,
            "guidance_scale",
            "1 for a network without a null label",
            sampling.guidance_scale,
        )
        self.network, self.objective, self.sampling = network, objective, sampling
        self.image_shape, self.null_label = image_shape, null_label
        self.average: nn.Module | None = None
        self._ema_decay = ema_decay
        if ema_decay is not None:
            self.average = copy.deepcopy(network).requires_grad_(False)
            self.register_buffer(AVERAGE_WEIGHT, torch.zeros(1))
        self.parts = {
            part: (*beginnings, *(AVERAGE + each for each in beginnings if ema_decay is not None))
            for part, beginnings in getattr(network, "parts", {}).items()
        }
        self._network_arguments = dict(network_arguments)
        self._alphas_cumprod: list[float] = objective.schedule.alphas_cumprod.tolist()
        self._steps = sampling_steps(
            self._alphas_cumprod,
            sampler=sampling.sampler,
            num_inference_steps=sampling.num_inference_steps,
            eta=sampling.eta,
            variance=sampling.variance,
        )
        self.evaluations_per_image = len(self._steps) * (1 if sampling.guidance_scale == 1 else 2)
        self.register_state_dict_post_hook(_without_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_with_prefix)  # type: ignore[no-untyped-call]

    def optimizers(self, lr: float) -> dict[str, torch.optim.Optimizer]:
        """Make the Adam of the paper."""
        return {"adam": torch.optim.Adam(self.network.parameters(), lr=lr, fused=True)}

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the average towards the network.

        The first step takes it to the network: what the network was before it was trained has no
        share in it, however short the training.
        """
        if self.average is None or self._ema_decay is None:
            return
        # Lengthened without reading it, for which a GPU would have to be waited for.
        self.average_weight.mul_(self._ema_decay).add_(1 - self._ema_decay)
        share = (1 - self._ema_decay) / self.average_weight[0]
        averages: list[Tensor] = [*self.average.parameters()]
        weights: list[Tensor] = [*self.network.parameters()]
        moves = list(torch._foreach_sub(weights, averages))
        torch._foreach_mul_(moves, share)
        torch._foreach_add_(averages, moves)

    @property
    def drawing(self) -> nn.Module:
        """The network that images are drawn with."""
        return self.network if self.average is None else self.average

    def losses(self, batch: Batch, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        """Yield the losses of a batch at random times."""
        yield "adam", self._losses(self.objective, batch, rng)

    def example_losses(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Return the loss of each image at a random time, with its own label."""
        return {"loss": self._losses(replace(self.objective, label_dropout=0.0), batch, rng)}

    @torch.inference_mode()
    def member_scores(self, batch: Batch, rng: torch.Generator) -> dict[str, Tensor]:
        """Attack by losses at several noise levels and by what the literature has."""
        predict = noise_predictor(self.drawing, self.objective.prediction_type)
        return member_scores(predict, batch.images, batch.labels, rng, null_label=self.null_label)

    def _losses(self, objective: DiffusionObjective, batch: Batch, rng: torch.Generator) -> Tensor:
        drawn = (batch.images, *objective.draw(batch.images, batch.labels, rng))
        return objective.losses(self.network, *(each[batch.part] for each in drawn))

    @torch.inference_mode()
    def sample(
        self, labels: Tensor, noise: NoiseSource, *, advance: Advance = lambda number: None
    ) -> Tensor:
        """Draw an image for each label along the steps of the sampler."""
        images: Tensor = sample_along(
            self._steps,
            self.predicting(labels, advance),
            draw_noise=noise,
            prediction_type=self.objective.prediction_type,
            clip_x_start=self.sampling.clip_x_start,
        )
        return images

    @torch.inference_mode()
    def sampling_step(self, labels: Tensor, noise: NoiseSource) -> Tensor:
        """Evaluate the network once."""
        log_snr = torch.zeros(len(labels), device=labels.device)
        output: Tensor = self.drawing(noise(), log_snr, labels)
        return output

    def predicting(self, labels: Tensor, advance: Advance = lambda number: None) -> Predict:
        """Let the network predict for labels at one log-SNR for all images, in float32.

        With guidance, away from "no class" and towards the label; see `guide`.
        """
        scale, both = self.sampling.guidance_scale, labels
        if scale != 1 and self.null_label is not None:
            both = torch.cat([labels, torch.full_like(labels, self.null_label)])

        def predict(x_t: Tensor, log_snr: float) -> Tensor:
            inputs = x_t if scale == 1 else torch.cat([x_t, x_t])
            log_snrs = both.new_full((len(both),), log_snr, dtype=torch.float32)
            output: Tensor = self.drawing(inputs, log_snrs, both).to(x_t.dtype)
            advance(len(both))
            if scale == 1:
                return output
            conditional, unconditional = output.chunk(2)
            guided: Tensor = guide(conditional, unconditional, scale)
            return guided

        return predict

    def restoring(
        self, *, jump_length: int | None = None, num_resamples: int | None = None
    ) -> Restore:
        """Make what draws by RePaint; None: its own numbers, or less where there are few steps."""
        num_steps = self.sampling.num_inference_steps
        if jump_length is None:
            jump_length = max(1, min(JUMP_LENGTH, num_steps - 1))
        if num_resamples is None:
            num_resamples = NUM_RESAMPLES if num_steps > 1 else 1
        return partial(self._restore, [*repaint_moves(num_steps, jump_length, num_resamples)])

    @torch.inference_mode()
    def _restore(
        self,
        moves: Sequence[tuple[int, int]],
        labels: Tensor,
        noise: NoiseSource,
        known: Tensor,
        projection: Projection,
    ) -> Tensor:
        return repaint_sample(
            self.predicting(labels),
            moves,
            alphas_cumprod=self._alphas_cumprod,
            prediction_type=self.objective.prediction_type,
            clip_x_start=self.sampling.clip_x_start,
            known=known,
            projection=projection,
            draw_noise=noise,
        )

    def description(self) -> dict[str, object]:
        """Say how it is noised, what it predicts, how it is trained, and how it draws."""
        objective, schedule = self.objective, self.objective.schedule
        steps, scale = len(self._steps), self.sampling.guidance_scale
        guidance = f", guidance scale {scale:g}" * (scale != 1)
        return {
            "schedule": f"{schedule.name}, {schedule.num_timesteps} timesteps",
            "prediction type": objective.prediction_type,
            "loss": f"{objective.loss_weighting} weighting, {objective.loss_reduction} over pixels",
            "label dropout": objective.label_dropout,
            "sampler": f"{self.sampling.sampler}, {steps} steps{guidance}",
            **({} if self.average is None else {"drawn from": self._average_in_words()}),
        }

    def _average_in_words(self) -> str:
        return f"a moving average of the network over steps, decay {self._ema_decay:g}"

    def drawing_settings(self) -> dict[str, Any]:
        """Return what `task.generators.diffusion.samplers.draw_by_settings` reads."""
        return {
            "null_label": self.null_label,
            "network": self._network_arguments,
            "prediction_type": self.objective.prediction_type,
            "sampling": asdict(self.sampling),
            "alphas_cumprod": self._alphas_cumprod,
        }


def _without_prefix(_: nn.Module, state_dict: dict[str, Tensor], prefix: str, *__: Any) -> None:
    for name in [name for name in state_dict if name.startswith(prefix + PREFIX)]:
        state_dict[prefix + name.removeprefix(prefix + PREFIX)] = state_dict.pop(name)


def _with_prefix(_: nn.Module, state_dict: dict[str, Tensor], prefix: str, *__: Any) -> None:
    own = (prefix + AVERAGE, prefix + AVERAGE_WEIGHT)
    names = [name for name in state_dict if name.startswith(prefix) and not name.startswith(own)]
    for name in names:
        state_dict[prefix + PREFIX + name.removeprefix(prefix)] = state_dict.pop(name)


def build_diffusion(config: Config) -> Diffusion:
    """Make the diffusion model of a configuration, with weights from torch's global generator."""
    data, diffusion = config.data, require_diffusion(config)
    null_label = len(data.classes) if diffusion.label_dropout > 0 else None
    arguments = {
        "channels": data.channels,
        "num_classes": len(data.classes),
        "null_class": null_label is not None,
        **config.model.model_dump(exclude={"family"}),
    }
    objective = DiffusionObjective(
        schedule=build_schedule(config),
        prediction_type=diffusion.prediction_type,
        loss_weighting=diffusion.loss_weighting,
        loss_reduction=diffusion.loss_reduction,
        timestep_sampling=diffusion.timestep_sampling,
        label_dropout=diffusion.label_dropout,
        null_label=null_label,
    )
    sampling = Sampling(
        sampler=diffusion.sampler,
        num_inference_steps=diffusion.num_inference_steps or diffusion.num_timesteps,
        eta=diffusion.eta,
        variance=diffusion.variance,
        clip_x_start=diffusion.clip_x_start,
        guidance_scale=diffusion.guidance_scale,
    )
    network = AttentionUNet if isinstance(config.model, AttentionUNetConfig) else UNet
    return Diffusion(
        network(**arguments),
        objective,
        sampling,
        image_shape=(data.channels, data.image_size, data.image_size),
        null_label=null_label,
        ema_decay=diffusion.ema_decay,
        network_arguments=arguments,
    )
