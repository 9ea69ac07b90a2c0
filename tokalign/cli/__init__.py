"""The command `tokalign`: one file a verb, each with its arguments as dataclasses and a `main` that takes them."""
