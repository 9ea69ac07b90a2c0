"""One file an experiment: what it runs, what it writes, and its tables, claims and pictures in docs/results/."""
