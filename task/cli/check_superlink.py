"""Whether a SuperLink can be reached over TLS, and what is wrong where it cannot.

Source: the codes of a failed verification are those of OpenSSL's x509_vfy.h.
"""

import base64
import http.client
import socket
import ssl
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from task.checks import require

TIMEOUT_SECONDS = 10.0
DAYS_OF_WARNING = 30
SECONDS_PER_DAY = 86_400

NOT_YET_VALID, EXPIRED = 9, 10
UNKNOWN_CA = (2, 7, 18, 19, 20, 21, 30)
OTHER_NAME = (62, 64)


def check_superlink(address: str, root_certificates: Path | None) -> Iterator[tuple[str, str]]:
    """Connect to a SuperLink as a node does, and say what was found.

    Args:
        address: "host:port", as `flower-supernode --superlink` takes it.
        root_certificates: of the authority that signed its certificate; None: those that the
            system trusts.

    Yields:
        A name and a finding at a time.

    Raises:
        OSError: it cannot be reached, or is not what it should be; the text says what to do.
        ValueError: an argument is wrong.
    """
    host, port = _parted(address)
    context = _trusting(root_certificates)
    proxy = _proxy(host)
    if proxy is not None:
        yield "proxy", f"{proxy.place}, of {proxy.variable}"
    with _connected(host, port) if proxy is None else _tunnel(proxy, host, port) as connection:
        yield "SuperLink", f"{address} accepts connections"
        certificate = _certificate(connection, context, host, port)
    ends = ssl.cert_time_to_seconds(str(certificate["notAfter"]))
    days = int((ends - time.time()) // SECONDS_PER_DAY)
    yield "certificate", f"trusted, for {host}, until {certificate['notAfter']} ({days} days)"
    if days < DAYS_OF_WARNING:
        yield "WARNING", f"it ends in {days} days: tell the coordinator to renew it"


def _parted(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    require(
        host != "" and "/" not in host and port.isdecimal() and 0 < int(port) < 2**16,
        "--superlink",
        "HOST:PORT, such as fl.example.org:8443, without https://",
        address,
    )
    return host.strip("[]"), int(port)


def _trusting(root_certificates: Path | None) -> ssl.SSLContext:
    if root_certificates is None:
        return ssl.create_default_context()
    if not root_certificates.is_file():
        raise FileNotFoundError(
            f"--root-certificates: there is no file {root_certificates}; the coordinator has it"
        )
    try:
        return ssl.create_default_context(cafile=root_certificates)
    except ssl.SSLError as error:
        raise ValueError(
            f"--root-certificates must be certificates in PEM format, got {root_certificates} "
            f"({error.reason}); ask the coordinator for the file again"
        ) from error


class Proxy(NamedTuple):
    """What a node goes through.

    Attributes:
        variable: that names it.
        place: host and port.
        address: all of it, with user and password.
    """

    variable: str
    place: str
    address: SplitResult


def _proxy(host: str) -> Proxy | None:
    """Return the proxy that Flower's HTTP client takes to a host; None where it takes none."""
    proxies = urllib.request.getproxies()
    variable = "HTTPS_PROXY" if proxies.get("https") else "ALL_PROXY"
    named = proxies.get("https") or proxies.get("all") or ""
    if not named or urllib.request.proxy_bypass(host):
        return None
    try:
        proxy = urlsplit(named if "://" in named else f"http://{named}")
        place = f"{proxy.hostname}:{proxy.port or 80}"
        whole = proxy.scheme == "http" and proxy.hostname is not None
    except ValueError:  # of a port that is none
        whole = False
    # The whole of it may hold a password.
    shown = f"something else, of {len(named)} characters"
    require(whole, variable, "http://HOST:PORT, or http://USER:PASSWORD@HOST:PORT", shown)
    return Proxy(variable, place, proxy)


def _tunnel(proxy: Proxy, host: str, port: int) -> socket.socket:
    connection = http.client.HTTPConnection(proxy.place, timeout=TIMEOUT_SECONDS)
    headers = {}
    if proxy.address.username:
        user = f"{unquote(proxy.address.username)}:{unquote(proxy.address.password or '')}"
        headers["Proxy-Authorization"] = f"Basic {base64.b64encode(user.encode()).decode()}"
    connection.set_tunnel(host, port, headers)
    try:
        connection.connect()
    except (OSError, http.client.HTTPException) as error:
        raise OSError(
            f"--superlink {host}:{port}: the proxy {proxy.place} does not "
            f"lead there ({error}); ask your network's administrator to let CONNECT to it through, "
            "or name the host in NO_PROXY where it needs no proxy"
        ) from error
    return connection.sock


def _connected(host: str, port: int) -> socket.socket:
    place = f"--superlink {host}:{port}"
    try:
        return socket.create_connection((host, port), timeout=TIMEOUT_SECONDS)
    except socket.gaierror as error:
        raise OSError(
            f"{place}: no such host name ({error.strerror}); check its spelling, or this machine's "
            "name server"
        ) from error
    except ConnectionRefusedError as error:
        raise OSError(
            f"{place}: refused, nothing listens there; check the port, and ask the coordinator "
            "whether the SuperLink runs"
        ) from error
    except OSError as error:
        raise OSError(
            f"{place}: unreachable ({error}); ask your network's administrator to let outgoing TCP "
            f"connections to it through the firewall"
        ) from error


def _certificate(
    connection: socket.socket, context: ssl.SSLContext, host: str, port: int
) -> dict[str, object]:
    place = f"--superlink {host}:{port}"
    try:
        with context.wrap_socket(connection, server_hostname=host) as secured:
            return dict(secured.getpeercert() or {})
    except ssl.SSLCertVerificationError as error:
        raise OSError(f"{place}: {_cause(error)}") from error
    except ssl.SSLError as error:
        if "ALERT" in (error.reason or ""):
            raise OSError(
                f"{place}: it refuses the TLS handshake ({error.reason}); ask the coordinator what "
                "it expects, such as a certificate of this node"
            ) from error
        raise OSError(
            f"{place}: what listens there does not speak TLS ({error.reason}); check the port; a "
            "SuperLink that was started with --insecure has none"
        ) from error
    except OSError as error:
        raise OSError(
            f"{place}: what listens there gives no answer to TLS ({error}); check the port, and "
            "whether a proxy or firewall stands between"
        ) from error


def _cause(error: ssl.SSLCertVerificationError) -> str:
    code, said = error.verify_code, error.verify_message
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    if code == EXPIRED:
        return (
            f"a certificate has expired (this machine's clock says {now}); the coordinator must "
            "renew that of the server or of its authority"
        )
    if code == NOT_YET_VALID:
        return (
            f"a certificate is not yet valid (this machine's clock says {now}); set the clock "
            "right, or wait"
        )
    if code in UNKNOWN_CA:
        return (
            f"the certificate is of an unknown authority ({said}); pass the coordinator's own file "
            "as --root-certificates; if you did, it is another one, or somebody stands between"
        )
    if code in OTHER_NAME:
        return (
            f"the certificate is of another host ({said}); use a name that it holds, or ask the "
            "coordinator for one with this name as subjectAltName"
        )
    return f"the certificate is not accepted ({said}, code {code}); tell the coordinator"
