"""An OpenAI-compatible server over a routed pair."""
