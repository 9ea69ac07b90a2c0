"""Which tokens only the large model should write: differences, branches, verdicts (R2R, arXiv 2505.21600, section
3)."""
