"""The formats of `feddm export`: what each needs, writes, and tells its reader."""

import copy
import importlib
import importlib.util
import json
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from task.checks import require
from task.export.drawing import Model, Settings, image_shape
from task.export.sources import ship
from task.generators.base import Generator
from task.generators.diffusion.generator import Diffusion
from task.generators.diffusion.network import UNet
from task.generators.diffusion.samplers import half_log_snr

# Of the example that the graph is traced with. One image would be taken for a constant.
EXAMPLE_BATCH = 2


# Images that are compared.
NUM_COMPARED = 8


@dataclass(frozen=True)
class Format:
    """A format that the generators of a family can be exported to: that of their weights alone.

    Attributes:
        library: the name of the library that loads it, as Hugging Face calls it.
        needs: libraries that write and check it beyond those that feddm always has.
    """

    library: str
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        """The libraries that are not installed."""
        return [name for name in self.needs if importlib.util.find_spec(name) is None]

    def check_installed(self) -> None:
        """Check that all libraries are there.

        Raises:
            ValueError: one is missing.
        """
        require(
            not self.missing,
            "--to",
            f"a format whose libraries are installed ({', '.join(self.missing)}: pip install "
            "'feddm[export]', in a checkout uv sync --extra export)",
            self.library,
        )

    def usage(self, settings: Settings) -> str:
        """Say in Markdown how to draw with an export of these settings."""
        return WEIGHTS_USAGE

    def fill(self, folder: Path, generator: Generator, settings: Settings) -> None:
        """Write the model and what describes it."""
        weights = generator.shared(generator.state_dict())
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    @torch.inference_mode()
    def compare(
        self, generator: Generator, folder: Path, settings: Settings
    ) -> tuple[float, float]:
        """Compare what an export draws with what the generator draws, of the same noise.

        Returns:
            The largest absolute difference, and the largest absolute value.
        """
        loaded = copy.deepcopy(generator)
        loaded.load_shared(load_file(folder / "model.safetensors"))
        labels = torch.arange(NUM_COMPARED) % len(settings["classes"])
        noise = torch.randn(
            NUM_COMPARED, *generator.noise_shape, generator=torch.Generator().manual_seed(0)
        )
        found, expected = (each.sample(labels, lambda: noise) for each in (loaded, generator))
        return float((found - expected).abs().max()), float(expected.abs().max())


