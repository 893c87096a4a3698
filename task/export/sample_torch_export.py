"""Draw images with the program beside this file, in PyTorch.

    pip install torch numpy pillow
    python sample.py --num 4 --out images

`torch.export.load` can run what a file holds: load only programs that you trust as you trust code.
"""

from pathlib import Path

import numpy as np

from task.export.drawing import Model, main


def load_model(folder: Path) -> Model:
    """Load the model of this folder."""
    import torch

    program = torch.export.load(folder / "model.pt2").module()

    @torch.inference_mode()
    def model(x_t: np.ndarray, log_snr: np.ndarray, labels: np.ndarray) -> np.ndarray:
        predicted: np.ndarray = program(*map(torch.from_numpy, (x_t, log_snr, labels))).numpy()
        return predicted

    return model


if __name__ == "__main__":
    main(load_model, Path(__file__).parent)
