"""`feddm`: the commands, their options and how they fail.

A command takes its arguments apart and hands them to a module of its own, which it imports when
it is called: torch takes seconds, and `feddm --help` needs none of it.
"""

import errno
import inspect
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import click
import typer
from typer.core import TyperGroup

from task.processes import have_home, let_threads_sleep, write_any_letter


def _without_markup(text: str) -> str:
    """Keep brackets in a help text, which are taken for markup where none escapes them."""
    return re.sub(r"(?<!\\)\[", r"\\[", text)


class OneLineErrors(TyperGroup):
    """Commands that end in one line on stderr and status 1 where an input is at fault."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Find a command; its help is wrapped to the terminal, and not to the source."""
        command = super().get_command(ctx, cmd_name)
        if command is not None and command.help:
            paragraphs = inspect.cleandoc(command.help).split("\n\n")
            # A paragraph behind \b, of examples, keeps its lines.
            kept = [p if p.startswith("\b") else " ".join(p.split()) for p in paragraphs]
            command.help = _without_markup("\n\n".join(kept))
            for parameter in command.params:
                if text := getattr(parameter, "help", None):
                    setattr(parameter, "help", _without_markup(text))  # noqa: B010
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno == errno.EPIPE:
                raise  # the reader of a pipe left, which click ends quietly
            typer.echo(f"feddm: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from error


app = typer.Typer(
    cls=OneLineErrors,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def finished(run: Path) -> Path:
    """Check that a folder holds a finished run, before anything that takes long is imported."""
    from task.runs.commands import require_weights
    from task.runs.layout import run_config

    run_config(run)
    require_weights(run)
    return run


def begun(runs: list[Path]) -> list[Path]:
    """Check that folders hold runs."""
    from task.runs.layout import run_config

    for run in runs:
        run_config(run)
    return runs


def folder(name: str) -> Callable[[Path | None], Path | None]:
    """Return a check that there is such a folder, for an error that begins with a name."""

    def check(path: Path | None) -> Path | None:
        if path is not None and not path.is_dir():
            raise ValueError(f"{name}: there is no folder {path}")
        return path

    return check


def words_of_a_run(words: list[str] | None) -> list[str] | None:
    """Check that overrides compose a configuration."""
    from task.config import load_config

    load_config(words or [])
    return words


# What several commands take.
FinishedRunFolder = Annotated[
    Path, typer.Argument(help="Folder of a finished run.", show_default=False, callback=finished)
]
Device = Annotated[
    str | None, typer.Option(help="auto, cpu, cuda or cuda:N; else the run's train.device.")
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1, help="Images at a time; else the run's eval.batch_size. It changes rounding alone."
    ),
]
NoiseSeed = Annotated[int | None, typer.Option(min=0, help="Of the noise; else the run's seed.")]
DrawingClient = Annotated[
    int | None,
    typer.Option(
        min=0, help="Draw from this client's own model, which federation.keep_local_models kept."
    ),
]


def known(module: str, name: str) -> list[str]:
    """List the words of a constant, to be offered by the Tab key."""
    return list(getattr(import_module(module), name))


@app.callback()
def feddm() -> None:
    """Work with the runs that feddm-train left behind, and check a hospital's node.

    Status 0: done; 1: not, and a line on stderr says why and the way out; 2: called wrongly.

    \b
    Examples:
      feddm doctor                  what this machine has and lacks
      feddm report runs/demo        a page about a run
      feddm generate --help         more examples of a command
      feddm --install-completion    the Tab key completes
    """


@app.command("evaluate")
def evaluate_command(
    run: FinishedRunFolder,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Further values as NAME=VALUE: eval.*, data.root, train.device, and how images "
            "are drawn, for example diffusion.sampler=dpmpp_2m diffusion.num_inference_steps=20.",
            show_default=False,
        ),
    ] = None,
    extractor: Annotated[
        str | None,
        typer.Option(
            help="inception, classifier, efficientnet, exported or auto; else what the run's "
            "config says.",
            autocompletion=lambda: known("task.config", "EXTRACTORS"),
        ),
    ] = None,
    image_range: Annotated[
        str | None,
        typer.Option(
            help="correct, or paper for the range of the published tables; else the run's.",
            autocompletion=lambda: known("task.config", "IMAGE_RANGES"),
        ),
    ] = None,
    num_per_class: Annotated[
        int | None,
        typer.Option(
            min=1, help="Images to draw of each class; else the run's eval.num_per_class."
        ),
    ] = None,
    batch_size: BatchSize = None,
    device: Device = None,
    client: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Measure this client's own model, which federation.keep_local_models kept, beside "
            "the global one: against the client's images and against all.",
        ),
    ] = None,
) -> None:
    """Measure images of a run's final weights, with real images beside them.

    Prints a table and writes RUN/evaluation-<extractor>-<image range>.json, with --client N
    RUN/evaluation-<extractor>-<image range>-client-N.json. What was drawn otherwise than the run
    draws goes into a file of its own, which no table takes up. Without a test split all is measured
    against the training images, without classification accuracy score and search for copies.

    \b
    Examples:
      feddm evaluate runs/demo
      feddm evaluate runs/demo --num-per-class 100 diffusion.sampler=dpmpp_2m
      feddm evaluate runs/demo --extractor inception
      feddm evaluate runs/demo --client 0
    """
    from task.cli.evaluate import evaluate_run, evaluation_config
    from task.cli.evaluate_client import evaluate_client

    config = evaluation_config(
        run,
        overrides or [],
        {
            "eval.extractor": extractor,
            "eval.image_range": image_range,
            "eval.num_per_class": num_per_class,
            "eval.batch_size": batch_size,
            "train.device": device,
        },
    )
    if client is None:
        evaluate_run(run, config, say=typer.echo)
    else:
        evaluate_client(run, config, client, say=typer.echo)


