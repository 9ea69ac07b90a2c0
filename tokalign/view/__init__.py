"""Pages for people: token heatmaps and the report of a comparison, each one self-contained HTML file."""

from tokalign.stage.pieces import token_pieces
from tokalign.view.heatmap import Scale, token_heatmap
from tokalign.view.report import build_report

__all__ = ["Scale", "build_report", "token_heatmap", "token_pieces"]
