import inspect
import io
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray._private.node
import ray._private.services

from server_app.launch import simulation as module
from server_app.launch.simulation import OverloadedError, described_end, show, simulate
from server_app.launch.superlink import (
    FLOWER_PROCESS,
    LONGEST_FOLDER,
    private_environment,
    private_folder,
    uninterrupted,
)
from task.processes import have_home, write_any_letter

# What a run said with flwr 1.42 and ray 2.55.
SAID = """\
Using SuperLink: feddm (127.0.0.1:53431)
Successfully started run 18366193085890170336
\x1b[92mINFO \x1b[0m:      Starting logstream for run_id `18366193085890170336`
\x1b[93mWARNING \x1b[0m:   Since flwr 1.32, default simulated SuperNodes changed from 10 to 2.
\x1b[92mINFO \x1b[0m:      \tflwr federation simulation-config @none/default <superlink>
Successfully installed feddm to /tmp/feddm-isk47hz4/flwr/apps/feddm.feddm.0.1.0.34ec2b6b.
/x/lib/python3.11/site-packages/ray/_private/worker.py:2051: FutureWarning: Tip: In future
  warnings.warn(
18:54:38 1,618 training images, 88 to 256 at a hospital
\x1b[36m(ClientAppActor pid=10668)\x1b[0m \x1b[93mWARNING \x1b[0m:   Manually terminating
\x1b[92mINFO \x1b[0m:      
"""
NEEDED = """\
\x1b[91mERROR \x1b[0m:     Simulation raised an exception
ValueError: no
\x1b[93mWARNING \x1b[0m:   something new
(raylet) [2026-11-25] A worker was killed due to the node running low on memory
/home/me/feddm/task/training/loop.py:1: UserWarning: look here
  at_this()
"""
TRACEBACK = """\
Traceback (most recent call last):
  File "/x/lib/python3.11/site-packages/flwr/simulation/run_simulation.py", line 1, in main
    raise ValueError("no")
    ^^^^^^^^^^^^^^^^^^^^^^
ValueError: no
"""


def test_noise_is_left_out_and_no_error_is(capsys: pytest.CaptureFixture[str]) -> None:
    whole = io.StringIO()
    said = SAID + NEEDED.replace("ValueError: no\n", TRACEBACK)
    show(said.splitlines(keepends=True), whole)
    kept = "18:54:38 1,618 training images, 88 to 256 at a hospital\n" + NEEDED
    assert capsys.readouterr().out == kept
    assert whole.getvalue() == said


@pytest.mark.parametrize(
    ("failures", "calls", "raised"),
    [
        ([None], 1, None),
        ([OverloadedError("busy"), None], 2, None),
        ([OverloadedError("busy"), OverloadedError("still busy")], 2, "still busy"),
        ([RuntimeError("wrong"), None], 1, "wrong"),
    ],
)
def test_only_a_busy_machine_is_given_one_more_chance(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failures: list[Exception | None],
    calls: int,
    raised: str | None,
) -> None:
    words: list[str] = []

    def once(app: Path, run_config: str, *rest: object) -> None:
        words.append(run_config)
        if (failure := failures[len(words) - 1]) is not None:
            raise failure

    monkeypatch.setattr(module, "simulate_once", once)
    start = {
        "run_config": lambda: f"attempt {len(words)}",
        "federation_config": "",
        "log_file": Path("log"),
    }
    if raised is None:
        simulate(Path("app"), **start)  # type: ignore[arg-type]
    else:
        with pytest.raises(RuntimeError, match=raised):
            simulate(Path("app"), **start)  # type: ignore[arg-type]
    assert words == [f"attempt {number}" for number in range(calls)]
    assert ("busy; trying once more" in capsys.readouterr().out) == (calls == 2)


def test_end_of_a_simulation_is_said_without_guessing() -> None:
    assert described_end(137).startswith("the simulation was killed by signal 9 (by hand, or bec")
    assert described_end(139) == "the simulation was killed by signal 11"
    assert described_end(3) == "the simulation's process ended with status 3"


def test_simulation_has_no_proxies_and_a_ray_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("all_proxy", "HTTP_PROXY", "https_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "socks5://127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    environment = private_environment(tmp_path)
    assert not [name for name in environment if name.lower().endswith("_proxy")]
    assert environment["RAY_ADDRESS"] == "local"
    assert environment["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] == "0"
    assert environment["RAY_TMPDIR"] == str(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert private_environment(tmp_path)["RAY_ADDRESS"] == "10.0.0.1:6379"


def test_any_letter_is_written_in_any_locale(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert private_environment(tmp_path)["PYTHONIOENCODING"] == "utf-8"
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="latin-1"))
    write_any_letter()
    print("Größe Žena", flush=True)
    assert written.getvalue() == "Größe \\u017dena\n".encode("latin-1")


def test_private_folder_leaves_room_for_the_names_of_sockets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    long = tmp_path / ("long" * 20)
    long.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(long))
    folder = private_folder()
    try:
        assert len(str(folder)) <= LONGEST_FOLDER and not any(long.iterdir())
    finally:
        folder.rmdir()


def test_cleaning_up_is_not_interrupted() -> None:
    before = signal.signal(signal.SIGHUP, signal.default_int_handler)
    try:
        with uninterrupted():
            os.kill(os.getpid(), signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_superlink_waits_longer_for_a_sign_of_life() -> None:
    code = (
        f"import runpy; runpy.run_path({str(FLOWER_PROCESS)!r})['be_patient_with_heartbeats']()\n"
        "from flwr.supercore.corestate import in_memory_corestate as state\n"
        "print(state.HEARTBEAT_PATIENCE * state.HEARTBEAT_DEFAULT_INTERVAL)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "600"


def test_ray_waits_longer_for_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    # The limit that this gets around stands in the source of Ray.
    assert "services.get_node(" in inspect.getsource(ray._private.node.Node.__init__)
    answers: list[Any] = [RuntimeError("not yet"), RuntimeError("not yet"), {"node": 1}]

    def get_node(*_: str) -> Any:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(ray._private.services, "get_node", get_node)
    patience: Callable[[], None] = runpy.run_path(str(FLOWER_PROCESS))["be_patient_with_ray"]
    patience()
    assert ray._private.services.get_node("address", "id") == {"node": 1}


def test_user_without_a_home_is_given_one_for_libraries(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    have_home()
    assert Path.home() == tmp_path
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("os.getuid", lambda: 2**31 - 7)
    with pytest.raises(RuntimeError):
        Path.home()
    have_home()
    assert Path.home() == Path(tempfile.gettempdir())
