"""tokalign: token-level alignment and reasoning recipes on the Hugging Face trainer stack."""

__version__ = "0.1.0"
