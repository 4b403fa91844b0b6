"""`python -m fspad_hf` is `fspad-hf`, after the seconds that importing this package takes."""

import sys

from fspad_hf_cli import main

sys.exit(main())
