"""The configuration: which values there are, what is legal, and how one is composed.

`conf/` holds every default, `schema` and `models` the types and checks. `compose` puts both
together for `feddm-train`, `flower` for `flwr run`, `stored` for a run's folder: equal values,
equal runs.
`overrides` and `hydra_grammar` read what people type; `class_folders` finds the names of classes.
"""

from task.config.class_folders import class_folders, is_hidden, require_folder
from task.config.compose import (
    TRAINED_WITH,
    changed_config,
    compose_conf,
    config_from_hydra,
    load_config,
    model_presets,
    preset_sweep,
    words_of_family,
)
from task.config.data_config import FILE_SETS, DataConfig
from task.config.flower import (
    RUN_CONFIG_WORDS,
    Word,
    as_run_config,
    compose_run_config,
    load_run_config,
)
from task.config.frozen_file import MODEL_FILE, FrozenFile
from task.config.models import (
    MODELS,
    AttentionUNetConfig,
    ClassifierConfig,
    ModelConfig,
    ResNetGANConfig,
    SmallGANConfig,
    StyleGAN2ADAConfig,
    VAEConfig,
    package_of,
)
from task.config.overrides import hydra_override, path_of, read_override
from task.config.remedies import strategy_preset, without_remedy
from task.config.schema import (
    CONF_DIR,
    EXTRACTORS,
    FITTED_VALUES,
    IMAGE_RANGES,
    MEASURING_OFF,
    MIN_MEASURED_IMAGES,
    MIN_PEERS,
    OWN_IMAGES,
    SAMPLER_VALUES,
    Config,
    FederationConfig,
    StrategyConfig,
    anchored,
    choices,
    flat_values,
    require_data_root,
    require_diffusion,
    settle_extractor,
    settle_frozen_file,
    settle_precisions,
    value_paths,
)
from task.config.section import FineTuning
from task.config.stored import nearest_models, read_config, unknown_values, write_config

__all__ = [
    "CONF_DIR",
    "EXTRACTORS",
    "FILE_SETS",
    "FITTED_VALUES",
    "IMAGE_RANGES",
    "MEASURING_OFF",
    "MIN_MEASURED_IMAGES",
    "MIN_PEERS",
    "MODELS",
    "MODEL_FILE",
    "OWN_IMAGES",
    "RUN_CONFIG_WORDS",
    "SAMPLER_VALUES",
    "TRAINED_WITH",
    "AttentionUNetConfig",
    "ClassifierConfig",
    "Config",
    "DataConfig",
    "FederationConfig",
    "FineTuning",
    "FrozenFile",
    "ModelConfig",
    "ResNetGANConfig",
    "SmallGANConfig",
    "StrategyConfig",
    "StyleGAN2ADAConfig",
    "VAEConfig",
    "Word",
    "anchored",
    "as_run_config",
    "changed_config",
    "choices",
    "class_folders",
    "compose_conf",
    "compose_run_config",
    "config_from_hydra",
    "flat_values",
    "hydra_override",
    "is_hidden",
    "load_config",
    "load_run_config",
    "model_presets",
    "nearest_models",
    "package_of",
    "path_of",
    "preset_sweep",
    "read_config",
    "read_override",
    "require_data_root",
    "require_diffusion",
    "require_folder",
    "settle_extractor",
    "settle_frozen_file",
    "settle_precisions",
    "strategy_preset",
    "unknown_values",
    "value_paths",
    "without_remedy",
    "words_of_family",
    "write_config",
]
