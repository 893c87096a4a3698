"""Draw images with the weights and the network beside this file, in PyTorch.

pip install torch safetensors numpy pillow
python sample.py --num 4 --out images
"""

from pathlib import Path

import numpy as np

from task.export.drawing import Model, main, read_settings


def load_model(folder: Path) -> Model:
    """Load the model of this folder."""
    import torch
    from safetensors.torch import load_file

    from task.generators.diffusion.network import UNet

    unet = UNet(**read_settings(folder)["network"])
    unet.load_state_dict(load_file(folder / "model.safetensors"))
    unet.eval()

    @torch.inference_mode()
    def model(x_t: np.ndarray, log_snr: np.ndarray, labels: np.ndarray) -> np.ndarray:
        predicted: np.ndarray = unet(*map(torch.from_numpy, (x_t, log_snr, labels))).numpy()
        return predicted

    return model


if __name__ == "__main__":
    main(load_model, Path(__file__).parent)
