r"""Token router: `tokalign router` as a file, for `accelerate launch`.

    accelerate launch --config_file accelerate_configs/ddp.yaml recipes/router.py \
        --config recipes/qwen3-0.6b-8b/router.yaml

tokalign/cli/train_router.py says what the data is and holds the options.
"""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["router", *sys.argv[1:]])
