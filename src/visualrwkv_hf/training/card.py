"""The model card of a fine-tuned model or adapter."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

MODEL_USAGE = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = "path/or/name"
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
```"""

ADAPTER_USAGE = """\
```python
import visualrwkv_hf  # makes transformers know the base model, which may come without code
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base, adapter = "{base}", "path/or/name"
processor = AutoProcessor.from_pretrained(base)
model = AutoModelForImageTextToText.from_pretrained(base)
model = PeftModel.from_pretrained(model, adapter)
```"""

TUNED_STATE_USAGE = """\
```python
from transformers import AutoModelForImageTextToText, AutoProcessor
from visualrwkv_hf import TunedState

base, state = "{base}", "path/or/name"
processor = AutoProcessor.from_pretrained(base)
model = AutoModelForImageTextToText.from_pretrained(base)
output = model.generate(**inputs, initial_state=TunedState.from_pretrained(state, model))
```"""

USAGE = {"model": MODEL_USAGE, "adapter": ADAPTER_USAGE, "tuned state": TUNED_STATE_USAGE}
"""What a folder holds -> how it is loaded."""


def training_card(
    title: str,
    facts: Mapping[str, Any],
    base_model: str | None = None,
    kind: Literal["model", "adapter", "tuned state"] = "model",
) -> str:
    """Return README.md of a fine-tuned model.

    Args:
        title: The heading.
        facts: What the model was trained on and how; each becomes a row of a table.
        base_model: Hub id or folder of the model that the training started from. A folder is named without its path,
            or by the `base_model` of its own card if it has one.
        kind: What the folder holds: a whole model, a PEFT adapter or a [`TunedState`].
    """
    metadata: dict[str, Any] = {
        "library_name": "peft" if kind == "adapter" else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["rwkv", "visualrwkv"],
    }
    if base_model:
        metadata["base_model"] = base_model = base_model_of(base_model)
        facts = {"base model": f"`{base_model}`", **facts}
    usage = USAGE[kind].format(base=base_model or "path/or/name")
    rows = "\n".join(f"| {name} | {value} |" for name, value in facts.items())
    return f"""\
---
{yaml.safe_dump(metadata, sort_keys=False).strip()}
---

# {title}

Fine-tuned with `visualrwkv-hf`.

## How to load it

{usage}

## Training

| | |
|---|---|
{rows}
"""


def base_model_of(source: str) -> str:
    """Return the name of a base model for a card: never a path, which would mean nothing on another machine.

    Args:
        source: What the model was loaded from, a Hub id or a folder. If a folder's own card names the model that it
            was made from, that is the base model; otherwise the folder's name is.
    """
    folder = Path(source)
    if not folder.is_dir():
        return source
    named = _metadata(folder / "README.md").get("base_model")
    named = named[0] if isinstance(named, list) and named else named
    return named if isinstance(named, str) and not Path(named).exists() else folder.resolve().name


def _metadata(card: Path) -> dict[str, Any]:
    """Return the YAML block at the start of a card, or nothing where there is none or it is broken."""
    if not card.is_file():
        return {}
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        found = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


__all__ = ["base_model_of", "training_card"]
