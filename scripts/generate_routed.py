r"""Answers by a routed pair; the same as `tokalign generate`.

accelerate launch scripts/generate_routed.py --slm SLM --llm LLM --router runs/router --dataset runs/problems \
    --output_dir runs/routed
"""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
