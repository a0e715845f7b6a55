"""Measure the gain from a constant state in a conversation, beside LLaVA-1.5, a transformer of the same size.

    python examples/benchmark_vs_transformer.py                    # 7B on a GPU; random weights, nothing is downloaded
    python examples/benchmark_vs_transformer.py --size small       # what a CPU can do; also --size tiny

Both models read the same prompt, a picture and text, up to each context length; then the time and the memory of each
further token are measured. Both have the vision tower of LLaVA-1.5, CLIP-L at 336 pixels. LLaVA is transformers' own,
with its attention in torch's fused kernel and with each of its caches: one that grows by a token at each step, and one
of fixed size, just large enough. The faster one at each length counts. Before any time is printed, the cached logits
of every model must be those that it gives without a cache.

The paper's measurement (arXiv 2406.13362), on an L20 with 48 GB at 24,576 tokens: 3.98 times faster, 54 % less memory.
"""

import resource
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import typer
from benchmarking import chosen_device, machine, markdown_table, readable, readable_bytes, report
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    Cache,
    DynamicCache,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
)

from visualrwkv_hf import VisualRWKVCache, VisualRWKVConfig, VisualRWKVStaticCache

PREFILL_CHUNK = 1024
"""Tokens read at once."""
STEPS = 32
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Limits on the relative norm error of logits. Half precision rounds after each of the layers, in another order."""

PAPER = {"context": 24576, "times_faster": 3.98, "memory_saved": 0.54}
OURS, LLAVA = "VisualRWKV", "LLaVA-1.5"


class Size(NamedTuple):
    """Widths and depths: LLaMA's of Vicuna 7B, RWKV's of RWKV 7B, CLIP's of CLIP-L at 336 pixels."""

    hidden_size: int
    num_layers: int
    head_dim: int
    llama_intermediate_size: int
    llama_vocab_size: int
    rwkv_vocab_size: int
    clip: dict[str, int]
    contexts: tuple[int, ...]

    @property
    def picture_tokens(self) -> int:
        return (self.clip["image_size"] // self.clip["patch_size"]) ** 2


def clip(hidden_size: int, layers: int, heads: int, image_size: int) -> dict[str, int]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": 4 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "image_size": image_size,
        "patch_size": 14,
    }


SIZES = {
    "tiny": Size(64, 2, 16, 176, 512, 512, clip(32, 2, 2, 56), (32, 64)),
    "small": Size(768, 12, 64, 2048, 32064, 65536, clip(256, 4, 4, 336), (1024, 2048, 4096)),
    "7B": Size(4096, 32, 64, 11008, 32064, 65536, clip(1024, 24, 16, 336), (1024, 4096, 8192, 16384, 24576)),
}


# --- the two models -----------------------------------------------------------------------------------


def rwkv_config(size: Size, version: int) -> VisualRWKVConfig:
    text = {
        "rwkv_version": version,
        "hidden_size": size.hidden_size,
        "num_hidden_layers": size.num_layers,
        "head_dim": size.head_dim,
        "vocab_size": size.rwkv_vocab_size,
    }
    return VisualRWKVConfig(
        text_config=text,
        vision_config={"clip_config": size.clip, "feature_layer": -2},
        image_token_id=size.rwkv_vocab_size - 1,
        scan="bidirectional",
        projector="linear" if version < 7 else "gated_norm",
    )


def llava_config(size: Size) -> LlavaConfig:
    text = {
        "model_type": "llama",
        "hidden_size": size.hidden_size,
        "intermediate_size": size.llama_intermediate_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": max(2, size.hidden_size // 128),
        "vocab_size": size.llama_vocab_size,
        "max_position_embeddings": 32768,
        "pad_token_id": 0,
    }
    return LlavaConfig(
        text_config=text,
        vision_config={"model_type": "clip_vision_model", **size.clip},
        image_token_index=size.llama_vocab_size - 1,
        image_seq_length=size.picture_tokens,
    )


class Contender(NamedTuple):
    """A model and how it remembers: `new_cache(config, tokens)` has room for so many."""

    name: str
    cache: str
    config: PreTrainedConfig
    new_cache: Callable[[PreTrainedConfig, int], Cache]


def contenders(size: Size, version: int, cache: str, compiled: bool) -> Iterator[Contender]:
    """The compiled step wants caches whose tensors stay where they are."""
    ours = VisualRWKVStaticCache if compiled else VisualRWKVCache
    yield Contender(OURS, "state", rwkv_config(size, version), lambda config, tokens: ours(config))
    llava = llava_config(size)
    if cache in ("dynamic", "both") and not compiled:
        yield Contender(
            LLAVA, "dynamic", llava, lambda config, tokens: DynamicCache(config=config.text_config)
        )
    if cache in ("static", "both") or compiled:
        yield Contender(
            LLAVA,
            "static",
            llava,
            lambda config, tokens: StaticCache(config.text_config, max_cache_len=tokens),
        )


