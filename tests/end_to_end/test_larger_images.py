"""The network for larger images, trained by simulated hospitals and drawn from."""

import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from task.runs.records import read_records
from task.runs.run import load_run
from tests.processes import SMALL, feddm_train

WORDS = (
    *("model=attention_unet", "diffusion=survey", "train.batch_size=8"),
    *("data.image_size=128", "data.test_fraction=0.97"),
)


@pytest.mark.slow
def test_hospitals_train_the_attention_unet_on_larger_images(tmp_path: Path) -> None:
    done = feddm_train(*SMALL, *WORDS, "run_name=larger", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    path = tmp_path / "runs" / "larger"
    losses = read_records(path / "metrics.jsonl").series("loss", reference="train")
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses.values())
    weights = load_file(path / "model.safetensors")
    average_weight = float(weights["average_weight"])
    assert 0 < average_weight < 1
    assert not weights["average.output.weight"].equal(weights["output.weight"])
    (image,) = load_run(path).sample(classes=[3], num_images=1).to_pil()
    assert image.size == (128, 128)
