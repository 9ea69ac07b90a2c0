r"""Supervised fine-tuning: `tokalign sft` as a file, for `accelerate launch`.

    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/sft.py \
        --config recipes/llama-3-8b/positive_sft.yaml

tokalign/cli/train_sft.py says what the data is and holds the options.
"""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["sft", *sys.argv[1:]])
