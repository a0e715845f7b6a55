"""Ask one question about every picture in a folder, on all machines of a Ray cluster, with vLLM in each worker.

    python examples/ray_caption.py pictures captions --model visualrwkv-7-0b1 --workers 4

The answers become a dataset of JSON Lines in the folder `captions`: {"picture": ..., "text": ...}. Every block of
pictures is a file, which appears when the block is done. A second run reads these files and asks about what is missing,
so a run that was killed loses the blocks under way and nothing else; with another question or model it is refused.
Pictures that cannot be read, or that vLLM refuses, have an empty text and an `error`. Ray's workers import vLLM, and
vLLM finds this package's plugin by itself.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import ray
import typer
from PIL import Image
from ray.data.llm import build_processor, vLLMEngineProcessorConfig
from transformers import AutoProcessor

import visualrwkv_hf  # noqa: F401  # tells AutoProcessor about our processor
from visualrwkv_hf.pictures import open_picture

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}


def pictures_without_text(folder: Path, output: Path) -> list[str]:
    """Return the pictures of a folder, sorted, about which no file of `output` has a line."""
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES}
    lines = (line for file in output.glob("*.json*") for line in file.read_text("utf-8").splitlines())
    return sorted(names - {json.loads(line)["picture"] for line in lines})


def refuse_other_settings(output: Path, settings: dict[str, Any]) -> None:
    """Exit if the dataset was begun with another question or model."""
    file = output / "settings"  # none of the dataset's files
    if not file.exists():
        file.write_text(json.dumps(settings), "utf-8")
    if (begun := json.loads(file.read_text("utf-8"))) != settings:
        raise SystemExit(f"{output} was begun with {begun}, not with {settings}: name another folder.")


def unreadable(path: Path) -> str:
    """Return why a picture cannot be read; empty if it can."""
    try:
        open_picture(path)
    except ValueError as error:
        return str(error)
    return ""


def prompt_about_a_picture(model: str, question: str) -> str:
    """Return the text of the chat template, in which vLLM replaces the placeholder by a picture's tokens."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    chat = [{"role": "user", "content": content}]
    return AutoProcessor.from_pretrained(model).apply_chat_template(
        chat, add_generation_prompt=True, tokenize=False
    )


def resources(workers: int, on_cpu: bool) -> dict[str, Any]:
    """Return the options of `vLLMEngineProcessorConfig` that say how many engines run, and on what."""
    bundle = {"CPU": 1} if on_cpu else {"CPU": 1, "GPU": 1}
    return {"concurrency": workers, "placement_group_config": {"bundles": [bundle]}}


def main(
    folder: Annotated[Path, typer.Argument(help="Pictures, also in its subfolders.")],
    output: Annotated[Path, typer.Argument(help="Folder of the dataset, which every machine can write to.")],
    model: Annotated[str, typer.Option(help="A model's folder or Hub id.")],
    question: Annotated[str, typer.Option(help="Asked about every picture.")] = "Describe the picture.",
    workers: Annotated[int, typer.Option(help="Engines.")] = 1,
    block: Annotated[int, typer.Option(help="Pictures of a file of the dataset.")] = 64,
    tokens: Annotated[int, typer.Option(help="The longest answer.")] = 64,
    max_model_len: Annotated[int, typer.Option(help="Tokens of prompt, picture and answer together.")] = 4096,
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "auto",
    on_cpu: Annotated[bool, typer.Option("--cpu", help="Engines without a GPU.")] = False,
) -> None:
    """Caption a folder."""
    folder = folder.resolve()
    output.mkdir(parents=True, exist_ok=True)
    refuse_other_settings(output, {"model": model, "question": question, "tokens": tokens, "dtype": dtype})
    names = pictures_without_text(folder, output)
    if not names:
        print("Every picture has its text.")
        return
    prompt = prompt_about_a_picture(model, question)

    def ask(row: dict) -> dict:
        image = Image.new("RGB", (8, 8)) if row["error"] else open_picture(folder / row["picture"])
        sampling = {"temperature": 0, "max_tokens": tokens}
        return {
            "picture": row["picture"],
            "error": row["error"],
            "prompt": prompt,
            "multimodal_data": {"image": image},
            "sampling_params": sampling,
        }

    def keep(row: dict) -> dict:
        error = row["error"] or row["__inference_error__"]
        return {
            "picture": row["picture"],
            "text": "" if error else row["generated_text"].strip(),
            "error": error,
        }

    config = vLLMEngineProcessorConfig(
        model_source=model,
        engine_kwargs={"dtype": dtype, "enforce_eager": on_cpu, "max_model_len": max_model_len},
        should_continue_on_error=True,
        batch_size=min(block, 64),
        chat_template_stage=False,
        tokenize_stage=False,
        detokenize_stage=False,
        **resources(workers, on_cpu),
    )
    rows = [{"picture": name} for name in names]
    dataset = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // block))
    dataset = dataset.map(lambda row: row | {"error": unreadable(folder / row["picture"])})
    # A postprocess of the processor would not see the rows that vLLM has refused.
    captioned = build_processor(config, preprocess=ask)(dataset).map(keep)
    captioned.write_json(str(output.resolve()), mode="append")
    print(f"{len(names)} pictures; {len(pictures_without_text(folder, output))} of them without text.")


if __name__ == "__main__":
    typer.run(main)
