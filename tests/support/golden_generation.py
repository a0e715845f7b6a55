"""Compute the golden cases that generate: greedy decoding, and the whole way from data and pictures to text."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import golden_layout as layout
import torch
from golden_cases import STOP_TOKEN, Case, Result, grid_side
from golden_models import (
    add_pixel_run,
    encoded,
    fused,
    original_run,
    our_scan,
    pooling_to,
    tokens_of,
    v7_run,
)
from torch import Tensor, nn

from visualrwkv_hf.conversion.world_tokenizer import build_world_tokenizer
from visualrwkv_hf.image_processing_visualrwkv import image_processor_for
from visualrwkv_hf.training.conversations import (
    PROMPT_FORMATS,
    PromptFormat,
    encode_conversation,
    format_conversation,
    pad_or_truncate,
    sample_order,
)


class Generated(NamedTuple):
    ids: Tensor  # [T]
    logits: Tensor  # [T] of the chosen tokens
    probabilities: Tensor  # [T]
    margins: Tensor  # [T] to the second best


def chosen(scores: Tensor) -> Generated:
    """Return the greedy choice at each step, from scores [T, vocab_size]."""
    best, ids = scores.topk(2)
    probabilities = scores.softmax(-1).gather(-1, ids[:, :1])[:, 0]
    return Generated(ids[:, 0], best[:, 0], probabilities, best[:, 0] - best[:, 1])


def generate(
    model: nn.Module, input_ids: Tensor, length: int, stop: int = STOP_TOKEN, **pictures: Any
) -> Generated:
    outputs = model.generate(
        input_ids=input_ids,
        **pictures,
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    found = chosen(torch.stack(outputs.logits, 1)[0].float())
    assert outputs.sequences[0, input_ids.shape[1] :].tolist() == found.ids.tolist()
    return found


def generated(
    model: nn.Module, input_ids: Tensor, length: int, pictures: dict[str, Any], stop: int = STOP_TOKEN
) -> Generated:
    """Run `generate()` for a prompt of v5 to UHD."""
    ids, _ = layout.expanded_ids(input_ids, model.config.image_token_id, model.config.num_image_tokens)
    return generate(model, ids, length, stop, **pictures)


def pixels_of(case: Case) -> dict[str, Tensor]:
    return {"pixel_values": case.inputs["images"][:, 0]}


def generated_by_reruns(
    last_logits: Callable[[Tensor], Tensor],
    model: nn.Module,
    embeds: Tensor,
    length: int,
    stop: int = STOP_TOKEN,
    window: int | None = None,
) -> Generated:
    """Generate as the original: run the whole sequence, cut to its last `window` embeddings, again for each token."""
    scores = []
    while len(scores) < length:
        scores.append(last_logits(embeds))
        token = scores[-1].argmax()
        if token == stop:
            break
        embeds = torch.cat([embeds, model.get_input_embeddings()(token)[None, None]], 1)
        embeds = embeds if window is None else embeds[:, -window:]
    return chosen(torch.stack(scores))


def add_generated(result: Result, variant: str, found: Generated) -> None:
    result.add(
        variant, ids=found.ids, logit=found.logits, prob=found.probabilities, top2_margin=found.margins
    )


def v51_scans_b1_generate(case: Case) -> Result:
    result = Result()
    for scan in case.variants("logits128"):
        add_pixel_run(result, scan, case.model(scan=our_scan(scan)), case)
    result.add(targets=result.tensors[f"targets.{scan}"])
    for scan in case.variants("generated"):
        length = len(case.expected[f"generated.{scan}"])
        found = generated(case.model(scan=our_scan(scan)), case.inputs["input_ids"], length, pixels_of(case))
        result.add(scan, generated=found.ids, top2_margin=found.margins)
    return result


def v601_multidirectional(case: Case) -> Result:
    """Compute v6.01, which is trained in the order of the text but reads in four directions when it generates."""
    result, forward, model = Result(), case.model(scan="unidirectional"), case.model()
    for variant, m in {"forward": forward, "multidirectional": model}.items():
        add_pixel_run(result, variant, m, case)
    result.add(
        image_features=tokens_of(model, case.inputs["images"][:, 0]),
        loss=result.tensors["loss.forward"],
        targets=result.tensors["targets.forward"],
    )
    length = len(case.expected["generated"])
    pictures = {"pixel_values": case.inputs["images"][:1, 0]}
    result.add(generated=generated(model, case.inputs["gen_input_ids"], length, pictures).ids)
    return result


def v60_generate(case: Case) -> Result:
    result, model = Result(), case.model()
    ids, pictures, length = case.inputs["input_ids"], pixels_of(case), len(case.expected["ids"])
    stop = case.config["stop_token_idx_stop_variant"]
    add_generated(result, "", generated(model, ids, length, pictures))
    add_generated(result, "stop", generated(model, ids, length, pictures, stop))
    batch = layout.v6_batch(model.get_input_embeddings(), ids, tokens_of(model, pictures["pixel_values"]))

    def last_logits(embeds: Tensor) -> Tensor:
        return original_run(model, batch._replace(inputs_embeds=embeds, labels=None)).logits[0, -1]

    window = case.config["ctx_len_ctx_variant"]
    reruns = generated_by_reruns(last_logits, model, batch.inputs_embeds, length, window=window)
    add_generated(result, "ctx", reruns)
    return result


def v7_reruns(
    model: nn.Module, input_ids: Tensor, tokens: Tensor, length: int, stop: int = STOP_TOKEN
) -> Generated:
    """Generate as the original: pad on the left anew for each token, so that the number of pads changes."""
    embed = model.get_input_embeddings()

    def last_logits(embeds: Tensor) -> Tensor:
        pads = embed(torch.full((1, layout.v7_left(embeds.shape[1])), STOP_TOKEN))
        return model(inputs_embeds=torch.cat([pads, embeds], 1), use_cache=False).logits[0, -1]

    left = layout.v7_left(input_ids.shape[1])
    embeds = layout.v7_embeds(embed, input_ids, tokens, model.config.image_token_id)[:, left:]
    return generated_by_reruns(last_logits, model, embeds, length, stop)


def v700_generate(case: Case) -> Result:
    result = Result()
    model = case.model(side=grid_side(case.inputs["images.dino"].shape[-2]), **pooling_to(case))
    tokens, ids = model.model.project(fused(model, case.inputs)), case.inputs["input_ids"]
    length, stop = len(case.expected["ids"]), case.config["stop_token_idx_stop_variant"]
    add_generated(result, "", v7_reruns(model, ids, tokens.flatten(0, 1), length))
    add_generated(result, "stop", v7_reruns(model, ids, tokens.flatten(0, 1), length, stop))
    recurrent = generate(model, layout.v7_ids(ids), length, **encoded(tokens))
    result.add(**{"ids.pad_once": recurrent.ids, "recurrent_logits_pad_once": recurrent.logits})
    return result


# --- from end to end --------------------------------------------------------------------------------


def column_logits(logits: Tensor, columns: Tensor) -> dict[str, Tensor]:
    return {"logits_cols": logits[..., columns], "lse": logits.logsumexp(-1)}


def samples_of(
    case: Case, tokenizer: Any, prompt_format: PromptFormat, image_tokens: int, count: int
) -> list[dict[str, Any]]:
    """Return the first `count` samples of one process in the first epoch, as our data functions make them."""
    data = case.json("data.json")
    samples = []
    for index in sample_order(len(data), epoch=0, epoch_steps=count, micro_batch_size=1):
        conversations, pictures = data[index]["conversations"], data[index].get("image", [])
        pictures = [pictures] if isinstance(pictures, str) else pictures
        text = "".join(turn.text for turn in format_conversation(conversations, prompt_format, len(pictures)))
        sample = encode_conversation(tokenizer, conversations, prompt_format, image_tokens, len(pictures))
        sample = pad_or_truncate(sample, case.config["ctx_len"], 0, tokenizer.image_token_id)
        samples.append({"input_text": text, "pictures": pictures, **sample})
    return samples


def add_samples(
    result: Result, label: str, ours: list[dict], golden: list[dict], image_token_id: int
) -> None:
    """Add the texts, ids and labels of samples to a result.

    Our placeholder and the original's, which differ up to UHD, both become -200.
    """
    for number, (sample, row) in enumerate(zip(ours, golden, strict=True)):
        ids = [layout.IMAGE_ID if i == image_token_id else i for i in sample["input_ids"]]
        expected = [layout.IMAGE_ID if i == image_token_id else i for i in row["input_ids"]]
        found = sample["input_text"], ids, sample["labels"]
        result.facts[f"sample {label} {number}"] = found, (row["input_text"], expected, row["labels"])


def add_texts(result: Result, golden: dict[str, Any], ids: Tensor, tokenizer: Any) -> None:
    """Add the generated ids, their text and the answer to a result; the answer ends at the first blank line."""
    text = tokenizer.decode(ids)
    result.facts["generated ids"] = ids.tolist(), golden["generated_ids"]
    result.facts["decoded"] = text, golden["decoded"]
    result.facts["final text"] = text.split("\n\n")[0].strip(), golden["final_text"]


def add_prompt(
    result: Result, golden: dict[str, Any], tokenizer: Any, prompt_format: PromptFormat, image_tokens: int
) -> None:
    question = golden["prompt_input_text"].removeprefix("User: ").split("\n\n")[0]
    conversations = [{"from": "human", "value": question}, {"from": "gpt", "value": ""}]
    ids = encode_conversation(tokenizer, conversations, prompt_format, image_tokens)["input_ids"]
    expected = [tokenizer.image_token_id if i == layout.IMAGE_ID else i for i in golden["prompt_ids"]]
    result.facts["prompt"] = ids, expected


def v60_full_vocab(case: Case) -> Result:
    result, model, inputs, tokenizer = Result(), case.model(), case.inputs, build_world_tokenizer()
    pixels = inputs["images"][:, 0]
    for position in case.variants("logits_cols"):
        golden = case.rows(f"samples_{position}.jsonl")
        prompt_format = dataclasses.replace(PROMPT_FORMATS["v6.0"], image_position=position)
        samples = samples_of(case, tokenizer, prompt_format, 1, len(golden))
        add_samples(result, position, samples, golden, tokenizer.image_token_id)
        ids, labels = (torch.tensor([row[key] for row in golden]) for key in ("input_ids", "labels"))
        tokens = tokens_of(model, pixels)
        batch = layout.v6_batch(model.get_input_embeddings(), ids, tokens, labels, case.config["ctx_len"])
        run = original_run(model, batch)
        result.add(position, loss=run.loss, targets=batch.labels, **column_logits(run.logits, inputs["rows"]))
    generation = case.json("generation.json")
    names = {row: sample["pictures"][0] for row, sample in enumerate(samples) if sample["pictures"]}
    for row, name in names.items():
        add_pixels(result, model, case, name, pixels[row])
    add_pixels(result, model, case, generation["image"], inputs["gen_images"][0, 0])
    add_prompt(result, generation, tokenizer, PROMPT_FORMATS["v6.0"], 1)
    pictures = {"pixel_values": inputs["gen_images"][:, 0]}
    length, stop = generation["max_new_tokens"], generation["stop_token_idx"]
    found = generated(model, inputs["gen_input_ids"], length, pictures, stop)
    result.add(generated=found.ids, gen_logit=found.logits, gen_prob=found.probabilities)
    add_texts(result, generation, found.ids, tokenizer)
    return result


def add_pixels(result: Result, model: nn.Module, case: Case, name: str, golden: Tensor) -> None:
    """Check our pixels against the original's, within 1e-6: a few roundings of float32 at values up to 3."""
    pixels = image_processor_for(model.config)(images=case.picture(name), return_tensors="pt")[
        "pixel_values"
    ][0]
    result.facts[f"pixels of {name}"] = bool(((pixels - golden).abs() <= 1e-6).all()), True


