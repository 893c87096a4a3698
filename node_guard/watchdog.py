"""`feddm-node`: Flower's `flower-supernode`, and starting it again where it has lost the SuperLink.

Flower's node gives the SuperLink up on some failures, such as a TLS handshake that times out while
the gateway stalls, and then does nothing any more. It is started again where the SuperLink can be
reached and has taken no sign of life of it for a while, where the process that starts its work has
died, and where its own process has ended.
"""

import argparse
import contextlib
import ctypes
import math
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import psutil

# A node sends a sign of life about every 20 s, while it works as well.
ONLINE_SECONDS = 60.0
PATIENCE_SECONDS = 75.0
# Whether the SuperLink can be reached is asked from so many seconds of silence on, so often.
PROBE_AFTER_SECONDS, PROBE_SECONDS = 45.0, 10.0
# Of a process that has not been heard yet: it imports its libraries first.
START_SECONDS = 300.0
# After a process has ended: for about a minute Flower takes a node that was killed for present.
RESTART_SECONDS = 20.0
# Until a process that was asked to end is killed.
ENDING_SECONDS = 50.0
# A training that is under way ends before the node is started again: its reply is kept on the disk.
WORK_SECONDS = 24 * 3600.0
LOOK_SECONDS = 1.0
# Looks at a node without the process that starts its work.
DEAD_LOOKS = 5
EXECUTOR, WORKING = "flower-superexec", ("flwr-clientapp", "feddm-guard")
USAGE_ERROR = 2


def say(text: str) -> None:
    """Print a line for the log of the service; a disk that is full hinders nothing."""
    with contextlib.suppress(OSError):
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} feddm-node: {text}", flush=True)


def superlink_answers(url: str, trust: ssl.SSLContext | None) -> bool:
    """Whether somebody answers who knows the fleet API, whatever it says to a stranger.

    Args:
        url: of the gateway or the SuperLink.
        trust: the certificates that are believed; None without TLS.
    """
    try:
        with httpx.Client(verify=trust or True, timeout=5) as client:
            answer = client.post(f"{url}/v1/fleet/pull-messages")
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
    # A gateway whose SuperLink is down says 502 to 504.
    return answer.status_code not in (502, 503, 504)


