"""What the test of `predict` in several processes runs in each of them.

As a script: `python -m torch.distributed.run --nproc_per_node 2 generation_worker.py <folder>`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from accelerate import PartialState
from tiny import build_vlm, image_dataset

from hera_trainer.evaluation.generation import predict
from hera_trainer.evaluation.questions import Questions


def main(folder: Path) -> None:
    state = PartialState(cpu=True)
    settings = {"max_new_tokens": 6, "batch_size": 2, "progress": False}
    predict(*build_vlm("llava"), Questions(image_dataset(3)), folder, **settings)  # as if it had been stopped
    entries = predict(*build_vlm("llava"), Questions(image_dataset(9)), folder, **settings)
    (folder / f"returned-{state.process_index}.json").write_text(json.dumps(entries))
    try:
        predict(*build_vlm("llava", seed=1), Questions(image_dataset(9)), folder, **settings)
    except ValueError as error:
        (folder / f"error-{state.process_index}.txt").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
