"""`python -m qnn summary | convert | bench | sensitivity` on a folder of transformers' models."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from torch import nn

from qnn.integrations.model_folder import batches_of, copy_the_rest, moved, open_model
from qnn.verbs.bench import bench
from qnn.verbs.convert import convert
from qnn.verbs.sensitivity import sensitivity
from qnn.verbs.summary import summary


def add(commands: Any) -> None:
    """Add the commands to a parser's."""
    command = _command(commands, "summary", "what each layer is, or why it is float")
    _json(command)
    command = _command(commands, "convert", "quantise the model and save it for transformers")
    command.add_argument("out", type=Path, help="a folder that is empty or does not exist")
    _layers(command)
    command = _command(commands, "bench", "time the quantised model beside the float one")
    command.add_argument("--other", type=Path, help="time the two folders' models as they are")
    command.add_argument("--seconds", type=float, default=10.0, help="how long (10)")
    _layers(command)
    _inputs(command)
    _json(command)
    command = _command(
        commands, "sensitivity", "the output's error with each layer quantised alone"
    )
    command.add_argument("--plot", type=Path, help="write a chart: layers.png")
    command.add_argument("--budget-bytes", type=int, help="print a scheme map that fits")
    _layers(command)
    _inputs(command)
    _json(command)


def _command(commands: Any, name: str, told: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=told, description=told)
    command.add_argument("folder", type=Path, help="what save_pretrained wrote")
    command.add_argument("--dtype", default="auto", help="of the float model (the checkpoint's)")
    command.set_defaults(run=globals()[f"_{name}"])
    return command


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON instead of text")


def _layers(command: argparse.ArgumentParser) -> None:
    command.add_argument("--scheme", default="int8", help="such as int8, int4_weight_g32 (int8)")
    command.add_argument("--include", nargs="+", metavar="NAME", help="only these, with wildcards")
    command.add_argument("--exclude", nargs="+", metavar="NAME", help="not these")
    command.add_argument(
        "--skip", action="store_true", help="leave out what the scheme cannot take"
    )


def _inputs(command: argparse.ArgumentParser) -> None:
    command.add_argument("--inputs", type=Path, help="batches that torch.save wrote")
    command.add_argument("--texts", type=Path, help="lines of text, for the folder's tokenizer")
    command.add_argument("--batch", type=int, default=1, help="texts a batch (1)")
    command.add_argument("--tokens", type=int, default=128, help="tokens a text, at most (128)")
    command.add_argument("--device", default="cpu", help="cpu, cuda")


def run(arguments: argparse.Namespace) -> int:
    """Run a command; what is wrong goes to stderr, in one line without a traceback."""
    try:
        arguments.run(arguments)
    except (ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        print(f"python -m qnn {arguments.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _chosen(given: argparse.Namespace) -> dict[str, Any]:
    skip = "skip" if given.skip else "error"
    return {"include": given.include, "exclude": given.exclude, "on_unsupported": skip}


def _show(given: argparse.Namespace, result: Any) -> None:
    print(json.dumps(result.to_dict(), indent=2) if given.json else result)


def _summary(given: argparse.Namespace) -> None:
    _show(given, summary(open_model(given.folder, given.dtype)))


def _convert(given: argparse.Namespace) -> None:
    out: Path = given.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty folder; nothing was written.")
    model: Any = open_model(given.folder, given.dtype)
    model = convert(model, given.scheme, inplace=True, **_chosen(given))
    model.save_pretrained(out)
    copy_the_rest(given.folder, out)
    done = summary(model)
    print(f"{out}: {done.bytes_after:,} bytes of {done.bytes_before:,}")


def _batches(given: argparse.Namespace, model: nn.Module) -> list[Any]:
    found = batches_of(
        model,
        given.folder,
        inputs=given.inputs,
        texts=given.texts,
        batch=given.batch,
        tokens=given.tokens,
    )
    return [moved(batch, given.device) for batch in found]


def _bench(given: argparse.Namespace) -> None:
    model: nn.Module = open_model(given.folder, given.dtype).to(given.device)
    if given.other is not None:
        other: nn.Module = open_model(given.other, given.dtype).to(given.device)
    else:
        model, other = convert(model, given.scheme, **_chosen(given)), model
    _show(given, bench(model, _batches(given, other)[0], other, seconds=given.seconds))


def _sensitivity(given: argparse.Namespace) -> None:
    model = open_model(given.folder, given.dtype).to(given.device)
    if given.inputs is None and given.texts is None:
        print(
            "python -m qnn sensitivity: random tokens, which are not what the model meets; --texts "
            "or --inputs give it data of its use.",
            file=sys.stderr,
        )
    table = sensitivity(model, _batches(given, model), given.scheme, **_chosen(given))
    _show(given, table)
    if given.plot is not None:
        table.plot(given.plot)
    if given.budget_bytes is not None:
        print(json.dumps(table.choose(given.budget_bytes), indent=2))
