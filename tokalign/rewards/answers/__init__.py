"""Final answers of maths problems: found in a text, read, compared."""
