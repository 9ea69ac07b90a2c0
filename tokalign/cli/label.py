r"""Routing labels of a small and a large model (R2R, arXiv 2505.21600): which tokens only the large one should write.

Four stages, each a resumable job over the processes of this launch: `answers` (of the LLM), `prefill` (what the SLM
would have written at each position, and the router's features), `branches` (where the LLM goes on behind the SLM's
tokens), `labels` (the verdict on every difference, in the splits train, calibration and test). `--stages` runs some of
them; each loads only the model that it needs. A last table and report.json say what came out.

    tokalign label --model deepseek-ai/DeepSeek-R1-Distill-Qwen-32B --engine vllm \
        --slm deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B --dataset runs/problems --output_dir runs/labels \
        --max_tokens 8192 --verdict outcome
    tokalign label --model Qwen/Qwen3-8B --engine vllm --slm Qwen/Qwen3-0.6B --dataset runs/problems \
        --output_dir runs/labels --verdict judge --judge Qwen/Qwen2.5-72B-Instruct --judge_engine server \
        --judge_base_urls http://localhost:8000/v1 --swap_order true

On several GPUs `tokalign label … --accelerate_config ddp`, or `accelerate launch -m tokalign label …`.
"""

from __future__ import annotations

from tokalign.generation.arguments import EngineArguments
from tokalign.routing.labels.arguments import LabelArguments, VerdictArguments
from tokalign.routing.labels.labelling import Labelling


def main(arguments: LabelArguments, verdict: VerdictArguments, llm: EngineArguments) -> None:
    Labelling(arguments, verdict, llm).run()
