from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from task.config import load_config
from task.generators.registry import initial_generator, keep_local, weightless_generator
from task.runs.resume import check_same_run
from task.runs.run import Run
from task.runs.starting_weights import load_starting_weights
from tests.helpers import written_run


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A finished run of another seed."""
    return written_run(tmp_path / "earlier", [], rounds_done=2, seed=1)


def test_weights_are_those_of_the_earlier_run(earlier: Path) -> None:
    config = Run(earlier).config
    generator = initial_generator(config.changed({"seed": 2}))
    told = load_starting_weights(generator, str(earlier))
    expected = initial_generator(config).state_dict()  # what `written_run` writes
    found = generator.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert told["file"] == "earlier" and told["round"] == config.federation.rounds
    checkpoint = sorted(earlier.glob("checkpoints/*"))[0]
    assert load_starting_weights(generator, str(checkpoint))["file"] == checkpoint.name


def test_what_stays_at_a_client_is_not_taken(tmp_path: Path) -> None:
    config = load_config(["model=vae", "model.hidden_dim=8", "data.image_size=8"])
    save_file(initial_generator(config).state_dict(), tmp_path / "earlier.safetensors")
    generator = initial_generator(config.changed({"seed": 2}))
    keep_local(generator, ["encoder"])
    before = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    load_starting_weights(generator, str(tmp_path / "earlier.safetensors"))
    kept = {n for n, t in generator.state_dict().items() if torch.equal(t, before[n])}
    stays = {name for name in before if generator.stays(name)}
    assert stays and stays <= kept < set(before)


def test_scales_of_one_frozen_generator_are_not_put_onto_another(tmp_path: Path) -> None:
    words = ["model=resnet_gan", "model.width=2", "model.latent_dim=4", "data.image_size=16"]
    bases = {seed: tmp_path / f"base-{seed}.safetensors" for seed in (1, 2)}
    for seed, file in bases.items():
        save_file(initial_generator(load_config([*words, f"seed={seed}"])).state_dict(), file)
    words[0] = "model=small_gan"
    words += ["data.horizontal_flip=false", "model.perceptual_weight=0"]
    one, other = (
        initial_generator(load_config([*words, f"model.pretrained={file}"]))
        for file in bases.values()
    )
    earlier = tmp_path / "adapted.safetensors"
    save_file(
        {**one.state_dict(), "scale": torch.full_like(one.state_dict()["scale"], 1.7)}, earlier
    )
    with pytest.raises(ValueError, match=r"on top of other weights .* freezes \(base\."):
        load_starting_weights(other, str(earlier))
    load_starting_weights(one, str(earlier))
    assert one.state_dict()["scale"].eq(1.7).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.channels": 3}, r"up\.0\.1\.\S+: \(1,\) there, \(3,\) here"),
        ({"data.classes": ["a", "b"]}, r"class_embedding\S*: \(10, 4\) there, \(2, 4\) here"),
        ({"model.width": 8}, r"and \d+ more\); give the same sections model"),
    ],
)
def test_what_does_not_fit_is_named(
    changes: dict[str, object], message: str, earlier: Path
) -> None:
    other = weightless_generator(Run(earlier).config.changed(changes))
    with pytest.raises(ValueError, match=rf"^train\.start_from: {earlier}.*{message}"):
        load_starting_weights(other, str(earlier))


def test_folder_of_the_starting_weights_may_have_moved_when_a_run_goes_on(
    earlier: Path, tmp_path: Path
) -> None:
    generator = weightless_generator(Run(earlier).config)
    told = load_starting_weights(generator, str(earlier))
    options = {"rounds_done": 1, "files": {"start.json": told}}
    later = written_run(tmp_path / "later", [], **options, train__start_from=str(earlier))  # type: ignore[arg-type]
    config = Run(later).config
    moved = config.changed({"train.start_from": str(earlier.rename(tmp_path / "moved"))})
    check_same_run(config, later)
    check_same_run(moved, later)
    other = written_run(tmp_path / "other", [], rounds_done=2, seed=5)
    for place in (str(other), str(tmp_path / "nowhere"), ""):
        with pytest.raises(ValueError, match=rf"asked for train\.start_from={place} \(there: "):
            check_same_run(config.changed({"train.start_from": place}), later)


def test_missing_and_unknown_entries_are_named(earlier: Path, tmp_path: Path) -> None:
    generator = weightless_generator(Run(earlier).config)
    file = tmp_path / "other.safetensors"
    save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"none there, .* here; "):
        load_starting_weights(generator, str(file))
    with pytest.raises(FileNotFoundError, match=r"there is no .*nowhere"):
        load_starting_weights(generator, str(tmp_path / "nowhere"))
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(FileNotFoundError, match=r"there is no .*unfinished/model\.safetensors"):
        load_starting_weights(generator, str(tmp_path / "unfinished"))