@app.command("audit")
def audit_command(
    context: typer.Context,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN] [NAME=VALUE...]",
            help="Folder of a finished run, then values as for feddm evaluate; with --images "
            "values alone, such as data.image_size=64 data.horizontal_flip=true.",
            show_default=False,
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of images of any generator, in place of RUN.", metavar="DIR"),
    ] = None,
    train: Annotated[
        Path | None,
        typer.Option(help="With --images: the images it was trained on.", metavar="DIR"),
    ] = None,
    held_out: Annotated[
        Path | None,
        typer.Option(
            help="With --images: images of the same kind that it was not trained on.",
            metavar="DIR",
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(help="With --images: folder for what is written, outside of it."),
    ] = Path("."),
    num_images: Annotated[
        int, typer.Option(min=20, help="Training images that are attacked at most; held-out too.")
    ] = 1000,
    num_per_class: Annotated[
        int | None,
        typer.Option(
            min=1, help="Images to draw of each class; else the run's eval.num_per_class."
        ),
    ] = None,
    device: Device = None,
) -> None:
    """Tell what a run's final weights, or any generator's images, show of training images.

    Attacks the weights of RUN to tell training images from held-out ones, as a whole, client by
    client and on the clients' own models that were kept, and searches what they draw for copies.
    With --images, --train and --held-out it searches the images of a folder for copies: of any
    tool, in folders of classes or without.

    Prints tables and findings, and writes audit.json, and audit-pairs.png: the generated images
    that are nearest to training images, with these, for you alone; into RUN, or into OUT. Status 0
    whatever is found.

    \b
    Examples:
      feddm audit runs/demo
      feddm audit runs/demo --num-images 5000 --num-per-class 100
      feddm audit --images generated --train data/train --held-out data/test
    """
    runs, overrides = runs_and_values(words or [])
    of_folders = {"--images": images, "--train": train, "--held-out": held_out}
    check_audited(context, runs, [option for option, path in of_folders.items() if path])
    if images and train and held_out:
        from task.cli.audit_folders import AuditedFolders, audit_folders

        folders = (path.expanduser().absolute() for path in (images, train, held_out))
        audit_folders(AuditedFolders(*folders), overrides, out=out, device=device, say=typer.echo)
        return
    run = finished(runs[0])
    from task.cli.audit import audit_run
    from task.cli.evaluate import evaluation_config

    options = {"eval.num_per_class": num_per_class, "train.device": device}
    config = evaluation_config(run, overrides, options)
    audit_run(run, config, num_images=num_images, say=typer.echo)


