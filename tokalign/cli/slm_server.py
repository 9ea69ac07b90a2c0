"""Print the command that starts a stock vLLM server as the small model of a routed pair.

The server routes by the router's threshold and is what `tokalign serve --engine vllm --slm_url …` talks to. More
options of vLLM's may follow the command.

    tokalign slm-server --slm Qwen/Qwen3-0.6B --llm Qwen/Qwen3-8B --router runs/router --port 8002
"""

from __future__ import annotations

from tokalign.routing.decode.arguments import SLMServerArguments
from tokalign.routing.decode.vllm.plugin import print_server_command


def main(arguments: SLMServerArguments) -> None:
    print_server_command(arguments)
