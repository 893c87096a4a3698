"""A pipeline of Diffusers that draws images of the classes that it is asked for.

It holds no scheduler: the network takes log-SNRs and no timesteps, and the steps of the samplers
that the model was measured with stand in `samplers.py` beside this file.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from task.generators.diffusion.samplers import draw_by_settings
from task.generators.noise import generation_noise


class ClassConditionalPipeline(DiffusionPipeline):
    """Draws images: `pipe(classes=["a", "b"], num_images=4).images`."""

    # A default makes Diffusers read the settings from model_index.json and look for no folder.
    def __init__(self, unet: Any, settings: dict[str, Any] | None = None) -> None:
        """Take a `ClassConditionalUNet` and what an export's config.json says."""
        super().__init__()
        self.register_modules(unet=unet)
        self.register_to_config(settings=settings)

    def __call__(
        self,
        classes: str | int | Sequence[str | int] | None = None,
        num_images: int = 1,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        **sampling: Any,
    ) -> ImagePipelineOutput:
        """Draw images.

        Args:
            classes: to draw, one or several, by name or by place in the settings' "classes";
                None: every class.
            num_images: of each class, > 0.
            seed: of the noise, as in `feddm generate`; None: the settings' "seed".
            generator: of other noise, in place of a seed.
            output_type: "pil"; "np", [N, H, W, C] in [0, 1]; "pt", [N, C, H, W] in [0, 1].
            **sampling: what to change of the settings' "sampling", see `draw_by_settings`.

        Returns:
            The images, class after class.

        Raises:
            ValueError: see `labels` and `draw_by_settings`.
        """
        labels = self.labels(classes, num_images)
        images = self.draw(labels, self.noise_source(labels, seed, generator), **sampling)
        pictures = VaeImageProcessor().postprocess(images, output_type=output_type)
        return ImagePipelineOutput(images=pictures)

    def labels(self, classes: str | int | Sequence[str | int] | None, num_images: int) -> Tensor:
        """Number the classes of the images to draw, [N] int64; arguments as in `__call__`.

        Raises:
            ValueError: a class is unknown, or there is nothing to draw.
        """
        known = list(self.config.settings["classes"])
        asked = [classes] if isinstance(classes, str | int) else classes
        numbers = [
            known.index(one) if one in known else one for one in (known if asked is None else asked)
        ]
        if not numbers or any(number not in range(len(known)) for number in numbers):
            raise ValueError(
                f"classes must be of {', '.join(known)}, or numbers from 0 to {len(known) - 1}, "
                f"at least one, got {classes!r}"
            )
        if num_images < 1:
            raise ValueError(f"num_images must be at least 1, got {num_images!r}")
        return torch.tensor(numbers, device=self.unet.device).repeat_interleave(num_images)

    def noise_source(
        self, labels: Tensor, seed: int | None, generator: torch.Generator | None
    ) -> Callable[[], Tensor]:
        """Make what draws noise for labels, [N] int64, new at every call; see `__call__`.

        Raises:
            ValueError: there are a seed and a generator.
        """
        settings = self.config.settings
        shape = (settings["channels"], settings["image_size"], settings["image_size"])
        if generator is not None:
            if seed is not None:
                raise ValueError(f"seed must be None beside a generator, got {seed!r}")
            whole = (len(labels), *shape)
            return partial(randn_tensor, whole, generator=generator, device=labels.device)
        seed = settings["seed"] if seed is None else seed
        runs = [(label, len(list(same))) for label, same in groupby(labels.tolist())]
        sources = [generation_noise(range(n), shape, seed=seed, label=label) for label, n in runs]

        def draw_noise() -> Tensor:
            return torch.from_numpy(np.concatenate([draw() for draw in sources])).to(labels.device)

        return draw_noise

    @torch.no_grad()
    def draw(self, labels: Tensor, draw_noise: Callable[[], Tensor], **sampling: Any) -> Tensor:
        """Draw an image of each label, [N, C, H, W] float32, about [-1, 1].

        Args:
            labels: [N] int64.
            draw_noise: see `noise_source`.
            **sampling: see `draw_by_settings`.
        """

        def predict(x_t: Tensor, log_snr: float, labels: Tensor) -> Any:
            return self.unet(x_t, torch.full_like(labels, log_snr, dtype=torch.float32), labels)

        images: Tensor = draw_by_settings(
            self.config.settings,
            predict,
            labels,
            draw_noise=draw_noise,
            **sampling,
        )
        return images
