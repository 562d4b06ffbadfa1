"""The names under which `alignment_objective` chooses what is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .cka import CKALoss
from .contrastive import HeRALoss
from .feature import FeatureLoss
from .objective import AlignmentObjective
from .uniformity import UniformityLoss

_Class = TypeVar("_Class", bound=type[AlignmentObjective])

_OBJECTIVES: dict[str, type[AlignmentObjective]] = {
    "contrastive": HeRALoss,
    "feature": FeatureLoss,
    "cka": CKALoss,
    "uniformity": UniformityLoss,
}


def register_objective(name: str) -> Callable[[_Class], _Class]:
    """Gives an objective the name by which `alignment_objective` chooses it.

    Args:
        name (`str`): The name. One that is taken is given to the new class.

    Raises:
        `TypeError`: If what is registered is no class derived from [`AlignmentObjective`].

    Example:

    ```python
    >>> @register_objective("mine")
    ... class Mine(AlignmentObjective): ...
    >>> HeRAConfig("out", alignment_objective="mine")
    ```
    """

    def register(objective: _Class) -> _Class:
        if not (isinstance(objective, type) and issubclass(objective, AlignmentObjective)):
            raise TypeError(f"{objective!r} is no class derived from `AlignmentObjective`.")
        _OBJECTIVES[name] = objective
        return objective

    return register


def get_objective(name: str) -> type[AlignmentObjective]:
    """The objective of a name, as [`register_objective`] gave it.

    Raises:
        `ValueError`: If there is none.
    """
    if name not in _OBJECTIVES:
        raise ValueError(
            f"`alignment_objective` must be one of {', '.join(map(repr, sorted(_OBJECTIVES)))}, got {name!r}. One of "
            "your own is registered with `hera_trainer.register_objective`."
        )
    return _OBJECTIVES[name]
