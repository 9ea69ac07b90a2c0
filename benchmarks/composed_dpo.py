"""recipes/critical_dpo.py for the scores that compositions.py makes, which no trainer takes before they are registered.

python benchmarks/composed_dpo.py --config recipes/ledger/critical_dpo.yaml --signal s_llm --dataset_name ...
"""

import runpy
from pathlib import Path

from tokalign.signals.registry import Signal, register

for name in ("s_reward", "s_entropy", "s_logprob", "s_llm", "s_random"):
    register(Signal(name, "composed score", 0.0, 1.0, "score", "low", to_weight=lambda scores: 1.0 - scores))

if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).resolve().parents[1] / "recipes" / "critical_dpo.py"), run_name="__main__")
