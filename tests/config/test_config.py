import math
import os
import re
import shutil
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from task.code_version import code_fingerprint
from task.config import (
    CONF_DIR,
    RUN_CONFIG_WORDS,
    anchored,
    changed_config,
    compose_run_config,
    flat_values,
    hydra_override,
    load_config,
    load_run_config,
    models,
    preset_sweep,
    read_config,
    require_diffusion,
    unknown_values,
    value_paths,
    without_remedy,
    words_of_family,
    write_config,
)
from task.config import compose as composing
from task.config import stored as storing
from task.config.models import MODELS, ModelConfig
from task.config.schema import checked, config_of, schema_fields
from task.config.section import PositiveInt

# What these leave open.
ALSO_NEEDED = {
    "data=image_folder": ["data.classes=[a,b]"],
    "data=dicom_folder": ["data.classes=[a,b]"],
}
FAMILIES = ", ".join(MODELS)
MODEL_OPTIONS = [f"model={file.stem}" for file in sorted(CONF_DIR.glob("model/*.yaml"))]
GROUP_OPTIONS = [f"{file.parent.name}={file.stem}" for file in sorted(CONF_DIR.glob("*/*.yaml"))]
# Every character that Hydra's grammar, YAML or a shell gives a meaning to, but interpolation.
NASTY = [
    *(
        "a b",
        " lead",
        "trail ",
        "it's",
        "''",
        '"',
        "back\\slash",
        "end\\",
        "end\\\\",
        "\\'",
        "\\\\'",
    ),
    *("new\nline", "tab\t", "Zürich 東京", "a=b", "a,b", "[x]", "{y: 1}", "$HOME", "null", "inf"),
    *("true", "1e5", "007", "#c", "a: b", "~", "%", "*", "(x)", "!x", "&x", "@", "`x`", "-", ";"),
    *("2026-11-20", "12:30:45", "=", "on", "0x1f", "1_000", "1e-05", "---", "? x", "|", ">"),
]


def also_needed(option: str) -> list[str]:
    return ALSO_NEEDED.get(option, [])


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= (
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return found


def test_flower_offers_a_dozen_words_and_no_default_of_its_own() -> None:
    pyproject = tomllib.loads((CONF_DIR.parent / "pyproject.toml").read_text(encoding="utf-8"))
    offered = flat(pyproject["tool"]["flwr"]["app"]["config"])
    assert set(offered) == {*RUN_CONFIG_WORDS}
    assert set(offered) - {"experiment", "model", "overrides"} <= set(value_paths())
    assert set(offered.values()) == {""}


@pytest.mark.parametrize("option", MODEL_OPTIONS)
def test_schema_fields_are_the_leaves_of_what_hydra_composes(option: str) -> None:
    config = load_config([option, *also_needed(option)])
    assert set(schema_fields(config.model.family)) == set(flat_values(config))
    assert set(flat_values(config)) - {"diffusion"} <= set(value_paths())


def test_flat_values_are_the_values_of_the_configuration() -> None:
    values = flat_values(load_config(["partition.beta=0.25", "data=svhn"]))
    assert values["partition.beta"] == 0.25
    assert values["data.name"] == "svhn"
    assert values["federation.clients_per_round"] is None
    assert set(values) == set(schema_fields("diffusion"))


@pytest.mark.parametrize("option", GROUP_OPTIONS)
def test_every_option_of_every_group_composes(option: str) -> None:
    group, name = option.split("=")
    config = load_config([option, *also_needed(option)])
    # A preset and a data set say their own name.
    assert {"experiment": config.experiment, "data": config.data.name}.get(group, name) == name


def test_forced_words_of_other_families_are_left_out_of_a_job() -> None:
    hidden, width, eta = "++model.hidden_dim=7", "++model.width=16", "++diffusion.eta=0.5"
    typo = "++model.widht=16"
    for model, kept in {"vae": [hidden], "tiny": [width, eta]}.items():
        words = [f"model={model}", hidden, width, eta, typo]
        assert words_of_family(words) == [f"model={model}", *kept, typo]
    with pytest.raises(ValueError, match=r"no such value: model\.widht"):
        load_config(words_of_family(["model=vae", typo]))
    with pytest.raises(ValueError, match=r"no such value: model\.width"):
        load_config(["model=vae", width])


def test_groups_of_conf_are_the_sections_of_the_configuration() -> None:
    groups = {folder.name for folder in CONF_DIR.iterdir() if folder.is_dir()}
    sections = {path.split(".")[0] for path in value_paths() if "." in path}
    assert groups == sections | {"experiment", "remedy"}


def test_demo_is_the_default_and_small() -> None:
    config = load_config()
    assert config.experiment == "demo"
    assert (config.data.name, config.data.image_size, config.data.channels) == ("digits", 16, 1)
    assert (config.model.width, config.model.num_poolings) == (32, 2)
    assert config.diffusion.sampler == "ddim" and config.diffusion.num_inference_steps == 100
    assert (config.federation.num_supernodes, config.federation.rounds) == (10, 20)


@pytest.mark.parametrize("experiment", ["paper", "table1", "table2", "table3", "table4"])
def test_tables_start_from_the_setting_of_the_paper(experiment: str) -> None:
    config = load_config([f"experiment={experiment}"])
    federation = config.federation
    assert config.experiment == experiment
    assert (federation.rounds, federation.num_supernodes) == (300, 10)
    assert federation.clients_per_round == 10
    assert (config.train.local_epochs, config.train.batch_size) == (5, 512)
    assert (config.train.mode, config.partition.beta) == ("federated", 0.5)
    assert (config.data.name, config.data.image_size, config.data.channels) == ("cifar10", 32, 3)
    assert (config.model.width, config.model.num_poolings, config.model.final_relu) == (64, 3, True)
    assert config.diffusion.schedule == "continuous"
    assert config.eval.final_metrics


def test_table5_deals_the_scans_as_the_paper() -> None:
    config = load_config(["experiment=table5"])
    assert (config.data.name, config.data.image_size) == ("sars_cov_2_ct", 64)
    assert (config.train.batch_size, config.federation.rounds) == (128, 300)
    assert config.partition.counts is not None and len(config.partition.counts) == 10


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("paper", ("linear", "epsilon", "epsilon", "sum", "ddpm", None)),
        ("released", ("continuous", "v_prediction", "epsilon", "mean", "ddim", None)),
        ("fast", ("continuous", "v_prediction", "uniform", "mean", "ddim", 100)),
    ],
)
def test_diffusion_presets_fit_on_top_of_demo(option: str, expected: tuple[object, ...]) -> None:
    config = load_config(["experiment=demo", f"diffusion={option}"])
    found = config.diffusion
    assert expected == (
        *(found.schedule, found.prediction_type, found.loss_weighting, found.loss_reduction),
        *(found.sampler, found.num_inference_steps),
    )
    assert config.data.name == "digits"


