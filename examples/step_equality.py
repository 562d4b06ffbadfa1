"""Shows that the alignment gradient of an optimizer step does not depend on how its samples are cut into micro-batches
and processes: runs the same 16 samples in several cuts and prints the largest relative deviation from one large batch.

    python examples/step_equality.py                     # prints the table
    python examples/step_equality.py --readme README.md  # and writes it between the markers of a Markdown file

Runs on the CPU with a tiny random LLaVA of the test suite, from a checkout of the repository, in about two minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CUTS = [(16, 1, 1), (8, 2, 1), (4, 4, 1), (2, 8, 1), (1, 16, 1), (8, 1, 2), (4, 2, 2), (2, 2, 4)]
SCOPES = ("step", "micro_batch")
MARKERS = ("<!-- equalities -->", "<!-- /equalities -->")


def worker(job: dict) -> None:
    """One optimizer step in one cut; writes the gradients of the first process."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from safetensors.torch import save_file
    from tiny import build_vlm, image_dataset, sft_args
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback

    from hera_trainer import HeRAConfig, HeRATrainer

    gradients = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            model = getattr(model, "module", model)
            gradients.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    model, processor = build_vlm("llava")
    dataset = image_dataset(n=16, with_features=8)
    args = HeRAConfig(
        **sft_args(
            job["out"],
            per_device_train_batch_size=job["batch"],
            gradient_accumulation_steps=job["accumulation"],
            contrast_scope=job["scope"],
            alignment_weight=job["weight"],
            aligned_heads=["L1H3", "L0H1", "L1H0"],
            num_neighbors=3,
            max_steps=1,
            max_grad_norm=0.0,
        )
    )
    trainer = HeRATrainer(model, args, train_dataset=dataset, processing_class=processor, callbacks=[Keep()])
    trainer._get_train_sampler = lambda *_: SequentialSampler(dataset)
    trainer.train()
    if trainer.is_world_process_zero():
        save_file({name: value.contiguous() for name, value in gradients.items()}, job["out"] + ".safetensors")


def run(out: str, cut: tuple[int, int, int], scope: str, weight: float) -> dict | None:
    """Gradients of a cut, or `None` where the trainer refuses it."""
    from safetensors.torch import load_file

    job = {"out": out, "batch": cut[0], "accumulation": cut[1], "scope": scope, "weight": weight}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={cut[2]}"]
    command += [__file__, "--worker", json.dumps(job)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if "Too few samples are compared" in done.stderr:
        return None
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return load_file(out + ".safetensors")


def deviation(gradients: dict, expected: dict) -> float:
    """Norm of the difference over the norm of what is expected, over all parameters."""
    difference = sum((gradients[name] - value).double().square().sum() for name, value in expected.items())
    return (difference / sum(value.double().square().sum() for value in expected.values())).sqrt().item()


def table() -> str:
    """The Markdown table."""
    lines = [
        '| batch x accumulation x processes | `contrast_scope="step"` | `contrast_scope="micro_batch"` |',
        "| --- | --- | --- |",
    ]
    with tempfile.TemporaryDirectory() as folder:
        plain, aligned = {}, {}
        for cut in CUTS:
            name = "x".join(map(str, cut))
            plain[cut] = run(f"{folder}/plain{name}", cut, "step", 0.0)
            for scope in SCOPES:
                total = run(f"{folder}/{scope}{name}", cut, scope, 5.0)
                aligned[cut, scope] = total and {n: value - plain[cut][n] for n, value in total.items()}
            cells = []
            for scope in SCOPES:
                gradients = aligned[cut, scope]
                cells.append(
                    "refused" if gradients is None else f"{deviation(gradients, aligned[CUTS[0], 'step']):.0e}"
                )
            lines.append(f"| {' x '.join(map(str, cut))} | {cells[0]} | {cells[1]} |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", help="Markdown file whose table is replaced")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(json.loads(args.worker))
        return
    markdown = table()
    if args.readme:
        path = Path(args.readme)
        block = f"{MARKERS[0]}\n{markdown}\n{MARKERS[1]}"
        path.write_text(re.sub(f"{MARKERS[0]}.*{MARKERS[1]}", lambda _: block, path.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    main()