def build(config: PreTrainedConfig, device: str, dtype: torch.dtype) -> PreTrainedModel:
    """Random weights; the zero-initialised ones too, or cached and uncached would agree for nothing."""
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa")
    for weight in model.parameters():
        if weight.ndim == 2 and not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    return model.to(device).eval()


def prompt(size: Size, config: PreTrainedConfig, length: int, device: str) -> tuple[Tensor, Tensor]:
    """Ids [1, length], a few words, the picture, words; and the picture [1, 3, height, width]."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 300, (1, length), generator=generator)
    ids[:, 4 : 4 + size.picture_tokens] = config.image_token_id
    side = size.clip["image_size"]
    return ids.to(device), torch.randn(1, 3, side, side, generator=generator).to(device)


def read(model: PreTrainedModel, ids: Tensor, picture: Tensor, cache: Cache | None) -> Tensor:
    """Return the logits after the last token, [1, vocab_size]. With a cache, read in chunks, the picture first."""
    chunks = ids.split(PREFILL_CHUNK, dim=1) if cache is not None else [ids]
    options: dict[str, Any] = dict(past_key_values=cache, use_cache=cache is not None, logits_to_keep=1)
    picture = picture.to(model.dtype)
    logits = model(input_ids=chunks[0], pixel_values=picture, **options).logits
    for chunk in chunks[1:]:
        logits = model(input_ids=chunk, **options).logits
    return logits[:, -1]


# --- is it right, how fast, how large? ----------------------------------------------------------------


def cache_error(contender: Contender, model: PreTrainedModel, ids: Tensor, picture: Tensor) -> float:
    """Return the relative norm error of the logits after a token that is read with the cache."""
    cache = contender.new_cache(model.config, ids.shape[1])
    read(model, ids[:, :-1], picture, cache)
    cached = model(input_ids=ids[:, -1:], past_key_values=cache, logits_to_keep=1).logits[:, -1]
    whole = read(model, ids, picture, None)
    return float((cached.double() - whole.double()).norm() / whole.double().norm())


def held_bytes(cache: Cache) -> int:
    """Return the bytes of a cache's tensors, for any kind of cache."""
    seen: dict[int, int] = {}

    def count(value: Any) -> None:
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, dict | list | tuple):
            for item in value.values() if isinstance(value, dict) else value:
                count(item)

    for layer in cache.layers:
        count(vars(layer))
    return sum(seen.values())