@pytest.mark.parametrize(
    ("remedy", "changed"),
    [
        ("none", {}),
        ("centralized", {"train.mode": "centralized"}),
        ("fedprox", {"strategy.name": "fedprox", "strategy.proximal_mu": 0.01}),
        ("scaffold", {"strategy.name": "scaffold"}),
        ("ema", {"federation.ema_decay": 0.5}),
        ("cosine", {"train.lr_schedule": "cosine", "train.warmup_rounds": 1}),
        ("int8", {"federation.wire_dtype": "int8"}),
        ("int4_feedback", {"federation.wire_dtype": "int4", "federation.error_feedback": True}),
        ("optimizer_averaged", {"train.optimizer_state": "averaged"}),
        ("small_batches", {"train.client_batch_fraction": 0.25}),
        ("large_steps", {"train.client_lr_factor": 3}),
        ("usplit", {"federation.sharing": "usplit"}),
        ("ulatdec", {"federation.local": ["down"], "federation.drawn_by": "clients"}),
        ("pretrained", {"train.start_from": "runs/public"}),
    ],
)
def test_a_remedy_changes_its_own_values_alone(remedy: str, changed: dict[str, object]) -> None:
    words = ["experiment=remedies", "run_name=x"]
    plain, other = (
        flat_values(load_config([*words, *each])) for each in ([], [f"remedy={remedy}"])
    )
    assert other == plain | changed
    assert changed.keys() <= without_remedy().keys()
    flower = compose_run_config(
        {"experiment": "remedies", "run_name": "x", "overrides": f"remedy={remedy}"}
    )
    assert flat_values(flower) == other


def test_recommended_experiment_is_the_papers_with_the_recommended_remedy() -> None:
    paper, recommended, remedy = (
        flat_values(load_config([*words, "run_name=x", "experiment=" + experiment]))
        for words, experiment in (
            ([], "paper"),
            ([], "recommended"),
            (["remedy=recommended"], "paper"),
        )
    )
    assert recommended == remedy | {"experiment": "recommended"}
    changed = {path for path in paper if paper[path] != remedy[path]}
    assert changed and changed <= without_remedy().keys()


def test_every_remedy_is_swept_and_wins_over_presets_but_not_over_values() -> None:
    swept = preset_sweep("remedies")["remedy"].split(",")
    # Where it begins has to be made first.
    swept = [*swept, "pretrained"]
    assert {*swept} == {file.stem for file in (CONF_DIR / "remedy").glob("*.yaml")}
    assert without_remedy().items() <= flat_values(load_config(["remedy=none"])).items()
    config = load_config(["remedy=ema", "experiment=remedies", "federation.ema_decay=0.9"])
    assert config.federation.ema_decay == 0.9
    assert load_config(["remedy=scaffold", "strategy=feddyn"]).strategy.name == "feddyn"


