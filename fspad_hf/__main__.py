"""`python -m fspad_hf` is `fspad-hf`."""

import sys

from fspad_hf_cli import main

sys.exit(main())
