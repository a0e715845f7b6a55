"""The `visualrwkv` command: one file for each of its commands. Only this folder imports typer and rich."""
