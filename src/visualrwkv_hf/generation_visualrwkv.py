"""`generate()` over the recurrent state, `read()`, and how both go on from a state that is kept."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from threading import Lock

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.configuration_utils import PreTrainedConfig
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .cache_visualrwkv import VisualRWKVCache, VisualRWKVStaticCache
from .prompt_identity import (
    Pictures,
    Prompt,
    picture_inputs_of,
    piece_ends,
    pixel_inputs_of,
    read_prompt,
    refuse_other_beginning,
    stable_length,
)
from .state_store import StateStore

CACHES: dict[str | None, Callable] = {
    None: VisualRWKVCache,
    "dynamic": VisualRWKVCache,
    "offloaded": VisualRWKVCache,  # a state of a few megabytes is not worth moving
    "static": VisualRWKVStaticCache,
}

PREPARED_PROMPT = ("scan_orders", "mm_encoder_outputs")


WHOLE_PROMPT_OPTIONS = ("cache_implementation", "prefill_chunk_size", "token_healing", "is_assistant")
"""Options of `generate()` that need a prompt to be read at once and from its start."""


_store_of_call: ContextVar[StateStore | None] = ContextVar("_store_of_call", default=None)
"""What `generate(..., state_store=...)` was given."""

_advancing: set[int] = set()
"""Caches, by their ids, that some `generate()` is advancing in place."""
_advancing_lock = Lock()


@contextmanager
def _alone_with(cache: object) -> Iterator[None]:
    """Lets nobody else advance `cache` meanwhile; a kept state is copied, and serves any number at once.

    Raises:
        ValueError: somebody else does.
    """
    if cache is None or getattr(cache, "contents", False):
        yield
        return
    with _advancing_lock:
        if id(cache) in _advancing:
            raise ValueError(
                "Another thread is generating from this cache, which advances in place. Give each thread a copy() of "
                "it, or a state that model.read() made: that one serves all."
            )
        _advancing.add(id(cache))
    try:
        yield
    finally:
        _advancing.discard(id(cache))


class VisualRWKVGenerationMixin(GenerationMixin):
    """`generate()` with the recurrent state as its cache.

    Attributes:
        state_store: if set, where `generate()` and `read()` look for a state that has read the beginning of their
            prompt, and leave their own.
    """

    state_store: StateStore | None = None

    @torch.no_grad()
    def read(self, processor, messages: list[dict], **template_variables) -> VisualRWKVCache:
        """Reads a chat once, so that `generate()` may go on from there as often as wanted.

        ```python
        state = model.read(processor, messages)
        output = model.generate(**inputs_of_the_whole_chat, past_key_values=state)
        ```

        It reads as far as no later text can change: to the end of the last turn, or of the last picture if that
        turn is a user's and has no text yet.

        Args:
            processor: the model's processor; of a text model the tokenizer.
            messages: the chat, as for `apply_chat_template`; its last message may be anyone's.
            template_variables: of the chat template, e.g. `image_position`.

        Returns:
            A state that is kept: see [`VisualRWKVCache`].

        Raises:
            ValueError: what is said next would stand in front of a picture, or the processor lengthens prompts.
            jinja2.TemplateError: messages that the template refuses.
        """
        if (getattr(processor, "pad_prompt_to_multiple_of", None) or 1) > 1:
            raise ValueError(
                "A processor with pad_prompt_to_multiple_of writes other tokens in front of a longer chat, so that no "
                "state can go on with it. Set it to None."
            )
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", **template_variables
        )
        length = stable_length(processor, messages, inputs["input_ids"].shape[1], **template_variables)
        ids, mask = inputs["input_ids"][:, :length], inputs["attention_mask"][:, :length]
        tensors = {
            name: inputs[name].to(self.device) for name in picture_inputs_of(self.config) if name in inputs
        }
        tensors |= {
            name: tensors[name].to(self.dtype) for name in pixel_inputs_of(self.config) if name in tensors
        }
        pictures = Pictures.of(tensors, self.config)
        prompt = read_prompt(self.config, ids, mask, pictures, self.dtype)

        (contents,) = prompt.contents
        found = None if self.state_store is None else self.state_store.find(contents)
        state = self._about_to_read(prompt, found)
        model_kwargs = pictures.chosen(_unread_pictures(state, prompt))
        if model_kwargs:
            model_kwargs = self._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)
        self._read_pieces(ids, state, model_kwargs, [*piece_ends(contents, (), None), length])
        state.prompt = ()
        state.set_fingerprint(self, processor)
        self._leave(state)
        return state

    @wraps(GenerationMixin.generate)
    def generate(self, *args, state_store: StateStore | None = None, **kwargs):
        token = _store_of_call.set(state_store)
        try:
            with _alone_with(kwargs.get("past_key_values")):
                return super().generate(*args, **kwargs)
        finally:
            _store_of_call.reset(token)

    @property
    def _store(self) -> StateStore | None:
        """The store of this call, or else the model's."""
        return self.state_store if (store := _store_of_call.get()) is None else store

    # --- where generate() starts ------------------------------------------------------------------------

    def _maybe_prepare_encoder_kwargs_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict, model_input_name, generation_config: GenerationConfig
    ) -> dict:
        # The last step before pictures are encoded: those that a state has read are not to be.
        self._start_from_state(inputs_tensor, model_kwargs, model_input_name, generation_config)
        return super()._maybe_prepare_encoder_kwargs_for_generation(
            inputs_tensor, model_kwargs, model_input_name, generation_config
        )

    def _start_from_state(
        self, input_ids: Tensor, model_kwargs: dict, input_name: str, generation_config: GenerationConfig
    ) -> None:
        """Puts a copy of the kept state into `model_kwargs`, or of the store's, and takes out the pictures read."""
        given = model_kwargs.get("past_key_values")
        kept = given if getattr(given, "contents", ()) else None
        store = self._store if given is None and len(input_ids) == 1 else None
        if kept is None and store is None:
            return
        if hindrances := _hindrances(model_kwargs | {input_name: input_ids}, generation_config):
            if kept is None:
                return
            raise ValueError(f"A kept state cannot go on with {', '.join(hindrances)}.")
        pictures = Pictures.of(model_kwargs, self.config)
        pixel_dtype = self.dtype if kept is None else kept.pixel_dtype
        _refuse_coarser_pixels(pictures.tensors, pixel_dtype)
        mask = model_kwargs.get("attention_mask")
        prompt = read_prompt(self.config, input_ids, mask, pictures, pixel_dtype)
        if kept is not None:
            kept.refuse_other_model(self)
        elif store is not None:
            # The last token is read in any case: what follows it is what is asked for.
            kept = store.find(prompt.contents[0][:-1])
        state = self._about_to_read(prompt, kept)
        for row, (read, whole) in enumerate(zip(state.contents, prompt.contents)):
            refuse_other_beginning(read, whole, row)
        for name in picture_inputs_of(self.config):
            model_kwargs.pop(name, None)
        model_kwargs |= pictures.chosen(_unread_pictures(state, prompt))
        model_kwargs["past_key_values"] = state

    def _about_to_read(self, prompt: Prompt, kept: VisualRWKVCache | None) -> VisualRWKVCache:
        """A state to advance: a copy of one that is `kept`, for all samples of `prompt`, or an empty one."""
        rows = len(prompt.contents)
        if kept is None:
            state = VisualRWKVCache(self.config)
            state.contents = [contents[:0] for contents in prompt.contents]
            state.pixel_dtype = self.dtype
        else:
            # A model over several devices has its layers' states there already.
            state = kept.copy() if hasattr(self, "hf_device_map") else kept.to(self.device, self.dtype)
            if state.batch_size == 1 and rows > 1:
                state.batch_repeat_interleave(rows)
            if state.batch_size != rows:
                raise ValueError(f"The state is of {state.batch_size} samples, the inputs are of {rows}.")
        state.prompt = prompt.contents
        return state

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict, *args, **kwargs
    ) -> None:
        given = model_kwargs.get("past_key_values")
        if (state := _about_to_read(model_kwargs)) is not None:
            repeats = max(generation_config.num_beams, generation_config.num_return_sequences)
            if repeats > 1:
                state.batch_repeat_interleave(repeats)
            return
        if given is not None:
            if not hasattr(given, "advance"):
                raise ValueError(
                    f"past_key_values must be a VisualRWKVCache, got {type(given).__name__}: a recurrent state is no "
                    "key-value cache. Leave it out, or make one with VisualRWKVCache(model.config)."
                )
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
            return
        if generation_config.use_cache is False:
            return
        implementation = generation_config.cache_implementation
        if implementation not in CACHES:
            raise ValueError(
                f"cache_implementation={implementation!r} has no meaning for a recurrent state of constant size; "
                f"use one of {', '.join(map(repr, CACHES))}."
            )
        cache = CACHES[implementation](self.config)
        if getattr(generation_config, "is_assistant", False):
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids=None, **model_kwargs
    ) -> tuple[Tensor, dict]:
        """As the stock method, which deals pictures to samples by counting placeholders: only unread ones count."""
        state, encoded = _about_to_read(model_kwargs), model_kwargs.get("mm_encoder_outputs")
        if expand_size > 1 and encoded and state is not None:
            unread, _ = _unread(input_ids, model_kwargs.get("attention_mask"), state.contents)
            encoded = self._expand_multimodal_outputs(unread, encoded, expand_size)
            model_kwargs["mm_encoder_outputs"] = None
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        if encoded:
            model_kwargs["mm_encoder_outputs"] = encoded
        return input_ids, model_kwargs

    # --- what it reads ----------------------------------------------------------------------------------

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs,
    ) -> dict:
        """As the stock method; a first step reads what its state has not, later steps nothing of the prompt."""
        if is_first_iteration and (state := _about_to_read(kwargs)) is not None:
            input_ids, mask = _unread(input_ids, kwargs.get("attention_mask"), state.contents)
            kwargs |= {"attention_mask": mask, "next_sequence_length": None}
            state.prompt = ()
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and inputs.get("use_cache", True):
            for name in (*picture_inputs_of(self.config), *PREPARED_PROMPT):
                inputs.pop(name, None)
            if inputs["input_ids"].shape[1] == 1:
                inputs.pop("attention_mask", None)  # a new token is no pad
        return inputs

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        is_first_iteration: bool = True,
    ):
        """As the stock method; one sample's prompt is read in pieces, see [`contents.piece_ends`]."""
        state = _about_to_read(model_kwargs)
        prompt = () if state is None else state.prompt
        if is_first_iteration and self._reads_in_pieces(input_ids, model_kwargs, generation_config):
            ids = _without_pads(input_ids, model_kwargs.get("attention_mask"))
            eos = generation_config._eos_token_tensor
            turn_ends = () if eos is None else eos.flatten().tolist()
            ends = piece_ends(ids[0].cpu(), turn_ends, getattr(self.config, "image_token_id", None))
            self._read_pieces(ids, model_kwargs["past_key_values"], model_kwargs, ends)
        outputs = super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)
        if state is not None and len(prompt) == 1:
            state.contents = prompt
            self._leave(state)
        return outputs

    def _reads_in_pieces(
        self, input_ids: Tensor, model_kwargs: dict, generation_config: GenerationConfig
    ) -> bool:
        """One sample with a kept state or a store, and on a CPU any: there one more piece costs next to nothing."""
        state = model_kwargs.get("past_key_values")
        if type(state) is not VisualRWKVCache or len(input_ids) > 1:
            return False
        if state.prompt:
            return True
        if (
            self.device.type != "cpu"
            or state.get_seq_length()
            or model_kwargs.get("attention_mask") is not None
        ):
            return False
        num_tokens = (
            0 if (encoded := _encoded(model_kwargs)) is None else sum(map(len, encoded.pooler_output))
        )
        if num_tokens != int(_placeholders(input_ids, self.config).sum()):
            return False  # the model says what is wrong
        return not _hindrances(model_kwargs | {"mm_encoder_outputs": None}, generation_config)

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict) -> dict:
        """Encode the pictures before the prompt is read, as the stock method does.

        That method knows a model's inputs from a signature; ours depend on the configuration's encoders. On a CPU
        pictures are encoded one at a time, so that a picture's features do not depend on how many others are in the
        batch (a matrix product may round differently for another number of rows).
        """
        pictures = Pictures.of(model_kwargs, self.config)
        if not pictures.tiles or _encoded(model_kwargs) is not None:
            return super()._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)
        count = len(pictures.tiles)
        groups = [[True] * count]
        if self.device.type == "cpu":
            groups = [[other == number for other in range(count)] for number in range(count)]
        outputs = [
            self.get_image_features(**pictures.chosen(group), return_dict=True).pooler_output
            for group in groups
        ]
        tokens: list[Tensor] = [features for output in outputs for features in output]
        left = {
            name: value for name, value in model_kwargs.items() if name not in picture_inputs_of(self.config)
        }
        return left | {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=tokens)}}

    def _read_pieces(self, ids: Tensor, state: VisualRWKVCache, model_kwargs: dict, ends: list[int]) -> None:
        """Reads one sample's `ids` [1, T] up to each of `ends`, and leaves the state behind the last picture.

        What is read of the pictures is taken out of `model_kwargs`.
        """
        start, contents = state.get_seq_length(), state.prompt
        for end in [end for end in ends if end > start]:
            piece = ids[:, start:end]
            pictures = self._pictures_of(piece, model_kwargs)
            self.model(input_ids=piece.to(self.device), past_key_values=state, use_cache=True, **pictures)
            start = end
            if contents:
                state.contents = [contents[0][:end]]
                if contents[0][end - 1] < 0 and not (contents[0][end:] < 0).any():
                    self._leave(state)

    def _pictures_of(self, piece: Tensor, model_kwargs: dict) -> dict:
        """The encoded pictures of `piece` [1, T], taken out of `model_kwargs`."""
        if not (count := int(_placeholders(piece, self.config).sum())):
            return {}
        tokens = torch.cat(list(_encoded(model_kwargs).pooler_output))  # type: ignore[union-attr]
        taken, left = (
            {"image": BaseModelOutputWithPooling(pooler_output=[some])} if len(some) else {}
            for some in (tokens[:count], tokens[count:])
        )
        model_kwargs["mm_encoder_outputs"] = left
        return {"mm_encoder_outputs": taken}

    # --- what it leaves ---------------------------------------------------------------------------------

    def _sample(self, input_ids: Tensor, *args, **model_kwargs):
        """As the stock method; a state that knows its prompt is left behind the answer."""
        state = _about_to_read(model_kwargs)
        prompt = () if state is None else state.prompt
        result = super()._sample(input_ids, *args, **model_kwargs)
        if state is not None and len(prompt) == 1:
            sequences = result if isinstance(result, Tensor) else result.sequences
            answer = sequences[0, input_ids.shape[1] :].cpu()
            state.contents = [torch.cat([prompt[0], answer])[: state.get_seq_length()]]
            self._leave(state)
            state.contents = ()  # a cache that generate() returns is plain: whoever gets it advances it
        return result

    def _leave(self, state: VisualRWKVCache) -> None:
        """Puts a copy of a sample's state into the store, if there is one."""
        if self._store is not None and len(state.contents) == 1:
            self._store.add(state.copy())


