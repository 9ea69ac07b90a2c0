r"""GRPO with structured-output rewards: `tokalign structured-grpo` as a file, for `accelerate launch`.

    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/structured_grpo.py \
        --config recipes/qwen3-4b-instruct/structured_grpo.yaml

tokalign/cli/train_structured_grpo.py says what the data is and holds the options.
"""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["structured-grpo", *sys.argv[1:]])
