"""Measuring in a process of its own: a script asks itself, and answers in one line of JSON."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from harness import progress


def ask(script: str, *arguments: str, quick: bool, **environment: str) -> dict[str, Any]:
    """What `python script arguments` answers; `{"error": …}` if it fails."""
    progress(f"a fresh process: {', '.join(arguments)}")
    command = [sys.executable, script, *arguments, *(["--quick"] if quick else [])]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return {"error": lines[-1][:160]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child_parser(description: str | None) -> argparse.ArgumentParser:
    """With what `ask` adds."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser


def reply(options: argparse.Namespace, work: Callable[[], Mapping[str, Any]]) -> None:
    torch.set_num_threads(options.threads)
    print(json.dumps(work()))


def resident_bytes() -> int | None:
    """What of this process lies in memory, after giving back what is free; None without /proc."""
    path = Path("/proc/self/statm")
    if not path.exists():
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
