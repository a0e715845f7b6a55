"""The small model inside the package: a model folder like any other."""

from pathlib import Path


def bundled_model() -> Path:
    """Return the folder of the model inside the package.

    Raises:
        FileNotFoundError: if this version of the package has none.
    """
    folder = Path(__file__).parent
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            "This version of visualrwkv-hf has no model inside. Name one (a folder or a Hub id), for example one that "
            "you converted."
        )
    return folder
