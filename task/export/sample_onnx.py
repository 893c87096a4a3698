"""Draw images with the model beside this file, in ONNX Runtime; it needs no PyTorch.

pip install onnxruntime numpy pillow
python sample.py --num 4 --out images
"""

from pathlib import Path

import numpy as np
import onnxruntime

from task.export.drawing import Model, main


def load_model(folder: Path) -> Model:
    """Load the model of this folder."""
    session = onnxruntime.InferenceSession(
        folder / "model.onnx", providers=["CPUExecutionProvider"]
    )

    def model(x_t: np.ndarray, log_snr: np.ndarray, labels: np.ndarray) -> np.ndarray:
        [predicted] = session.run(None, {"x_t": x_t, "log_snr": log_snr, "labels": labels})
        return np.asarray(predicted)

    return model


if __name__ == "__main__":
    main(load_model, Path(__file__).parent)
