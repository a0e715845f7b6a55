"""What `generate()` has yet to read of a prompt: one value, made once a call and passed along as one argument."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationConfig

from .cache_visualrwkv import VisualRWKVCache
from .kept_state import KeptState, is_kept
from .placement import block_devices, compute_device, text_model_of
from .prompt_identity import (
    Pictures,
    PromptIdentity,
    identify_prompt,
    longest_piece,
    piece_ends,
    refuse_other_beginning,
)
from .state_store import StateStore
from .tuned_state import TunedState, initial_cache, store_of_beginning

PREPARED_INPUTS = ("inputs_embeds", "scan_orders", "mm_encoder_outputs")
"""Model inputs that were computed for a whole prompt."""
WHOLE_PROMPT_OPTIONS = ("cache_implementation", "prefill_chunk_size", "token_healing", "output_hidden_states")
"""Options of `generate()` with which a prompt is read at once and from its start."""


@dataclass(eq=False)
class ReadingPlan:
    """What one call of `generate()` has yet to read. [`ReadingPlan.of`] begins it, [`~ReadingPlan.start`] completes it.

    Attributes:
        input_ids: int64 [B, T], the whole prompt.
        pictures: all pictures of the prompt, as pixels.
        kept: the user's state, which the prompt continues; None if there is none.
        store: where a state may be found, and where states are left.
        user_cache: the user's own empty cache, which is advanced; None to make one.
        for_assistant: whether a model that assists another one reads.
        initial: what the rows begin with in place of zeros, one for all or one for each.
        prompts: the identity of each row; empty if nobody asks for it.
        pixel_dtype: the dtype in which pixels are compared.
        ends: the lengths at which the only row is cut into pieces; none if the rest is read at once.
        cache: what is advanced; it holds what was read before.
        num_read: for each row, how many of its tokens `cache` has read before, padding not counted.
        unread: the pictures that are not read yet.
        num_uncounted: how many columns of the prompt `cache` does not count once it has read it: pads that were left
            out. Negative where rows of a kept state have read more or less, and the longest of each part counts.
    """

    input_ids: Tensor
    pictures: Pictures
    kept: KeptState | None = None
    store: StateStore | None = None
    user_cache: VisualRWKVCache | None = None
    for_assistant: bool = False
    initial: TunedState | Sequence[TunedState | None] | None = None
    prompts: Sequence[PromptIdentity] = ()
    pixel_dtype: torch.dtype = torch.float32
    ends: Sequence[int] = ()
    cache: VisualRWKVCache = field(init=False)
    num_read: Sequence[int] = field(init=False)
    unread: Pictures = field(init=False)
    num_uncounted: int = field(init=False, default=0)
    _start_length: int = field(init=False, repr=False)

    @classmethod
    def of(
        cls,
        config: PreTrainedConfig,
        inputs: Mapping[str, Any],
        generation_config: Sequence[GenerationConfig | None],
        store: StateStore | None,
        carried: "ReadingPlan | None",
        initial: TunedState | Sequence[TunedState | None] | None = None,
    ) -> "ReadingPlan | None":
        """Return a plan for these arguments of `generate()`; None if the stock method reads them.

        Args:
            config: the model's configuration.
            inputs: the arguments by name, with the prompt as `input_ids`.
            generation_config: the caller's and the model's, in which options are looked up in this order.
            store: the store of this call.
            carried: the plan of the model that this one assists, which has its pictures.
            initial: what the rows begin with in place of zeros.

        Raises:
            ValueError: a kept state cannot continue with these options, or the pictures are not whole.
        """
        past, ids = inputs.get("past_key_values"), inputs.get("input_ids")
        kept = past if is_kept(past) else None
        hindrances = _hindrances(inputs, generation_config)
        if kept is not None and hindrances:
            raise ValueError(f"A kept state cannot go on with {', '.join(hindrances)}.")
        continues = (
            past is not None and kept is None and not (type(past) is VisualRWKVCache and past.is_empty)
        )
        if hindrances or continues or not isinstance(ids, Tensor):
            return None
        if initial is not None and past is not None:
            raise ValueError(
                "initial_state is for prompts that are read from their start, without past_key_values."
            )
        for_assistant = bool(option_of("is_assistant", {}, generation_config))
        return cls(
            input_ids=ids,
            pictures=_pictures(inputs, config, carried),
            kept=kept,
            store=store if past is None and len(ids) == 1 and not for_assistant else None,
            user_cache=past if kept is None else None,
            for_assistant=for_assistant,
            initial=initial,
        )

    def __deepcopy__(self, memo: dict) -> "ReadingPlan":
        # generate() copies the arguments for an assistant model, which takes only the pictures from here.
        return self

    def start(self, model, attention_mask: Tensor | None, repeats: int, turn_ends: Sequence[int]) -> None:
        """Find out what is read already, and make the cache that continues from there.

        Args:
            model: the model that reads.
            attention_mask: [B, T], or None.
            repeats: how many samples of the cache each row of the prompt gets.
            turn_ends: token ids that end a turn.

        Raises:
            ValueError: the prompt does not begin with what the kept state has read, or the state is another model's.
        """
        kept, rows = self.kept, len(self.input_ids)
        self.store = store_of_beginning(self.store, model, self.initial)
        attention_mask = mask_of(self.input_ids, attention_mask)
        if kept is not None or self.store is not None:
            self.pixel_dtype = model.dtype if kept is None else kept.pixel_dtype
            _refuse_coarser_pixels(self.pictures.tensors, self.pixel_dtype)
            self.prompts = identify_prompt(
                model.config, self.input_ids, attention_mask, self.pictures, self.pixel_dtype
            )
            if kept is not None:
                kept.refuse_other_model(model)
            elif self.store is not None:
                # The last token is read in any case, since its output is what is asked for.
                prompt = self.prompts[0]
                kept = self.store.find(prompt.beginning(prompt.length - 1))
        self.begin(model, kept)
        if repeats > 1 and not self.cache.is_empty:
            self.cache.batch_repeat_interleave(repeats)
        device = compute_device(model)
        if rows * repeats == 1 and (self.prompts or device.type == "cpu") and not self.for_assistant:
            ids = without_padding(self.input_ids, attention_mask)[0]
            placeholder = getattr(model.config, "image_token_id", None)
            self.ends = piece_ends(ids.cpu(), turn_ends, placeholder, longest_piece(device))
        self._start_length = int(self.cache.get_seq_length())

    def begin(self, model, kept: KeptState | None) -> None:
        """Make the cache: a copy of `kept`, or an empty one.

        Raises:
            ValueError: the prompt does not begin with what `kept` has read.
        """
        rows = len(self.input_ids)
        if kept is None:
            if self.initial is not None:
                self.cache = initial_cache(self.initial, model, rows)
            else:
                self.cache = VisualRWKVCache(model.config) if self.user_cache is None else self.user_cache
            self.num_read, self.unread = [0] * rows, self.pictures
            return
        if kept.batch_size not in (1, rows):
            raise ValueError(f"The state is of {kept.batch_size} samples, the inputs are of {rows}.")
        read = list(kept.prompts) * (rows if kept.batch_size == 1 else 1)
        if self.kept is not None:
            for row, (before, prompt) in enumerate(zip(read, self.prompts)):
                refuse_other_beginning(before, prompt, row)
        self.num_read = [prompt.length for prompt in read]
        ends = [
            (end, length)
            for prompt, length in zip(self.prompts, self.num_read)
            for end in prompt.picture_ends
        ]
        self.unread = self.pictures.chosen([end > length for end, length in ends])
        self.cache = start_cache(kept, model)
        if kept.batch_size < rows:
            self.cache.batch_repeat_interleave(rows)

    @property
    def is_pending(self) -> bool:
        """Whether the cache has not read the prompt yet. Once it has, it is never cropped back to where it started."""
        return int(self.cache.get_seq_length()) == self._start_length

    @property
    def prompt_length(self) -> int:
        """The number of tokens of the only row, or of the longest."""
        return max(prompt.length for prompt in self.prompts) if self.prompts else self.input_ids.shape[1]

    def rest(self, input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return what is left to read of `input_ids` [B * repeats, T']: ids with padding on the left, and their mask.

        T' exceeds T where tokens are guessed before the first step, as in assisted decoding.
        """
        # Spares a GPU the wait for each row's length. A state that is kept counts no pads.
        if not any(self.num_read) and not self.ends and not self.prompts:
            return input_ids, attention_mask
        mask = mask_of(input_ids, attention_mask)
        mask = torch.ones_like(input_ids) if mask is None else mask
        repeats = len(input_ids) // len(self.num_read)
        num_read = [length for length in self.num_read for _ in range(repeats)]
        rows = [ids[real.bool()][done:] for ids, real, done in zip(input_ids, mask, num_read)]
        longest = max(map(len, rows))
        self.num_uncounted = input_ids.shape[1] - int(self.cache.get_seq_length()) - longest
        ids = torch.stack([F.pad(row, (longest - len(row), 0)) for row in rows])
        if all(len(row) == longest for row in rows):
            return ids, None
        return ids, torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])

    def count_columns(self) -> None:
        """Make the length of the cache that of the sequences without their last token, pads included.

        The stock method cuts longer sequences at that length when the cache goes on.
        """
        self.cache.advance(self.num_uncounted)
        self.num_uncounted = 0

    def leave(self, num_tokens: int, answer: Tensor | None = None) -> None:
        """Put a copy of the state into the store, if there is one and the cache has read just `num_tokens`.

        Args:
            num_tokens: tokens of the prompt, or of prompt and `answer`.
            answer: int64 [T], what was generated.
        """
        if self.store is None or int(self.cache.get_seq_length()) != num_tokens or self.cache.batch_size != 1:
            return
        prompt = self.prompts[0] if answer is None else self.prompts[0].continued(answer.cpu())
        if num_tokens <= prompt.length:
            self.store.add(KeptState.of(self.cache, [prompt.beginning(num_tokens)], self.pixel_dtype))


