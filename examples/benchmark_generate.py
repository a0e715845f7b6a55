"""Measure the gain from the recurrent state: generation with it, without it, and at growing positions, in one table.

    python examples/benchmark_generate.py            # RWKV-7 0.1B shape, random weights, a few minutes on two cores
    python examples/benchmark_generate.py --layers 4 --hidden-size 256 --new-tokens 16

"Recomputed" runs the whole sequence, head included, for each new token, as the original research code does. Both ways
must give the same tokens before any time is printed.
"""

import argparse
import json
import statistics
import time

import torch

from visualrwkv_hf import VisualRWKVForCausalLM, VisualRWKVTextConfig


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rwkv-version", type=int, default=7, choices=(5, 6, 7))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--prompt", type=int, default=600, help="tokens of the prompt")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--positions", type=int, nargs="+", default=[100, 1000, 10000])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--json", help="also write the rows to this file")
    return parser.parse_args()


def build_model(args: argparse.Namespace) -> VisualRWKVForCausalLM:
    """Random weights; the zero-initialised ones too, or the blocks would add nothing."""
    torch.manual_seed(0)
    config = VisualRWKVTextConfig(
        rwkv_version=args.rwkv_version, num_hidden_layers=args.layers, hidden_size=args.hidden_size
    )
    model = VisualRWKVForCausalLM(config)
    for weight in model.parameters():
        if weight.ndim == 2 and not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    return model.to(args.device, getattr(torch, args.dtype)).eval()


def seconds(function, device: str) -> tuple[float, object]:
    """Wall time of `function()` and what it returned."""
    if device != "cpu":
        torch.accelerator.synchronize()
    start = time.perf_counter()
    result = function()
    if device != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter() - start, result


def recompute(model: VisualRWKVForCausalLM, ids: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Greedy generation as the original does it: all logits of the whole sequence for each new token."""
    for _ in range(new_tokens):
        logits = model(ids, use_cache=False).logits  # [1, T, vocab_size]
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
    return ids


def time_per_token(model: VisualRWKVForCausalLM, position: int, steps: int, device: str) -> tuple[float, int]:
    """Return the median seconds of one step after `position` tokens, and the bytes of the state there."""
    ids = torch.randint(1, model.config.vocab_size, (1, position), device=device)
    cache = model(ids, logits_to_keep=1).past_key_values
    token = ids[:, -1:]
    times = [seconds(lambda: model(token, past_key_values=cache), device)[0] for _ in range(steps)]
    held = sum(
        tensor.nbytes
        for layer in cache.layers
        for tensor in (*layer.conv_states.values(), *layer.recurrent_states.values())
        if tensor is not None
    )
    return statistics.median(times[2:]), held


@torch.no_grad()
def main() -> None:
    args = parse_arguments()
    model = build_model(args)
    ids = torch.randint(1, model.config.vocab_size, (1, args.prompt), device=args.device)
    options = dict(max_new_tokens=args.new_tokens, do_sample=False, eos_token_id=None)
    model.generate(ids[:, :16], **{**options, "max_new_tokens": 4})  # warm-up

    cached, with_state = seconds(lambda: model.generate(ids, **options), args.device)
    recomputed, without = seconds(lambda: recompute(model, ids, args.new_tokens), args.device)
    if not torch.equal(with_state, without):
        raise SystemExit("The two ways give different tokens: no times are printed for a wrong result.")

    print(
        f"RWKV-{args.rwkv_version}, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters, {args.dtype}, "
        f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}\n"
    )
    print(f"| {args.new_tokens} tokens after a prompt of {args.prompt} | seconds | tokens/s | ratio |")
    print("|---|---|---|---|")
    for name, elapsed in (("recomputed for each token", recomputed), ("with the state", cached)):
        print(f"| {name} | {elapsed:.2f} | {args.new_tokens / elapsed:.1f} | {recomputed / elapsed:.1f} x |")

    rows = []
    print("\n| position | ms per token | ratio to the first | state held, bytes |")
    print("|---|---|---|---|")
    for position in args.positions:
        per_token, held = time_per_token(model, position, steps=32, device=args.device)
        rows.append({"position": position, "seconds_per_token": per_token, "state_bytes": held})
        print(
            f"| {position:,} | {1e3 * per_token:.2f} | {per_token / rows[0]['seconds_per_token']:.2f} | {held:,} |"
        )

    if args.json:
        with open(args.json, "w") as file:
            json.dump({"cached_s": cached, "recomputed_s": recomputed, "positions": rows}, file, indent=2)


if __name__ == "__main__":
    main()
