"""Which tokens only the large model should write (R2R, arXiv 2505.21600, section 3).

`labelling` runs the four stages. What each does: `divergence` (where the models differ), `branches` (where each choice
leads, sentence by sentence as `sentences` tells), `judge` (who compares them), `labeller` (the label of every token),
`report`. `classes` and `verdicts` name what a label can be.
"""
