"""`feddm-hospitals`: whom the SuperLink lets in, by name, and what to do when it forgets them."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import click
import typer
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)
from flwr.cli.flower_config import read_superlink_connection
from flwr.cli.utils import flwr_cli_exc_handler, init_http_client_from_connection
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.primitives.asymmetric import bytes_to_public_key, public_key_to_bytes

from server_app.hospitals.registry import (
    HOSPITALS_VARIABLE,
    Hospital,
    HospitalsFile,
    check_name,
)
from task.cli.check_key import CURVES, fingerprint
from task.runs.layout import NODES_FILE, client_numbers

UNREGISTERED = "unregistered"

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Register hospitals' nodes with a SuperLink, list and remove them.",
)
Connection = Annotated[
    str,
    typer.Argument(
        help="The SuperLink's name in the config.toml of FLWR_HOME, as for `flwr run`.",
        show_default=False,
    ),
]
RegistryFile = Annotated[
    Path,
    typer.Option(
        "--file",
        envvar=HOSPITALS_VARIABLE,
        dir_okay=False,
        help="Where names and keys are kept; the SuperLink needs the same in its environment.",
        show_default=False,
    ),
]


def main() -> None:
    """Run `feddm-hospitals`."""
    try:
        app(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        sys.exit(1)
    except (ValueError, OSError) as error:
        print(f"feddm-hospitals: {error}", file=sys.stderr)
        sys.exit(1)


class NodeRegistry:
    """The nodes of a SuperLink, by its Control API."""

    def __init__(self, client: ControlHttpClient) -> None:
        """Take a client that is open."""
        self._client = client

    def nodes(self) -> list[NodeInfo]:
        """List all nodes that were ever registered."""
        with flwr_cli_exc_handler():
            return list(self._client.ListNodes(ListNodesRequest()).nodes_info)

    def register(self, key: ec.EllipticCurvePublicKey, name: str) -> int:
        """Let a key's holder in; returns its node id."""
        request = RegisterNodeRequest(public_key=public_key_to_bytes(key), name=name)
        with flwr_cli_exc_handler():
            return int(self._client.RegisterNode(request).node_id)

    def unregister(self, node: int) -> None:
        """Refuse a node from now on; Flower takes its key no second time."""
        with flwr_cli_exc_handler():
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node))


@contextmanager
def superlink(connection: str) -> Iterator[NodeRegistry]:
    """Open a connection of Flower's configuration."""
    # It is this machine's, or at the end of a tunnel, and no proxy leads there.
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[name]
    # Flower prints which connection it uses, which is no line of a list.
    with redirect_stdout(sys.stderr):
        client = init_http_client_from_connection(read_superlink_connection(connection))
    try:
        yield NodeRegistry(client)
    finally:
        client.close()


def key_of(node: NodeInfo) -> str:
    """Return the fingerprint of a node's key."""
    return fingerprint(bytes_to_public_key(node.public_key))


