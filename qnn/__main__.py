"""`python -m qnn doctor | build`, and `summary | convert | bench | sensitivity` of a folder."""

from __future__ import annotations

import argparse
import io
import json
import sys

from qnn import folder_commands
from qnn.kernels.cpu import native
from qnn.verbs import doctor


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qnn", description="Quantised torch.nn layers.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "doctor", help="what runs on this machine, what does not, and how to get it"
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    command = commands.add_parser(
        "build", help="build the native CPU kernels now, instead of at the first int8 call"
    )
    command.add_argument("--force", action="store_true", help="build again what is there")
    folder_commands.add(commands)
    arguments = parser.parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold any bytes
    if arguments.command == "build":
        return _build(arguments.force)
    if arguments.command != "doctor":
        return folder_commands.run(arguments)
    data = doctor.report()
    print(json.dumps(data, indent=2) if arguments.json else doctor.render(data))
    return 0


def _build(force: bool) -> int:
    for line in native.passed_over():
        print(f"passed over: {line}", file=sys.stderr)
    try:
        print(native.build(force=force, log=sys.stderr))
    except native.BuildError as error:
        print(f"python -m qnn build: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
