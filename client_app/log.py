"""The log of a real node, for the engineer who watches `flower-supernode`."""

import logging
import sys

logger = logging.getLogger("feddm.client")


def show_log() -> None:
    """Let this process write what it does to stderr, a line per message, and failures whole.

    For real nodes only: those of a simulation would flood the log of the run. Flower's SuperNode
    shows whatever the processes of its ClientApps write; its own logger holds no other than its
    own lines.
    """
    if logger.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s feddm %(levelname)s: %(message)s"))
    logger.setLevel(logging.INFO)
    # What is said of files that cannot be read comes from there.
    for name in (logger.name, "task"):
        logging.getLogger(name).addHandler(handler)