def _about_to_read(model_kwargs: dict) -> VisualRWKVCache | None:
    """The state of these inputs if it knows its prompt and is yet to read it."""
    state = model_kwargs.get("past_key_values")
    return state if getattr(state, "prompt", ()) else None


def _encoded(model_kwargs: dict) -> BaseModelOutputWithPooling | None:
    """The pictures that are encoded already."""
    return (model_kwargs.get("mm_encoder_outputs") or {}).get("image")


def _hindrances(model_kwargs: dict, generation_config: GenerationConfig) -> list[str]:
    """The options given that need a prompt to be read at once and from its start."""
    given = {name: model_kwargs.get(name) is not None for name in ("inputs_embeds", *PREPARED_PROMPT)}
    given["output_hidden_states"] = bool(model_kwargs.get("output_hidden_states"))
    given["use_cache=False"] = generation_config.use_cache is False
    given |= {name: bool(getattr(generation_config, name, None)) for name in WHOLE_PROMPT_OPTIONS}
    return [name for name, is_given in given.items() if is_given]


def _placeholders(input_ids: Tensor, config: PreTrainedConfig) -> Tensor:
    """Where the tokens of pictures stand, bool as `input_ids`."""
    placeholder = getattr(config, "image_token_id", None)
    return torch.zeros_like(input_ids, dtype=torch.bool) if placeholder is None else input_ids == placeholder


