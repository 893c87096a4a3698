"""Flower's `flower-supernode`, which notes in a file when the SuperLink has answered it last.

Flower itself knows of no such time: its process lives on, and its health check answers, where it
has given the SuperLink up.
"""

import sys
from pathlib import Path
from typing import Any

import httpx
from flwr.supernode.cli.flower_supernode import flower_supernode

FLEET_API = "/v1/fleet/"


def note_answers(heard: Path) -> None:
    """Touch a file whenever the fleet API answers a request of this process."""
    send = httpx.Client.send

    def noting(client: httpx.Client, request: httpx.Request, **options: Any) -> httpx.Response:
        response = send(client, request, **options)
        if response.is_success and request.url.path.startswith(FLEET_API):
            heard.touch()
        return response

    httpx.Client.send = noting  # type: ignore[method-assign, assignment]


def main() -> None:
    """Run `flower-supernode` with the words behind the first, which names the file."""
    note_answers(Path(sys.argv[1]))
    sys.argv = ["flower-supernode", *sys.argv[2:]]
    flower_supernode()


if __name__ == "__main__":
    main()