@dataclass(frozen=True)
class NetworkFormat(Format):
    """A format of the network of a diffusion model, with code that draws with it.

    Attributes:
        write: writes the network's own files into a folder.
        loader: the module whose `load_model` loads a folder; shipped as sample.py.
        snippet: Python that loads an export and calls it, run in its folder, with fields as in
            `usage`.
    """

    write: Callable[[nn.Module, Settings, Path], None] = field(kw_only=True)
    loader: str = field(kw_only=True)
    snippet: str = field(kw_only=True)

    def usage(self, settings: Settings) -> str:
        """Say in Markdown how to draw with an export of these settings."""
        name = settings["classes"][0]
        known = {
            **settings,
            "class_in_shell": shlex.quote(name),
            "class_in_python": json.dumps(name),
            "null_label": null_label_in_words(settings["null_label"]),
        }
        # Not str.format, which would take the braces of Python for its own.
        return re.sub(
            r"\{(channels|image_size|prediction_type|null_label|class_in_shell|class_in_python)\}",
            lambda field: str(known[field[1]]),
            USAGE.replace("{snippet}", self.snippet),
        )

    def load_model(self, folder: Path) -> Model:
        """Load an export as its own sample.py does."""
        model: Model = importlib.import_module(f"task.export.{self.loader}").load_model(folder)
        return model

    def fill(self, folder: Path, generator: Generator, settings: Settings) -> None:
        """Write the network, what describes it, and the code that draws with it."""
        self.write(network_of(generator), settings, folder)
        (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        ship("generators/diffusion/samplers.py", folder / "samplers.py")
        ship("generators/noise.py", folder / "noise.py")
        ship("export/drawing.py", folder / "drawing.py")
        ship(f"export/{self.loader}.py", folder / "sample.py")

    @torch.inference_mode()
    def compare(
        self, generator: Generator, folder: Path, settings: Settings
    ) -> tuple[float, float]:
        """Compare predictions of an export with the network's own, for every log-SNR and label.

        All images are pure noise, whatever the network is told of them.

        Returns:
            The largest absolute difference, and the largest absolute prediction.
        """
        rng = np.random.default_rng(0)
        x_t = rng.standard_normal((NUM_COMPARED, *image_shape(settings)), np.float32)
        most, least = (2 * half_log_snr(settings["alphas_cumprod"][end]) for end in (0, -1))
        log_snr = np.linspace(least, most, NUM_COMPARED, dtype=np.float32)
        # With the null label, which comes last.
        last = settings["null_label"] or len(settings["classes"]) - 1
        inputs = (x_t, log_snr, np.linspace(0, last, NUM_COMPARED).round().astype(np.int64))
        expected = network_of(generator)(*map(torch.from_numpy, inputs)).numpy()
        found = self.load_model(folder)(*inputs)
        return float(np.abs(found - expected).max()), float(np.abs(expected).max())


def network_of(generator: Generator) -> nn.Module:
    """Return the network that a diffusion model draws with.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(generator, Diffusion):
        raise TypeError(f"a network format takes a diffusion model, got a {generator.title}")
    return generator.drawing


def formats_of(generator: Generator) -> Mapping[str, Format]:
    """Return by name the formats that a generator can be exported to."""
    if not isinstance(generator, Diffusion):
        return {"safetensors": Format("pytorch")}
    if isinstance(generator.network, UNet):
        return FORMATS
    # A graph needs no Python of the network, which is shipped for `UNet` alone.
    graphs = {name: FORMATS[name] for name in ("torch-export", "onnx")}
    return {"safetensors": Format("pytorch"), **graphs}


def write_safetensors(unet: nn.Module, settings: Settings, folder: Path) -> None:
    """Write the weights, and the network as a file of Python."""
    save_file(unet.state_dict(), folder / "model.safetensors", {"format": "pt"})
    ship("generators/diffusion/network.py", folder / "network.py")


def write_torch_export(unet: nn.Module, settings: Settings, folder: Path) -> None:
    """Write the graph of the network with its weights, for any number of images of one size."""
    program = traced(unet, settings)
    program.example_inputs = None  # it would be saved as a pickle
    torch.export.save(program, folder / "model.pt2")


def write_onnx(unet: nn.Module, settings: Settings, folder: Path) -> None:
    """Write the graph of the network with its weights, and what config.json says as metadata.

    Raises:
        RuntimeError: the exporter returned nothing.
    """
    import onnx

    program = torch.onnx.export(
        traced(unet, settings),
        dynamo=True,
        external_data=False,
        verbose=False,
        input_names=["x_t", "log_snr", "labels"],
        output_names=["prediction"],
        dynamic_shapes={"x_t": {0: "batch"}, "log_snr": None, "labels": None},
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {name: json.dumps(v) for name, v in settings.items()})
    onnx.checker.check_model(proto, full_check=True)
    onnx.save(proto, folder / "model.onnx")


def write_diffusers(unet: nn.Module, settings: Settings, folder: Path) -> None:
    """Write a pipeline with a network of its own, which `DiffusionPipeline` loads."""
    import diffusers

    from task.export.diffusers_pipeline import ClassConditionalPipeline
    from task.export.diffusers_unet import ClassConditionalUNet

    model = ClassConditionalUNet(**settings["network"])
    model.load_state_dict(unet.state_dict())
    model.save_pretrained(folder / "unet")
    index = {
        "_class_name": ["pipeline", ClassConditionalPipeline.__name__],
        "_diffusers_version": diffusers.__version__,
        "unet": ["diffusers_unet", ClassConditionalUNet.__name__],
        "settings": settings,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    ship("export/diffusers_pipeline.py", folder / "pipeline.py", in_package=True)
    ship("export/diffusers_unet.py", folder / "unet" / "diffusers_unet.py", in_package=True)
    ship("generators/diffusion/network.py", folder / "unet" / "network.py")


def traced(unet: nn.Module, settings: Settings) -> torch.export.ExportedProgram:
    """Trace a network, in eval mode, for any number of images of the size of the settings."""
    x_t = torch.zeros(EXAMPLE_BATCH, *image_shape(settings))
    log_snr = x_t.new_zeros(EXAMPLE_BATCH)
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(
        unet,
        (x_t, log_snr, log_snr.long()),
        dynamic_shapes={"x_t": batch, "log_snr": batch, "labels": batch},
    )
    # They hold the paths of this machine, and would travel with the file.
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                node.meta.pop("stack_trace", None)
    return program


def null_label_in_words(null_label: int | None) -> str:
    """Say whether a model knows "no class", and what follows from that."""
    if null_label is None:
        return 'None of them stands for "no class", so this model knows no guidance.'
    return f'{null_label} (`null_label`) stands for "no class", which guidance needs.'


WEIGHTS_USAGE = """\
`model.safetensors` holds the weights, and `config.json` what they were made for. feddm draws with
them: `feddm generate RUN` in the folder of the run, or `load_run` in Python.
"""

USAGE = """\
In this folder, with the libraries that `sample.py` names at its top:

```bash
python sample.py --class {class_in_shell} --num 4 --out images
```

From Python:

```python
{snippet}```

The network is a function of

- `x_t`: noisy images, float32 `[N, {channels}, {image_size}, {image_size}]`, about [-1, 1];
- `log_snr`: of their noise, float32 `[N]`, log(alphas_cumprod / (1 - alphas_cumprod));
- `labels`: int64 `[N]`, positions in `classes`. {null_label}

It returns what `prediction_type` says ({prediction_type}), in the shape of `x_t`. Images are drawn
from noise along the steps of a sampler: `config.json` holds `classes`, `alphas_cumprod` and the
sampler's arguments, `samplers.py` makes steps of them and takes them with NumPy or PyTorch, and
`drawing.py` is the rest of `sample.py`.
"""

FORMATS: dict[str, Format] = {
    "safetensors": NetworkFormat(
        library="pytorch",
        write=write_safetensors,
        loader="sample_safetensors",
        snippet="""\
import torch
from drawing import read_settings
from network import UNet
from safetensors.torch import load_file

unet = UNet(**read_settings(".")["network"]).eval()
unet.load_state_dict(load_file("model.safetensors"))
x_t, log_snr = torch.randn(2, {channels}, {image_size}, {image_size}), torch.full((2,), -9.0)
with torch.inference_mode():
    prediction = unet(x_t, log_snr, torch.tensor([0, 0]))
""",
    ),
    "torch-export": NetworkFormat(
        library="pytorch",
        write=write_torch_export,
        loader="sample_torch_export",
        snippet="""\
import torch

program = torch.export.load("model.pt2").module()  # trust the file as you trust code
x_t, log_snr = torch.randn(2, {channels}, {image_size}, {image_size}), torch.full((2,), -9.0)
with torch.inference_mode():
    prediction = program(x_t, log_snr, torch.tensor([0, 0]))
""",
    ),
    "onnx": NetworkFormat(
        library="onnx",
        needs=("onnx", "onnxscript", "onnxruntime"),
        write=write_onnx,
        loader="sample_onnx",
        snippet="""\
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
shape = (2, {channels}, {image_size}, {image_size})
x_t = np.random.default_rng(0).standard_normal(shape, np.float32)
log_snr, labels = np.full(2, -9.0, np.float32), np.array([0, 0])
[prediction] = session.run(None, {"x_t": x_t, "log_snr": log_snr, "labels": labels})
""",
    ),
    "diffusers": NetworkFormat(
        library="diffusers",
        needs=("diffusers",),
        write=write_diffusers,
        loader="sample_diffusers",
        snippet="""\
from diffusers import DiffusionPipeline

# Runs pipeline.py and unet/*.py of this folder: read them first.
pipe = DiffusionPipeline.from_pretrained(".", trust_remote_code=True, low_cpu_mem_usage=False)
images = pipe(classes=[{class_in_python}], num_images=2, seed=0).images
images[0].save("image.png")
""",
    ),
}
