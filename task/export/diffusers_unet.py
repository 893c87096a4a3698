"""The network as a model of Diffusers: its weights and arguments lie beside this file."""

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from task.generators.diffusion.network import UNet


class ClassConditionalUNet(UNet, ModelMixin, ConfigMixin):
    """Predicts from noisy images, log-SNRs and labels; see `UNet.forward`."""

    @register_to_config
    def __init__(
        self,
        *,
        channels: int,
        num_classes: int,
        null_class: bool,
        width: int,
        num_poolings: int,
        bottom_blocks: int,
        final_relu: bool,
        dropout: float,
        class_embedding_dim: int,
        fourier_features: int,
    ) -> None:
        """Make the network; arguments as in `UNet`."""
        super().__init__(
            channels=channels,
            num_classes=num_classes,
            null_class=null_class,
            width=width,
            num_poolings=num_poolings,
            bottom_blocks=bottom_blocks,
            final_relu=final_relu,
            dropout=dropout,
            class_embedding_dim=class_embedding_dim,
            fourier_features=fourier_features,
        )
