"""A pipeline of Diffusers that draws images of the classes that it is asked for.

It holds no scheduler: the network takes log-SNRs and no timesteps, and the steps of the samplers
that the model was measured with stand in `steps.py` beside this file.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from task.steps import draw_by_settings


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
        generator: torch.Generator | None = None,
        output_type: str = "pil",
        **sampling: Any,
    ) -> ImagePipelineOutput:
        """Draw images.

        Args:
            classes: to draw, one or several, by name or by place in the settings' "classes";
                None: every class.
            num_images: of each class, > 0.
            generator: of the noise.
            output_type: "pil"; "np", [N, H, W, C] in [0, 1]; "pt", [N, C, H, W] in [0, 1].
            **sampling: what to change of the settings' "sampling", see `draw_by_settings`.

        Returns:
            The images, class after class.

        Raises:
            ValueError: see `labels` and `draw_by_settings`.
        """
        images = self.draw(self.labels(classes, num_images), generator, **sampling)
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

    @torch.no_grad()
    def draw(
        self, labels: Tensor, generator: torch.Generator | None = None, **sampling: Any
    ) -> Tensor:
        """Draw an image of each label, [N, C, H, W] float32, about [-1, 1]; see `__call__`."""
        settings = self.config.settings
        size = settings["image_size"]
        shape = (len(labels), settings["channels"], size, size)

        def predict(x_t: Tensor, log_snr: float, labels: Tensor) -> Any:
            return self.unet(x_t, torch.full_like(labels, log_snr, dtype=torch.float32), labels)

        images: Tensor = draw_by_settings(
            settings,
            predict,
            labels,
            draw_noise=partial(randn_tensor, shape, generator=generator, device=labels.device),
            **sampling,
        )
        return images
