"""`python -m qnn doctor [--json]`."""

from __future__ import annotations

import argparse
import json

from qnn import doctor


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m qnn", description="Quantised torch.nn layers.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "doctor", help="what runs on this machine, what does not, and how to get it"
    )
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    arguments = parser.parse_args(argv)
    data = doctor.report()
    print(json.dumps(data, indent=2) if arguments.json else doctor.render(data))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
