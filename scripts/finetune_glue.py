"""Fine-tune on a task of GLUE: accelerate launch scripts/finetune_glue.py --config configs/finetune/glue.yaml"""

import sys

from dynmoe_hf.cli.finetune import main
from dynmoe_hf.training.finetune_glue import GlueArguments, finetune_glue

if __name__ == "__main__":
    sys.exit(main(finetune_glue, GlueArguments))
