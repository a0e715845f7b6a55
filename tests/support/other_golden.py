"""Write a small golden folder of other sizes than `tests/golden`, computed without the package.

The language model is the oracle (float64, one token and one head at a time), and the vision tower is transformers' own
SigLIP. Projectors and losses are a few lines here. Ids come from a greedy longest match in the vocabulary. Letters: B
batch, T time, C hidden size, L tokens of a picture, D width of the features.
"""

import json
import re
from pathlib import Path

import torch
from oracles import rwkv, wkv
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel

HIDDEN, HEAD_DIM, LAYERS, VOCABULARY, FFN = 64, 64, 2, 290, 96
RANKS = {"w": 24, "a": 16, "v": 8, "g": 40}
WIDTHS = {"dino": 12, "siglip": 8, "sam": 20}
"""Widths of the features. The sizes up to here, but for HEAD_DIM, differ from those of `tests/golden`."""

PAD, PAD_MULTIPLE = 261, 16


def write_other_golden(folder: Path) -> Path:
    """Write the cases and return the folder, about half a megabyte."""
    torch.manual_seed(7)
    language = language_weights("rwkv", LAYERS) | {
        "rwkv.emb.weight": randn(VOCABULARY, HIDDEN),
        "rwkv.head.weight": randn(VOCABULARY, HIDDEN, scale=HIDDEN**-0.5),
    }
    save(folder, "weights/language.safetensors", language)
    write_ops(folder)
    write_text_only(folder, language)
    write_pictures(folder, language)
    write_compressor(folder, language)
    write_rows(folder)
    write_tilings(folder)
    cases = sorted(path.parent.relative_to(folder).as_posix() for path in folder.glob("*/*/case.json"))
    (folder / "index.json").write_text(json.dumps([{"path": path} for path in cases]), "utf-8")
    return folder


def randn(*shape: int, scale: float = 1.0) -> torch.Tensor:
    """Return random values that bfloat16 holds exactly."""
    return (torch.randn(shape) * scale).bfloat16().float()


def save(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.bfloat16().contiguous() for key, tensor in tensors.items()}, folder / name)


def write_case(
    folder: Path,
    path: str,
    inputs: dict[str, torch.Tensor] | None = None,
    expected: dict[str, torch.Tensor] | None = None,
    weights: tuple[str, ...] = (),
    files: dict[str, str] | None = None,
    **config,
) -> None:
    """Write one case, whose expected float64 tensors are stored in float32.

    The tolerance is 1e-4 of a tensor's largest value, or of 1 if that is larger.
    """
    inputs, expected, files = inputs or {}, expected or {}, files or {}
    case = folder / path
    case.mkdir(parents=True, exist_ok=True)
    expected = {name: x.float() if x.dtype == torch.float64 else x for name, x in expected.items()}
    for kind, tensors in (("inputs", inputs), ("expected", expected)):
        if tensors:
            save_file({name: x.contiguous() for name, x in tensors.items()}, case / f"{kind}.safetensors")
    facts = {}
    for name, x in expected.items():
        facts[f"expected:{name}"] = {"shape": list(x.shape)}
        if x.is_floating_point():
            largest = float(x.abs().max())
            facts[f"expected:{name}"] |= {"max_abs": largest, "recommended_atol": 1e-4 * max(1.0, largest)}
    for name, content in files.items():
        (case / name).write_text(content, "utf-8")
    info = {"config": config, "files": dict.fromkeys(files, ""), "weights": list(weights), "tensors": facts}
    (case / "case.json").write_text(json.dumps(info), "utf-8")


# --- recurrences ------------------------------------------------------------------------------------


def write_ops(folder: Path) -> None:
    """Write RWKV-7's recurrence with three heads, an odd length and a batch of one, and its gradients by autograd."""
    B, T, H, N = 1, 11, 3, 64
    q, k, v, w = (randn(B, T, H, N) for _ in range(4))
    removal = F.normalize(randn(B, T, H, N), dim=-1)
    rate = torch.sigmoid(randn(B, T, H, N))
    inputs = {"q": q, "w": w, "k": k, "v": v, "a": -removal, "b": removal * rate}
    inputs = {name: x.bfloat16().float().requires_grad_() for name, x in inputs.items()}
    gy = randn(B, T, H, N)
    decay = -torch.exp(inputs["w"].double())
    order = (inputs["q"], decay, inputs["k"], inputs["v"], inputs["a"], inputs["b"])
    y, state = wkv.wkv7(*order, torch.zeros(B, H, N, N))
    grads = torch.autograd.grad(y, list(inputs.values()), gy.double())
    expected = {"fp32.y": y.detach(), "fp32.final_state": state.detach().transpose(-1, -2)}
    expected |= {f"fp32.g_{name}": grad for name, grad in zip(inputs, grads)}
    inputs = {name: x.detach() for name, x in inputs.items()} | {"gy": gy}
    write_case(folder, "x_ops/wkv7_op", inputs, expected)


