"""`feddm-node`: Flower's `flower-supernode`, and starting it again where it has lost the SuperLink.

Flower's node gives the SuperLink up on some failures, such as a TLS handshake that times out while
the gateway stalls, and then does nothing any more. It is started again where the SuperLink can be
reached and has not answered it for a while, and where its process has ended.
"""

import argparse
import contextlib
import os
import signal
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import psutil

from node_guard.supernode import FLEET_API

# A node asks for work every three seconds, or sends a sign of life every thirty where it works.
ONLINE_SECONDS = 60.0
# Of a SuperLink that can be reached and does not answer this node.
PATIENCE_SECONDS = 75.0
PROBE_SECONDS = 10.0
# After a process has ended: for about a minute Flower takes a node that was killed for present.
RESTART_SECONDS = 20.0
# Until a process that was asked to end is killed.
GRACE_SECONDS = 50.0
# A training that is under way ends before the node is started again: its reply is kept on the disk.
WORK_SECONDS = 7200.0
LOOK_SECONDS = 1.0
WORKING = ("flwr-clientapp", "feddm-guard")


def say(text: str) -> None:
    """Print a line for the log of the service."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} feddm-node: {text}", flush=True)


@dataclass(frozen=True)
class SuperLink:
    """Where the fleet API is.

    Attributes:
        url: of the gateway or the SuperLink.
        trust: the certificates that are believed; None without TLS.
    """

    url: str
    trust: ssl.SSLContext | None

    def answers(self) -> bool:
        """Whether somebody answers who knows the fleet API, whatever it says to a stranger."""
        try:
            with httpx.Client(verify=self.trust or True, timeout=5, trust_env=True) as client:
                answer = client.post(f"{self.url}{FLEET_API}pull-messages")
        except httpx.TransportError:
            return False
        # A gateway whose SuperLink is down says 502 to 504.
        return answer.status_code not in (502, 503, 504)


class Node:
    """The process of a node, and when the SuperLink has answered it."""

    def __init__(self, words: Sequence[str], folder: Path) -> None:
        """Start nothing yet.

        Args:
            words: the options of `flower-supernode`.
            folder: for the file that tells of answers.
        """
        self._words, self._heard = [*words], folder / "heard"
        self._process: subprocess.Popen[bytes] | None = None
        self.started_at = 0.0

    def start(self) -> None:
        """Start the process, in a session of its own."""
        self._heard.unlink(missing_ok=True)
        command = [sys.executable, "-P", "-m", "node_guard.supernode", str(self._heard)]
        self._process = subprocess.Popen([*command, *self._words], start_new_session=True)
        self.started_at = time.time()

    @property
    def status(self) -> int | None:
        """With what the process has ended; None while it runs."""
        return None if self._process is None else self._process.poll()

    @property
    def heard_at(self) -> float | None:
        """When the SuperLink answered it last, in seconds since the epoch; None before that."""
        try:
            return self._heard.stat().st_mtime
        except FileNotFoundError:
            return None

    @property
    def is_online(self) -> bool:
        """Whether the SuperLink has answered it lately."""
        heard = self.heard_at
        return self.status is None and heard is not None and time.time() - heard < ONLINE_SECONDS

    @property
    def is_working(self) -> bool:
        """Whether a ClientApp of it is at work."""
        if self._process is None:
            return False
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if any(Path(word).name in WORKING for word in child.cmdline()[:2]):
                        return True
        return False

    def end(self) -> None:
        """End the process and all that it has started."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Watchdog:
    """Looks at a node again and again, and starts it again where that is needed."""

    def __init__(self, node: Node, superlink: SuperLink, *, patience: float) -> None:
        """Watch a node; see `main` for the arguments."""
        self._node, self._superlink, self._patience = node, superlink, patience
        self._unreachable_at = self._probed_at = 0.0
        self._waits_since: float | None = None
        self._ending = threading.Event()

    def end(self) -> None:
        """Have `watch` end the node and return."""
        self._ending.set()

    def watch(self) -> int:
        """Start the node and watch it until this is asked to end; returns the exit status."""
        self._node.start()
        while not self._ending.wait(LOOK_SECONDS):
            status = self._node.status
            if status == 2:  # argparse: it would end alike again
                say("flower-supernode does not take these options, see above")
                return 2
            if status is not None:
                say(f"the node has ended with status {status}; it is started again")
                self._restart(pause=RESTART_SECONDS)
            elif self._is_lost():
                self._restart(pause=0.0)
        say("asked to end")
        self._node.end()
        return 0

    def _restart(self, *, pause: float) -> None:
        self._node.end()
        if not self._ending.wait(pause):
            self._node.start()

    def _is_lost(self) -> bool:
        """Whether the node is to be started again although its process lives."""
        now = time.time()
        heard = max(self._node.heard_at or 0.0, self._node.started_at)
        if now - heard < PROBE_SECONDS:
            self._waits_since = None
            return False
        if now - self._probed_at >= PROBE_SECONDS:
            self._probed_at = now
            if not self._superlink.answers():
                self._unreachable_at = time.time()
        silent = now - max(heard, self._unreachable_at)
        if silent < self._patience:
            return False
        if self._node.is_working and now - (self._waits_since or now) < WORK_SECONDS:
            if self._waits_since is None:
                say("the SuperLink does not answer this node; its training ends first")
                self._waits_since = now
            return False
        say(
            f"the SuperLink can be reached and has not answered this node for {now - heard:.0f} s; "
            "the node is started again"
        )
        self._waits_since = None
        return True


