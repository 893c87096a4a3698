"""Draw images with the pipeline beside this file, in Diffusers.

    pip install torch diffusers numpy pillow
    python sample.py --num 4 --out images

The pipeline and its network are code of this folder, which `trust_remote_code=True` runs.
"""

from pathlib import Path

import numpy as np

from task.export.drawing import Model, main


def load_model(folder: Path) -> Model:
    """Load the model of this folder."""
    import torch
    from diffusers import DiffusionPipeline

    # Its default needs one library more, for a saving that is none for a network of this size.
    settings = {"trust_remote_code": True, "low_cpu_mem_usage": False}
    unet = DiffusionPipeline.from_pretrained(str(folder), **settings).unet

    @torch.inference_mode()
    def model(x_t: np.ndarray, log_snr: np.ndarray, labels: np.ndarray) -> np.ndarray:
        predicted: np.ndarray = unet(*map(torch.from_numpy, (x_t, log_snr, labels))).numpy()
        return predicted

    return model


if __name__ == "__main__":
    main(load_model, Path(__file__).parent)