def check_audited(context: click.Context, runs: list[Path], given: list[str]) -> None:
    """Check that either a run is audited or three folders are, with options of these alone.

    Args:
        context: of the command.
        runs: that were named.
        given: the options of folders that were.
    """
    other = ("num_images", "num_per_class") if given else ("out",)
    typed = click.core.ParameterSource.COMMANDLINE
    wrong = [name for name in other if context.get_parameter_source(name) is typed]
    names = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
    if given and (runs or len(given) < 3):
        got = " and ".join([*given, *map(str, runs)])
        raise ValueError(
            "--images, --train and --held-out must be given together, and without RUN, which is "
            f"audited alone (feddm audit RUN), got {got}"
        )
    if not given and len(runs) != 1:
        raise ValueError(
            "RUN must be the folder of one finished run, or in its place --images, --train and "
            f"--held-out, got {' '.join(map(str, runs)) or 'none'}"
        )
    if wrong:
        fits = "RUN, which has a model to attack" if given else "--images, --train and --held-out"
        raise ValueError(f"{names} must be left out, or given with {fits}")


def runs_and_values(words: list[str]) -> tuple[list[Path], list[str]]:
    """Tell folders of runs from values, NAME=VALUE; a run of a sweep is named by its words."""
    folders = [word for word in words if "=" not in word or Path(word).exists()]
    return [Path(word) for word in folders], [word for word in words if word not in folders]


@app.command()
def generate(
    run: FinishedRunFolder,
    num: Annotated[
        int, typer.Option(min=1, help="Images to draw of each class.", show_default=False)
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder for them: new, or one of earlier images.", show_default=False),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Further values as NAME=VALUE, of how images are drawn: "
            "diffusion.sampler=dpmpp_2m diffusion.num_inference_steps=20 "
            "diffusion.guidance_scale=2.",
            show_default=False,
        ),
    ] = None,
    class_: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            help="Name of a class, or its number from 0 where no class is called that; may be "
            "repeated. Else every class.",
        ),
    ] = None,
    grid: Annotated[
        bool, typer.Option("--grid", help="Write OUT/grid.png, too: the first 10 of each class.")
    ] = False,
    scale: Annotated[
        int,
        typer.Option(min=1, help="Make a square of so many pixels a side of each pixel."),
    ] = 1,
    seed: NoiseSeed = None,
    client: DrawingClient = None,
    device: Device = None,
    batch_size: BatchSize = None,
) -> None:
    """Draw images of chosen classes from a run's final weights.

    Writes OUT/<class>/000000.png and so on, and OUT/manifest.json, which says what drew them. The
    same call again draws only what is not there yet, so that a stopped one goes on; a larger --num
    adds images to a folder.

    \b
    Examples:
      feddm generate runs/demo --class 3 --num 100 --out images
      feddm generate runs/demo --num 10 --out large --grid --scale 8
      feddm generate runs/demo --num 5000 --out all diffusion.sampler=dpmpp_2m \\
        diffusion.num_inference_steps=20
    """
    from task.config import changed_config
    from task.runs.layout import run_config

    config = run_config(run)
    config = changed_config(
        config,
        overrides or [],
        options={"seed": seed, "train.device": device, "eval.batch_size": batch_size},
        names=config.generation_values,
    )
    from task.cli.generate import generate_images

    generate_images(
        run,
        config,
        classes=class_ or None,
        num_images=num,
        out=out,
        client=client,
        grid=grid,
        scale=scale,
        say=typer.echo,
    )


