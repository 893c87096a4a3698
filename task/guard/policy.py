"""What a hospital demands of every run, in a file of its own that no coordinator can reach."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from task.checks import require
from task.code_version import ROOT
from task.guard.bundle import Bundle

POLICY_FILE = "policy.toml"
REQUIRE_PRIVACY = "require-privacy"
REQUIRE_SECURE_AGGREGATION = "require-secure-aggregation"
NODE_CONFIG = "node-config"
MAX_EPSILON = "max-epsilon"
# What makes a configuration of a run config, in a bundle and in the guard's own feddm.
CONFIGURATION = ("conf/**/*.yaml", "task/config/**/*.py")


class PolicyError(ValueError):
    """A run does not fit the hospital's policy."""


@dataclass(frozen=True)
class Policy:
    """What a run must be like.

    Attributes:
        require_privacy: whether it must train with differential privacy.
        require_secure_aggregation: whether the server may learn sums alone.
        node_config: values that take the place of those in `--node-config`, whatever these are.
    """

    require_privacy: bool = False
    require_secure_aggregation: bool = False
    node_config: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the policy of a guard.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is no TOML, a key is unknown, or a value of another type.
        """
        file = folder / POLICY_FILE
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no policy is there; an empty file demands nothing")
        try:
            given = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: it must be TOML ({error})") from error
        types = {REQUIRE_PRIVACY: bool, REQUIRE_SECURE_AGGREGATION: bool, NODE_CONFIG: dict}
        unknown = ", ".join(sorted(given.keys() - types.keys()))
        require(not unknown, str(file), f"of the keys {', '.join(types)}", unknown)
        for key, value in given.items():
            require(type(value) is types[key], f"{file}: {key}", f"a {types[key].__name__}", value)
        return cls(**{key.replace("-", "_"): value for key, value in given.items()})

    def check(self, bundle: Bundle, run_config: Mapping[str, Any]) -> None:
        """Check the configuration of a run, as the bundle's own code would compose it.

        Args:
            bundle: an approved one.
            run_config: Flower's, flat.

        Raises:
            PolicyError: it does not fit; names value and way out.
            ValueError: it is no configuration.
        """
        limit = self.node_config.get(MAX_EPSILON)
        private = self.require_privacy or limit is not None
        if not private and not self.require_secure_aggregation:
            return
        if _configuration_of(bundle.files) != _own_configuration():
            raise PolicyError(
                "the bundle composes configurations otherwise than this node's feddm, which "
                "therefore cannot check them; install the version that was approved"
            )
        # Imported here because it takes a second, which a policy without demands need not.
        from task.config import compose_run_config, flat_values

        values = flat_values(compose_run_config(run_config))
        if private:
            # A feddm that knows no such value trains without.
            mechanism = values.get("privacy.mechanism", "none")
            whose = REQUIRE_PRIVACY if self.require_privacy else f"{MAX_EPSILON}={limit}"
            _demand(mechanism == "dp_sgd", "privacy.mechanism", "dp_sgd", mechanism, whose)
            noise = values.get("privacy.noise_multiplier")
            _demand(noise != 0, "privacy.noise_multiplier", "above 0, or null,", noise, whose)
        epsilon = values.get("privacy.epsilon")
        if limit is not None and epsilon is not None:
            whose = f"{MAX_EPSILON}={limit}"
            _demand(epsilon <= limit, "privacy.epsilon", f"at most {limit}", epsilon, whose)
        if self.require_secure_aggregation:
            hidden = values.get("federation.secure_aggregation", False)
            name = "federation.secure_aggregation"
            _demand(hidden is True, name, "true", hidden, REQUIRE_SECURE_AGGREGATION)


def _demand(fits: bool, name: str, expected: str, value: object, whose: str) -> None:
    if not fits:
        raise PolicyError(
            f"{name} must be {expected} by {whose} in {POLICY_FILE}, got {value!r}; ask the "
            "coordinator for another run, or change the policy"
        )


def _configuration_of(files: Mapping[str, bytes]) -> dict[str, bytes]:
    suffixes = {"conf/": ".yaml", "task/config/": ".py"}
    return {
        path: content
        for path, content in files.items()
        for start, suffix in suffixes.items()
        if path.startswith(start) and path.endswith(suffix)
    }


def _own_configuration() -> dict[str, bytes]:
    return {
        file.relative_to(ROOT).as_posix(): file.read_bytes()
        for pattern in CONFIGURATION
        for file in ROOT.glob(pattern)
    }
