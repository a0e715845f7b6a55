"""`visualrwkv convert`: an original checkpoint to a model folder and back."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from .options import errors_in_a_sentence


class Conversion(NamedTuple):
    """What `visualrwkv convert` was asked for."""

    paths: Sequence[str]
    to_original: bool
    world: str | None
    vision_tower: Sequence[str]
    push_to_hub: str | None
    private: bool
    revision: str | None
    dtype: str | None
    max_shard_size: str
    overwrite: bool
    family: str | None
    tiling: str | None
    extras: bool
    verify: bool


def convert(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SOURCE [SOURCE2] OUTPUT",
            help="A checkpoint, or both files of a split one (a file or hf://owner/repo/file[@revision]), and the "
            "folder to make.",
        ),
    ] = None,
    list_releases: Annotated[
        bool, typer.Option("--list", help="Show the released checkpoints, and nothing else.")
    ] = False,
    to_original: Annotated[
        bool, typer.Option("--to-original", help="The way back: FOLDER OUT.pth instead of SOURCE OUTPUT.")
    ] = False,
    world: Annotated[
        str | None,
        typer.Option(help="Start an untrained model from this RWKV World language model, without a SOURCE."),
    ] = None,
    vision_tower: Annotated[
        list[str] | None,
        typer.Option(help="Where vision weights are that the source has not: a folder, a file, a Hub id."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. Without it every tensor keeps its own.")
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="The largest file of tensors.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what OUTPUT holds.")] = False,
    family: Annotated[
        str | None, typer.Option(help="For one that tensors alone do not tell, for example v5.1.")
    ] = None,
    tiling: Annotated[
        str | None, typer.Option(help="How pictures are cut. Without it as the family does.")
    ] = None,
    extras: Annotated[
        bool, typer.Option("--extras/--no-extras", help="Keep tensors that only the way back needs.")
    ] = True,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Read what was written and compare it to the bit.")
    ] = True,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="USER/NAME", help="Put the folder on the Hub as well.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch to push to.")] = None,
) -> None:
    """Turns an original checkpoint into a folder for from_pretrained, or such a folder back."""
    asked = Conversion(
        paths or [],
        to_original,
        world,
        vision_tower or [],
        push_to_hub,
        private,
        revision,
        dtype,
        max_shard_size,
        overwrite,
        family,
        tiling,
        extras,
        verify,
    )
    with errors_in_a_sentence(RuntimeError, MemoryError):
        typer.echo(released_checkpoints() if list_releases else run_conversion(asked))


def released_checkpoints() -> str:
    """What `visualrwkv convert --list` prints."""
    from visualrwkv_hf.conversion.releases import release_table

    return release_table()


def run_conversion(asked: Conversion) -> str:
    """What `visualrwkv convert` does. Returns where the result is, a line for each place."""
    refuse_options(asked)
    if asked.to_original:
        return convert_back(asked)
    from visualrwkv_hf.conversion.hub_files import refuse_push, upload

    if asked.push_to_hub:
        refuse_push(asked.push_to_hub, asked.private)
    folder = convert_forward(asked)
    if not asked.push_to_hub:
        return str(folder)
    try:
        url = upload(folder, asked.push_to_hub, private=asked.private, revision=asked.revision)
    except ValueError as error:
        raise ValueError(f"{error} The converted folder is whole: {folder}.") from error
    return f"{folder}\n{url}"


def refuse_options(asked: Conversion) -> None:
    """Raises `ValueError` for too few paths or too many, and for options that would have no effect."""
    least, most, usage = 2, 3, "SOURCE [SOURCE2] OUTPUT"
    if asked.to_original:
        least, most, usage = 2, 2, "--to-original FOLDER OUT.pth"
    elif asked.world:
        least, most, usage = 1, 1, "--world LM.pth --vision-tower TOWER OUTPUT"
    if not least <= len(asked.paths) <= most:
        raise ValueError(f"The paths must be {usage}, got {len(asked.paths)} of them.")
    if asked.world and not asked.vision_tower:
        raise ValueError(
            "--world needs --vision-tower: a language model alone is converted as SOURCE OUTPUT."
        )
    without_effect = {
        "--private": asked.private and not asked.push_to_hub,
        "--revision": asked.revision and not asked.push_to_hub,
        "--world": asked.to_original and asked.world,
        "--vision-tower": asked.to_original and asked.vision_tower,
        "--push-to-hub": asked.to_original and asked.push_to_hub,
        "--family": asked.to_original and asked.family,
        "--tiling": asked.to_original and asked.tiling,
        "--no-extras": asked.to_original and not asked.extras,
    }
    for option, is_given in without_effect.items():
        if is_given:
            reason = "with --to-original" if asked.to_original else "without --push-to-hub"
            raise ValueError(f"{option} has no effect {reason}.")


def convert_back(asked: Conversion) -> str:
    from visualrwkv_hf.conversion.convert import to_original

    folder, out_path = asked.paths
    return str(to_original(folder, out_path, dtype=asked.dtype, overwrite=asked.overwrite))


def convert_forward(asked: Conversion) -> Path:
    from visualrwkv_hf.conversion.convert import to_hf
    from visualrwkv_hf.conversion.hub_files import local_file

    options: dict[str, Any] = {
        "dtype": asked.dtype,
        "max_shard_size": asked.max_shard_size,
        "overwrite": asked.overwrite,
        "verify": asked.verify,
        "tiling": asked.tiling,
        "family": asked.family,
    }
    *named, output = asked.paths
    if asked.world:
        from visualrwkv_hf.conversion.start import start_vlm

        with progress_bar() as progress:
            world = local_file(asked.world)
            return start_vlm(world, asked.vision_tower, output, progress=progress, **options)
    sources = [local_file(source) for source in named]
    if asked.vision_tower:
        options["vision_tower"] = asked.vision_tower
    with progress_bar(None if asked.vision_tower else bytes_to_write(sources, asked.dtype)) as progress:
        return to_hf(sources, output, keep_unused=asked.extras, progress=progress, **options)


def bytes_to_write(sources: Sequence[Path], dtype: str | None) -> int:
    """The size of the sources' tensors in `dtype`."""
    from visualrwkv_hf.conversion.checkpoint import read_checkpoint
    from visualrwkv_hf.conversion.convert import parse_dtype

    asked = parse_dtype(dtype)
    return sum(
        info._replace(dtype=asked if asked and info.dtype.is_floating_point else info.dtype).num_bytes
        for info in read_checkpoint(*sources).infos.values()
    )


@contextlib.contextmanager
def progress_bar(total: int | None = None) -> Iterator[Callable[[str, int], None]]:
    """Bytes on the terminal, with the file's name; nothing where standard error is no terminal.

    Args:
        total: how many bytes there will be, if that is known.

    Yields:
        Callable: takes a file's name and the bytes written since the last call.
    """
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:

        def progress(file: str, num_bytes: int) -> None:
            bar.set_description(file, refresh=False)
            bar.update(num_bytes)

        yield progress
