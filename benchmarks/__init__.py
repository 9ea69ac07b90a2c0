"""Benchmarks: experiments/ (one file each), suite.py (all of them), render.py (their pages), peers/, faults.py."""
