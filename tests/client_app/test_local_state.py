"""What stays at a client between rounds: on its disk, in no message, and the same to the bit."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from safetensors.torch import save_file
from torch import Tensor, nn

from client_app import workspace
from client_app.app import app
from client_app.workspace import open_workspace
from server_app.messages import addressed
from task.config import MODELS, Config, ModelConfig, load_run_config
from task.generators.base import Batch
from task.generators.registry import GENERATORS, initial_generator, register
from task.protocol.node import NodeConfig, check_node, own_config
from task.protocol.wire import FailureCode, Key, WeightLayout
from task.runs.checkpoint import load_weights
from tests.end_to_end.pixel_gaussians import PixelGaussians
from tests.helpers import (
    SMALL_RUN,
    TRAINED_KEYS,
    Network,
    node_context,
    sent,
    simulated,
    write_digits_as_mnist,
)


class CountingConfig(ModelConfig):
    """Nothing is to be chosen."""

    family: Literal["counting"]


class Counting(PixelGaussians):
    """Counts its batches, keeps a number for each image, and one of its two optimizers."""

    local = frozenset({"counted", "of_image"})
    bound_to_images = True
    local_optimizers = frozenset({"of_image"})

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.register_buffer("counted", torch.zeros(()))
        self.register_parameter("of_image", None)

    def prepare(self, num_images: int) -> None:
        self.of_image = nn.Parameter(torch.zeros(num_images))

    def optimizers(self, lr: float) -> dict[str, torch.optim.Optimizer]:
        shared = [parameter for name, parameter in self.named_parameters() if name != "of_image"]
        return {
            "adam": torch.optim.Adam(shared, lr=lr),
            "of_image": torch.optim.Adam([self.of_image], lr=lr),
        }

    def losses(self, batch: Batch, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        self.counted += 1
        yield from super().losses(batch, rng)
        yield "of_image", (self.of_image[batch.indices] - batch.labels).square()


def build(config: Config) -> Counting:
    data = config.data
    return Counting((data.channels, data.image_size, data.image_size), len(data.classes))


@pytest.fixture(autouse=True)
def family() -> Iterator[None]:
    """Know the family, and begin every test as a new process does."""
    register("counting", CountingConfig, build)
    workspace._build_workspace.cache_clear()
    yield
    workspace._build_workspace.cache_clear()
    del MODELS["counting"], GENERATORS["counting"]


SHARED = {key: value for key, value in SMALL_RUN.items() if key[:5] not in ("model", "diffu")}
FAMILY = "~model +model.family=counting train.lr=0.05 train.batch_size=32"
RUN = {**SHARED, "overrides": FAMILY, "run_name": "counted"}


def asked(
    kind: str,
    server_round: int,
    weights: np.ndarray | None = None,
    run_id: str = "1",
    run: Mapping[str, Any] = RUN,
) -> Message:
    """Make the message of a round as the server does."""
    Network()
    generator = initial_generator(load_run_config(run))
    layout = WeightLayout.of(generator, generator.local | generator.frozen)
    weights = layout.pack(generator.state_dict()) if weights is None else weights
    said = {Key.PRECISION: "float32", Key.RUN_NAME: "counted", Key.RUN_ID: run_id}
    config = ConfigRecord({Key.SERVER_ROUND: server_round, **said})
    content = RecordDict(
        {Key.ARRAYS: ArrayRecord({Key.PACKED: Array(weights)}), Key.CONFIG: config}
    )
    made = addressed(content, node_id=7, message_type=kind, timeout=60, entries={Key.CLIENT: 1})
    made.metadata.__dict__["_message_id"] = "asked"
    return made


def trained(context: Context, server_round: int) -> tuple[Message, dict[str, Tensor], Path]:
    """Let a client train a round; returns its reply and the newest file of its state."""
    reply = app(asked("train", server_round, run=context.run_config), context)
    assert not reply.has_error(), reply.error
    file = sorted(Path(str(context.run_config["output_dir"])).parent.rglob("**/round_*"))[-1]
    return reply, load_weights(file)[0], file


@pytest.fixture
def context(tmp_path: Path) -> Context:
    (tmp_path / "runs" / "counted").mkdir(parents=True)  # as the server does
    return node_context({**RUN, "output_dir": str(tmp_path / "runs")}, simulated(3)[1])


def test_state_goes_on_from_round_to_round_and_leaves_in_no_message(context: Context) -> None:
    batches = 0
    for server_round in (1, 2, 3):
        reply, state, file = trained(context, server_round)
        batches = batches or int(state["counted"])
        assert batches > 0 and state["counted"] == server_round * batches
        assert (
            file.parent.name == "client-1" and file.name == f"round_000{server_round}.safetensors"
        )
        assert set(state) == {
            *("counted", "of_image"),
            *("of_image/0.step", "of_image/0.exp_avg", "of_image/0.exp_avg_sq"),
        }
        assert state["of_image/0.step"] == state["counted"]
        packed = reply.content.array_records[Key.ARRAYS][Key.PACKED].numpy()
        shape = initial_generator(load_run_config(RUN)).mean.shape
        assert packed.size == 2 * shape.numel()
    # Those of as many rounds as the server may go back, and one more.
    assert len([*file.parent.glob("*.safetensors")]) == 3


def test_repeated_round_begins_with_the_state_that_it_began_with(context: Context) -> None:
    trained(context, 1)
    first, state, file = trained(context, 2)
    trained(context, 3)
    workspace._build_workspace.cache_clear()  # another process
    again, repeated, newest = trained(context, 2)
    assert newest == file  # that of round 3 is of no round any more
    assert all(torch.equal(state[name], repeated[name]) for name in state)
    packed = [each.content.array_records[Key.ARRAYS][Key.PACKED].data for each in (first, again)]
    assert packed[0] == packed[1]


def test_clients_of_a_process_have_states_of_their_own(context: Context) -> None:
    _, state, _ = trained(context, 1)
    other = node_context(context.run_config, simulated(3)[2])
    message = asked("train", 1)
    message.content[Key.CONFIG][Key.CLIENT] = 2
    assert not app(message, other).has_error()
    file = Path(str(context.run_config["output_dir"])) / "counted/clients/client-2"
    (kept,) = file.glob("*.safetensors")
    own = load_weights(kept)[0]
    assert len(own["of_image"]) != len(state["of_image"])
    assert int(own["counted"]) > 0


def test_node_without_a_place_for_its_state_takes_no_part(tmp_path: Path) -> None:
    write_digits_as_mnist(tmp_path, train=40, test=5)
    node = NodeConfig(data_path=str(tmp_path))
    config = own_config(
        load_run_config({**RUN, "overrides": RUN["overrides"] + " data=mnist"}), node
    )
    with pytest.raises(ValueError, match=r"^output-path: a mixture of Gaussians keeps a part of"):
        check_node(config, node)


def test_state_of_another_run_is_refused_and_named(
    context: Context, caplog: pytest.LogCaptureFixture
) -> None:
    _, _, file = trained(context, 1)
    reply = app(asked("train", 2, run_id="2"), context)
    assert reply.error.code == FailureCode.BAD_INPUT
    assert f"{file} is of another run, or another client, of the same name" in caplog.text


def test_state_of_other_images_is_refused(
    context: Context, caplog: pytest.LogCaptureFixture
) -> None:
    _, _, file = trained(context, 1)
    # As many images, of which two have changed places.
    train = open_workspace(context).dataset.train
    own = open_workspace(context).images(context)[0].images
    places = [int((train.images == image).flatten(1).all(1).nonzero()[0, 0]) for image in own[:2]]
    train.images[torch.tensor(places)] = own[[1, 0]]
    reply = app(asked("train", 2), context)
    assert reply.error.code == FailureCode.BAD_INPUT
    assert f"{file} does not fit: this client has other images than after round 1" in caplog.text


@pytest.fixture
def node(tmp_path: Path) -> Context:
    """A real node with a place for its state."""
    write_digits_as_mnist(tmp_path, train=80, test=5)
    (tmp_path / "kept").mkdir()
    run_config = {**RUN, "overrides": f"{FAMILY} data=mnist data.test_fraction=null"}
    places = {"data-path": str(tmp_path), "output-path": str(tmp_path / "kept")}
    return node_context(run_config, places)


def test_state_of_a_node_is_for_its_user_and_not_on_a_disk_that_is_gone(
    node: Context, tmp_path: Path
) -> None:
    assert not app(asked("train", 1), node).has_error()
    kept = tmp_path / "kept"
    made = [kept / "counted", kept / "counted/state", kept / "counted/state/client-1"]
    assert [path.stat().st_mode & 0o777 for path in made] == [0o700] * 3
    assert [file.name for file in made[-1].glob("*.safetensors")] == ["round_0001.safetensors"]
    kept.rename(tmp_path / "unmounted")
    assert app(asked("train", 2), node).error.code == FailureCode.DATA_UNREADABLE
    assert not kept.exists()


class Convolution(Counting):
    """Keeps the state of the optimizer of a weight whose memory format changes."""

    local_optimizers = frozenset({"adam"})

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.weight = nn.Parameter(torch.ones(3, 4, 2, 2))

    def optimizers(self, lr: float) -> dict[str, torch.optim.Optimizer]:
        return {"adam": torch.optim.Adam(self.parameters(), lr=lr, fused=True)}

    def losses(self, batch: Batch, rng: torch.Generator) -> Iterator[tuple[str, Tensor]]:
        places = torch.arange(self.weight.numel()).view_as(self.weight)
        yield "adam", ((self.weight - places) ** 2).sum() * batch.labels.float().exp()


def test_optimizer_goes_on_alike_in_a_new_process(
    context: Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = (1, 8, 8)
    monkeypatch.setitem(GENERATORS, "counting", lambda config: Convolution(shape, 10))
    sent = []
    for is_new in (False, True):
        trained(context, 1)
        if is_new:
            workspace._build_workspace.cache_clear()
        sent.append(trained(context, 2)[0].content.array_records[Key.ARRAYS][Key.PACKED].data)
    assert sent[0] == sent[1]


# Bytes before the numbers in a file of NumPy's format that holds a short shape.
NPY_HEADER = 128
# Of a family: values that make it small, and beginnings of the names of what may travel.
PROMISED = {
    "small_gan": (
        "model.width=2 model.latent_dim=8 model.perceptual_weight=0",
        ("scale", "shift"),
    ),
    "resnet_gan": (
        "model.width=2 model.latent_dim=8 federation.local=[discriminator]",
        ("generator.", "generator_ema.", "averaged_share"),
    ),
    "stylegan2_ada_tiny": (
        "model.channel_max=8 model.latent_dim=8 federation.local=[discriminator]",
        ("generator.", "generator_ema.", "path_length_mean", "half_life_share"),
    ),
}


def write_unlike_anything(file: Path) -> Path:
    """Write the file of a run of model=resnet_gan with numbers that stand nowhere else."""
    words = "model=resnet_gan model.width=2 model.latent_dim=8"
    state = initial_generator(load_run_config({**SHARED, "overrides": words})).state_dict()
    rng = torch.Generator().manual_seed(5)
    save_file({name: torch.rand(each.shape, generator=rng) for name, each in state.items()}, file)
    return file


def passages(secret: Tensor) -> set[bytes]:
    """Return the bytes of 8 values after each other, of which any 15 of a tensor hold some."""
    pieces = [piece for piece in secret.flatten().split(8) if len(piece) > 1 and piece.any()]
    return {each.numpy().tobytes() for piece in pieces for each in (piece, piece.double())}


@pytest.mark.parametrize("preset", PROMISED)
def test_only_the_promised_tensors_leave_the_client(preset: str, tmp_path: Path) -> None:
    (tmp_path / "runs" / "counted").mkdir(parents=True)
    words, promised = PROMISED[preset]
    run = {**SHARED, "run_name": "counted", "output_dir": str(tmp_path / "runs")}
    run |= {"overrides": f"model={preset} {words}", "train.batch_size": 64}
    if preset == "small_gan":
        file = write_unlike_anything(tmp_path / "base.safetensors")
        run["overrides"] += f" model.pretrained={file}"
    context = node_context(run, simulated(3)[1])
    reply, kept, _ = trained(context, 1)

    generator = open_workspace(context).generator
    state = {name: each.detach().clone() for name, each in generator.state_dict().items()}
    travels = [state[name].flatten() for name in state if name.startswith(promised)]
    assert {name: set(record) for name, record in reply.content.items()} == {
        Key.ARRAYS: {Key.PACKED},
        Key.METRICS: TRAINED_KEYS | set(generator.measures),
    }
    array = reply.content.array_records[Key.ARRAYS][Key.PACKED]
    assert array.numpy().tobytes() == torch.cat(travels).numpy().tobytes()
    assert len(array.data) == NPY_HEADER + 4 * sum(map(len, travels))

    secrets = {name: each for name, each in state.items() if not name.startswith(promised)} | kept
    whole = sent(reply)
    assert travels[0].numpy().tobytes() in whole
    for name, secret in secrets.items():
        assert not any(passage in whole for passage in passages(secret)), name
    if preset == "small_gan":
        # A scale and a shift of 96 channels, of each of 10 classes.
        assert len(array.data) == NPY_HEADER + 2 * 96 * 10 * 4
        assert passages(kept["latents"]) and passages(kept["adam/2.exp_avg"])
