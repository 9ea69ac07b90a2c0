"""The router: a small network beside the small model that scores whether the large one should write the next token.

`model` is the network, `features` what it reads from disk in training, `trainer` its training, `calibration` its
threshold for a budget, `metrics` how well it finds divergent tokens, `card` its page on the hub.
"""
