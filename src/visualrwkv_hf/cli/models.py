"""`visualrwkv models`: the converted models in the cache."""

from typing import Annotated

import typer

from ..inference.loading import refuse_weights
from ..inference.model_cache import cached_models, models_folder, releases, remove_model, weights_format
from ..inference.progress import in_bytes
from .options import WeightsOption, errors_in_a_sentence, fetched
from .steps import say

models = typer.Typer(invoke_without_command=True)


@models.callback()
def list_models(context: typer.Context) -> None:
    """List the models in the cache with their sizes, and the releases that can be fetched."""
    if context.invoked_subcommand:
        return
    with errors_in_a_sentence():
        there = cached_models()
        for name, size in there.items():
            typer.echo(f"{name:24} {in_bytes(size):>9} {weights_format(models_folder() / name)}")
        missing = {name: release for name, release in releases().items() if name not in there}
        say(f"{len(there)} models in {models_folder()}.")
        if missing:
            say("Releases that can be fetched with --model NAME or `visualrwkv models pull NAME`:")
            for name, release in missing.items():
                typer.echo(f"  {name:12} {in_bytes(release.num_bytes)}", err=True)


@models.command("pull")
def pull(
    name: Annotated[
        str, typer.Argument(help="Release such as v6-1.6b, a .pth file, or hf://owner/repo/file[@revision].")
    ],
    weights: WeightsOption = None,
) -> None:
    """Fetch and convert a model ahead of its first use."""
    with errors_in_a_sentence():
        refuse_weights(weights, "cpu")
        typer.echo(fetched(name, weights))
        option = f" --weights {weights}" if weights else ""
        say(f'Next: visualrwkv ask --model {name}{option} PICTURE "What is in the picture?"')


@models.command("rm")
def remove(name: Annotated[str, typer.Argument(help="Model, as `visualrwkv models` names it.")]) -> None:
    """Delete a converted model. Its original file stays in the Hub's cache (`hf cache` lists and deletes those)."""
    with errors_in_a_sentence():
        say(f"Deleted {name}, {in_bytes(remove_model(name))}.")
