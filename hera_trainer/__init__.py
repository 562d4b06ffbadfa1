"""Head-wise representation alignment for fine-tuning vision-language models."""

import lazy_loader

# The package's version, and the only place where it is written.
__version__ = "0.1.0.dev0"

# Public names stand in `__init__.pyi`. They are imported when first used: the loss and the metrics need torch only, and
# should not cost the import of TRL.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
