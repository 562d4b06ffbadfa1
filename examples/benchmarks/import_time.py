"""What importing hera_trainer costs beside importing trl's SFTTrainer, each in a fresh process.

    python examples/benchmarks/import_time.py
    python examples/benchmarks/import_time.py --small    # the package alone, beside trl's lazy package

`from trl import SFTTrainer` is compared with `import hera_trainer` and `from hera_trainer import HeRATrainer`. Both
packages import only what is asked for, so each process checks that the class is there before the clock stops.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))


def timed(statement: str) -> float:
    """Seconds of an import statement in this process."""
    names: dict[str, object] = {}
    start = time.perf_counter()
    exec(statement, names)
    imported = names.get(statement.split()[-1])
    if statement.startswith("from") and not isinstance(imported, type):
        raise AssertionError(f"`{statement}` gave {imported!r}, no class.")
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--small", action="store_true", help="imports that take little time")
    parser.add_argument("--device", choices=("cpu",), default="cpu")
    parser.add_argument("--statement", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.statement:
        print(json.dumps({"seconds": timed(chosen.statement)}))
        return
    # Not above: a process that measures an import must not have imported torch for the harness.
    from harness import Result, fresh_process, paired

    def cost(statement: str) -> float:
        return fresh_process(__file__, "--statement", statement)["seconds"]

    theirs = "import trl" if chosen.small else "from trl import SFTTrainer"
    ours = ["import hera_trainer"] if chosen.small else ["import hera_trainer", "from hera_trainer import HeRATrainer"]
    rows = []
    for statement in ours:
        pairs = paired(statement, theirs, chosen.pairs, warmup=0 if chosen.small else 1, cost=cost)  # type: ignore
        rows.append(pairs.row(f"`{statement}`: time", f"`{theirs}`", at_most=1.1, note="seconds, a fresh process each"))
    name = "import_time_small" if chosen.small else "import_time"
    command = f"python examples/benchmarks/import_time.py --pairs {chosen.pairs}" + (" --small" if chosen.small else "")
    Result(name, command, rows).save()


if __name__ == "__main__":
    main()
