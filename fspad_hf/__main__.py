"""`python -m fspad_hf` is `fspad-hf`."""

import sys

from .cli import main

sys.exit(main())
