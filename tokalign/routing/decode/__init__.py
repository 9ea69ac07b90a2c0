"""Routed decoding: two models write one completion, and a policy decides who writes each token.

`policies` decide, `costs` and `served_rate` measure, `rollouts` writes stages. In this process `generator` runs both
models in batches over `slots`, `transformers_backend` gives it to many tasks at once. `orchestrator` moves requests
between two engines that run elsewhere, and `vllm` is those engines on stock vLLM. `backend` is what both ways share.
"""
