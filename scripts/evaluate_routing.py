r"""Accuracy against cost of a routed pair; the same as `tokalign evaluate routing`.

python scripts/evaluate_routing.py --slm_run runs/slm --llm_run runs/llm --runs router=runs/routed \
    --output_dir runs/routing
"""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["evaluate", "routing", *sys.argv[1:]])
