import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from task.config import Config, load_config, write_config
from task.generation.draw_images import draw_images
from task.generators.diffusion.generator import Diffusion, build_diffusion
from task.randomness import Stream
from task.runs.evaluations import drawn_otherwise, evaluation_file
from tests.benchmarks import sampling_quality
from tests.cli.test_cli import finished_run

CPU = torch.device("cpu")
LABELS = torch.arange(20) % 10


def configured(*overrides: str) -> Config:
    return load_config(
        [
            *("data.image_size=8", "model.width=8", "model.num_poolings=1"),
            *("diffusion.sampler=dpmpp_2m", "diffusion.num_inference_steps=4"),
            *("train.precision=float32", *overrides),
        ]
    )


def built(config: Config) -> Diffusion:
    torch.manual_seed(0)
    return build_diffusion(config)


def drawn(config: Config, model: Diffusion) -> Tensor:
    return draw_images(config, model, LABELS, device=CPU, stream=Stream.FINAL_IMAGES).images


def test_images_in_bfloat16_differ_from_those_in_float32_by_rounding() -> None:
    config = configured()
    whole = drawn(config, built(config)).int()
    half = drawn(configured("eval.precision=bfloat16"), built(config)).int()
    other = drawn(config.changed({"seed": 1}), built(config)).int()
    assert 0 < (half - whole).abs().float().mean() < 2
    assert (other - whole).abs().float().mean() > 20


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_memory_format_changes_rounding_alone_and_leaves_a_model_that_trains(
    precision: str,
) -> None:
    images = []
    for channels_last in ("true", "false"):
        config = configured(f"train.channels_last={channels_last}", f"eval.precision={precision}")
        model = built(config).train()
        images.append(drawn(config, model).int())
        assert images[-1].is_contiguous()
        assert model.training and not any(weight.is_inference() for weight in model.parameters())
        wide = next(m.weight for m in model.modules() if isinstance(m, nn.Conv2d))
        assert wide.is_contiguous(memory_format=torch.channels_last) == (channels_last == "true")
        model.network(torch.zeros(2, 1, 8, 8), torch.zeros(2), LABELS[:2]).sum().backward()
        assert wide.grad is not None and wide.grad.isfinite().all()
    assert (images[0] - images[1]).abs().float().mean() < 2


def test_drawing_needs_a_settled_precision() -> None:
    config = configured("eval.precision=auto")
    with pytest.raises(ValueError, match="precision must be float32 or bfloat16, got 'auto'"):
        drawn(config, built(config))


def test_file_of_an_evaluation_tells_what_was_drawn_otherwise(tmp_path: Path) -> None:
    config = configured("eval.extractor=classifier")
    write_config(config, tmp_path / "config.yaml")
    measured_otherwise = configured("eval.precision=bfloat16", "eval.batch_size=7")
    assert drawn_otherwise(tmp_path, measured_otherwise) == ""
    assert drawn_otherwise(tmp_path, configured("seed=7", "eval.seed=3")) == "seed=7,eval.seed=3"
    other = configured("diffusion.num_inference_steps=9", "diffusion.clip_x_start=true")
    words = drawn_otherwise(tmp_path, other)
    assert words == "num_inference_steps=9,clip_x_start=True"
    names = [evaluation_file(tmp_path, config, *w).name for w in ((), ("",), ("client-3", words))]
    assert names == [
        "evaluation-classifier-correct.json",
        "evaluation-classifier-correct.json",
        "evaluation-classifier-correct-client-3-num_inference_steps=9,clip_x_start=True.json",
    ]


def test_sampling_quality_measures_every_way_on_one_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("task.evaluation.classifier.MAX_STEPS", 20)
    run = finished_run(
        tmp_path, "data=digits", "data.test_fraction=0.1", "diffusion.num_timesteps=30"
    )
    found = sampling_quality.compare(run, num_images=20, seeds=(0, 1))
    assert {f"sample.fd_{name}" for name in ("ancestral_30", "dpmpp_2m_20")} <= set(found)
    assert all(math.isfinite(value) for value in found.values())
    # The network has learned nothing, so that all it draws is further away than any real image.
    ranges = {name for name in found if name.endswith("_range")}
    assert len(ranges) == len(sampling_quality.WAYS) and all(found[name] > 0 for name in ranges)
    (floor,) = (name for name in found if name.startswith("sample.fd_floor_of_"))
    drawn = found.keys() - ranges - {floor}
    assert all(found[name] > 2 * found[floor] for name in drawn)
