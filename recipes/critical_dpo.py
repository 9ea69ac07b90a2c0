r"""Critical-token DPO, plain DPO and RPO: `tokalign critical-dpo` as a file, for `accelerate launch`.

    accelerate launch --config_file accelerate_configs/zero3.yaml recipes/critical_dpo.py \
        --config recipes/llama-3-8b/critical_dpo.yaml

tokalign/cli/train_critical_dpo.py says what the data is and holds the options.
"""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["critical-dpo", *sys.argv[1:]])
