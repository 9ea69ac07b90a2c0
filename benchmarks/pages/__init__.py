"""The pages of docs/results/: one module a page, made from the runs' JSON alone (see common.py)."""
