"""An OpenAI-compatible server over a routed pair; the same as `tokalign serve`.

python scripts/serve_routed.py --slm Qwen/Qwen3-0.6B --llm Qwen/Qwen3-8B --router runs/router
"""

import sys

from tokalign.cli.main import main

if __name__ == "__main__":
    main(["serve", *sys.argv[1:]])
