"""Datasets: the column contract and its checks, preference pairs, and the made-up ledger world."""
