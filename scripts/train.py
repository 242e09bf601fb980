"""`dynmoe train` for launchers: accelerate launch scripts/train.py --config configs/train/top_p_tiny.yaml"""

import sys

from dynmoe_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
