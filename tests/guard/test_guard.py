"""What the guard lets run, on bundles that Flower built."""

import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from shutil import rmtree

import pytest
from flwr.cli.build import build_fab_from_files
from typer.testing import CliRunner

from task.cli.main import app as feddm
from task.guard.approvals import Approvals, describe_changes
from task.guard.bundle import Bundle
from task.guard.decide import Decision, RunRequest, decide
from task.guard.policy import Policy
from task.protocol.wire import FailureCode
from tests.processes import CHECKOUT

PROJECT = """
[project]
name = "app"
version = "1.0"
license = {text = "MIT"}
dependencies = []
[tool.flwr.app]
publisher = "somebody"
[tool.flwr.app.components]
serverapp = "code:app"
clientapp = "code:app"
"""


def fab(**changes: str) -> bytes:
    files = {"pyproject.toml": PROJECT, "code.py": "app = 1\n", "README.md": "An app.\n"}
    files |= {name.replace("_py", ".py"): text for name, text in changes.items()}
    return build_fab_from_files({name: text.encode() for name, text in files.items()})[0]


def repacked(content: bytes, change: Callable[[zipfile.ZipFile], None], **how: int) -> bytes:
    """Write a bundle anew, entry by entry, in another order, and change it."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(file, "w", **how) as new:
        for entry in reversed(old.infolist()):
            new.writestr(entry.filename, old.read(entry))
        change(new)
    return file.getvalue()


@pytest.fixture
def guard(tmp_path: Path) -> Path:
    folder = tmp_path / "guard"
    folder.mkdir()
    (folder / "policy.toml").touch()
    return folder


def asked(content: bytes, run_id: int = 1, **said: str) -> RunRequest:
    name = {"app": "somebody/app", "version": "1.0", "fab_hash": sha256(content).hexdigest()}
    return RunRequest(run_id, **{**name, **said}, run_config={})


def decided(guard: Path, content: bytes, request: RunRequest | None = None) -> Decision:
    return decide(request or asked(content), content, guard, guard.parent / "apps")


def log_of(guard: Path) -> list[dict[str, object]]:
    lines = (guard / "log" / "runs.jsonl").read_text().splitlines()
    return [json.loads(line.partition(" ")[2]) for line in lines[1:]]


def test_hash_is_of_the_content_and_not_of_its_packing() -> None:
    content = fab()
    same = repacked(content, lambda _: None, compression=zipfile.ZIP_STORED)
    assert same != content and Bundle.of_fab(same).sha256 == Bundle.of_fab(content).sha256
    others = [fab(code_py="app = 2\n"), fab(more_py=""), fab(code_py="app = 1\n\n")]
    assert len({Bundle.of_fab(other).sha256 for other in (content, *others)}) == 4
    # What moves from a name into a content is another bundle.
    first, second = (Bundle({"a": b"bc"}), Bundle({"ab": b"c"}))
    assert first.sha256 != second.sha256
    assert Bundle.of_fab(content).app == ("somebody/app", "1.0")


@pytest.mark.parametrize(
    "path", ["../out.py", "/out.py", "code.py", "CODE.py", "a\\b.py", "a/", "a//b.py", ".info/x.py"]
)
def test_bundle_that_could_be_unpacked_otherwise_is_refused(path: str) -> None:
    with pytest.warns(UserWarning) if path == "code.py" else pytest.MonkeyPatch.context():
        content = repacked(fab(), lambda archive: archive.writestr(path, "app = 3"))
    with pytest.raises(ValueError, match="bundle must be one of plain files"):
        Bundle.of_fab(content)


def test_link_poisoned_cache_and_rubbish_are_refused() -> None:
    link = zipfile.ZipInfo("task")
    link.external_attr = 0o120777 << 16
    for entry in (link, "__pycache__/code.cpython-311.pyc"):
        content = repacked(fab(), lambda archive, e=entry: archive.writestr(e, "/tmp"))  # type: ignore[misc]
        with pytest.raises(ValueError, match="bundle must be one of plain files"):
            Bundle.of_fab(content)
    with pytest.raises(ValueError, match="cannot be unpacked"):
        Bundle.of_fab(b"no archive")
    huge = repacked(fab(), lambda z: z.writestr("a.py", bytes(101 * 2**20)), compression=8)
    with pytest.raises(ValueError, match="at most 104857600 bytes unpacked"):
        Bundle.of_fab(huge)


def test_only_approved_bundles_run_and_every_run_is_logged(guard: Path) -> None:
    content, other = fab(), fab(code_py="app = 2\n")
    first = decided(guard, content)
    assert (first.code, first.error, first.folder) == (
        FailureCode.NOT_APPROVED,
        "NotApprovedError",
        "",
    )
    Approvals(guard).add(Bundle.of_fab(content), content)
    for _ in range(2):
        second = decided(guard, content)
        assert (second.code, second.error) == (0, "")
    assert (Path(second.folder) / "code.py").read_text() == "app = 1\n"
    assert sorted(p.name for p in Path(second.folder).iterdir()) == [
        "README.md",
        "code.py",
        "pyproject.toml",
    ]
    assert decided(guard, other, asked(other, 2)).code == FailureCode.NOT_APPROVED
    entries = log_of(guard)
    # Nor does any that finds a cache of other code, or a link to it, in the folder of the bundle.
    link, cache = Path(second.folder) / "numpy", Path(second.folder) / "__pycache__"
    for plant, remove in (
        (lambda: link.symlink_to(guard), link.unlink),
        (lambda: (cache.mkdir(), (cache / "code.pyc").touch()), lambda: rmtree(cache)),
    ):
        plant()  # type: ignore[no-untyped-call]
        assert decided(guard, content).code == FailureCode.NOT_APPROVED
        remove()
    said = [(entry["run"], entry["runs"], entry["bundle"]) for entry in entries]
    own, others = Bundle.of_fab(content).sha256, Bundle.of_fab(other).sha256
    assert said == [("1", False, own), ("1", True, own), ("2", False, others)]
    assert all(entry["time"] and entry["why"] for entry in entries)


@pytest.mark.parametrize(
    "said",
    [
        {"version": "../../evil"},
        {"app": "somebody/other"},
        {"fab_hash": sha256(b"another").hexdigest()},
    ],
)
def test_coordinator_that_names_another_bundle_than_it_sends_is_refused(
    said: dict[str, str], guard: Path
) -> None:
    content = fab()
    Approvals(guard).add(Bundle.of_fab(content), content)
    refused = decided(guard, content, asked(content, **said))
    assert refused.code == FailureCode.NOT_APPROVED and "calls the bundle" in refused.why


def test_unpacked_folder_with_other_code_does_not_run(guard: Path) -> None:
    content = fab()
    Approvals(guard).add(Bundle.of_fab(content), content)
    folder = Path(decided(guard, content).folder)
    (folder / "sitecustomize.py").write_text("import evil")
    refused = decided(guard, content)
    assert refused.code == FailureCode.NOT_APPROVED and "remove that folder" in refused.why


def test_list_policy_or_log_that_was_changed_lets_nothing_run(guard: Path) -> None:
    content = fab()
    Approvals(guard).add(Bundle.of_fab(content), content)
    file = guard / "approved.jsonl"
    whole = file.read_text()
    file.write_text(whole.replace('"version": "1.0"', '"version": "1.1"'))
    refused = decided(guard, content)
    assert refused.code == FailureCode.BAD_INPUT and "approved.jsonl, line 2" in refused.why
    file.write_text(whole)
    for text, expected in (
        ("require-privcy = true", "policy.toml must be of the keys require-privacy, "),
        ("require-privacy = 1", "require-privacy must be a bool, got 1"),
        ("require-privacy", "must be TOML"),
    ):
        (guard / "policy.toml").write_text(text)
        assert expected in decided(guard, content).why
    (guard / "policy.toml").unlink()
    refused = decided(guard, content)
    assert refused.code == FailureCode.DATA_UNREADABLE and "an empty file demands" in refused.why


def test_policy_is_held_against_the_run(guard: Path) -> None:
    bundle = Bundle(
        {
            file.relative_to(CHECKOUT).as_posix(): file.read_bytes()
            for pattern in ("conf/**/*.yaml", "task/config/**/*.py")
            for file in CHECKOUT.glob(pattern)
        }
    )
    run = {"overrides": "data=digits", "run_name": ""}
    Policy().check(bundle, run)
    for policy, expected in (
        (Policy(require_privacy=True), "privacy.mechanism must be dp_sgd by require-privacy"),
        (Policy(node_config={"max-epsilon": 8.0}), "must be dp_sgd by max-epsilon=8.0"),
        (Policy(require_secure_aggregation=True), "federation.secure_aggregation must be true"),
    ):
        with pytest.raises(ValueError, match=expected):
            policy.check(bundle, run)
    with pytest.raises(ValueError, match="nonsense"):
        Policy(require_privacy=True).check(bundle, {"overrides": "nonsense=1"})
    private = {"overrides": "data=digits privacy=dp_sgd privacy.epsilon=5"}
    Policy(require_privacy=True, node_config={"max-epsilon": 8.0}).check(bundle, private)
    with pytest.raises(ValueError, match=r"privacy.epsilon must be at most 4.0 by max-epsilon=4.0"):
        Policy(node_config={"max-epsilon": 4.0}).check(bundle, private)
    hidden = {"overrides": "data=digits federation.secure_aggregation=true"}
    Policy(require_secure_aggregation=True).check(bundle, hidden)
    quiet = "data=digits privacy=dp_sgd privacy.epsilon=null privacy.noise_multiplier=0"
    with pytest.raises(ValueError, match=r"privacy.noise_multiplier must be above 0"):
        Policy(require_privacy=True).check(bundle, {"overrides": quiet})
    # Defaults of its own could say anything.
    changed = Bundle({**bundle.files, "conf/config.yaml": b"privacy: {mechanism: dp_sgd}"})
    with pytest.raises(ValueError, match="composes configurations otherwise"):
        Policy(require_privacy=True).check(changed, run)


def test_changes_are_shown_before_a_bundle_is_approved(
    guard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDDM_GUARD", str(guard))
    first, second, folder = tmp_path / "first.fab", tmp_path / "second.fab", tmp_path / "app"
    first.write_bytes(fab(code_py="app = 1\nkept = 2\n", old_py=""))
    refused = CliRunner().invoke(feddm, ["approve", str(first)], input="n\n")
    assert refused.exit_code == 1 and "not approved" in refused.stderr
    assert Approvals(guard).hashes() == []
    assert "all of it is new" in refused.stdout and "+ old.py (0 bytes)" in refused.stdout
    assert CliRunner().invoke(feddm, ["approve", str(first)], input="y\n").exit_code == 0
    second.write_bytes(fab(code_py="app = 3 # \x1b[1A\nkept = 2\n", new_py="a = 1\n" * 60))
    shown = CliRunner().invoke(feddm, ["approve", str(second), "--yes"])
    lines = shown.stdout.splitlines()
    changes = [
        "- old.py (0 bytes)",
        "+ new.py (360 bytes)",
        *60 * ["    +a = 1"],
        "~ code.py",
        "    @@ -1 +1 @@",
    ]
    changes += ["    -app = 1", "    +app = 3 # \\x1b[1A"]
    changes += ["1 files added, 1 removed, 1 changed, 2 as before"]
    assert [line for line in lines if line in changes] == changes, shown.output
    assert lines[-1] == "approved" and len(Approvals(guard).hashes()) == 2
    # The same app as the folder from which Flower would make the bundle.
    folder.mkdir()
    with zipfile.ZipFile(first) as archive:
        archive.extractall(folder)
    again = CliRunner().invoke(feddm, ["approve", str(folder)])
    assert again.exit_code == 0 and "was approved before" in again.stdout, again.output


def test_no_answer_is_no_and_an_answer_is_one_line_of_json(guard: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "task.guard.decide"]
    content = fab()
    request = json.dumps(vars(asked(content))).encode() + b"\n" + content
    environment = {"FLWR_HOME": str(tmp_path), "HOME": str(tmp_path)}
    Approvals(guard).add(Bundle.of_fab(content), content)

    def answer(**variables: str) -> "subprocess.CompletedProcess[bytes]":
        return subprocess.run(
            command,
            input=request,
            env={**environment, **variables},
            capture_output=True,
            check=False,
            cwd=tmp_path,
        )

    nowhere = answer()
    assert nowhere.returncode == 1 and b"FEDDM_GUARD must name the guard's folder" in nowhere.stderr
    said = answer(FEDDM_GUARD=str(guard))
    assert json.loads(said.stdout)["code"] == 0, said.stderr
    assert list(describe_changes(Bundle.of_fab(content), Bundle.of_fab(content)))[-1].endswith(
        "0 changed, 3 as before"
    )
