r"""Token signals of preference pairs: `tokalign score …` as a file, for launchers that want one.

accelerate launch scripts/score.py contrast --model meta-llama/Meta-Llama-3-8B \
    --positive runs/positive --negative runs/negative --dataset runs/pairs --output_dir runs/scored
"""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
