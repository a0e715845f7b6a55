"""`visualrwkv convert`: an original checkpoint to a model folder and back."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

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

DEFAULT_SHARD_SIZE = "5GB"


def convert(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE [SOURCE2] OUTPUT",
            help="Checkpoint (both files if it is split; a file or hf://owner/repo/file[@revision]) and the folder to "
            "make.",
        ),
    ] = None,
    list_releases: Annotated[
        bool, typer.Option("--list", help="List the released checkpoints and exit.")
    ] = False,
    to_original: Annotated[
        bool, typer.Option("--to-original", help="Convert back: FOLDER OUT.pth in place of SOURCE OUTPUT.")
    ] = False,
    world: Annotated[
        str | None,
        typer.Option(
            help="Assemble an untrained model from this RWKV World language model, without a SOURCE."
        ),
    ] = None,
    vision_tower: Annotated[
        list[str] | None,
        typer.Option(help="Vision weights that the checkpoint lacks: a folder, a file or a Hub id."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Default: every tensor keeps its dtype.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="int8 or int4 rounds the weights; see `visualrwkv quantize`. Default: as they are."
        ),
    ] = None,
    max_shard_size: MaxShardSizeOption = DEFAULT_SHARD_SIZE,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the model in OUTPUT.")] = False,
    family: Annotated[
        str | None,
        typer.Option(
            help="Model family (for example v5.1), for checkpoints whose family cannot be inferred from their tensors."
        ),
    ] = None,
    tiling: Annotated[
        str | None, typer.Option(help="How pictures are cut into tiles. Default: as the family does.")
    ] = None,
    extras: Annotated[
        bool, typer.Option("--extras/--no-extras", help="Keep tensors that only --to-original needs.")
    ] = True,
    verify: VerifyOption = True,
    push_to_hub: PushToHubOption = None,
    private: PrivateOption = False,
    revision: RevisionOption = None,
) -> None:
    """Convert an original checkpoint to a folder for from_pretrained, or such a folder back."""
    with errors_in_a_sentence():
        if list_releases:
            from visualrwkv_hf.conversion.releases import release_list

            typer.echo(release_list())
            return
        paths, vision_tower = paths or [], vision_tower or []
        refuse_number_of_paths(paths, to_original=to_original, world=world, vision_tower=vision_tower)
        refuse_without_effect(
            {
                "--private": private and not push_to_hub,
                "--revision": revision and not push_to_hub,
                "--world": to_original and world,
                "--vision-tower": to_original and vision_tower,
                "--push-to-hub": to_original and push_to_hub,
                "--family": to_original and family,
                "--tiling": to_original and tiling,
                "--no-extras": to_original and not extras,
                "--weights": to_original and weights,
                "--max-shard-size": to_original and max_shard_size != DEFAULT_SHARD_SIZE,
                "--no-verify": to_original and not verify,
            },
            because="with --to-original" if to_original else "without --push-to-hub",
        )
        if to_original:
            typer.echo(convert_back(*paths, dtype=dtype, overwrite=overwrite))
            return
        if push_to_hub:
            from visualrwkv_hf.conversion.hub_files import refuse_push

            refuse_push(push_to_hub, private)
        options: dict[str, Any] = dict(
            dtype=dtype,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            verify=verify,
            keep_unused=extras,
            tiling=tiling,
            family=family,
            weights=weights,
        )
        *sources, output = paths
        if world:
            folder = assemble(world, vision_tower, output, **options)
        else:
            folder = convert_sources(sources, output, vision_tower, **options)
        address = push(folder, push_to_hub, private=private, revision=revision) if push_to_hub else None
        typer.echo(folder)
        if address:
            typer.echo(address)
        say_next(folder, is_trained=not world)


def refuse_number_of_paths(
    paths: Sequence[str], *, to_original: bool, world: str | None, vision_tower: Sequence[str]
) -> None:
    """Raise `ValueError` for too few or too many paths."""
    least, most, usage = 2, 3, "SOURCE [SOURCE2] OUTPUT"
    if to_original:
        least, most, usage = 2, 2, "--to-original FOLDER OUT.pth"
    elif world:
        least, most, usage = 1, 1, "--world LM.pth --vision-tower TOWER OUTPUT"
    if not least <= len(paths) <= most:
        raise ValueError(f"The paths must be {usage}, got {len(paths)} of them.")
    if world and not vision_tower:
        raise ValueError(
            "--world needs --vision-tower. A language model alone is converted as SOURCE OUTPUT."
        )


def convert_back(folder: str, out_path: str, **options: Any) -> Path:
    """Write a model folder as an original checkpoint."""
    from visualrwkv_hf.conversion import to_original

    return to_original(folder, out_path, **options)


def assemble(world: str, vision_tower: Sequence[str], output: str, **options: Any) -> Path:
    """Write an untrained model of a language model and a vision tower."""
    from visualrwkv_hf.conversion import assemble_vlm
    from visualrwkv_hf.conversion.hub_files import local_file

    with bytes_bar() as bar:
        options |= dict(progress=bar, expect=bar.expect)
        return assemble_vlm(local_file(world, say), vision_tower, output, **options)


def convert_sources(
    sources: Sequence[str], output: str, vision_tower: Sequence[str], *, dtype: str | None, **options: Any
) -> Path:
    """Write the model folder of an original checkpoint."""
    from visualrwkv_hf.conversion import to_hf
    from visualrwkv_hf.conversion.hub_files import local_file

    files = [local_file(source, say) for source in sources]
    if vision_tower:
        options["vision_tower"] = vision_tower
    with bytes_bar() as bar:
        return to_hf(files, output, dtype=dtype, progress=bar, expect=bar.expect, **options)


def push(folder: Path, repo: str, **options: Any) -> str:
    """Upload a folder and return the address. The error says that the folder is complete all the same."""
    from visualrwkv_hf.conversion.hub_files import upload

    try:
        return upload(folder, repo, **options)
    except ValueError as error:
        raise ValueError(f"{error} The converted folder is complete: {folder}.") from error


def say_next(folder: Path, *, is_trained: bool) -> None:
    """Say at a terminal which command to type next."""
    if not sys.stderr.isatty():
        return
    if not is_trained:
        say(f"Next, train it: python examples/finetune.py --model {shlex.quote(str(folder))} --help")
    elif (folder / "processor_config.json").exists():
        say(f'Next: visualrwkv ask --model {shlex.quote(str(folder))} PICTURE "What is in the picture?"')
    else:
        say(f"Next: visualrwkv info {shlex.quote(str(folder))}")