def read_public_key(text: bytes, what: str) -> ec.EllipticCurvePublicKey:
    """Read a public key of OpenSSH's format.

    Raises:
        ValueError: it is none that Flower takes.
    """
    try:
        key = load_ssh_public_key(text)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError(
            f"{what} must be a public key by make-node-key.sh (ecdsa-sha2-nistp384 ...), got "
            f"something else ({error})"
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name not in CURVES:
        raise ValueError(f"{what} must be an EC key, such as P-384, got {type(key).__name__}")
    return key


def let_in(link: NodeRegistry, file: HospitalsFile, hospital: Hospital) -> str:
    """Register a key unless it is registered, and write it down.

    Returns:
        What was done, in a line.

    Raises:
        ValueError: the key was removed.
    """
    name = f"{hospital.name} with {hospital.fingerprint}"
    known = next((node for node in link.nodes() if key_of(node) == hospital.fingerprint), None)
    if known is not None and known.status == UNREGISTERED:
        # By `flwr supernode unregister`, of which a new database would know nothing.
        hospital = replace(hospital, nodes=(known.node_id,), removed=True)
        file.add(hospital)
    if hospital.removed:
        raise ValueError(
            f"PUBLIC_KEY must be of a key that was not removed, got {name}; make-node-key.sh makes "
            "a new one under a new name"
        )
    node = known.node_id if known else link.register(_key_in(hospital), hospital.name)
    file.add(replace(hospital, nodes=(node,)))
    return f"SuperNode {node} {'was registered before' if known else 'is registered'}: {name}"


def _key_in(hospital: Hospital) -> ec.EllipticCurvePublicKey:
    return read_public_key(hospital.public_key.encode(), f"the key of {hospital.name}")


@app.command("register")
def register_hospital(
    connection: Connection,
    public_key: Annotated[
        Path,
        typer.Argument(
            exists=True,
            dir_okay=False,
            help="The file that make-node-key.sh has made at the hospital, NAME.pub.",
            show_default=False,
        ),
    ],
    name: Annotated[str, typer.Argument(help="Of the hospital.", show_default=False)],
    file: RegistryFile,
) -> None:
    """Let the node in that holds a public key's private key, under the name of its hospital."""
    key = read_public_key(public_key.read_bytes(), f"PUBLIC_KEY={public_key}")
    blob = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
    registry = HospitalsFile(file)
    with registry.held(), superlink(connection) as link:
        name = check_name(name)
        hospitals = registry.hospitals()
        known = hospitals.pop(fingerprint(key), None)
        same = [each for each in hospitals.values() if each.name == name and not each.removed]
        if same:
            raise ValueError(
                f"NAME must be of one hospital alone, got {name!r}, which has {same[0].fingerprint}"
            )
        removed = known is not None and known.removed
        hospital = Hospital(name, fingerprint(key), blob, (), removed)
        print(let_in(link, registry, hospital))
        if known is not None and known.name != hospital.name:
            print(f"it was {known.name}")


@app.command("list")
def list_hospitals(
    connection: Connection,
    run: Annotated[
        Path | None,
        typer.Argument(
            help="The folder of a run; each line then ends with the number under which its log "
            "and report name the node, or with - where it has not taken part.",
            show_default=False,
        ),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            envvar=HOSPITALS_VARIABLE,
            dir_okay=False,
            help="Where names are kept; without it they are those of the SuperLink.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """List the nodes that the SuperLink knows: id, status, fingerprint of the key, name.

    The status is Flower's: registered, online, offline or unregistered.
    """
    hospitals = {} if file is None else HospitalsFile(file).hospitals()
    numbers = {} if run is None else client_numbers(run)
    if run is not None and numbers is None:
        raise ValueError(
            f"RUN must be the folder of a run with real nodes, got {run}, where no {NODES_FILE} is"
        )
    with superlink(connection) as link:
        for node in link.nodes():
            key = key_of(node)
            name = hospitals[key].name if key in hospitals else node.name
            words = [str(node.node_id), node.status, key, name]
            if numbers is not None and run is not None:
                number = numbers.get(node.node_id)
                words.append("-" if number is None else f"client {number}")
            print(*words)


@app.command("remove")
def remove_hospital(
    connection: Connection,
    node: Annotated[int, typer.Argument(help="Id of the node, of `list`.", show_default=False)],
    file: RegistryFile,
) -> None:
    """Remove a node: its key is refused from now on, and never registered again."""
    registry = HospitalsFile(file)
    with registry.held(), superlink(connection) as link:
        found = next((each for each in link.nodes() if each.node_id == node), None)
        if found is None:
            raise ValueError(f"NODE must be the id of a node of `feddm-hospitals list`, got {node}")
        # Written down first: the file may say more than Flower has done, and never less.
        key = bytes_to_public_key(found.public_key)
        known = registry.hospitals().get(fingerprint(key))
        name = known.name if known else found.name
        blob = key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
        registry.add(Hospital(name, fingerprint(key), blob, (node,), removed=True))
        if found.status != UNREGISTERED:
            link.unregister(node)
        print(f"SuperNode {node} is removed: {name} with {fingerprint(key)}")


@app.command("restore")
def restore_hospitals(connection: Connection, file: RegistryFile) -> None:
    """Bring a SuperLink with another database up to date; hospitals keep their numbers.

    Those that it does not know are registered again, and keys that were removed are unregistered.
    """
    registry = HospitalsFile(file)
    with registry.held(), superlink(connection) as link:
        hospitals = registry.hospitals()
        if not hospitals:
            raise ValueError(f"--file must name registered hospitals, got {file}, which has none")
        for node in link.nodes():
            known = hospitals.get(key_of(node))
            if known is None or known.removed == (node.status == UNREGISTERED):
                continue
            # By `remove`, which the database may not know, or by `flwr supernode unregister`.
            known = replace(known, nodes=(node.node_id,), removed=True)
            registry.add(known)
            if node.status != UNREGISTERED:
                link.unregister(node.node_id)
            print(f"SuperNode {node.node_id} is removed: {known.name} with {known.fingerprint}")
        present = [each for each in registry.hospitals().values() if not each.removed]
        refused = False
        for hospital in present:
            try:
                print(let_in(link, registry, hospital))
            except ValueError as error:
                refused = True
                print(f"feddm-hospitals: {error}", file=sys.stderr)
    if refused:
        sys.exit(1)
