"""`python -m visualrwkv_hf.cli` is the `visualrwkv` command."""

from .app import app

if __name__ == "__main__":
    app()
