"""The study of docs/results.md: `python examples/paper_study/study.py all`, or some of its experiments by their names.

What is in `results/` is not run again, so the command may be stopped and repeated.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Sequence
from pathlib import Path

from experiments import EXPERIMENTS
from maps import HeadMap, rank
from records import RESULTS, read_results
from train import Laboratory, train


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", choices=[*EXPERIMENTS, "all"])
    parser.add_argument("--folder", type=Path, default=Path("out/study"), help="for images, encoders and models")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that each finished run is written to")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--part", default="1/1", help="2/3: every third run, from the second on, for several processes")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no further run after this time")
    args = parser.parse_args(arguments)
    begin, lab = time.monotonic(), Laboratory(args.folder, args.device, args.results / "rankings")
    first, parts = map(int, args.part.split("/"))
    for experiment in EXPERIMENTS if "all" in args.experiments else args.experiments:
        done = {record["key"] for record in read_results(args.results).get(experiment, [])}
        for run in EXPERIMENTS[experiment]()[first - 1 :: parts]:
            if run.key in done or time.monotonic() - begin > args.seconds:
                continue
            record = rank(lab, run) if isinstance(run, HeadMap) else train(lab, run)
            args.results.mkdir(parents=True, exist_ok=True)
            with (args.results / f"{experiment}.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
            lab.finished(run.key)
            gc.collect()  # a trainer and its model refer to each other, and would stay for some runs
            print(f"{experiment}: {run.arm}, seed {run.seed}, {record['seconds']} s", flush=True)


if __name__ == "__main__":
    main()