def end_with_watchdog() -> None:
    """Ask Linux to kill this process when the one that started it is killed."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class Node:
    """The process of a node, and when the SuperLink has taken a sign of life of it.

    Attributes:
        started_at: `time.monotonic()`.
        heard_at: likewise; None before the first time.
    """

    def __init__(self, words: Sequence[str]) -> None:
        """Start nothing yet; `words` are the options of `flower-supernode`."""
        self._words = [*words]
        self._process: subprocess.Popen[bytes] | None = None
        self.started_at, self.heard_at = -math.inf, None

    started_at: float
    heard_at: float | None

    def start(self) -> None:
        """Start the process, in a session of its own."""
        reading, writing = os.pipe()
        command = [sys.executable, "-P", "-m", "node_guard.supernode", str(writing)]
        self._process = subprocess.Popen(
            [*command, *self._words],
            start_new_session=True,
            pass_fds=[writing],
            preexec_fn=end_with_watchdog,
        )
        os.close(writing)
        self.started_at, self.heard_at = time.monotonic(), None
        threading.Thread(target=self._listen, args=(reading,), daemon=True).start()

    def _listen(self, pipe: int) -> None:
        started_at = self.started_at
        with open(pipe, "rb", buffering=0) as told:
            while told.read(4096):
                if self.started_at == started_at:
                    self.heard_at = time.monotonic()

    @property
    def status(self) -> int | None:
        """With what the process has ended; None while it runs."""
        return None if self._process is None else self._process.poll()

    @property
    def is_online(self) -> bool:
        """Whether the SuperLink has taken a sign of life of it lately."""
        heard = self.heard_at
        running = self.status is None
        return running and heard is not None and time.monotonic() - heard < ONLINE_SECONDS

    def runs(self, *names: str) -> bool:
        """Whether one of some programs runs below it."""
        if self._process is None:
            return False
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process(self._process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    words = [Path(word).name for word in child.cmdline()[:2]]
                    if child.status() != psutil.STATUS_ZOMBIE and {*words} & {*names}:
                        return True
        return False

    def end(self) -> None:
        """End the process and all that it has started."""
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(ENDING_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Watchdog:
    """Looks at a node again and again, and starts it again where that is needed."""

    def __init__(self, node: Node, reachable: Callable[[], bool], *, patience: float) -> None:
        """Watch a node.

        Args:
            node: that is watched.
            reachable: asks whether the SuperLink answers strangers.
            patience: seconds of a SuperLink that does, and takes no sign of life of the node.
        """
        self._node, self._reachable, self._patience = node, reachable, patience
        self._unreachable_at = self._probed_at = -math.inf
        self._works_since: float | None = None
        self._dead_looks = 0
        self._ending = threading.Event()

    def end(self) -> None:
        """Have `watch` end the node and return."""
        self._ending.set()

    def watch(self) -> int:
        """Start the node and watch it until this is asked to end; returns the exit status."""
        self._node.start()
        while not self._ending.wait(LOOK_SECONDS):
            status = self._node.status
            if status == USAGE_ERROR:  # it would end alike again
                say("flower-supernode does not take these options, see above")
                return USAGE_ERROR
            if status is not None:
                say(f"the node has ended with status {status}; it is started again")
                self._restart(pause=RESTART_SECONDS)
            elif why := self.why_lost(time.monotonic()):
                say(f"{why}; the node is started again")
                self._restart(pause=0.0)
        say("asked to end")
        self._node.end()
        return 0

    def _restart(self, *, pause: float) -> None:
        self._works_since, self._dead_looks = None, 0
        self._node.end()
        if not self._ending.wait(pause):
            self._node.start()

    def why_lost(self, now: float) -> str:
        """Say why the node is to be started again although its process lives; "" where it is not.

        Args:
            now: `time.monotonic()`.
        """
        heard = self._node.heard_at
        if heard is not None and not self._node.runs(EXECUTOR, *WORKING):
            self._dead_looks += 1
            if self._dead_looks >= DEAD_LOOKS:
                return f"{EXECUTOR}, which starts the node's work, is dead"
        else:
            self._dead_looks = 0
        since = self._node.started_at + START_SECONDS - self._patience if heard is None else heard
        if now - since < PROBE_AFTER_SECONDS:
            self._works_since = None
            return ""
        if now - self._probed_at >= PROBE_SECONDS:
            self._probed_at = now
            if not self._reachable():
                self._unreachable_at = now
        if now - max(since, self._unreachable_at) < self._patience:
            return ""
        if self._node.runs(*WORKING) and now - (self._works_since or now) < WORK_SECONDS:
            if self._works_since is None:
                say("the SuperLink does not hear this node; the training under way ends first")
                self._works_since = now
            return ""
        return "the SuperLink can be reached and does not hear this node"


def serve_health(node: Node, address: str) -> ThreadingHTTPServer:
    """Answer on `/health`: 200 while the node is online, 503 while it is not.

    Args:
        node: that is asked about.
        address: host and port, IPv4.

    Raises:
        ValueError: it is none, or the port is taken.
    """

    class Health(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            online = node.is_online
            text = b"online\n" if online else b"the SuperLink does not hear this node\n"
            self.send_response((200 if online else 503) if self.path == "/health" else 404)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            """Say nothing: it is asked all the time."""

    host, _, port = address.rpartition(":")
    try:
        server = ThreadingHTTPServer((host or "127.0.0.1", int(port)), Health)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--health must be host:port of this machine that nobody has, got {address!r}: {error}"
        ) from error
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def trusted(root_certificates: str | None) -> ssl.SSLContext:
    """Return the certificates that are believed.

    Raises:
        ValueError: the file holds none.
    """
    try:
        return ssl.create_default_context(cafile=root_certificates)
    except OSError as error:  # ssl.SSLError is one
        raise ValueError(
            f"--root-certificates must be a file of certificates, got {root_certificates!r}: "
            f"{error}"
        ) from error


def patience_of(text: str) -> float:
    """Read `--patience`."""
    seconds = float(text)
    if not seconds >= ONLINE_SECONDS:
        raise argparse.ArgumentTypeError(f"must be at least {ONLINE_SECONDS:g} s, got {text}")
    return seconds


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
        type=patience_of,
        default=PATIENCE_SECONDS,
        metavar="SECONDS",
        help="of a SuperLink that can be reached and does not hear the node (%(default)g)",
    )
    own, words = parser.parse_known_args()
    reading = argparse.ArgumentParser(prog="feddm-node", add_help=False, allow_abbrev=False)
    reading.add_argument("--superlink", required=True)
    reading.add_argument("--root-certificates")
    reading.add_argument("--insecure", action="store_true")
    flowers, _ = reading.parse_known_args(words)
    node = Node(words)
    try:
        trust = None if flowers.insecure else trusted(flowers.root_certificates)
        server = serve_health(node, own.health)
    except ValueError as error:
        print(f"feddm-node: {error}", file=sys.stderr)
        sys.exit(1)
    url = f"{'http' if flowers.insecure else 'https'}://{flowers.superlink}"
    watchdog = Watchdog(node, lambda: superlink_answers(url, trust), patience=own.patience)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup leaves it
            signal.signal(number, lambda *_: watchdog.end())
    try:
        sys.exit(watchdog.watch())
    finally:
        node.end()
        server.shutdown()