def serve_health(node: Node, address: str) -> ThreadingHTTPServer:
    """Answer on `/health`: 200 while the node is online, 503 while it is not.

    Args:
        node: that is asked about.
        address: host and port.

    Raises:
        ValueError: there is no port in it.
        OSError: the port is taken.
    """

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            online = node.is_online
            text = b"online\n" if online else b"the SuperLink does not answer this node\n"
            self.send_response((200 if online else 503) if self.path == "/health" else 404)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            """Say nothing: it is asked all the time."""

    host, _, port = address.rpartition(":")
    server = ThreadingHTTPServer((host.strip("[]") or "127.0.0.1", int(port)), Health)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def main() -> None:
    """Run `feddm-node`: options of its own, and all of those of `flower-supernode`."""
    parser = argparse.ArgumentParser(
        prog="feddm-node",
        description="Start flower-supernode, and start it again where it has lost the SuperLink.",
        epilog="All other options are those of flower-supernode: flower-supernode --help.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--health",
        default="127.0.0.1:9095",
        metavar="HOST:PORT",
        help="where /health answers 200 while the SuperLink hears the node, else 503 (%(default)s)",
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=PATIENCE_SECONDS,
        metavar="SECONDS",
        help="of a SuperLink that can be reached and does not answer the node (%(default)g)",
    )
    own, words = parser.parse_known_args()
    reading = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reading.add_argument("--superlink", required=True)
    reading.add_argument("--root-certificates")
    reading.add_argument("--insecure", action="store_true")
    flowers, _ = reading.parse_known_args(words)
    try:
        trust = None
        if not flowers.insecure:
            trust = ssl.create_default_context(cafile=flowers.root_certificates)
        scheme = "http" if flowers.insecure else "https"
        with tempfile.TemporaryDirectory(prefix="feddm-node-") as folder:
            node = Node(words, Path(folder))
            watchdog = Watchdog(
                node, SuperLink(f"{scheme}://{flowers.superlink}", trust), patience=own.patience
            )
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, lambda *_: watchdog.end())
            server = serve_health(node, own.health)
            try:
                sys.exit(watchdog.watch())
            finally:
                node.end()
                server.shutdown()
    except (OSError, ValueError, ssl.SSLError) as error:
        print(f"feddm-node: {error}", file=sys.stderr)
        sys.exit(1)
