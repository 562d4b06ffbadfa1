"""`python -m hera_trainer` is `hera`, for launchers that take modules: `accelerate launch -m hera_trainer sft ...`."""

import sys

from .cli import main

sys.exit(main())
