"""`visualrwkv quantize`: a model folder with weights in int8 or int4."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..inference.loading import model_folder, model_source, refuse_weights
from .bars import bytes_bar
from .options import (
    MaxShardSizeOption,
    PrivateOption,
    PushToHubOption,
    RevisionOption,
    VerifyOption,
    errors_in_a_sentence,
    refuse_without_effect,
)
from .steps import say


def quantize(
    model: Annotated[str, typer.Argument(metavar="FOLDER", help="Model: a folder, a Hub id or a release.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to make.")],
    weights: Annotated[
        str,
        typer.Option(help="int8 (8 bits a weight), or int4 (4.5 bits a weight, and the head in int8)."),
    ] = "int8",
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16 or float16 for all that is not rounded. Default: as it is."),
    ] = None,
    max_shard_size: MaxShardSizeOption = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in OUT.")] = False,
    verify: VerifyOption = True,
    push_to_hub: PushToHubOption = None,
    private: PrivateOption = False,
    revision: RevisionOption = None,
) -> None:
    """Round a model's weights to int8 or int4, in files that this package and transformers read.

    The blocks' linear layers and the head are rounded. The embedding, the low-rank maps, the norms, the vision tower
    and the projector stay as they are.
    """
    with errors_in_a_sentence():
        from .convert import push

        refuse_weights(weights, "cpu")
        refuse_without_effect(
            {"--private": private and not push_to_hub, "--revision": revision and not push_to_hub},
            because="without --push-to-hub",
        )
        if push_to_hub:
            from visualrwkv_hf.conversion.hub_files import refuse_push

            refuse_push(push_to_hub, private)
        folder = model_folder(model_source(model))
        from visualrwkv_hf.conversion import quantize as quantize_folder

        options = dict(dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite, verify=verify)
        with bytes_bar() as bar:
            result = quantize_folder(
                folder, output, weights=weights, progress=bar, expect=bar.expect, **options
            )
        address = push(result, push_to_hub, private=private, revision=revision) if push_to_hub else None
        typer.echo(result)
        if address:
            typer.echo(address)
        if sys.stderr.isatty():
            what = "ask" if (result / "processor_config.json").exists() else "info"
            question = ' PICTURE "What is in the picture?"' if what == "ask" else ""
            named = shlex.quote(str(result))
            say(f"Next: visualrwkv {what} {'--model ' if what == 'ask' else ''}{named}{question}")