def v700_full_vocab(case: Case) -> Result:
    result, inputs, tokenizer = Result(), case.inputs, build_world_tokenizer()
    model = case.model(side=grid_side(inputs["images.dino"].shape[-2]), **pooling_to(case))
    tokens = model.model.project(fused(model, inputs)).flatten(0, 1)
    golden, generation = case.rows("samples.jsonl"), case.json("generation.json")
    samples = samples_of(
        case, tokenizer, PROMPT_FORMATS["v7.00"], case.config["num_token_per_image"], len(golden)
    )
    add_samples(result, "", samples, golden, tokenizer.image_token_id)
    counts = [len(sample["pictures"]) for sample in samples if sample["pictures"]]
    result.facts["pictures per sample"] = counts, generation["num_image_per_sample"]
    ids, labels = (torch.tensor([row[key] for row in golden]) for key in ("input_ids", "labels"))
    logits, loss = v7_run(model, ids, tokens, labels)
    result.add(loss=loss, **column_logits(logits, inputs["rows"]))
    picture = generation["pictures"][0]
    given = {
        f"images.{tower}": inputs[f"features.{picture}.{tower}"][None] for tower in ("dino", "siglip", "sam")
    }
    tokens = model.model.project(fused(model, given)).flatten(0, 1)
    length, stop = generation["max_new_tokens"], generation["stop_token_idx"]
    found = v7_reruns(model, inputs["gen_input_ids"], tokens, length, stop)
    result.add(generated=found.ids, gen_logit=found.logits, gen_prob=found.probabilities)
    add_prompt(result, generation, tokenizer, PROMPT_FORMATS["v7.00"], case.config["num_token_per_image"])
    add_texts(result, generation, found.ids, tokenizer)
    return result


RUNNERS: dict[str, Callable[[Case], Result]] = {
    "v51_scans_b1_generate": v51_scans_b1_generate,
    "v601_multidirectional": v601_multidirectional,
    "v60_generate": v60_generate,
    "v700_generate": v700_generate,
    "v60_full_vocab": v60_full_vocab,
    "v700_full_vocab": v700_full_vocab,
}
