"""Lists the nodes that a SuperLink knows: id, status, fingerprint of the key, name.

`flwr supernode list` shows neither names nor keys, and a fingerprint is what a hospital and its
coordinator can compare over the telephone. A node's status is Flower's: registered, online,
offline or unregistered. With the folder of a run each line ends with "client 3", the number under
which the run's log and report name the node, or "-" where it has not taken part.
"""

import sys
from contextlib import redirect_stdout
from pathlib import Path

import click
from flwr.cli.flower_config import read_superlink_connection
from flwr.cli.utils import flwr_cli_exc_handler, init_http_client_from_connection
from flwr.proto.control_pb2 import ListNodesRequest
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.primitives.asymmetric import bytes_to_public_key

from task.cli.check_key import fingerprint
from task.runs.layout import NODES_FILE, client_numbers


def registered_nodes(connection: str) -> list[NodeInfo]:
    """Ask the SuperLink behind a connection of Flower's configuration for its nodes."""
    client = init_http_client_from_connection(read_superlink_connection(connection))
    try:
        with flwr_cli_exc_handler():
            return list(client.ListNodes(ListNodesRequest()).nodes_info)
    finally:
        client.close()


def main(arguments: list[str]) -> int:
    """Print a line per node."""
    if len(arguments) not in (1, 2):
        print("usage: list_nodes.py CONNECTION [RUN]", file=sys.stderr)
        return 2
    try:
        numbers = client_numbers(Path(arguments[1])) if len(arguments) == 2 else {}
        if numbers is None:
            raise ValueError(f"there is no {Path(arguments[1]) / NODES_FILE}")
    except ValueError as error:
        print(f"list_nodes.py: RUN must be the folder of a run: {error}", file=sys.stderr)
        return 1
    try:
        # Flower prints which connection it uses, which is no line of the list.
        with redirect_stdout(sys.stderr):
            nodes = registered_nodes(arguments[0])
    except click.ClickException as error:
        print(f"list_nodes.py: {error.format_message()}", file=sys.stderr)
        return 1
    for node in nodes:
        words = [node.node_id, node.status, fingerprint(bytes_to_public_key(node.public_key))]
        words += [node.name]
        if len(arguments) == 2:
            number = numbers.get(node.node_id)
            words += ["-" if number is None else f"client {number}"]
        print(*words)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
