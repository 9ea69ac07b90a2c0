"""Pages for people: token heatmaps and the report of a comparison, each one self-contained HTML file."""

from tokalign.view.heatmap import Scale, token_heatmap, token_pieces

__all__ = ["Scale", "token_heatmap", "token_pieces"]
