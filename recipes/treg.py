r"""T-REG and its base losses, DPO and SimPO: `tokalign treg` as a file, for `accelerate launch`.

    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/treg.py \
        --config recipes/llama-3-8b-instruct/treg.yaml

tokalign/cli/train_treg.py says what the data is and holds the options.
"""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["treg", *sys.argv[1:]])