@pytest.mark.parametrize("option", ["data=mnist", "model=feddm", "diffusion=paper"])
def test_groups_win_over_the_preset_in_either_order(option: str) -> None:
    first = load_config([option, "experiment=table1", "run_name=x"])
    assert first == load_config(["experiment=table1", option, "run_name=x"])
    assert first != load_config(["experiment=table1", "data=svhn", "diffusion=fast", "run_name=x"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        # Name, value and way out: what is allowed, or which word allows it.
        ("data=imagenet", ["data/imagenet", "cifar10", "digits", "fashion_mnist", "mnist", "svhn"]),
        ("data.name=imagenet", ["data.name", "'imagenet'", "cifar10", "digits", "svhn"]),
        ("experiment=table9", ["experiment/table9", "demo", "table1"]),
        ("partition.beta=0", ["partition.beta must be > 0", "got 0"]),
        ("partition.beta=-0.5", ["partition.beta", "-0.5", "> 0"]),
        ("partition.beta=nan", ["partition.beta", "nan", "> 0"]),
        (
            "federation.clients_per_round=11",
            ["federation.clients_per_round", "11", "federation.num_supernodes=10", "null"],
        ),
        ("federation.clients_per_round=0", ["federation.clients_per_round", "0", "> 0"]),
        ("federation.min_replies=11", ["federation.min_replies", "11", "at most 10"]),
        ("data.image_size=20", ["data.image_size", "20", "multiple of 8"]),
        ("data.image_size=0", ["data.image_size", "0", "positive multiple of 8"]),
        ("data.image_size=-8", ["data.image_size", "-8", "positive multiple of 8"]),
        ("model.num_poolings=5", ["data.image_size", "16", "multiple of 32", "model.num_poolings"]),
        ("data.channels=2", ["data.channels", "2", "1, 3"]),
        ("data.classes=[]", ["data.classes", "[]", "at least one class"]),
        ("data=image_folder", ["data.classes", "[]", "folders in data.root=data: none"]),
        ("data.on_corrupt=ignore", ["data.on_corrupt", "'ignore'", "refuse, skip"]),
        ("data.fit=cut", ["data.fit", "'cut'", "stretch, crop, pad"]),
        ("data.window=[40]", ["data.window", "[40.0]", "[center, width]"]),
        ("data.window=[40,0.9]", ["data.window", "[40.0, 0.9]", "width >= 1"]),
        ("data.window=[nan,400]", ["data.window", "[nan, 400]", "finite"]),
        ("data.window=[-inf,400]", ["data.window", "[-inf, 400]", "finite"]),
        ("data.window=[40,nan]", ["data.window", "[40, nan]", "finite"]),
        ("data.window=[40,inf]", ["data.window", "[40, inf]", "finite"]),
        ("partition.beta=null", ["partition.beta", "None", "partition.counts"]),
        ("partition.counts=[[1]]", ["partition.beta", "0.5", "null", "partition.counts"]),
        ("data.classes=[a,a]", ["data.classes", "['a', 'a']", "distinct"]),
        ("data.val_fraction=1", ["data.val_fraction", "got 1", "between 0 and 1"]),
        ("data.test_fraction=0", ["data.test_fraction", "got 0", "between 0 and 1"]),
        ("federation.rounds=many", ["federation.rounds must be an integer, got 'many'"]),
        ("federation.rounds=2.5", ["federation.rounds must be an integer, got 2.5"]),
        ("federation.rounds=null", ["federation.rounds must be an integer, got None"]),
        ("federation.rounds=true", ["federation.rounds must be an integer, got True"]),
        (
            "partition.counts=[[a]]",
            ["must be a list, each element a list, each element an integer"],
        ),
        ("model.family=[a]", [f"model.family must be one of {FAMILIES}, got ['a']"]),
        ("federation.rounds='3'", ["federation.rounds must be an integer, got '3'"]),
        ("train.lr=true", ["train.lr must be a number, got True"]),
        (
            "train.lr=0 train.batch_size=0",
            ["train.lr must be > 0, got 0", "train.batch_size must be > 0, got 0"],
        ),
        ("model.family=nvae", [f"model.family must be one of {FAMILIES}, got 'nvae'"]),
        ("model.width=0", ["model.width must be > 0, got 0"]),
        ("+model.depth=3", ["no such value: model.depth"]),
        (
            "model.latent_noise=1",
            ["no such value: model.latent_noise; it is one of model=small_gan"],
        ),
        (
            "model=resnet_gan train.accumulation=2",
            ["train.accumulation must be 1 with model.family=resnet_gan", "got 2"],
        ),
        ("partition.beta=high", ["partition.beta must be a number, or null, got 'high'"]),
        ("resume=maybe", ["resume must be true or false, got 'maybe'"]),
        ("data.classes=abc", ["data.classes", "abc", "list"]),
        ("partition.betta=1", ["no such value: partition.betta"]),
        ("nonsense=1", ["no such value: nonsense"]),
        ("eval.precision=fp8", ["eval.precision", "'fp8'", "auto, float32, bfloat16"]),
        ("train.precision=fp8", ["train.precision", "'fp8'", "auto, float32, bfloat16"]),
        ("train.device=tpu", ["train.device", "'tpu'", "auto, cpu, cuda"]),
        ("train.lr=0", ["train.lr", "got 0", "> 0"]),
        (
            "train.compile=true train.deterministic=true",
            ["train.compile", "null or false", "True"],
        ),
        ("train.local_epochs=0", ["train.local_epochs", "0", "> 0"]),
        ("model.dropout=1", ["model.dropout", "got 1", "[0, 1)"]),
        ("model.bottom_blocks=1", ["model.bottom_blocks", "1", ">= 2"]),
        ("model.fourier_features=3", ["model.fourier_features", "3", "even"]),
        ("diffusion.num_timesteps=1", ["diffusion.num_timesteps", "1", ">= 2"]),
        (
            "diffusion.schedule=sine",
            ["diffusion.schedule", "'sine'", "linear, cosine, sigmoid, continuous"],
        ),
        ("diffusion.eta=1.5", ["diffusion.eta", "1.5", "[0, 1]"]),
        (
            "diffusion.num_inference_steps=500",
            ["diffusion.num_inference_steps", "500", "diffusion.num_timesteps=300"],
        ),
        (
            "diffusion.sampler=ddpm",  # the demo skips steps
            ["diffusion.num_inference_steps", "100", "null", "diffusion.sampler=ddim"],
        ),
        ("diffusion.guidance_scale=2", ["guidance_scale", "2.0", "diffusion.label_dropout > 0"]),
        (
            "federation.aggregation=mean",
            ["federation.aggregation", "'mean'", "median, trimmed_mean"],
        ),
        (
            "federation.secure_aggregation=true federation.aggregation=median "
            "federation.min_replies=3",
            ["federation.aggregation", "fedavg or bounded_mean", "sums alone", "'median'"],
        ),
        (
            "federation.secure_aggregation=true federation.max_update_norm=2",
            ["federation.max_update_norm", "null", "federation.update_range", "2.0"],
        ),
        (
            "federation.secure_aggregation=true federation.keep_local_models=[0]",
            ["federation.keep_local_models", "sums alone", "[0]"],
        ),
        (
            "federation.secure_aggregation=true federation.clients_per_round=2",
            ["federation.clients_per_round", "at least 3", "got 2"],
        ),
        (
            "privacy=dp_sgd model=vae privacy.noise=distributed privacy.colluders=1 "
            "train.local_epochs=1",
            ["federation.secure_aggregation", "true", "share of the noise", "False"],
        ),
        (
            "experiment=private train.local_epochs=2",
            ["train.local_epochs", "1 with privacy.noise=distributed", "one step", "got 2"],
        ),
        (
            "experiment=private privacy.colluders=8",
            ["federation.min_replies", "at least 10", "privacy.colluders=8 of 10", "got 8"],
        ),
        (
            "experiment=private federation.min_replies=5",
            ["federation.min_replies", "at least 6", "masks off of two sums", "got 5"],
        ),
        (
            "experiment=private federation.local=[encoder]",
            ["federation.local", "[]", "the server takes the step", "encoder"],
        ),
        (
            "privacy=dp_clients train.mode=centralized",
            ["train.mode", "federated", "dp_clients", "'centralized'"],
        ),
        (
            "privacy=dp_clients federation.aggregation=median federation.min_replies=3",
            ["federation.aggregation", "fedavg or bounded_mean", "dp_clients", "'median'"],
        ),
        (
            "privacy=dp_clients privacy.sampling_rate=0.1",
            ["privacy.sampling_rate", "null", "dp_clients", "0.1"],
        ),
        (
            "privacy=dp_sgd model=vae privacy.colluders=1",
            ["privacy.colluders", "null without", "got 1"],
        ),
        (
            "experiment=private privacy.colluders=null",
            ["privacy.colluders", "1 or more", "got None"],
        ),
        (
            "strategy.server_lr=0.1",
            ["strategy.server_lr", "null with strategy.name=fedavg", "strategy=fedadam", "0.1"],
        ),
        (
            "strategy.name=feddyn",
            ["strategy.alpha", "a value", "strategy.name=feddyn", "strategy=feddyn sets", "None"],
        ),
        ("strategy=fedavgm strategy.momentum=1", ["strategy.momentum", "[0, 1)", "1"]),
        ("strategy=fedadam strategy.tau=0", ["strategy.tau", "> 0", "0"]),
        ("strategy.name=moon", ["strategy.name", "fedavg, fedprox", "'moon'"]),
        (
            "strategy=scaffold federation.secure_aggregation=true",
            ["strategy.name", "such as fedprox", "secure_aggregation=true", "'scaffold'"],
        ),
        (
            "strategy=feddyn privacy=dp_clients",
            ["strategy.name", "mechanism=dp_clients", "such as fedprox", "'feddyn'"],
        ),
        (
            "strategy=scaffold privacy=dp_sgd model=vae",
            ["strategy.name", "mechanism=dp_sgd", "noise", "'scaffold'"],
        ),
        (
            "strategy=scaffold federation.aggregation=median federation.min_replies=3",
            ["federation.aggregation", "fedavg", "scaffold", "'median'"],
        ),
        (
            "strategy=scaffold federation.max_update_norm=5",
            ["federation.max_update_norm", "null", "scaffold", "got 5"],
        ),
        (
            "strategy=feddyn federation.wire_dtype=int8",
            ["federation.error_feedback", "true", "feddyn", "got False"],
        ),
        (
            "strategy=feddyn federation.aggregation=median federation.min_replies=3",
            ["federation.aggregation", "fedavg or bounded_mean", "feddyn", "'median'"],
        ),
        (
            "train.optimizer_state=averaged federation.aggregation=median federation.min_replies=3",
            ["train.optimizer_state", "new or kept unless", "aggregation=fedavg", "'averaged'"],
        ),
        (
            "train.optimizer_state=averaged privacy=dp_clients",
            ["train.optimizer_state", "new or kept", "neither a mask nor noise", "'averaged'"],
        ),
        (
            "experiment=private train.optimizer_state=kept",
            ["train.optimizer_state", "new with privacy.noise=distributed", "'kept'"],
        ),
        (
            "federation.drawn_by=clients federation.secure_aggregation=true",
            ["federation.drawn_by", "global with", "neither a mask nor noise", "'clients'"],
        ),
        (
            "model=classifier federation.drawn_by=clients",
            ["federation.drawn_by", "global with model.family=classifier", "no images"],
        ),
        (
            "privacy=dp_sgd model=vae train.client_batch_fraction=0.5",
            ["train.client_batch_fraction", "1 with", "sampling_rate", "0.5"],
        ),
        (
            "experiment=private train.client_lr_factor=2",
            ["train.client_lr_factor", "1 with privacy.noise=distributed", "2"],
        ),
        (
            "federation.sharing=usplit federation.keep_local_models=[0]",
            ["federation.keep_local_models", "[] with", "usplit"],
        ),
        (
            "federation.drawn_by=clients federation.clients_per_round=2",
            ["federation.clients_per_round", "null with", "drawn_by=clients", "2"],
        ),
        (
            "federation.drawn_by=clients federation.ema_decay=0.5",
            ["federation.ema_decay", "null with", "no average", "0.5"],
        ),
        (
            "federation.drawn_by=clients federation.sharing=usplit",
            ["federation.sharing", "whole with", "all of it", "'usplit'"],
        ),
        (
            "federation.sharing=usplit federation.secure_aggregation=true",
            ["federation.secure_aggregation", "false with", "usplit", "each would know"],
        ),
        (
            "federation.sharing=usplit strategy=scaffold",
            ["strategy.name", "another with federation.sharing=usplit", "'scaffold'"],
        ),
        (
            "federation.sharing=usplit federation.wire_dtype=int4 federation.error_feedback=true",
            ["federation.error_feedback", "false with federation.sharing=usplit", "True"],
        ),
        (
            "federation.sharing=usplit privacy=dp_clients",
            ["privacy.mechanism", "none with federation.sharing=usplit", "'dp_clients'"],
        ),
        (
            "federation.sharing=usplit federation.clients_per_round=1",
            ["federation.clients_per_round", "at least 2 with federation.sharing=usplit", "1"],
        ),
        (
            "experiment=private strategy=fedadam",
            ["strategy.name", "fedavg with privacy.noise=distributed", "the server", "'fedadam'"],
        ),
        (
            "experiment=private train.lr_schedule=cosine",
            ["train.lr_schedule", "constant with privacy.noise=distributed", "'cosine'"],
        ),
        (
            "train.warmup_rounds=20",
            ["train.warmup_rounds", "below federation.rounds=20", "got 20"],
        ),
        (
            "federation.aggregation=median",
            ["federation.min_replies", "at least 3", "aggregation=median", "got 1"],
        ),
        (
            "federation.aggregation=trimmed_mean federation.min_replies=4",
            ["federation.min_replies", "at least 5", "trim_fraction=0.2", "got 4"],
        ),
        (
            "federation.aggregation=krum federation.min_replies=6 federation.num_malicious=2",
            ["federation.min_replies", "at least 7", "num_malicious=2", "got 6"],
        ),
        (
            "federation.aggregation=krum federation.min_replies=5 federation.num_selected=5",
            ["federation.num_selected", "at most 4", "got 5"],
        ),
        ("federation.trim_fraction=0.5", ["federation.trim_fraction", "0.5", "something left"]),
        ("federation.trim_fraction=0", ["federation.trim_fraction", "got 0", "something is cut"]),
        ("federation.num_malicious=-1", ["federation.num_malicious", "-1", ">= 0"]),
        ("federation.max_weight_share=0", ["federation.max_weight_share", "got 0", "(0, 1]"]),
        ("federation.max_weight_share=1.5", ["federation.max_weight_share", "1.5", "null"]),
        ("federation.max_update_norm=0", ["federation.max_update_norm", "got 0", "> 0"]),
        ("federation.round_attempts=0", ["federation.round_attempts", "0", "> 0"]),
        ("federation.wire_dtype=int2", ["federation.wire_dtype", "'int2'", "float32, float16"]),
        ("federation.error_feedback=true", ["federation.error_feedback", "int8 or int4"]),
        ("federation.ema_decay=1", ["federation.ema_decay", "got 1", "(0, 1)", "null"]),
        ("federation.gpus_per_client=-1", ["federation.gpus_per_client", "got -1", ">= 0"]),
        ("eval.num_images=-1", ["eval.num_images", "-1", ">= 0"]),
        ("seed=-1", ["seed", "-1", "[0, 2^63)"]),
        ("seed=9223372036854775808", ["seed", "9223372036854775808", "[0, 2^63)"]),
        ("run_name=a/b", ["run_name", "'a/b'", "without a slash"]),
        ("run_name=..", ["run_name", "'..'", "one folder"]),
        ("partition.beta=0.1,0.5", ["partition.beta=0.1,0.5"]),
    ],
)
def test_bad_values_are_refused_with_name_value_and_way_out(
    override: str, words: list[str]
) -> None:
    with pytest.raises(ValueError) as caught:
        load_config(override.split())
    assert [word for word in words if word not in str(caught.value)] == []


