"""The command `hera`: one module a command, imported when it is called. Uses all other folders."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from .. import __version__
from .chatter import leave_out_chatter
from .parser import Parser

# Name -> what `hera --help` says of it. The module of the same name in this package has a `main(arguments)`.
COMMANDS = {
    "sft": "fine-tune a model with aligned attention heads",
    "rank": "score the attention heads of a model against a vision teacher",
    "encode": "compute the teacher's vectors of a data set, for later runs",
    "plan": "estimate memory, pools and cost of a run from the model's configuration",
    "merge": "write an adapter into its base model",
    "report": "make one HTML page of a training run",
    "eval": "run a model over a data set and score its answers",
    "demo": "the whole job on a small real model, about 10 minutes on 2 CPU cores",
    "env": "print versions and hardware, for bug reports",
}


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS)) + 2
    listing = "\n".join(f"  {name:<{width}}{summary}" for name, summary in COMMANDS.items())
    parser = Parser(
        prog="hera",
        usage="hera [-h] [--version] command ...",
        description="Fine-tune vision-language models with head-wise representation alignment.",
        epilog=f"commands:\n{listing}\n\n`hera COMMAND --help` explains one. Example: hera demo --steps 20",
    )
    parser.add_argument("--version", action="version", version=f"hera-trainer {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="command", help="what to do")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `hera`.

    Args:
        argv (sequence of `str`, *optional*): Arguments, those of the process by default.

    Returns:
        `int`: Exit code: 0, or 1 after an error, which is said in one line (2 for wrong arguments, from argparse; 130
        when interrupted).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = _parser().parse_args(arguments[:1]).command  # what follows belongs to the command
    leave_out_chatter()
    try:
        import_module(f".{command}", __name__).main(arguments[1:])
    except Exception as error:
        if (said := _explained(error)) is None:
            raise  # not a mistake of the user
        print(f"hera {command}: error: {said}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"hera {command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _explained(error: Exception) -> str | None:
    """An error in one line, with its cure; `None` of one that is a fault of the program."""
    text = " ".join(str(error).split())
    if isinstance(error, (ValueError, ImportError, OSError)):
        return text
    import jinja2
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        cure = "The memory of the GPU is full. Use smaller batches or 4-bit weights: `hera plan` estimates what fits."
    elif isinstance(error, jinja2.TemplateError):
        cure = "The chat template does not take these turns, or cannot be read. Give others, or another template."
    else:
        return None
    return f"{cure} ({text})"
