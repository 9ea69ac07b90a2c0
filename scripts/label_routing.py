"""Routing labels of a small and a large model; the same as `tokalign label`.

accelerate launch scripts/label_routing.py --model LLM --slm SLM --dataset runs/problems --output_dir runs/labels
"""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["label", *sys.argv[1:]])