@app.command()
def restore(
    run: FinishedRunFolder,
    images: Annotated[
        list[str],
        typer.Argument(
            help="Pictures of the run's size; with --upscale N, that size over N. Further values "
            "as NAME=VALUE: diffusion.num_inference_steps=50 diffusion.guidance_scale=2.",
            show_default=False,
        ),
    ],
    class_: Annotated[
        str,
        typer.Option("--class", help="Name or number of the class of all pictures."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the images.", show_default=False)],
    mask: Annotated[
        Path | None,
        typer.Option(help="Picture that is white where the others are to be filled, else black."),
    ] = None,
    upscale: Annotated[
        int | None, typer.Option(min=2, help="Enlarge the pictures so many times.")
    ] = None,
    colorize: Annotated[
        bool, typer.Option("--colorize", help="Color gray pictures, or colored ones anew.")
    ] = False,
    num: Annotated[int, typer.Option(min=1, help="Images to draw for each picture.")] = 1,
    jump_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Steps that are taken back at a time; else RePaint's 10, or all but one where "
            "there are no more.",
        ),
    ] = None,
    num_resamples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="How often each stretch of that length is walked; else RePaint's 10. 1 is ten "
            "times faster, and fits what is filled in less well to its surroundings.",
        ),
    ] = None,
    seed: NoiseSeed = None,
    client: DrawingClient = None,
    device: Device = None,
    batch_size: BatchSize = None,
) -> None:
    """Fill in what pictures lack, by a run's final weights: --mask, --upscale or --colorize.

    Writes OUT/<name of the picture>-0.png and so on. What is known of a picture stays as it is.
    What is filled in is invented: it looks like the training images of the class, and says nothing
    of the patient.

    \b
    Examples:
      feddm restore runs/demo three.png --class 3 --mask lower-half.png \\
        --num 4 --out filled
      feddm restore runs/demo small.png --class 3 --upscale 4 --out large
      feddm restore runs/eyes gray.png --class N --colorize --out colored \\
        diffusion.num_inference_steps=100
    """
    from task.cli.restore import FileTask, restore_files

    restore_files(
        run,
        images,
        FileTask(mask, upscale, colorize),
        out=out,
        class_=class_,
        num_images=num,
        walk={"jump_length": jump_length, "num_resamples": num_resamples},
        client=client,
        options={"seed": seed, "train.device": device, "eval.batch_size": batch_size},
        say=typer.echo,
    )


@app.command()
def tables(
    sweep_dir: Annotated[
        Path,
        typer.Argument(
            help="Folder with finished, measured runs.",
            show_default=False,
            callback=folder("SWEEP_DIR"),
        ),
    ],
    figures: Annotated[
        bool, typer.Option(help="Draw figures too; for 2 to 6 the models of the runs draw.")
    ] = True,
    device: Annotated[
        str, typer.Option(help="That draws the figures: auto, cpu, cuda or cuda:N.")
    ] = "auto",
) -> None:
    """Lay the runs of a sweep out as the paper's Tables I to V and figures 2 to 6.

    Runs of several generators that are otherwise equal are compared by figures, costs and samples,
    and those of several remedies by the share of the gap to pooled images that each closes.

    Reads every run in SWEEP_DIR and below it, prints the tables, and writes tables.md,
    tables.html, tables.csv and figures/ there. Of medical data, figure 6 shows real images too:
    keep it as you keep them.

    \b
    Examples:
      feddm-train -m run_name=skew partition.beta=0.1,0.5,5 \\
        eval.final_metrics=true
      feddm tables runs/skew
    """
    from task.cli.tables import write_tables
    from task.training.devices import select_device

    write_tables(sweep_dir, device=select_device(device) if figures else None, say=typer.echo)