def _unread_pictures(state: VisualRWKVCache, prompt: Prompt) -> list[bool]:
    """Which pictures of `prompt` are not read yet, [N]."""
    return [end > len(read) for read, ends in zip(state.contents, prompt.picture_ends) for end in ends]


def _refuse_coarser_pixels(pictures: dict[str, Tensor], pixel_dtype: torch.dtype) -> None:
    for name, pixels in pictures.items():
        if pixels.is_floating_point() and pixels.dtype not in (pixel_dtype, torch.float32):
            raise ValueError(
                f"{name} are {pixels.dtype}, the state has read pixels of {pixel_dtype}: give them in that or in "
                "float32, as the processor makes them."
            )


def _without_pads(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """One sample's ids [1, T] without its pads."""
    return input_ids if attention_mask is None else input_ids[:, attention_mask[0].bool()]


def _unread(
    input_ids: Tensor, attention_mask: Tensor | None, read: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None]:
    """What is left to read of each row behind what it has `read`: ids [B, T'] with pads in front, and their mask."""
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = [ids[real.bool()][len(done) :] for ids, real, done in zip(input_ids, mask, read)]
    longest = max(map(len, rows))
    ids = torch.stack([F.pad(row, (longest - len(row), 0)) for row in rows])
    if all(len(row) == longest for row in rows):
        return ids, None
    return ids, torch.stack([F.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
