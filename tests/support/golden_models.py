"""Compute the golden cases that run the model once.

The converted model computes each case in the original's layout and, where a call as users make it gives the same,
with such a call, too.
"""

import contextlib
import copy
import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import golden_layout as layout
import torch
from golden_cases import Case, Public, Result, grid_side
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from visualrwkv_hf.conversion import restore_state_dict
from visualrwkv_hf.loss_visualrwkv import L2Wrap, visualrwkv_loss
from visualrwkv_hf.modeling_vision import pool_patches
from visualrwkv_hf.scan_orders import SCANS, grid_permutation

PERMUTED_INPUT = ("snake", "spiral", "zigzag")
"""Scans for which the original reorders the features once, before the first block, and never restores their order."""


# --- pictures ---------------------------------------------------------------------------------------


def tokens_of(model: nn.Module, pixels: Tensor) -> Tensor:
    """Return pictures [B, 3, S, S] as the tokens [B, L, C] that the language model reads."""
    return torch.stack(list(model.get_image_features(pixels, return_dict=True).pooler_output))


def encoded(pictures: list[Tensor] | Tensor) -> dict[str, Any]:
    """Return the arguments that pass projected pictures to the model in place of pixels."""
    return {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=list(pictures))}}


def fused(model: nn.Module, inputs: dict[str, Tensor], variant: str = "") -> Tensor:
    """Return the features [N, L, D] that the tower makes of its encoders' features, which the inputs hold."""
    suffix = f".{variant}" if variant else ""
    names = {"dinov2": "dino", "siglip": "siglip", "sam": "sam"}
    return model.model.vision_tower.fuse(
        {ours: inputs[f"images.{theirs}{suffix}"].flatten(0, -3) for ours, theirs in names.items()}
    )


# --- v5 to UHD --------------------------------------------------------------------------------------


class Run(NamedTuple):
    logits: Tensor
    loss: Tensor
    batch: layout.Batch
    orders: Tensor  # [B, D, T]


def original_run(model: nn.Module, batch: layout.Batch) -> Run:
    """Run the language model on a batch in the original's layout, and return the logits in the original's order."""
    config = model.config
    orders = layout.original_orders(
        config.scan, *config.pooled_grid, batch.start, batch.length, len(batch.inputs_embeds)
    )
    outputs = model(
        inputs_embeds=batch.inputs_embeds, scan_orders=orders, labels=batch.labels, use_cache=False
    )
    return Run(in_original_order(config.scan, outputs.logits, orders), outputs.loss, batch, orders)


def take(sequence: Tensor, index: Tensor) -> Tensor:
    """Return [B, N, C], the positions `index` [B, N] of `sequence` [B, T, C]."""
    return sequence.gather(1, index[..., None].expand(-1, -1, sequence.shape[-1]))


def in_original_order(scan: str, logits: Tensor, orders: Tensor) -> Tensor:
    return take(logits, orders[:, 0, : logits.shape[1]]) if scan in PERMUTED_INPUT else logits


def public_run(model: nn.Module, run: Run, input_ids: Tensor, pictures: Callable[[Tensor], dict]) -> Public:
    """Call the model as a user does, without scan orders, on the samples of `input_ids` that have a picture."""
    rows = (input_ids == layout.IMAGE_ID).any(1).nonzero().flatten()
    config = model.config
    ids, mask = layout.expanded_ids(input_ids[rows], config.image_token_id, config.num_image_tokens)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **pictures(rows)).logits
    return Public(rows, in_original_order(config.scan, logits, run.orders[rows]), mask.bool())


def add_v6_run(
    result: Result,
    variant: str,
    model: nn.Module,
    case: Case,
    tokens: Tensor,
    pictures: Callable[[Tensor], dict],
    suffix: str = "",
    is_cut: bool = False,
) -> None:
    """Add the logits, loss and targets of one batch of v5.1 to UHD to a result.

    Args:
        result: receives the tensors.
        variant: the part after the dot in the expected tensors' names.
        model: the converted model.
        case: holds the inputs, whose names end with `suffix`.
        tokens: [B, L, C], the projected pictures.
        pictures: maps the numbers of samples to the model's arguments for their pictures.
        suffix: the end of the inputs' names.
        is_cut: whether the original cuts samples to `ctx_len`; the package does not, so it is then not called as a
            user does.
    """
    ids, labels = (case.inputs[f"{name}{suffix}"] for name in ("input_ids", "labels"))
    batch = layout.v6_batch(model.get_input_embeddings(), ids, tokens, labels, case.config["ctx_len"])
    run = original_run(model, batch)
    result.add(variant, logits128=run.logits, loss=run.loss, targets=batch.labels)
    if not is_cut:
        result.add(variant, logits128=public_run(model, run, ids, pictures))


