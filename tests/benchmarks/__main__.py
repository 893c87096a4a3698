"""`python -m tests.benchmarks`, which is `feddm bench`."""

import argparse
import sys
import time
from importlib import import_module
from pathlib import Path

from task.checks import require
from task.config import load_config
from task.training.devices import select_device
from tests.benchmarks.report import (
    LONGER,
    SECTIONS,
    Figures,
    check_writable,
    describe_machine,
    text_of,
    write_json,
)


def main(words: list[str]) -> int:
    """Run the sections that a command line asks for; returns the exit status."""
    options = parse(words)
    try:
        sections = chosen_sections(options.only, full=options.full)
        device = select_device(load_config([f"train.device={options.device}"]).train.device)
        if options.json is not None:
            check_writable(options.json)
    except ValueError as error:
        print(f"feddm bench: {error}", file=sys.stderr)
        return 1
    figures = describe_machine(device)
    print(text_of("machine", figures, device_type=device.type), flush=True)
    failed = []
    for name in sections:
        found = run_section(name, full=options.full, device=options.device)
        print(text_of(name, found, device_type=device.type), flush=True)
        figures |= found
        failed += [name] if f"{name}.failed" in found else []
        # After each, so that an interrupted benchmark keeps what it has measured.
        if options.json is not None:
            write_json(options.json, figures)
    if failed:
        print(f"feddm bench: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def parse(words: list[str]) -> argparse.Namespace:
    """Take the command line apart."""
    parser = argparse.ArgumentParser(
        prog="feddm bench",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Measure training, sampling and rounds side by side with what their users\n"
        "would otherwise have. On 2 cores all of it takes 17 minutes, with --full half an hour.\n"
        "Compare figures of one run only, on a machine that does nothing else.",
        epilog="sections:\n" + "\n".join(f"  {name}: {what}" for name, what in SECTIONS.items()),
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--full", action="store_true", help="the longer parts as well")
    parser.add_argument(
        "--only", metavar="A,B", help=f"of the sections {', '.join(SECTIONS)}; else all"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    return parser.parse_args(words)


def chosen_sections(only: str | None, *, full: bool) -> list[str]:
    """Return the sections that `--only` names, in the order of `SECTIONS`.

    Without it all, the longer ones only where `full` asks for them.

    Raises:
        ValueError: there is no such section.
    """
    if only is None:
        return [name for name in SECTIONS if full or name not in LONGER]
    names = [name.strip() for name in only.split(",")]
    for name in names:
        require(name in SECTIONS, "--only", f"of {', '.join(SECTIONS)}", name)
    return [name for name in SECTIONS if name in names]


def run_section(name: str, *, full: bool, device: str) -> Figures:
    """Measure a section; where it fails, that is its figure, and the others go on."""
    start = time.monotonic()
    try:
        found: Figures = import_module(f"tests.benchmarks.{name}").measure(full=full, device=device)
    except Exception as error:
        return {f"{name}.failed": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    return found | {f"{name}.took_seconds": time.monotonic() - start}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
