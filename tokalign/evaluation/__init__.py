"""What a model is worth: verified accuracy with intervals, pass@k, paired comparisons, log-probs of completions."""