@app.command()
def export(
    run: FinishedRunFolder,
    to: Annotated[
        str,
        typer.Option(
            help="diffusers, onnx, torch-export or safetensors.",
            autocompletion=lambda: known("task.export.formats", "FORMATS"),
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write, or an earlier export to replace; else RUN/export/TO."),
    ] = None,
    client: Annotated[
        int | None,
        typer.Option(
            min=0, help="This client's own weights, which federation.keep_local_models kept."
        ),
    ] = None,
) -> None:
    """Write a run's final weights in a format that other libraries load, with a model card.

    The folder holds all that drawing images needs, without feddm: python sample.py in it draws
    some. What was written is loaded again and compared with the run's own network.

    \b
    Examples:
      feddm export runs/demo --to safetensors
      feddm export runs/demo --to onnx --out models/digits
      feddm export runs/demo --to diffusers --client 0
    """
    from task.export.folder import export_run
    from task.runs.run import load_run

    written = export_run(load_run(run), to, out=out, client=client)
    typer.echo(
        f"written to {written.folder}: loaded again, its predictions of up to "
        f"{written.largest:.3g} differ from the run's by at most {written.difference:.2g}"
    )


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN...", help="Folders of runs, finished or not.", callback=begun),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; else RUN/report.html. Several runs need it."),
    ] = None,
) -> None:
    """Show a run on one page, or compare several.

    Writes one HTML file that needs no network: losses, times, metrics, who took part, samples,
    warnings, and the command that repeats the run. A run writes its own at its end. Several runs
    are compared: what differs, figures, curves and samples side by side.

    \b
    Examples:
      feddm report runs/demo
      feddm report runs/demo runs/pooled --out comparison.html
    """
    from task.reporting.report import write_report

    typer.echo(f"written to {write_report(*runs, file=out)}")


@app.command()
def study(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="RUN... [study.NAME=VALUE...]",
            help="Folders of finished runs of the same images, then values of conf/study.yaml, and "
            "of how to draw.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write; else RUN/study. Several runs that draw need it."),
    ] = None,
) -> None:
    """Say whether a classifier is better when a run's images fill up its training set.

    Trains classifiers on real images, on generated ones and on both, all for as many steps, and
    compares them on test images that neither they nor the run have seen. Goes on where it stopped.

    \b
    Examples:
      feddm study runs/demo
      feddm study runs/demo 'study.ratios=[1,2]' study.num_seeds=5
      feddm study runs/vae runs/stylegan runs/classifier --out runs/study
    """
    folders, words = runs_and_values(runs)
    if not folders:
        raise ValueError("RUN must be the folder of a finished run, got none")
    for each in folders:
        finished(each)
    from task.cli.study import study_runs

    study_runs(folders, words, out=out, say=typer.echo)


@app.command("check-node")
def check_node_command(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="The words of the run, as the coordinator passes them: data=image_folder "
            "'data.classes=[normal,pneumonia]' model=tiny train.batch_size=64.",
            show_default=False,
            callback=words_of_a_run,
        ),
    ] = None,
    data_path: Annotated[
        Path | None, typer.Option(help="The node's data-path: the hospital's own images.")
    ] = None,
    output_path: Annotated[
        Path | None, typer.Option(help="The node's output-path, where its local model stays.")
    ] = None,
    min_images: Annotated[
        int, typer.Option(min=1, help="The node's min-images: training images to take part with.")
    ] = 1,
    patients: Annotated[
        Path | None,
        typer.Option(help="The node's patients: its table of which file is of which patient."),
    ] = None,
    pretrained_generator: Annotated[
        Path | None,
        typer.Option(help="The node's pretrained-generator, for a run of model=small_gan."),
    ] = None,
    trusted_peers: Annotated[
        str | None,
        typer.Option(help="The node's trusted-peers: fingerprints of the other hospitals."),
    ] = None,
    minimum_peers: Annotated[
        int, typer.Option(help="The node's minimum-peers: hospitals of a sum at least.")
    ] = 0,
    superlink: Annotated[
        str | None, typer.Option(help="HOST:PORT to connect to, as the node is going to.")
    ] = None,
    root_certificates: Annotated[
        Path | None,
        typer.Option(help="The coordinator's file of its CA, else the system's."),
    ] = None,
    private_key: Annotated[
        Path | None, typer.Option(help="The node's key; prints its fingerprint to compare.")
    ] = None,
) -> None:
    """Check on a hospital's machine whether its node can take part in a run.

    Looks at the images as the node itself does, trains a step of the run's model, and tries the
    connection. Status 0: it can; 1: it cannot, and the last line says why.

    \b
    Examples:
      feddm check-node --data-path images data=image_folder \\
        'data.classes=[normal,pneumonia]'
      feddm check-node --superlink fl.example.org:8443 \\
        --root-certificates ca.crt --private-key keys/hospital-a data=digits
    """
    from task.cli.check_node import examine_node
    from task.protocol.node import NodeConfig

    examine_node(
        overrides or [],
        NodeConfig(
            data_path=None if data_path is None else str(data_path.expanduser().absolute()),
            output_path=None if output_path is None else str(output_path.expanduser().absolute()),
            min_images=min_images,
            patients=None if patients is None else str(patients.expanduser().absolute()),
            pretrained_generator=None
            if pretrained_generator is None
            else str(pretrained_generator.expanduser().absolute()),
            trusted_peers=trusted_peers,
            minimum_peers=minimum_peers,
        ),
        superlink=superlink,
        root_certificates=root_certificates,
        private_key=private_key,
        say=typer.echo,
    )


