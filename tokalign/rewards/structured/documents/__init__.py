"""What a completion says, read once and strictly: JSON, YAML, XML, in a Markdown block or bare."""
