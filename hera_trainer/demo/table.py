"""What the demo prints last: the model before training, after SFT, and after SFT with alignment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("before", "SFT", "HeRA")
_GROUPS = {"aligned": "five aligned heads", "top": "five best heads", "all": "all heads"}


def row_of(name: str, values: Mapping[str, float | None]) -> str:
    """A line with a value in each column that has one."""
    cells = (values.get(column) for column in COLUMNS)
    return f"{name:<44}" + "".join(f"{'' if value is None else f'{value:.3f}':>10}" for value in cells)


def closing_table(results: Mapping[str, Any]) -> str:
    """The demo's closing table as text.

    Args:
        results (`dict`): What `results.json` holds.
    """
    lines = [f"\n{'':<44}" + "".join(f"{column:>10}" for column in COLUMNS)]
    for context, groups in results["mknn"].items():
        lines.append(f"Mutual k-NN with the teacher, {context}")
        lines += [row_of(f"  {name}", groups[group]) for group, name in _GROUPS.items()]
        null = f"{results['null'][context]['mean']:.3f}, 95th percentile {results['null'][context]['p95']:.3f}"
        lines.append(f"  {'unrelated spaces score':<42}{null:>30}")
    lines += [
        "Held-out captions",
        row_of("  language-model loss", results["held_out_loss"]),
        row_of("  image gain: rise with permuted images", results["image_gain"]),
        f"easy-VQA, {results['settings']['questions']} held-out questions",
        row_of("  accuracy", results["vqa_accuracy"]),
        f"  {'the commonest answer to each question':<42}{results['vqa_baseline']:>30.3f}",
        "Training, last five steps",
        *(row_of(f"  {name.replace('_', ' ')}", values) for name, values in results["training"].items()),
        f"{'Seconds of training':<44}" + "".join(f"{results['seconds'].get(c, ''):>10}" for c in COLUMNS),
        f"{'Seconds in all':<44}{results['seconds']['in all']:>30}",
        f"{'Peak memory (GB)':<44}{results['peak_memory_gb']:>30}",
    ]
    return "\n".join(lines)


def shown_answers(questions: Mapping[str, Sequence[str]], said: Mapping[str, Sequence[str]], count: int) -> str:
    """The first answers in each column.

    Args:
        questions (`Dataset` or mapping): Columns `question` and `answer`.
        said (`dict[str, Sequence[str]]`): By column, what the model answered.
        count (`int`): How many.
    """
    lines = [f"\n{'question':<46}{'right':<12}" + "".join(f"{column:<14}" for column in COLUMNS)]
    for i in range(count):
        answers = "".join(f"{said[column][i][:11]!r:<14}" for column in COLUMNS)
        lines.append(f"{questions['question'][i]:<46}{questions['answer'][i]:<12}{answers}")
    return "\n".join(lines)
