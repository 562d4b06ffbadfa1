"""What libraries say of themselves while they are imported and used, and who gave a command cannot change."""

from __future__ import annotations

import logging
import sys
import warnings

# Logger -> the beginnings of what is left out of it.
_MESSAGES = {
    "torch.utils._pytree": ("<enum ",),  # of torchao's enumerations
    "bitsandbytes.backends.cpu.ops": ("Failed to load CPU gemm_4bit_forward from kernels-community",),
    "DeepSpeed": ("Setting ds_accelerator to ", "Setting accelerator to CPU"),  # on stdout, where results are
}
# Names that TRL and PEFT, not the user, call by their old form.
_OLD_NAMES = r"`(is_)?gradient_checkpointing` is deprecated"


class _LeftOut(logging.Filter):
    """Leaves out messages by their beginnings."""

    def __init__(self, beginnings: tuple[str, ...]) -> None:
        super().__init__()
        self.beginnings = beginnings

    def filter(self, record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(self.beginnings)


_FILTERS = {name: _LeftOut(beginnings) for name, beginnings in _MESSAGES.items()}


def leave_out_chatter() -> None:
    """To be called before libraries are imported. Everything else that they say is shown."""
    for name, left_out in _FILTERS.items():
        logging.getLogger(name).addFilter(left_out)
    if not sys.warnoptions:  # `python -W` and PYTHONWARNINGS
        warnings.filterwarnings("ignore", message=_OLD_NAMES, category=FutureWarning)
