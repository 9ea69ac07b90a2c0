"""What a model is worth: verified accuracy, pass@k, structure, routed decoding, log-probs of completions."""
