"""`visualrwkv info`: what a model folder holds, as a table or as JSON."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from ..inference.loading import model_source
from ..inference.model_cache import is_original
from ..inference.printable import one_line
from ..inference.progress import in_bytes
from .options import errors_in_a_sentence, fetched

POSITIONS = {
    "first": "first: picture, question",
    "middle": "middle (the sandwich): question, picture, question",
    "last": "last: question, picture",
}


def info(
    folder: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="Model folder or Hub id. Default: the small model inside the package."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")] = False,
) -> None:
    """Describe a model without reading its weights: release, sizes, tokens per picture, size of the state."""
    with errors_in_a_sentence():
        source = model_source(folder)
        source = fetched(source) if is_original(source) else source

        from ..inference.facts import facts_of

        facts = facts_of(source)
        if as_json:
            typer.echo(json.dumps(facts, indent=2))
        else:
            show_facts(facts)


def show_facts(facts: Mapping[str, Any]) -> None:
    """Print the facts as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    for name, value in rows_of(facts):
        table.add_row(name, one_line(value))
    Console(highlight=False, markup=False).print(table)


def rows_of(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the facts in words."""
    yield "model", facts["model"]
    yield (
        "language model",
        f"{facts['language_model']}: {facts['layers']} layers of width {facts['hidden_size']}, {facts['heads']} heads "
        f"of {facts['head_dim']}, {facts['vocab_size']:,} tokens",
    )
    dtypes = ", ".join(f"{dtype} ({count} tensors)" for dtype, count in facts["dtypes"].items())
    yield "parameters", f"{facts['num_parameters']:,} in {in_bytes(facts['num_bytes'])}, {dtypes}"
    for part, count in facts["parameters"].items():
        yield f"  {part}", f"{count:,} ({count / max(1, facts['num_parameters']):.1%})"
    if "encoders" in facts:
        encoders = ", ".join(f"{name} at {side} x {side} pixels" for name, side in facts["encoders"].items())
        yield "vision", f"{encoders}; {by(facts['patch_grid'])} patches; tiling: {facts['tiling']}"
        each = (
            "per tile; larger pictures have more tiles" if facts["tokens_depend_on_size"] else "per picture"
        )
        yield "picture tokens", f"{facts['tokens_of_a_picture']:,} {each}; projector: {facts['projector']}"
        yield "scan", f"{facts['scan']}, over a grid of {by(facts['token_grid'])}"
        yield "picture position", POSITIONS[facts["image_position"]]
    yield "state", f"{in_bytes(facts['state_bytes'])} per conversation, whatever its length"


def by(sides: Sequence[int]) -> str:
    """Return the sides of a grid as text."""
    return " x ".join(map(str, sides))