# --- the language model -----------------------------------------------------------------------------


def language_weights(prefix: str, layers: int) -> dict[str, torch.Tensor]:
    """Return random RWKV-7 blocks under the original's names."""
    C, weights = HIDDEN, {}

    def norm(name: str) -> None:
        weights[f"{prefix}.{name}.weight"] = 1 + randn(C, scale=0.1)
        weights[f"{prefix}.{name}.bias"] = randn(C, scale=0.1)

    for layer in range(layers):
        block = f"blocks.{layer}"
        for name in ("ln0",) * (layer == 0) + ("ln1", "ln2", "att.ln_x"):
            norm(f"{block}.{name}")
        att = f"{prefix}.{block}.att"
        for name in ("receptance", "key", "value", "output"):
            weights[f"{att}.{name}.weight"] = randn(C, C, scale=C**-0.5)
        for name in "rwkvag":
            weights[f"{att}.x_{name}"] = torch.rand(1, 1, C).bfloat16().float()
        for name, rank in RANKS.items():
            if name == "v" and layer == 0:
                continue
            weights[f"{att}.{name}1"] = randn(C, rank, scale=C**-0.5)
            weights[f"{att}.{name}2"] = randn(rank, C, scale=rank**-0.5)
            if name != "g":
                weights[f"{att}.{name}0"] = randn(1, 1, C, scale=0.5)
        weights[f"{att}.k_k"] = 0.8 + randn(1, 1, C, scale=0.1)
        weights[f"{att}.k_a"] = 1 + randn(1, 1, C, scale=0.1)
        weights[f"{att}.r_k"] = randn(C // HEAD_DIM, HEAD_DIM, scale=0.1)
        ffn = f"{prefix}.{block}.ffn"
        weights[f"{ffn}.x_k"] = torch.rand(1, 1, C).bfloat16().float()
        weights[f"{ffn}.key.weight"] = randn(FFN, C, scale=C**-0.5)
        weights[f"{ffn}.value.weight"] = randn(C, FFN, scale=FFN**-0.5)
    norm("ln_out")
    return {name: x.bfloat16().float() for name, x in weights.items()}


def read(weights: dict[str, torch.Tensor], prefix: str, embeddings: torch.Tensor) -> torch.Tensor:
    """Return the oracle's output [T, C] for `embeddings` [T, C]; their left pads, if any, are read like all others."""
    names = {"blocks.0.ln0": "embed_norm", "ln_out": "norm"}
    ours, layers = {}, 0
    for name, weight in weights.items():
        if not name.startswith(f"{prefix}."):
            continue
        name = name.removeprefix(f"{prefix}.")
        part, kind = name.rsplit(".", 1)
        if found := re.match(r"blocks\.(\d+)", name):
            layers = max(layers, int(found[1]) + 1)
        ours[f"{names[part]}.{kind}" if part in names else name.replace("blocks.", "layers.")] = (
            weight.double()
        )
    return rwkv.hidden_states(ours, 7, layers, HIDDEN // HEAD_DIM, HEAD_DIM, embeddings)


def logits_of(weights: dict[str, torch.Tensor], embeddings: torch.Tensor) -> torch.Tensor:
    """Return the logits [T, vocabulary] of `embeddings` [T, C], read after tokens 261 that make T a multiple of 16."""
    left = -len(embeddings) % PAD_MULTIPLE
    pads = weights["rwkv.emb.weight"][PAD].expand(left, -1)
    hidden = read(weights, "rwkv", torch.cat([pads, embeddings]))[left:]
    return hidden @ weights["rwkv.head.weight"].double().T


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy averaged over a sample's labels, then over the samples."""
    of_samples = [
        F.cross_entropy(row[:-1], targets[1:], ignore_index=-100) for row, targets in zip(logits, labels)
    ]
    return torch.stack(of_samples).mean()


def texts(batch: int, length: int) -> torch.Tensor:
    """Return ids without the pad and without the placeholder, which is the last id."""
    return torch.randint(1, PAD, (batch, length))


def write_text_only(folder: Path, language: dict[str, torch.Tensor]) -> None:
    """Write texts of 3 and 18 tokens, in batches of one and three. A projector gives the width of the features."""
    save(
        folder, "weights/linear.safetensors", {"proj.weight": randn(HIDDEN, sum(WIDTHS.values()), scale=0.1)}
    )
    inputs, expected = {}, {}
    for batch, length in ((1, 3), (3, 18)):
        ids = texts(batch, length)
        inputs[f"input_ids.T{length}"] = ids
        rows = [logits_of(language, language["rwkv.emb.weight"][row]) for row in ids]
        expected[f"logits128.T{length}"] = torch.stack(rows)[..., :128]
    weights = ("weights/language.safetensors", "weights/linear.safetensors")
    write_case(folder, "d_rwkv7/v700_text_only", inputs, expected, weights, vocab_size=VOCABULARY)


# --- pictures ---------------------------------------------------------------------------------------


def with_pictures(language: dict[str, torch.Tensor], ids: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return embeddings [B, T, C] in which projected pictures [n, C] replace the placeholders row by row."""
    embeddings = language["rwkv.emb.weight"][ids].double()
    embeddings[ids == VOCABULARY - 1] = tokens.double()
    return embeddings


def prompt(batch: int, spans: list[tuple[int, int]], length: int) -> torch.Tensor:
    """Return `batch` texts [B, length] with placeholders at the positions [start, end) of each span."""
    ids = texts(batch, length)
    for start, end in spans:
        ids[:, start:end] = VOCABULARY - 1
    return ids


def labels_after(ids: torch.Tensor, start: int) -> torch.Tensor:
    labels = ids.clone()
    labels[:, :start] = -100
    return labels.masked_fill(ids == VOCABULARY - 1, -100)


def write_pictures(folder: Path, language: dict[str, torch.Tensor]) -> None:
    """Write features of three towers, 36 tokens pooled to 9, for a sample of three pictures and for two of one."""
    projector, inputs, expected = randn(HIDDEN, sum(WIDTHS.values()), scale=0.2), {}, {}
    save(folder, "weights/linear_other.safetensors", {"proj.weight": projector})
    prompts = {"three": prompt(1, [(2, 11), (14, 23), (25, 34)], 38), "pairs": prompt(2, [(1, 10)], 17)}
    for variant, ids in prompts.items():
        count = int((ids == VOCABULARY - 1).sum()) // 9
        features = {tower: randn(count, 36, width) for tower, width in WIDTHS.items()}
        fused = torch.cat(list(features.values()), -1)  # [N, L, D]
        grid = fused.double().transpose(1, 2).unflatten(2, (6, 6))
        pooled = F.adaptive_avg_pool2d(grid, 3).flatten(2).transpose(1, 2)
        tokens = pooled @ projector.double().T
        labels = labels_after(ids, ids.shape[1] - 3)
        rows = [logits_of(language, row) for row in with_pictures(language, ids, tokens.flatten(0, 1))]
        logits = torch.stack(rows)
        inputs |= {f"images.{tower}.{variant}": x for tower, x in features.items()}
        inputs |= {f"input_ids.{variant}": ids, f"labels.{variant}": labels}
        expected |= {f"logits128.{variant}": logits[..., :128], f"loss.{variant}": loss_of(logits, labels)}
        expected |= {f"pooled.{variant}": pooled, f"image_features.{variant}": tokens}
    weights = ("weights/language.safetensors", "weights/linear_other.safetensors")
    config = {"vocab_size": VOCABULARY, "num_token_per_image": 9}
    write_case(folder, "d_rwkv7/v700_multi_image", inputs, expected, weights, **config)


def siglip() -> tuple[SiglipVisionModel, dict[str, torch.Tensor]]:
    """Return transformers' own tower and its weights under the names of transformers 4."""
    config = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=3,
        image_size=32,
        patch_size=8,
    )
    tower = SiglipVisionModel(config).eval()
    with torch.no_grad():
        for weight in tower.parameters():
            weight.copy_(weight.bfloat16().float())
    names = {name: f"vit.vision_model.{name.removeprefix('vision_model.')}" for name in tower.state_dict()}
    return tower, {names[name]: weight for name, weight in tower.state_dict().items()}


def write_compressor(folder: Path, language: dict[str, torch.Tensor]) -> None:
    """Write v7.03 with samples of 2, 1 and 4 tiles of 16 tokens; a compressor of one block leaves 3 tokens of each."""
    tower, tower_weights = siglip()
    gate, o_proj = randn(24, 24, scale=0.2), randn(HIDDEN, 24, scale=0.2)
    ln_v = {"weight": 1 + randn(HIDDEN, scale=0.1), "bias": randn(HIDDEN, scale=0.1)}
    ln_v = {name: x.bfloat16().float() for name, x in ln_v.items()}
    projector = {"proj.gate.weight": gate, "proj.o_proj.weight": o_proj}
    projector |= {f"proj.ln_v.{name}": x for name, x in ln_v.items()}
    compressor = language_weights("vtc", 1)
    save(folder, "weights/compressor.safetensors", tower_weights | projector | compressor)

    pictures = [randn(count, 3, 32, 32) for count in (2, 1, 4)]
    longest = 4 * 16
    tokens, encoded = [], []
    for picture in pictures:
        with torch.no_grad():
            features = tower(picture).last_hidden_state.flatten(0, 1).double()  # [tiles * L, D]
        features = F.pad(features, (0, 0, longest - len(features), 0))  # zero rows in front
        gated = features * torch.sigmoid(features @ gate.double().T)
        norm = {name: x.double() for name, x in ln_v.items()}
        projected = F.layer_norm(gated @ o_proj.double().T, (HIDDEN,), norm["weight"], norm["bias"])
        encoded.append(projected)
        kept = F.adaptive_avg_pool1d(read(compressor, "vtc", projected).T[None], 3)[0].T
        tokens.append(kept)
    ids = prompt(3, [(4, 7)], 12)
    labels = labels_after(ids, 8)
    rows = [logits_of(language, row) for row in with_pictures(language, ids, torch.cat(tokens))]
    logits = torch.stack(rows)
    inputs = {"input_ids": ids, "labels": labels} | {f"images.{i}": x for i, x in enumerate(pictures)}
    expected = {"logits128": logits[..., :128], "loss": loss_of(logits, labels)}
    expected |= {"encoded": torch.stack(encoded), "compressed.pool": torch.stack(tokens)}
    weights = ("weights/language.safetensors", "weights/compressor.safetensors")
    vit = {"hidden_size": 24, "num_attention_heads": 3}
    config = {"vocab_size": VOCABULARY, "num_token_per_image": 3, "vit": vit}
    write_case(folder, "d_rwkv7/v703_visual_token_compressor", inputs, expected, weights, **config)


# --- text and cuts ----------------------------------------------------------------------------------


def greedy_ids(text: str, vocabulary: dict[bytes, int]) -> list[int]:
    """Return the ids of a text, taking the longest matching entry of the vocabulary at each position."""
    content, ids, longest = text.encode(), [], max(map(len, vocabulary))
    while content:
        size = next(n for n in range(min(longest, len(content)), 0, -1) if content[:n] in vocabulary)
        ids.append(vocabulary[content[:size]])
        content = content[size:]
    return ids


def write_rows(folder: Path) -> None:
    """Write rows in v6.0's format: one with a picture, one without, and one whose speaker is in capitals.

    Their names and the length to which they are padded do not occur in `tests/golden`.
    """
    from visualrwkv_hf.conversion.world_tokenizer import load_world_vocabulary  # a table, no code under test

    vocabulary, rows = load_world_vocabulary(), []

    def row(name: str, speaker: str, question: str, answer: str, has_image: bool) -> None:
        human, said = f"User: {'<image>' * has_image}{chr(10) * has_image}{question}\n\n", f" {answer}\n\n"
        front, _, back = human.rpartition("<image>")
        ids = greedy_ids(front, vocabulary) + [-200] * has_image + greedy_ids(back, vocabulary)
        prefix = greedy_ids("Assistant:", vocabulary)
        spoken = greedy_ids(f"Assistant:{said}", vocabulary)
        masked = 0 if speaker != "human" else len(ids)
        labels = [-100] * masked + ids[masked:] + [-100] * len(prefix) + spoken[len(prefix) :]
        ids, missing = ids + spoken, 24 - len(ids + spoken)
        assert missing >= 0, missing
        value = f"<image>\n{question}" if has_image else question
        turns = [{"from": speaker, "value": value}, {"from": "gpt", "value": answer}]
        padded = {"input_ids": ids + [0] * missing, "labels": labels + [-100] * missing}
        rows.append(
            {
                "name": name,
                "conversations": turns,
                "has_image": has_image,
                "image_position": "first" if has_image else "none",
                "input_text": f"{human}Assistant:{said}",
                "input_ids": ids,
                "labels": labels,
                "padded_ctx24": padded,
            }
        )

    row("a picture of one's own", "human", "Which boat?", "The red one.", True)
    row("a text of one's own", "human", "Name a colour.", "Blue.", False)
    row("a speaker in capitals", "Human", "Which boat?", "The blue one.", True)
    write_case(folder, "f_data/v60_format", files={"rows.jsonl": "\n".join(map(json.dumps, rows))})


def write_tilings(folder: Path) -> None:
    """Write cuts into 3 x 3 and 5 x 5 tiles, and a kind of cut that never reached a model, with another number."""
    rows = []
    for width, height in ((90, 60), (55, 110)):
        row = {"size": [width, height], "crop_5_squares": {"crops": [], "num_images": 5, "resize": []}}
        for count in (3, 5):
            x, y = width // count, height // count
            boxes = [[i * x, j * y, i * x + x, j * y + y] for j in range(count) for i in range(count)]
            tiles = {"crops": boxes, "num_images": len(boxes), "resize": []}
            row[f"uhd_split_image_into_tiles_{count}"] = tiles
        rows.append(row)
    write_case(folder, "j_preproc/tiling", files={"tiling.json": json.dumps(rows)})
