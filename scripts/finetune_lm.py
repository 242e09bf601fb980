"""Fine-tune on instructions: accelerate launch scripts/finetune_lm.py --config configs/finetune/lm_lora.yaml"""

import sys

from dynmoe_hf.cli.finetune import main
from dynmoe_hf.training.finetune_lm import InstructionArguments, finetune_lm

if __name__ == "__main__":
    sys.exit(main(finetune_lm, InstructionArguments))
