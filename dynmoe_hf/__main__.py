"""`python -m dynmoe_hf`: the `dynmoe` command."""

import sys

from dynmoe_hf.cli import main

sys.exit(main())