def decode_times(step: Callable[..., Any], logits: Tensor, cache: Cache, device: str) -> list[float]:
    """Seconds of each of the next greedy tokens."""

    def now() -> float:
        if device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter()

    times = []
    for _ in range(STEPS):
        token = logits.argmax(-1, keepdim=True)
        start = now()
        logits = step(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        times.append(now() - start)
    return times


def highest_memory(device: str) -> int:
    """Bytes: of the GPU since the last reset; on a CPU of this process since it began, whatever it did."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@torch.no_grad()
def measure(
    contender: Contender, size: Size, contexts: list[int], device: str, dtype: torch.dtype, compiled: bool
) -> list[dict[str, Any]]:
    """A row for each context length.

    Raises:
        ArithmeticError: the cache changes the result.
    """
    model = build(contender.config, device, dtype)
    ids, picture = prompt(size, model.config, max(contexts), device)
    error = cache_error(contender, model, ids[:, : min(contexts)], picture)
    if not error <= TOLERANCE[dtype]:
        raise ArithmeticError(
            f"{contender.name}, {contender.cache} cache: the cached logits are off by {error:.1e}, "
            f"allowed {TOLERANCE[dtype]:.0e}."
        )
    step = torch.compile(model, mode="reduce-overhead") if compiled else model
    weights = sum(weight.nbytes for weight in model.parameters())
    rows = []
    for context in contexts:
        cache = contender.new_cache(model.config, context + STEPS)
        logits = read(model, ids[:, :context], picture, cache)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = decode_times(step, logits, cache, device)
        rows.append(
            {
                "model": contender.name,
                "cache": contender.cache,
                "context": context,
                "seconds_per_token": statistics.median(times[STEPS // 4 :]),  # the first compile and allocate
                "parameters": model.num_parameters(),
                "weight_bytes": weights,
                "cache_bytes": held_bytes(cache),
                "highest_memory": highest_memory(device),
                "cache_error": error,
            }
        )
    return rows


# --- the table ----------------------------------------------------------------------------------------


def compared(rows: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """This model and the best of LLaVA at each context length. Memory: a GPU's highest, else weights and cache."""

    def memory(row: dict[str, Any]) -> int:
        return row["highest_memory"] if device == "cuda" else row["weight_bytes"] + row["cache_bytes"]

    lines = []
    for context in dict.fromkeys(row["context"] for row in rows):
        here = [row for row in rows if row["context"] == context]
        (ours,) = (row for row in here if row["model"] == OURS)
        llava = min((row for row in here if row["model"] == LLAVA), key=lambda row: row["seconds_per_token"])
        lines.append(
            {
                "context": context,
                "llava_cache": llava["cache"],
                "llava_seconds": llava["seconds_per_token"],
                "our_seconds": ours["seconds_per_token"],
                "times_faster": llava["seconds_per_token"] / ours["seconds_per_token"],
                "llava_memory": memory(llava),
                "our_memory": memory(ours),
                "memory_saved": 1 - memory(ours) / memory(llava),
            }
        )
    return lines


def readable_line(line: dict[str, Any]) -> dict[str, str]:
    paper = line["context"] == PAPER["context"]
    return {
        "context, tokens": f"{line['context']:,}",
        f"{LLAVA} per token (its cache)": f"{readable(line['llava_seconds'])} ({line['llava_cache']})",
        f"{OURS} per token": readable(line["our_seconds"]),
        "times faster": f"{line['times_faster']:.2f}" + f" (paper: {PAPER['times_faster']})" * paper,
        f"{LLAVA} memory": readable_bytes(line["llava_memory"]),
        f"{OURS} memory": readable_bytes(line["our_memory"]),
        "less memory": f"{line['memory_saved']:.0%}" + f" (paper: {PAPER['memory_saved']:.0%})" * paper,
    }


def draw(lines: list[dict[str, Any]], file: Path) -> None:
    """Time per token and memory over the context length."""
    from matplotlib import pyplot

    contexts = [line["context"] for line in lines]
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for panel, what, scale, label in (
        (panels[0], "seconds", 1e3, "ms per token"),
        (panels[1], "memory", 1e-9, "GB"),
    ):
        panel.plot(contexts, [scale * line[f"llava_{what}"] for line in lines], marker="o", label=LLAVA)
        panel.plot(contexts, [scale * line[f"our_{what}"] for line in lines], marker="o", label=OURS)
        panel.set(xlabel="context, tokens", ylabel=label, ylim=(0, None))
        panel.legend()
    figure.savefig(file)


def main(
    size: Annotated[Literal["tiny", "small", "7B"], typer.Option(help="Of both models.")] = "7B",
    rwkv_version: Annotated[int, typer.Option(min=5, max=7)] = 7,
    context: Annotated[list[int] | None, typer.Option(help="Tokens; may be given several times.")] = None,
    cache: Annotated[Literal["dynamic", "static", "both"], typer.Option(help="LLaVA's.")] = "both",
    compiled: Annotated[
        bool, typer.Option("--compile", help="torch.compile and CUDA graphs for both.")
    ] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; the GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16 on a GPU, float32 on a CPU.")] = None,
    threads: Annotated[int | None, typer.Option(help="Of the CPU.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the numbers to this file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Also write the table to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw to this file; needs matplotlib.")] = None,
) -> None:
    """Measure the gain from a constant state, beside LLaVA-1.5, a transformer of the same size."""
    device = chosen_device(device, threads)
    chosen: torch.dtype = getattr(torch, dtype or ("bfloat16" if device == "cuda" else "float32"))
    shape = SIZES[size]
    contexts = sorted(context or shape.contexts)
    if contexts[0] < shape.picture_tokens + 8:
        raise typer.BadParameter(f"The picture alone has {shape.picture_tokens} tokens, got {contexts[0]}.")
    rows: list[dict[str, Any]] = []
    try:
        for contender in contenders(shape, rwkv_version, cache, compiled):
            rows += measure(contender, shape, contexts, device, chosen, compiled)
            torch.compiler.reset()  # what is compiled holds the model
            if device == "cuda":
                torch.cuda.empty_cache()
    except ArithmeticError as error:
        typer.secho(f"Wrong, so no times: {error}", err=True, fg="red")
        raise typer.Exit(1) from error
    about = {**machine(device), "dtype": str(chosen).removeprefix("torch."), "compiled": compiled}
    lines = compared(rows, device)
    parameters = {row["model"]: row["parameters"] for row in rows}
    kind = "highest on the GPU while decoding" if device == "cuda" else "weights and cache"
    head = (
        f"{about['device']}, {about['threads']} threads, torch {about['torch']}, {about['dtype']}, "
        f"{'compiled' if compiled else 'eager'}; RWKV-{rwkv_version}; parameters: "
        f"{', '.join(f'{name} {count / 1e6:,.0f} M' for name, count in parameters.items())}; memory: {kind}\n"
        f"(the paper on an L20 at {PAPER['context']:,} tokens: {PAPER['times_faster']} times faster, "
        f"{PAPER['memory_saved']:.0%} less memory)\n\n"
    )
    text = head + markdown_table([readable_line(line) for line in lines])
    report(text, {"about": about, "rows": rows, "compared": lines, "paper": PAPER}, markdown, json)
    if plot:
        draw(lines, plot)


if __name__ == "__main__":
    typer.run(main)
