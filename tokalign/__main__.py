"""`python -m tokalign …` is `tokalign …`; `accelerate launch -m tokalign …` runs a verb on many processes."""

from tokalign.cli.main import entry

if __name__ == "__main__":
    entry()
