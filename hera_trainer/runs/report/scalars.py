"""The logged numbers that runs are compared by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..plots import monitor_group
from .curves import held_out_losses
from .groups import NamedRun


@dataclass(frozen=True)
class Scalar:
    """A number that runs log. It has a plot and a column of the closing table.

    Args:
        name (`str`): Name of its plot.
        title (`str`): What it is called.
        keys (sequence of `str`): Its names in the log; the first that a run has counts.
        noisy (`bool`, *optional*, defaults to `False`): Whether running means are drawn of long curves.
        measured (`bool`, *optional*, defaults to `False`):
            Whether it is a measurement of the weights, which in the end may be those of an earlier step.
    """

    name: str
    title: str
    keys: Sequence[str]
    noisy: bool = False
    measured: bool = False

    def curve(self, run: NamedRun) -> tuple[list[int], list[float]]:
        """Steps and values of a run, empty if it did not log it."""
        curves = [run.record.curve(key) for key in self.keys]
        return next((curve for curve in curves if curve[0]), ([], []))

    def first(self, run: NamedRun) -> float | None:
        """The first value of a run, `None` if it did not log it."""
        return next(iter(self.curve(run)[1]), None)

    def last(self, run: NamedRun) -> float | None:
        """The last value of a run, of a measurement the last that leads to its weights; `None` if there is none."""
        return next(reversed(self._of_result(run).values()), None)

    def last_of_both(self, run: NamedRun, other: NamedRun) -> tuple[float, float] | None:
        """The values of two runs at the last step that both have, as `last` has them; `None` if there is no such step.
        One of them may have trained for longer."""
        own, others = self._of_result(run), self._of_result(other)
        return next(((own[step], others[step]) for step in reversed(own) if step in others), None)

    def _of_result(self, run: NamedRun) -> dict[int, float]:
        points = zip(*self.curve(run), strict=True)
        return {step: value for step, value in points if not self.measured or run.record.leads_to_result(step)}


LOSS = Scalar("loss", "Language-model loss", ("lm_loss", "loss"), noisy=True)  # SFT logs the latter only
ALIGNMENT_LOSS = Scalar("alignment-loss", "Alignment loss", ("alignment_loss",), noisy=True)
_OTHERS = (
    Scalar("image-gain", "Image gain", ("image_gain",), measured=True),
    Scalar("pull", "Pull at the aligned heads", ("alignment_pull",)),
    Scalar("spread", "Spread of the aligned heads", ("alignment_spread",)),
    Scalar("temperature", "Temperature", ("temperature",)),
)


def scalars_of(runs: Sequence[NamedRun]) -> list[Scalar]:
    """The numbers that at least one of the runs logged.

    Args:
        runs (sequence of [`NamedRun`]): The runs.
    """
    keys = dict.fromkeys(key for run in runs for key in held_out_losses(run.record))
    held_out: list[Scalar] = []
    for key in keys:
        name = key.removeprefix("eval").removesuffix("_loss").strip("_")
        title = f"Held-out loss{name and f', {name}'}"
        held_out.append(Scalar(f"held-out-{len(held_out)}", title, (key,), measured=True))
    scalars = [LOSS, *held_out, ALIGNMENT_LOSS, *_OTHERS]
    return [scalar for scalar in scalars if any(scalar.curve(run)[0] for run in runs)]


def head_scalars(context: str, ending: str = "") -> list[Scalar]:
    """The mean mutual k-NN of groups of heads.

    Args:
        context (`str`): `"text"` or `"image"`.
        ending (`str`, *optional*): Ending of the names of their plots.
    """
    titles = (("aligned", "Aligned heads"), ("top", "Top heads"), ("all", "All heads"))
    prefix = monitor_group(context)
    names = {key: f"mknn-{context}{ending}-{key}" for key, _ in titles}
    return [Scalar(names[key], title, (f"{prefix}/{key}",), measured=True) for key, title in titles]