@app.command("privacy")
def privacy_command(
    output_path: Annotated[
        Path, typer.Option(help="The node's output-path, which holds its ledger.")
    ],
    max_epsilon: Annotated[
        float | None, typer.Option(help="The node's max-epsilon; else no limit.")
    ] = None,
    privacy_delta: Annotated[float, typer.Option(help="The node's privacy-delta.")] = 1e-5,
) -> None:
    """Print on a hospital's machine what runs have spent of its patients' privacy.

    A line per run: the rounds and steps that were charged before they were trained, on how many
    patients, and the epsilon of the patient on whom that run has spent most. Then over all runs:
    the most that was spent on one patient, and what is left of max-epsilon.

    \b
    Examples:
      feddm privacy --output-path kept
      feddm privacy --output-path kept --max-epsilon 8 --privacy-delta 1e-5
    """
    from task.cli.privacy import show_ledger
    from task.protocol.node import NodeConfig, ledger_of

    node = NodeConfig(
        output_path=str(output_path.expanduser().absolute()),
        max_epsilon=max_epsilon,
        privacy_delta=privacy_delta,
    )
    show_ledger(ledger_of(node), say=typer.echo)


@app.command()
def approve(
    bundle: Annotated[
        Path,
        typer.Argument(help="A .fab file, or the folder of an app.", show_default=False),
    ],
    yes: Annotated[bool, typer.Option("--yes", help="Approve without asking.")] = False,
) -> None:
    """Let a hospital's node run a bundle of code, after a look at what is new in it.

    Shows the files that are added, removed and changed since the bundle that was approved last, and
    after a yes adds the bundle to the list in the folder that the variable FEDDM_GUARD names.

    \b
    Examples:
      feddm approve .
      feddm approve feddm.feddm.0-1-0.4f1c9a2b.fab --yes
    """
    from task.cli.approve import approve_bundle
    from task.guard.approvals import guard_folder

    approve_bundle(
        bundle,
        guard_folder(),
        agree=lambda: yes or typer.confirm("approve it?"),
        say=typer.echo,
    )


@app.command()
def doctor(
    data_root: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the data sets; else where each preset of conf/data looks.",
            callback=folder("--data-root"),
        ),
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of runs.")] = Path("runs"),
) -> None:
    """Say what this machine has for training, and what is missing.

    Versions, devices, disks, data sets, what metrics and exports need, runs. Status 0: it can
    train; 1: it cannot, and the last line says why.

    \b
    Examples:
      feddm doctor
      feddm doctor --data-root /data --runs /srv/runs
    """
    from task.cli.doctor import examine_machine

    examine_machine(data_root=data_root, runs=runs, say=typer.echo)


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def bench(context: typer.Context) -> None:
    """Measure this machine's training, sampling and rounds beside the alternatives.

    Needs a checkout; `feddm bench --help` says what is measured and how long it takes.
    """
    from task.cli.bench import run_benchmarks

    run_benchmarks(context.args)


def main() -> None:
    """Run the command line."""
    have_home()
    let_threads_sleep()
    write_any_letter()
    app(prog_name="feddm")