def _pictures(inputs: Mapping[str, Any], config: PreTrainedConfig, carried: ReadingPlan | None) -> Pictures:
    """Return the pictures to read; none for a text model, which reads the placeholders of its main model as tokens."""
    if carried is None or not hasattr(config, "vision_config"):
        return Pictures.of(inputs, config)
    return carried.pictures


def drops_caches(model) -> bool:
    """Return whether `model` trains with gradient checkpointing, with which it reads without a cache."""
    return bool(model.training and text_model_of(model).gradient_checkpointing)


def refuse_dropped_cache(model, what: str) -> None:
    """Raise `ValueError` if `model` would drop the cache that `what` needs."""
    if drops_caches(model):
        raise ValueError(f"{what} needs a cache, which gradient checkpointing excludes: call model.eval().")


def start_cache(kept: KeptState, model) -> VisualRWKVCache:
    """Return a cache that continues from `kept`, where `model` computes."""
    return kept.to_cache(block_devices(model), model.dtype)


def mask_of(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """Return the part of `attention_mask` that is for `input_ids` [B, T]: its last T columns.

    Raises:
        ValueError: it has fewer.
    """
    if attention_mask is None or attention_mask.shape == input_ids.shape:
        return attention_mask
    length = input_ids.shape[1]
    if attention_mask.shape[1] < length:
        raise ValueError(
            f"attention_mask is shorter ({attention_mask.shape[1]}) than the tokens given ({length})."
        )
    return attention_mask[:, -length:]


def without_padding(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return the ids [1, T] of one sample without its padding."""
    return input_ids if attention_mask is None else input_ids[:, attention_mask[0].bool()]


def option_of(name: str, inputs: Mapping, configs: Sequence[GenerationConfig | None]) -> Any:
    """Return an option of `generate()`: from its arguments, else from the first configuration that has it."""
    values = [inputs.get(name), *(getattr(config, name, None) for config in configs)]
    return next((value for value in values if value is not None), None)


def _hindrances(inputs: Mapping[str, Any], configs: Sequence[GenerationConfig | None]) -> list[str]:
    """Return the names of inputs and options with which a prompt must be read at once and from its start."""
    given = {name: inputs.get(name) is not None for name in PREPARED_INPUTS}
    given["mm_encoder_outputs"] = bool(inputs.get("mm_encoder_outputs"))
    given |= {name: bool(option_of(name, inputs, configs)) for name in WHOLE_PROMPT_OPTIONS}
    given["use_cache=False"] = option_of("use_cache", inputs, configs) is False
    return [name for name, is_given in given.items() if is_given]


def _refuse_coarser_pixels(pictures: Mapping[str, Tensor], pixel_dtype: torch.dtype) -> None:
    for name, pixels in pictures.items():
        if pixels.is_floating_point() and pixels.dtype not in (pixel_dtype, torch.float32):
            raise ValueError(
                f"{name} are {pixels.dtype}, the state has read pixels of {pixel_dtype}: give them in that or in "
                "float32, as the processor makes them."
            )