def add_pixel_run(
    result: Result, variant: str, model: nn.Module, case: Case, suffix: str = "", is_cut: bool = False
) -> None:
    """Do what `add_v6_run` does, with pictures given as pixels; the original reads only the first view of each."""
    pixels = case.inputs[f"images{suffix}"][:, 0]
    add_v6_run(
        result,
        variant,
        model,
        case,
        tokens_of(model, pixels),
        lambda rows: {"pixel_values": pixels[rows]},
        suffix,
        is_cut,
    )


@contextlib.contextmanager
def recorded_blocks(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """Yield a dict that receives the output of each block, [B, T, C] in the order of the text, when the model runs."""
    outputs: dict[int, Tensor] = {}

    def keep(layer: nn.Module, args: tuple, output: tuple) -> None:
        outputs[layer.layer_idx] = output[0]

    hooks = [layer.register_forward_hook(keep) for layer in model.model.language_model.layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def blocks_of(model: nn.Module, batch: layout.Batch) -> dict[str, Tensor]:
    """Return the input of the first block and the outputs of all blocks.

    Each is in the order in which its block reads, because the original recorded them so.
    """
    with recorded_blocks(model) as outputs:
        run = original_run(model, batch)
    directions = run.orders.shape[1]
    blocks = {f"block{i}_out": take(out, run.orders[:, i % directions]) for i, out in outputs.items()}
    return blocks | {"block0_in": batch.inputs_embeds}


def pooling_of(family: str, grid_size: int) -> dict[str, Any]:
    """Return the fields of our configuration that do what the original's `grid_size` does."""
    if grid_size == 1 and family == "v5.0":
        return {"pooling": "mean"}
    by_size = {-1: {"pooling": "none"}, 0: {"pooling": "class_token"}}
    return by_size.get(grid_size, {"pooling": "average", "pooled_grid_size": grid_size})


def v50_forward_grids(case: Case) -> Result:
    result = Result()
    inputs, pixels = case.inputs, case.inputs["images"][:, 0]
    for variant in case.variants("logits128"):
        model = case.model(**pooling_of(case.family, int(variant.removeprefix("grid"))))
        embed = model.get_input_embeddings()
        batch = layout.v50_batch(embed, inputs["input_ids"], tokens_of(model, pixels), inputs["labels"])
        run = original_run(model, batch)
        result.add(
            variant, logits128=run.logits, loss=run.loss, targets=batch.labels, **blocks_of(model, batch)
        )
        for row, ids in enumerate(inputs["input_ids"]):  # v5.0 puts no pads in front: run each sample alone
            if layout.image_index(ids) is not None:
                public = public_run(
                    model, run, ids[None], lambda _, row=row: {"pixel_values": pixels[row, None]}
                )
                result.add(f"{variant}#{row}", logits128=public._replace(rows=torch.tensor([row])))
    result.add(vit_last_hidden_state=model.get_image_features(pixels).last_hidden_state)
    return result


def v60_forward_grids(case: Case) -> Result:
    result = Result()
    inputs, pixels = case.inputs, case.inputs["images"][:, 0]
    for variant in case.variants("logits128"):
        model = case.model(**pooling_of(case.family, int(variant.removeprefix("grid"))))
        add_pixel_run(result, variant, model, case)
        tokens = tokens_of(model, pixels)
        batch = layout.v6_batch(model.get_input_embeddings(), inputs["input_ids"], tokens)
        result.add(variant, image_features=tokens, **blocks_of(model, batch))
    return result


def v51_scans_b3(case: Case) -> Result:
    result = Result()
    our_scans = [
        scan for scan in case.variants("logits128") if scan != "rotation"
    ]  # golden_judge.DELIBERATE says why rotation is left out
    for scan in our_scans:
        add_pixel_run(result, scan, case.model(scan=our_scan(scan)), case)
    side = case.model().config.pooled_grid[0]
    for scan in PERMUTED_INPUT:
        result.add(**{f"{scan}_order": grid_permutation(scan, 0, side, side)})
    result.add(targets=result.tensors[f"targets.{our_scans[-1]}"])
    return result


def our_scan(scan: str) -> str:
    """Return our name of a scan; "rotation" permutes the samples of a batch, so a single one is read in order."""
    return {"rotation": "unidirectional"}.get(scan, scan if scan in SCANS else f"{scan}al")


def truncation(case: Case) -> Result:
    """Compute a case that cuts samples to `ctx_len`; v5.1's was recorded with the bidirectional scan."""
    result = Result()
    add_pixel_run(result, "", case.model(scan="bidirectional"), case, is_cut=True)
    return result


def v60_image_positions(case: Case) -> Result:
    result, model = Result(), case.model()
    positions = sorted(
        (v for v in case.variants("targets") if v != "batch"), key=lambda v: int(v.removeprefix("pos"))
    )
    in_batch = len(case.expected["targets.batch"])
    for variant in positions:
        add_pixel_run(result, variant, model, case, f".{variant}")
    for name in (
        "input_ids",
        "labels",
        "images",
    ):  # all but the first: the original cannot batch a picture at position 0 with later ones
        case.inputs[f"{name}.batch"] = torch.cat(
            [case.inputs[f"{name}.{variant}"] for variant in positions[-in_batch:]]
        )
    add_pixel_run(result, "batch", model, case, ".batch")
    return result


def hd_uhd(case: Case) -> Result:
    result = Result()
    for variant in case.variants("logits128"):
        dino = case.inputs[f"images.dino.{variant}"]
        # UHD's gate is unused. `gate_is_untrained` sees this in released weights, but not in these random ones.
        projector = {"uhd_mlp": {"projector": "relu"}}.get(case.name, {})
        model = case.model(side=grid_side(dino.shape[-2]), **projector)
        features = fused(model, case.inputs, variant)
        tokens = model.model.project(features)
        add_v6_run(
            result,
            variant,
            model,
            case,
            tokens,
            lambda rows, tokens=tokens: encoded(tokens[rows]),
            f".{variant}",
        )
        result.add(variant, fused=features, image_features=tokens)
    return result


# --- v7 ---------------------------------------------------------------------------------------------


def v7_run(
    model: nn.Module, input_ids: Tensor, tokens: Tensor, labels: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return logits and loss without the pads in front; `tokens` [sum of L, C] are the projected pictures."""
    left = layout.v7_left(input_ids.shape[1])
    embeds = layout.v7_embeds(model.get_input_embeddings(), input_ids, tokens, model.config.image_token_id)
    logits = model(inputs_embeds=embeds, use_cache=False).logits[:, left:]
    return logits, None if labels is None else visualrwkv_loss(logits, labels, model.config.text_config)


def v7_public(model: nn.Module, input_ids: Tensor, **pictures: Any) -> Public:
    """Call the model as a user does, with the pads in front as ordinary tokens, and drop the logits of the pads."""
    left = layout.v7_left(input_ids.shape[1])
    logits = model(input_ids=layout.v7_ids(input_ids), use_cache=False, **pictures).logits[:, left:]
    return Public(torch.arange(len(logits)), logits, torch.ones_like(input_ids, dtype=torch.bool))


def pooling_to(case: Case) -> dict[str, Any]:
    count = case.config.get("num_token_per_image")
    return {} if count is None else {"pooling": "adaptive", "pooled_grid_size": grid_side(count)}


def v7_features(case: Case) -> Result:
    """Compute the cases of v7.00 that give features in place of the towers, with one or more pictures per sample."""
    result = Result()
    for variant in case.variants("logits128"):
        side = grid_side(case.inputs[f"images.dino.{variant}"].shape[-2])
        model = case.model(side=side, **pooling_to(case))
        features = fused(model, case.inputs, variant)
        tokens = model.model.project(features)  # [N, L, C]
        ids, labels = (case.inputs[f"{name}.{variant}"] for name in ("input_ids", "labels"))
        logits, loss = v7_run(model, ids, tokens.flatten(0, 1), labels)
        pooled = pool_patches(features, model.config)
        result.add(variant, logits128=logits, loss=loss, pooled=pooled, image_features=tokens)
        if int((ids == model.config.image_token_id).sum()) == tokens.shape[:2].numel():
            result.add(variant, logits128=v7_public(model, ids, **encoded(tokens)))
    return result


def v700_text_only(case: Case) -> Result:
    result, model = Result(), case.model()
    for variant in case.variants("logits128"):
        ids = case.inputs[f"input_ids.{variant}"]
        with recorded_blocks(model) as outputs:
            logits, _ = v7_run(model, ids, torch.empty(0))
        result.add(variant, logits128=logits, **{f"block{i}_out": out for i, out in outputs.items()})
        result.add(variant, block0_in=model.get_input_embeddings()(layout.v7_ids(ids)))
        result.add(variant, logits128=v7_public(model, ids))
    return result


def v701_v702_siglip(case: Case) -> Result:
    """Compute v7.01, which reads the first of a sample's pictures, and v7.02, which reads all of its regions."""
    result, model = Result(), case.model(**pooling_to(case))
    pixels = {"v701": case.inputs["images.v701"][:, 0], "v702": case.inputs["images.v702"]}
    for variant, images in pixels.items():
        ids, labels = (case.inputs[f"{name}.{variant}"] for name in ("input_ids", "labels"))
        tokens = tokens_of(model, images)
        logits, loss = v7_run(model, ids, tokens.flatten(0, 1), labels)
        result.add(variant, logits128=logits, loss=loss, image_features=tokens)
        result.add(variant, vit_last_hidden_state=model.get_image_features(images).last_hidden_state)
        result.add(variant, logits128=v7_public(model, ids, pixel_values=images))
    return result


def compressor_models(case: Case) -> dict[str, nn.Module]:
    count = case.config["num_token_per_image"]
    return {
        reduction: case.model(compressor_num_tokens=count, compressor_reduction=reduction)
        for reduction in ("pool", "step")
    }


def v703_visual_token_compressor(case: Case) -> Result:
    """Compute v7.03: samples of fewer tiles are left-padded with zero rows, which are projected and compressed, too."""
    result, models = Result(), compressor_models(case)
    model = models["pool"]
    samples = sum(name.startswith("images.") for name in case.inputs)
    tower = [
        model.get_image_features(case.inputs[f"images.{i}"]).last_hidden_state.flatten(0, 1)
        for i in range(samples)
    ]
    most_tiles = max(len(case.inputs[f"images.{i}"]) for i in range(samples))
    longest = max(len(rows) for rows in tower)
    padded = torch.stack([nn.functional.pad(rows, (0, 0, longest - len(rows), 0)) for rows in tower])
    projected = model.model.multi_modal_projector(padded)  # [B, tiles * L, C]
    read = model.model.compressor.read(projected)
    result.add(encoded=projected)
    for variant, m in models.items():
        result.add(variant, compressed=m.model.compressor.reduce(read, num_tiles=most_tiles))
    for name in case.variants("vtc_out"):
        result.add(name, vtc_out=model.model.compressor.read(case.inputs[f"vtc_in.{name}"]))
    tokens, ids = result.tensors["compressed.pool"], case.inputs["input_ids"]
    logits, loss = v7_run(model, ids, tokens.flatten(0, 1), case.inputs["labels"])
    result.add(logits128=logits, loss=loss)
    result.add(logits128=v7_public(model, ids, **encoded(tokens)))
    full = max(range(len(tower)), key=lambda i: len(tower[i]))  # a picture without zero rows
    pixels = case.inputs[f"images.{full}"]
    public = v7_public(model, ids[full, None], pixel_values=pixels, num_tiles=torch.tensor([len(pixels)]))
    result.add("#pixels", logits128=public._replace(rows=torch.tensor([full])))
    return result


def v704_visual_token_compressor(case: Case) -> Result:
    result, models = Result(), compressor_models(case)
    pixels = case.inputs["images"]  # [B, tiles, 3, S, S]
    counts = torch.full((len(pixels),), pixels.shape[1])
    for variant, model in models.items():
        outputs = model.get_image_features(pixels.flatten(0, 1), num_tiles=counts)
        result.add(variant, compressed=torch.stack(outputs.pooler_output))
    model, ids = models["pool"], case.inputs["input_ids"]
    result.add(encoded=model.model.project(outputs.last_hidden_state).unflatten(0, pixels.shape[:2]))
    logits, loss = v7_run(model, ids, result.tensors["compressed.pool"].flatten(0, 1), case.inputs["labels"])
    result.add(logits128=logits, loss=loss)
    result.add(logits128=v7_public(model, ids, pixel_values=pixels.flatten(0, 1), num_tiles=counts))
    return result


# --- loss and gradients -----------------------------------------------------------------------------


def loss_gradients(case: Case, model: nn.Module, logits: Tensor, labels: Tensor) -> Result:
    """Return the loss with L2Wrap, its gradients, and the gradients of the cross entropy alone."""
    text = model.config.text_config
    with_l2wrap = visualrwkv_loss(logits, labels, text)
    plain = visualrwkv_loss(logits, labels, dataclasses.replace(text, l2_wrap=0.0))
    # The gradient of `pull` is what L2Wrap adds.
    pull = L2Wrap.apply(logits.sum() * 0, logits, text.l2_wrap / logits[..., 0].numel())
    dlogits, extra = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (with_l2wrap, pull))
    grads, plain_grads = (original_gradients(model, loss) for loss in (with_l2wrap, plain))
    largest = logits.argmax(-1)
    result = Result()
    result.add(
        loss=with_l2wrap,
        logits=logits,
        logits_argmax=largest,
        dlogits_absmax_per_position=dlogits.abs().amax(-1),
        l2wrap_extra_grad_at_argmax=extra.gather(-1, largest[..., None])[..., 0],
    )
    for kind, tensors in {"grad": grads, "grad_noL2": plain_grads}.items():
        result.add(**{f"{kind}.{name}": tensor for name, tensor in tensors.items()})
    for name in case.expected:  # of some gradients only the first rows are stored
        if found := re.fullmatch(r"(grad|grad_noL2)_rows(\d+)\.(.+)", name):
            tensors = {"grad": grads, "grad_noL2": plain_grads}[found[1]]
            result.add(**{name: tensors[found[3]][: int(found[2])]})
    golden_norms = case.json("grad_l2norm.json")
    result.facts["trainable tensors"] = sorted(grads), sorted(golden_norms)
    for name, golden in golden_norms.items():
        norms = {"with_l2wrap": grads[name].double().norm(), "ce_only": plain_grads[name].double().norm()}
        wrong = {k: float(n) for k, n in norms.items() if abs(n - golden[k]) > NORM_RTOL * golden[k]}
        result.facts[f"gradient norm of {name}"] = wrong, {}
    return result


NORM_RTOL = 1e-5
"""Tolerance for float32: each element's error is below 7e-6 of the largest element (case.json), and a norm averages
over many elements."""


def original_gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Return the gradients of all weights but the vision tower's, under the original's names."""
    parameters = {
        name: p for name, p in model.named_parameters() if not name.startswith("model.vision_tower.")
    }
    grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
    return restore_state_dict(dict(zip(parameters, grads)), model.config)


@torch.enable_grad()
def v60_loss_grads(case: Case) -> Result:
    model, inputs = case.model(), case.inputs
    tokens = tokens_of(model, inputs["images"][:, 0])
    batch = layout.v6_batch(model.get_input_embeddings(), inputs["input_ids"], tokens, inputs["labels"])
    return loss_gradients(case, model, original_run(model, batch).logits, batch.labels)


@torch.enable_grad()
def v700_loss_grads(case: Case) -> Result:
    inputs = case.inputs
    model = case.model(side=grid_side(inputs["images.dino"].shape[-2]), **pooling_to(case))
    tokens = model.model.project(fused(model, inputs)).flatten(0, 1)
    logits, _ = v7_run(model, inputs["input_ids"], tokens)
    return loss_gradients(case, model, logits, inputs["labels"])


# --- bfloat16 ---------------------------------------------------------------------------------------


def both_dtypes(model: nn.Module) -> dict[str, nn.Module]:
    return {"logits_fp32": model, "logits_bf16": copy.deepcopy(model).bfloat16()}


def v60_bf16(case: Case) -> Result:
    result = Result()
    for name, model in both_dtypes(case.model()).items():
        pixels = case.inputs["images"][:, 0].to(model.dtype)
        batch = layout.v6_batch(
            model.get_input_embeddings(), case.inputs["input_ids"], tokens_of(model, pixels)
        )
        result.add(**{name: original_run(model, batch).logits})
    return result


def v700_bf16(case: Case) -> Result:
    result = Result()
    for name, model in both_dtypes(case.model()).items():
        result.add(**{name: v7_run(model, case.inputs["input_ids"], torch.empty(0, dtype=model.dtype))[0]})
    return result


RUNNERS: dict[str, Callable[[Case], Result]] = {
    "v50_forward_grids": v50_forward_grids,
    "v51_scans_b3": v51_scans_b3,
    "v51_truncation": truncation,
    "v60_forward_grids": v60_forward_grids,
    "v60_image_positions": v60_image_positions,
    "v60_truncation_detail_high": truncation,
    "hd_linear": hd_uhd,
    "hd_mlp": hd_uhd,
    "uhd_linear": hd_uhd,
    "uhd_mlp": hd_uhd,
    "v700_multi_image": v7_features,
    "v700_one_image_linear": v7_features,
    "v700_one_image_mlp": v7_features,
    "v700_text_only": v700_text_only,
    "v701_v702_siglip": v701_v702_siglip,
    "v703_visual_token_compressor": v703_visual_token_compressor,
    "v704_visual_token_compressor": v704_visual_token_compressor,
    "v60_loss_grads": v60_loss_grads,
    "v700_loss_grads": v700_loss_grads,
    "v60_bf16": v60_bf16,
    "v700_bf16": v700_bf16,
}
"""Maps the name of a case to the function that computes it."""