def test_missing_classes_are_answered_with_the_folders_that_are_there(tmp_path: Path) -> None:
    for name in ("train/b", "train/a", "train/.hidden", "test/a"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"'data\.classes=\[a,b\]'.*: a, b\)"):
        load_config(["data=image_folder", hydra_override("data.root", str(tmp_path))])


def test_table5_counts_are_those_of_the_paper() -> None:
    config = load_config(["data=sars_cov_2_ct", "partition=table5"])
    assert config.partition.beta is None and config.partition.counts is not None
    covid, non_covid = zip(*config.partition.counts, strict=True)
    assert covid == (20, 140, 441, 66, 19, 1, 14, 183, 339, 29)
    assert non_covid == (187, 105, 4, 10, 14, 289, 24, 24, 572, 0)
    assert (config.data.image_size, config.data.channels) == (64, 3)


@pytest.mark.parametrize("override", ["partition.betta=1", "nonsense=1"])
def test_unknown_keys_are_not_answered_with_advice_to_force_them_in(override: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_config([override])
    assert f"+{override}" not in str(caught.value)


@pytest.mark.parametrize("override", ["+partition.betta=1", "++nonsense=1"])
def test_unknown_keys_are_refused_with_a_plus_as_well(override: str) -> None:
    with pytest.raises(ValueError, match=r"no such value: .*(betta|nonsense)"):
        load_config([override])


def is_float(path: str) -> bool:
    return "float" in str(value_paths().get(path)).replace("float32", "")


# With what chooses a model that has it.
FLOATS = {
    path: option
    for option in MODEL_OPTIONS
    for path in flat_values(load_config([option, *also_needed(option)]))
    if is_float(path)
}


@pytest.mark.parametrize("field", FLOATS)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_no_value_is_nan_and_one_may_be_infinite(field: str, value: str) -> None:
    given = f"[{value},{value}]" if field == "data.window" else value
    words = [FLOATS[field], f"{field}={given}"]
    if (field, value) == ("partition.beta", "inf"):
        load_config(words)
        return
    with pytest.raises(ValueError, match=rf"{field} must be .*, got \[?{value}"):
        load_config(words)


def test_family_of_generators_is_one_class_and_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Mixture(ModelConfig):
        family: Literal["mixture"]
        num_components: PositiveInt

    monkeypatch.setitem(MODELS, "mixture", Mixture)
    config = config_of(
        {
            **{k: v for k, v in flat_values(load_config()).items() if k[:3] not in ("mod", "dif")},
            **{"model.family": "mixture", "model.num_components": 3, "diffusion": None},
        }
    )
    assert config.model == Mixture(family="mixture", num_components=3)
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config
    assert "model.num_components" in value_paths()
    for name, value, expected in (
        ("model.num_components", 0, "> 0, got 0"),
        ("model.family", "diffusion", "given"),
        ("model.family", "nvae", f"one of {FAMILIES}, mixture, got 'nvae'"),
    ):
        with pytest.raises(ValueError, match=rf"model\.\w+ must be {expected}"):
            config.changed({name: value})


@pytest.fixture
def mixtures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A family without diffusion and two files of it in a conf/ of their own."""

    class Mixture(ModelConfig):
        drawing_values = ("model.truncation",)
        family: Literal["mixture"]
        num_components: PositiveInt
        truncation: float

    conf = tmp_path / "conf"
    shutil.copytree(CONF_DIR, conf)
    (conf / "model" / "mixture.yaml").write_text(
        "family: mixture\nnum_components: 3\ntruncation: 1.0\nlr: 0.25\nbatch_size: 7\n"
    )
    (conf / "model" / "large_mixture.yaml").write_text(
        "defaults: [mixture, _self_]\nnum_components: 99\ntruncation: 2.0\nlr: 0.125\n"
    )
    monkeypatch.setitem(MODELS, "mixture", Mixture)
    for module in (composing, storing):
        monkeypatch.setattr(module, "CONF_DIR", conf)
    caches = (composing.model_presets, storing._defaults)
    for each in caches:
        each.cache_clear()
    yield
    for each in caches:
        each.cache_clear()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (1e-3, 32)),
        (["model=feddm"], (2e-4, 32)),  # of a demo every batch is small
        (["model=mixture"], (0.25, 32)),
        (["experiment=paper"], (2e-4, 512)),
        (["experiment=paper", "model=mixture"], (0.25, 7)),
        (["experiment=paper", "model=large_mixture"], (0.125, 7)),
        (["experiment=table5", "model=mixture"], (0.25, 128)),
        (["model=mixture", "train.lr=0.5", "train.batch_size=9"], (0.5, 9)),
        (["train.lr=0.5", "model=mixture"], (0.5, 32)),
    ],
)
def test_learning_rate_comes_with_the_model(
    words: list[str], expected: tuple[float, int], mixtures: None
) -> None:
    config = load_config(words)
    assert (config.train.lr, config.train.batch_size) == expected
    assert not {"model.lr", "model.batch_size"} & flat_values(config).keys()


@pytest.mark.parametrize("name", ["lr", "batch_size"])
def test_values_of_training_are_no_words_of_the_model(name: str) -> None:
    with pytest.raises(ValueError, match=rf"model\.{name} must be left out; say train\.{name}="):
        load_config([f"model.{name}=7"])


def test_a_model_without_a_file_needs_a_learning_rate(mixtures: None) -> None:
    words = ["~model", "+model.family=mixture", "+model.num_components=3", "+model.truncation=1.0"]
    with pytest.raises(ValueError, match=r"train\.lr must be a number, got None"):
        load_config(words)
    assert load_config([*words, "train.lr=0.1"]).train.lr == 0.1


def test_a_family_without_diffusion_has_no_value_of_it(mixtures: None, tmp_path: Path) -> None:
    config = load_config(["model=mixture", "run_name=x"])
    assert config.diffusion is None
    assert {p for p in flat_values(config) if p.startswith("diffusion")} == {"diffusion"}
    assert set(schema_fields("mixture")) == set(flat_values(config))
    assert config.changed({"seed": 3}).changed({"seed": config.seed}) == config
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml").model == config.model
    assert unknown_values(tmp_path / "config.yaml") == {}
    assert {p for p in config.generation_values if p.startswith(("diff", "model"))} == {
        "model.truncation"
    }
    assert changed_config(
        config, ["model.truncation=0.5"], options={}, names=config.generation_values
    ).model == config.model.model_copy(update={"truncation": 0.5})
    with pytest.raises(ValueError, match=r"model.family=mixture has no diffusion"):
        require_diffusion(config)


@pytest.mark.parametrize(
    "word",
    [
        "diffusion=fast",
        "diffusion.eta=0.5",
        "++diffusion.eta=0.5",
        "diffusion.num_inference_steps=null",
    ],
)
def test_a_word_of_diffusion_is_refused_for_a_family_without_it(word: str, mixtures: None) -> None:
    for words in (["model=mixture", word], [word, "experiment=table1", "model=mixture"]):
        with pytest.raises(ValueError, match=r"model\.family=mixture has no diffusion") as caught:
            load_config(words)
        assert re.search(
            rf"leave {re.escape(word)} out, or choose .*model=feddm", str(caught.value)
        )
        assert "model=mixture" not in str(caught.value)
    with pytest.raises(ValueError, match="has no diffusion"):
        load_run_config({"model": "mixture", "overrides": word})
    config = load_config(["model=mixture"])
    with pytest.raises(ValueError, match=rf"has no diffusion; leave {re.escape(word)} out$"):
        changed_config(config, [word], options={}, names=config.generation_values)
    load_config([word.lstrip("+")])


def test_diffusion_is_given_where_the_family_has_it_and_nowhere_else(mixtures: None) -> None:
    mixture, unet = load_config(["model=mixture"]), load_config()
    with pytest.raises(ValueError, match=r"no such value: diffusion\.eta \(diffusion is null\)"):
        mixture.changed({"diffusion.eta": 0.5})
    for config, other, expected in (
        (mixture, unet, "diffusion must be null with model.family=mixture, got 'its values'"),
        (unet, mixture, "diffusion must be given with model.family=diffusion, got None"),
    ):
        tree = config.model_dump() | {"diffusion": other.model_dump()["diffusion"]}
        with pytest.raises(ValueError, match=expected):
            checked(tree)


@pytest.mark.parametrize(
    ("preset", "missing", "expected"),
    [
        ("mixture", "truncation", 1.0),
        ("large_mixture", "truncation", 2.0),
        ("large_mixture", "num_components", 99),
    ],
)
def test_a_value_that_a_run_of_another_family_lacks_is_that_of_its_preset(
    preset: str, missing: str, expected: object, mixtures: None, tmp_path: Path
) -> None:
    file = tmp_path / "config.yaml"
    write_config(load_config([f"model={preset}"]), file)
    stored = yaml.safe_load(file.read_text(encoding="utf-8"))
    del stored["model"][missing], stored["train"]["clip_norm"]
    file.write_text(yaml.safe_dump(stored), encoding="utf-8")
    found = read_config(file)
    assert flat_values(found)[f"model.{missing}"] == expected
    assert found.train.clip_norm is None and found.diffusion is None


def test_a_stored_family_that_is_not_installed_is_named(mixtures: None, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    write_config(load_config(["model=mixture"]), file)
    del MODELS["mixture"]
    with pytest.raises(ValueError, match=r"model\.family must be one of .*, got 'mixture'"):
        read_config(file)


def test_a_stored_diffusion_model_without_diffusion_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    write_config(load_config(), file)
    stored = yaml.safe_load(file.read_text(encoding="utf-8"))
    file.write_text(yaml.safe_dump(stored | {"diffusion": None}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.yaml.*diffusion must be a mapping, got None"):
        read_config(file)


def test_changed_values_are_checked_too() -> None:
    config = load_config()
    with pytest.raises(
        ValueError, match=r"data\.window must be a list, each element finite, .*got \[nan, 400\.0\]"
    ):
        config.changed({"data.window": [math.nan, 400.0]})


def test_values_at_the_edge_are_accepted() -> None:
    config = load_config(
        [
            *("partition.beta=inf", "federation.clients_per_round=10", "federation.min_replies=10"),
            *("data.image_size=8", "seed=9223372036854775807", "diffusion.eta=0"),
        ]
    )
    assert config.partition.beta == math.inf
    assert config.federation.clients_per_round == config.federation.num_supernodes == 10
    assert config.seed == 2**63 - 1


def test_load_config_leaves_the_hydra_of_the_process_as_it_was() -> None:
    assert not GlobalHydra.instance().is_initialized()
    load_config()
    assert not GlobalHydra.instance().is_initialized()
    composing._composition.cache_clear()  # or nothing would be composed
    with initialize_config_dir(str(CONF_DIR / "data"), version_base="1.3"):
        outer = GlobalHydra.instance().hydra
        load_config(["data=svhn"])
        with pytest.raises(ValueError, match="partition"):
            load_config(["partition.beta=0"])
        assert GlobalHydra.instance().hydra is outer
        assert compose("mnist").name == "mnist"  # its own folder still, not conf/
    assert not GlobalHydra.instance().is_initialized()


def test_compositions_of_the_same_words_share_neither_values_nor_times() -> None:
    words = ['run_name="${feddm_count:%H-%M-%S}"']
    times = iter(range(10))
    OmegaConf.register_new_resolver("feddm_count", lambda form: next(times), use_cache=True)
    try:
        first = composing.compose_conf(words)
        first.train.lr = 7.0
        assert (first.run_name, first.run_name) == (0, 0)
        second = composing.compose_conf(words)
        assert second.run_name == 1 and second.train.lr != 7.0
        # Hydra has resolved ${now:...} of its own folders.
        assert not OmegaConf.get_cache(composing.compose_conf([]))
    finally:
        OmegaConf.clear_resolver("feddm_count")


def test_empty_strings_mean_what_conf_says() -> None:
    pyproject = tomllib.loads((CONF_DIR.parent / "pyproject.toml").read_text(encoding="utf-8"))
    offered = flat(pyproject["tool"]["flwr"]["app"]["config"])
    found = load_run_config({**offered, "run_name": "x"})
    assert found == load_run_config({"run_name": "x"})
    assert found == anchored(load_config(["run_name=x"]), Path.home())


@pytest.mark.parametrize(
    ("given", "path", "expected"),
    [
        ({"partition.beta": 0.1}, "partition.beta", 0.1),
        ({"partition.beta": "inf"}, "partition.beta", math.inf),
        ({"resume": True}, "resume", True),
        ({"resume": "true"}, "resume", True),
        ({"train.channels_last": False}, "train.channels_last", False),
        ({"federation.clients_per_round": 3}, "federation.clients_per_round", 3),
        ({"federation.clients_per_round": "null"}, "federation.clients_per_round", None),
        ({"diffusion.num_inference_steps": "null"}, "diffusion.num_inference_steps", None),
        ({"data.classes": "[left, right]"}, "data.classes", ["left", "right"]),
        ({"run_name": 5}, "run_name", "5"),
        ({"run_name": "null"}, "run_name", "null"),
        ({"experiment": "table1"}, "data.name", "cifar10"),
        ({"model": "feddm"}, "model.width", 64),
        ({"experiment": "table1", "overrides": "data=mnist"}, "data.name", "mnist"),
        ({"experiment": "table1", "train.lr": 0.5}, "train.lr", 0.5),
        ({"overrides": "data=mnist partition.beta=2"}, "partition.beta", 2.0),
        ({"overrides": "data.classes=[a,b]"}, "data.classes", ["a", "b"]),
        # Two layers of quotes: shlex takes the outer ones, Hydra the inner ones.
        ({"overrides": "\"run_name='two words'\" seed=3"}, "run_name", "two words"),
        ({"overrides": "run_name='two words' seed=3"}, "seed", 3),
        ({"partition.beta": 0.1, "overrides": "partition.beta=0.7"}, "partition.beta", 0.7),
    ],
)
def test_run_config_reaches_the_configuration(
    given: dict[str, Any], path: str, expected: object
) -> None:
    assert flat_values(load_run_config(given))[path] == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"partition.betta": 1}, ["no such value: partition.betta"]),
        ({"partition.beta": 0}, ["partition.beta", "> 0"]),
        ({"federation.rounds": "many"}, ["federation.rounds", "many"]),
        ({"experiment": "table9"}, ["experiment/table9", "demo"]),
        ({"overrides": "data=imagenet"}, ["data/imagenet", "digits"]),
        ({"overrides": "run_name='x"}, ["overrides", "run_name='x", "quot"]),
    ],
)
def test_bad_run_config_is_refused_by_name(given: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        load_run_config(given)
    assert [word for word in words if word not in str(caught.value)] == []


def test_run_config_counts_relative_folders_from_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = load_run_config({"output_dir": "results", "data.root": "~/images"})
    assert config.data.cache_dir == "/home/someone/.cache/feddm"
    assert config.output_dir == "/home/someone/results"
    assert config.data.root == "/home/someone/images"


@pytest.mark.parametrize("text", NASTY)
def test_text_of_any_characters_survives_hydra_and_yaml(text: str, tmp_path: Path) -> None:
    config = load_run_config({"run_name": text, "output_dir": "/" + text})
    assert (config.run_name, config.output_dir) == (text, str(Path("/" + text)))
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config


def test_numbers_and_words_are_left_to_hydra_to_read() -> None:
    assert hydra_override("seed", 3) == "seed=3"
    assert hydra_override("resume", True) == "resume=true"
    assert hydra_override("partition.beta", "inf") == "partition.beta=inf"
    assert hydra_override("run_name", "3") == 'run_name="3"'


def test_anchored_counts_relative_folders_from_the_given_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = load_config(["output_dir=a/b", "data.root='~/c'", "run_name=x"])
    moved = anchored(config, Path("/there"))
    assert (moved.output_dir, moved.data.root) == ("/there/a/b", "/home/someone/c")
    assert anchored(moved, Path("/elsewhere")) == moved
    rest = {"output_dir", "data.root", "data.cache_dir"}
    before, after = flat_values(config), flat_values(moved)
    assert {k: v for k, v in before.items() if k not in rest} == {
        k: v for k, v in after.items() if k not in rest
    }


@pytest.mark.parametrize(
    "overrides", [[], ["experiment=table1"], ["partition.beta=inf", "federation.ema_decay=0.9"]]
)
def test_written_configuration_reads_back_equal(overrides: list[str], tmp_path: Path) -> None:
    config = load_config(overrides)
    write_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "data"),
        (b"seed: 1", "data"),
        (b"nonsense: 1", "model"),
        (b"{data: 3, model: {}, diffusion: {}, train: {}}", "data must be a mapping"),
        (b"[1, 2]", "config.yaml"),
        (b"3", "config.yaml"),
        (b"seed: [", "config.yaml"),
        (b"\t", "config.yaml"),
        (b"\xff\xfe\x00", "config.yaml"),
    ],
)
def test_what_is_no_configuration_is_refused(content: bytes, word: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=word) as caught:
        read_config(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("path", [*schema_fields("diffusion")])
def test_value_that_a_stored_configuration_lacks_is_that_of_conf(
    path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As a run of an earlier version looks, which did not know the value."""
    config = load_config(["experiment=table5", "output_dir=/was/there", "run_name=so"])
    file = tmp_path / "so" / "config.yaml"
    file.parent.mkdir()
    write_config(config, file)
    stored = yaml.safe_load(file.read_text(encoding="utf-8"))
    *sections, name = path.split(".")
    part = stored[sections[0]] if sections else stored
    del part[name]
    part["of_another_version"] = 3
    file.write_text(yaml.safe_dump(stored), encoding="utf-8")
    wanted = flat_values(config)
    wanted |= {"output_dir": str(tmp_path)} if path == "output_dir" else {}
    # What is lost with the name of the preset or of the data set is another one's. Runs that could
    # not be audited were not.
    lost = {"experiment": "demo", "data.name": "sars_cov_2_ct", "audit.at_end": False}
    assert flat_values(read_config(file)) == wanted | {k: v for k, v in lost.items() if k == path}
    unknown = ".".join([*sections, "of_another_version"])
    assert unknown_values(file) == {unknown: 3}
    for said in (f"{file} has no {path}; taken for ", f"{file} has {unknown}, which this version"):
        assert said in caplog.text


def test_run_that_could_not_choose_a_strategy_is_of_fedavg(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    config = load_config()
    write_config(config, file)
    stored = yaml.safe_load(file.read_text(encoding="utf-8"))
    del stored["strategy"], stored["train"]["lr_schedule"], stored["train"]["warmup_rounds"]
    file.write_text(yaml.safe_dump(stored), encoding="utf-8")
    read = read_config(file)
    assert (read.strategy, read.train) == (config.strategy, config.train)
    assert read.strategy.name == "fedavg" and read.train.lr_schedule == "constant"


def test_pictures_of_a_run_that_could_not_choose_how_they_fit_are_stretched(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    config = load_config(["data=image_folder", "data.classes=[a,b]"])
    assert config.data.fit != "stretch"
    write_config(config, file)
    stored = yaml.safe_load(file.read_text(encoding="utf-8"))
    del stored["data"]["fit"]
    file.write_text(yaml.safe_dump(stored), encoding="utf-8")
    assert read_config(file).data.fit == "stretch"


def test_name_of_a_class_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"gr\xfcn")).mkdir()
    with pytest.raises(ValueError, match=r"folder below data\.root, must be text in UTF-8"):
        load_config(["data=image_folder", f"data.root={tmp_path}"], images_below=tmp_path)


def test_stored_values_are_checked_like_given_ones(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    write_config(load_config(), file)
    text = file.read_text(encoding="utf-8")
    assert "beta: 0.5" in text
    file.write_text(text.replace("beta: 0.5", "beta: 0.0"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.yaml.*partition\.beta must be > 0"):
        read_config(file)


def test_missing_configuration_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.yaml"):
        read_config(tmp_path / "config.yaml")


def test_files_of_the_extractors_are_absolute_or_empty() -> None:
    words = ["eval.inception_weights=w.pth", "data=chest_xray", "data.patients=p.csv"]
    config = anchored(load_config(words), Path("/there"))
    assert config.eval.inception_weights == "/there/w.pth"
    assert config.data.patients == "/there/p.csv"
    assert config.eval.exported_program == ""


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "eval.extractor=eye",
            r"eval\.extractor must be one of auto, inception, classifier, efficientnet",
        ),
        ("eval.image_range=both", r"eval\.image_range must be one of correct, paper"),
        ("eval.extractor=exported", r"eval\.exported_program must be the file of a program"),
    ],
)
def test_extractors_out_of_range_are_refused(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config([override])


class BesidePackage:
    """What an installed package says of itself in its entry points."""

    value = "nvae.family"
    dist = SimpleNamespace(name="feddm-nvae", version="1.2")

    def __init__(self, bring: Callable[[], object]) -> None:
        self.load = bring


def test_package_of_a_family_is_named_and_stands_in_the_fingerprint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class NVAE(ModelConfig):
        family: Literal["nvae"]

    def fail() -> None:
        raise ImportError("No module named 'einops'")

    monkeypatch.setattr(models, "MODELS", dict(MODELS))
    monkeypatch.setattr(models, "PACKAGES", {})
    found = [BesidePackage(fail)]
    monkeypatch.setattr(models, "entry_points", lambda group: found)
    models._load_installed_families.cache_clear()
    with pytest.raises(
        ValueError, match=r"the package feddm-nvae 1\.2 brings .*einops'\); install"
    ):
        load_config(["model.family=nvae"])
    found[0] = BesidePackage(lambda: models.MODELS.update(nvae=NVAE))
    assert "nvae" in models.model_schemas("nvae")
    assert (models.package_of("nvae"), models.package_of("vae")) == ("feddm-nvae 1.2", "")
    codes = {code_fingerprint(package) for package in ("", "feddm-nvae 1.2", "feddm-nvae 1.3")}
    assert len(codes) == 3 and all(re.fullmatch("[0-9a-f]{16}", code) for code in codes)
    models._load_installed_families.cache_clear()
