"""Flower's `flower-supernode`, which tells `feddm-node` when the SuperLink takes it for present.

Flower itself knows of no such time: its process lives on, and its health check answers, where its
signs of life have ended.
"""

import contextlib
import os
import sys
from typing import Any

import httpx
from flwr.supernode.cli.flower_supernode import flower_supernode

# With these the SuperLink counts a node as online; it gives work to one that is offline as well.
SIGNS_OF_LIFE = ("/v1/fleet/activate-node", "/v1/fleet/send-node-heartbeat")


def tell_of_answers(pipe: int) -> None:
    """Write a byte to a pipe whenever the SuperLink has taken a sign of life of this process."""
    send = httpx.Client.send

    def telling(client: httpx.Client, request: httpx.Request, **options: Any) -> httpx.Response:
        response = send(client, request, **options)
        if response.is_success and request.url.path in SIGNS_OF_LIFE:
            with contextlib.suppress(OSError):  # of a feddm-node that has been killed
                os.write(pipe, b".")
        return response

    httpx.Client.send = telling  # type: ignore[method-assign, assignment]


def main() -> None:
    """Run `flower-supernode` with the words behind the first, which is the number of the pipe."""
    tell_of_answers(int(sys.argv[1]))
    sys.argv = ["flower-supernode", *sys.argv[2:]]
    flower_supernode()


if __name__ == "__main__":
    main()
