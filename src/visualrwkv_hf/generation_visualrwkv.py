"""`generate()` over the recurrent state, `read()`, and how both continue from a state that is kept."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
)
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .cache_visualrwkv import VisualRWKVCache, VisualRWKVStaticCache, refuse_key_values
from .decode_graph import why_no_graph
from .decode_loop import DecodeLoop, why_stock_loop
from .film_prompts import around_pictures, has_films, sampling_of, with_frames
from .kept_state import KeptState, is_kept
from .placement import compute_device
from .prompt_identity import (
    Pictures,
    identify_prompt,
    longest_piece,
    picture_inputs_of,
    piece_ends,
    pixel_inputs_of,
    stable_length,
)
from .reading_plan import ReadingPlan, option_of, refuse_dropped_cache, start_cache
from .state_store import StateStore
from .tuned_state import TunedState, identity_of_beginning, store_of_beginning

CACHES: dict[str | None, Callable] = {
    None: VisualRWKVCache,
    "dynamic": VisualRWKVCache,
    "offloaded": VisualRWKVCache,  # a state of a few megabytes is not worth moving
    "static": VisualRWKVStaticCache,
}

TRANSFORMERS_INTERNALS = {
    "_prepare_cache_for_generation": "Overridden: it makes our cache, since the stock one refuses class names with "
    "'rwkv', and completes the reading plan, for it is the last step before the decoding loop that sees the mask.",
    "prepare_inputs_for_generation": "Overridden: its first call reads the prompt by the plan.",
    "_validate_model_kwargs": "Relied on: it lets past_key_values pass, whatever that is; so the plan goes in there.",
    "_maybe_prepare_encoder_kwargs_for_generation": "Relied on: without pixels it encodes nothing; the plan has them.",
    "_valid_auto_compile_criteria": "Relied on: on a GPU, get_compiled_call chooses how a step runs if the cache says "
    "is_compileable, unless quantisation, offloading or disable_compile forbid it.",
    "_expand_inputs_for_generation": "Relied on: it repeats tensors for beams and samples, and leaves the plan alone.",
    "_prefill": "Relied on: it calls prepare_inputs_for_generation first; for assistants not as the first iteration.",
    "_sample": "Overridden: on a CPU with native ops decode_loop.py does the same with less Python. It reads the "
    "tokens that it returns one by one, all but the last.",
    "_assisted_decoding": "Relied on: its first step appends guesses to the prompt, and copies our arguments for the "
    "assistant model, which so gets the pictures.",
}
"""Methods of GenerationMixin that this module overrides or whose inner workings it relies on, and why.

Checked with transformers 5.23.0. A test compares their source with what was checked, and fails if a release of
transformers changes one of them.
"""

_advancing: set[int] = set()
"""Caches, by their ids, that some `generate()` is advancing in place."""
_advancing_lock = Lock()


@contextmanager
def _alone_with(cache: object) -> Iterator[None]:
    """Keep others from advancing `cache` meanwhile. A kept state is only copied, so any number may use it.

    Raises:
        ValueError: somebody else is advancing it.
    """
    if cache is None or is_kept(cache):
        yield
        return
    with _advancing_lock:
        if id(cache) in _advancing:
            raise ValueError(
                "Another thread is generating from this cache, which advances in place. Give each thread a copy() of "
                "it, or a state that model.read() made: any number of threads may share that."
            )
        _advancing.add(id(cache))
    try:
        yield
    finally:
        _advancing.discard(id(cache))


class VisualRWKVGenerationMixin(GenerationMixin):
    """`generate()` with the recurrent state as its cache.

    On a CPU it encodes the pictures of a prompt one by one, and reads the prompt of one sample in pieces that end after
    pictures and before the last question, even if no kept state is used. So a question after a kept state gives the
    same answer as the same question in one prompt, bit for bit in float32 (matrix products of another number of rows
    may round differently). `forward` always reads what it is given at once.

    Attributes:
        state_store: if set, `generate()` and `read()` look here for a state that has read the beginning of their
            prompt, and leave their own. Both take another store for one call, as `state_store=...`. A model whose
            generation config has `max_states` has a store of so many states from the beginning.
    """

    _state_store: StateStore | bool | None = False  # nobody has set it

    @property
    def state_store(self) -> StateStore | None:
        """Where states of earlier prompts are looked for and left; None for nowhere."""
        if isinstance(self._state_store, bool):
            most = getattr(self.generation_config, "max_states", None)
            if not most:
                return None
            self._state_store = StateStore(most)
        return self._state_store

    @state_store.setter
    def state_store(self, store: StateStore | None) -> None:
        self._state_store = store

    @torch.no_grad()
    def read(
        self,
        processor,
        messages: list[dict],
        *,
        state_store: StateStore | None = None,
        initial_state: TunedState | None = None,
        **template_variables,
    ) -> KeptState:
        """Read a chat once, so that `generate()` can continue from there as often as wanted.

        ```python
        state = model.read(processor, messages)
        output = model.generate(**inputs_of_the_whole_chat, past_key_values=state)
        ```

        It reads the part that no later message can change: to the end of the last turn, or of the last picture if
        that turn is a user's and has no text yet.

        Args:
            processor: the model's processor; of a text model the tokenizer.
            messages: the chat, as for `apply_chat_template`; its last message may be anyone's.
            state_store: where to look for a state and to leave states in this call, in place of `model.state_store`.
            initial_state: a [`TunedState`] with which the chat begins in place of zeros.
            template_variables: variables of the chat template, e.g. `image_position`; for films `num_frames` or `fps`.

        Raises:
            ValueError: a later question would be placed before a picture, the processor lengthens prompts,
                `initial_state` is for another model, or this one trains with gradient checkpointing.
            jinja2.TemplateError: the chat template refuses the messages.
        """
        refuse_dropped_cache(self, "read()")
        if (getattr(processor, "pad_prompt_to_multiple_of", None) or 1) > 1:
            raise ValueError(
                "A processor with pad_prompt_to_multiple_of writes other tokens at the start of a longer chat, so that "
                "no state can continue it. Set it to None."
            )
        if has_films(messages):
            messages = with_frames(messages, sampling_of(template_variables))
        inputs = processor.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_tensors="pt", **template_variables
        )
        length = stable_length(processor, messages, inputs["input_ids"].shape[1], **template_variables)
        ids, mask = inputs["input_ids"][:, :length], inputs["attention_mask"][:, :length]
        names = [name for name in picture_inputs_of(self.config) if name in inputs]
        tensors = {name: self._moved(inputs[name]) for name in names}
        tensors |= {
            name: tensors[name].to(self.dtype) for name in pixel_inputs_of(self.config) if name in tensors
        }
        pictures = Pictures.of(tensors, self.config)
        (prompt,) = identify_prompt(self.config, ids, mask, pictures, self.dtype)

        store = self.state_store if state_store is None else state_store
        store = store_of_beginning(store, self, initial_state)
        plan = ReadingPlan(
            ids, pictures, store=store, initial=initial_state, prompts=[prompt], pixel_dtype=self.dtype
        )
        found = None if plan.store is None else plan.store.find(prompt)
        plan.begin(self, found)
        plan.ends = [*piece_ends(prompt.ids, (), None, longest_piece(compute_device(self))), length]
        rest, _ = plan.rest(ids, mask)
        tokens = self._encoded(plan.unread)
        self._read_pieces(plan, rest, torch.cat(tokens) if tokens else None)
        plan.leave(length)
        beginnings = [identity_of_beginning(self, initial_state)]
        return KeptState.of(plan.cache, [prompt], self.dtype).identified(self, processor, beginnings)

    @torch.no_grad()
    def watch(
        self, processor, frames: Iterable, state: VisualRWKVCache | KeptState | None = None
    ) -> VisualRWKVCache:
        """Read pictures one after another into one state, in constant memory, however many there are.

        ```python
        state = model.watch(processor, film_frames("film.mp4", FrameSampling(fps=1)))
        state = model.watch(processor, camera, state)  # goes on
        output = model.generate(**processor.question_inputs("What happened?", state), past_key_values=state.copy())
        ```

        All pictures belong to one user message that begins with them, as with `image_position="first"`. A question is
        asked of a copy of the state, so that watching may go on; see `processor.question_inputs`.

        Args:
            processor: the model's processor.
            frames: pictures, as the processor takes them; an iterator is read one picture at a time.
            state: what was watched before, from this method. A cache is advanced in place, a kept state is copied.

        Returns:
            The cache that has read the pictures.

        Raises:
            ValueError: a picture cannot be read, or the model trains with gradient checkpointing.
        """
        refuse_dropped_cache(self, "watch()")
        cache: Any = VisualRWKVCache(self.config) if state is None else state
        if is_kept(cache):
            cache = start_cache(cache, self)
        for frame in frames:
            before = around_pictures(processor)[0] if cache.is_empty else "\n"
            inputs = processor(images=frame, text=before + processor.image_token, return_tensors="pt")
            inputs = inputs.to(compute_device(self), dtype=self.dtype)
            self.model(**inputs, past_key_values=cache, use_cache=True)
        return cache

    @wraps(GenerationMixin.generate, assigned=("__module__", "__name__", "__qualname__"))
    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        state_store: StateStore | None = None,
        reading_plan: ReadingPlan | None = None,
        initial_state: TunedState | Sequence[TunedState | None] | None = None,
        **kwargs,
    ):
        """Generate as [`~transformers.GenerationMixin.generate`], with states instead of key-value caches.

        On a CPU the pictures of a prompt are encoded one by one, and the prompt of one sample is read in pieces, so
        that a kept state changes no bit of an answer: see the class. A call of the model reads a prompt at once.

        Args:
            inputs: int64 [B, T], the prompt: always the whole chat from its start.
            generation_config: as of the stock method.
            *args: likewise, in its order.
            state_store: where to look for a state and to leave states in this call, in place of `model.state_store`.
            reading_plan: what a model that this one assists hands over; not for users.
            initial_state: a [`TunedState`] with which the prompts begin in place of zeros, or one for each row; None in
                the list stands for zeros.
            **kwargs: all other arguments of the stock method, and the model's inputs. `past_key_values` may be a
                [`KeptState`], which stays as it is, or a [`VisualRWKVCache`], which is advanced in place. Pictures that
                either has read may be given again or, for a `VisualRWKVCache`, left out.
                `cache_implementation` may be "dynamic" or "static" (for `torch.compile`). If it is not given, a GPU
                records the decoding step as a CUDA graph where it can (see `decode_graph.why_no_graph`).

        Raises:
            ValueError: the prompt does not begin with what the kept state has read, or the state is another model's;
                an option cannot be combined with a kept state; another thread is advancing the same cache; the model
                trains with gradient checkpointing and would use a cache; a kept state with PEFT's prompt learning.
        """
        named = kwargs if inputs is None else {**kwargs, "input_ids": inputs}
        past = kwargs.get("past_key_values")
        configs = (generation_config, self.generation_config)
        if self._prepares_by_itself():
            store = self.state_store if state_store is None else state_store  # an empty one is false
            plan = ReadingPlan.of(self.config, named, configs, store, reading_plan, initial_state)
        elif is_kept(past):
            raise ValueError(
                "A kept state cannot go on where something else prepares the inputs of this model, as PEFT's prompt "
                "learning does: it has not read the learned prompt."
            )
        else:
            plan = None
        if plan is None and initial_state is not None:
            raise ValueError(
                "initial_state needs input_ids, and no option with which a prompt is read at once."
            )
        if plan is not None:
            kwargs = self._without_pictures(kwargs) | {"past_key_values": plan}
        elif not kwargs.get("mm_encoder_outputs") and (pictures := Pictures.of(kwargs, self.config)).tiles:
            # The stock method would find a tower's inputs by a signature; ours depend on the configuration.
            kwargs = self._without_pictures(kwargs)
            if (pictures := self._unread_pictures(pictures, named)).tiles:
                encoded = BaseModelOutputWithPooling(pooler_output=self._encoded(pictures))
                kwargs["mm_encoder_outputs"] = {"image": encoded}
        # An assistant gets its cache back from the model that it assists, which goes on taking tokens back.
        keeps_record = option_of("is_assistant", {}, configs) or _records_past(past)
        with _alone_with(past):
            result = super().generate(inputs, generation_config, *args, **kwargs)
        if plan is not None and plan.store is not None:
            sequences = result if isinstance(result, Tensor) else result.sequences
            answer = sequences[0, plan.input_ids.shape[1] :]
            plan.leave(int(plan.cache.get_seq_length()), answer)
        if plan is not None:
            plan.count_columns()
        cache = getattr(result, "past_key_values", past)
        if isinstance(cache, VisualRWKVCache) and not keeps_record:
            cache.deactivate_past_recording()
        return result

    def _prepares_by_itself(self) -> bool:
        """Return whether the inputs of each step are prepared by the method of this model's class.

        PEFT's prompt learning puts a function of its own in its place during `generate()`, which calls ours, takes
        its inputs for the whole prompt, and puts the learned prompt before them.
        """
        prepare = getattr(self.prepare_inputs_for_generation, "__func__", None)
        return prepare is type(self).prepare_inputs_for_generation

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        generation_mode: GenerationMode,
        *args,
        **kwargs,
    ) -> None:
        """Put the cache into `model_kwargs`, and the plan of what is left to read if there is one."""
        given = model_kwargs.get("past_key_values")
        if isinstance(given, ReadingPlan):
            self._start_plan(given, generation_config, model_kwargs, generation_mode)
        elif given is not None:
            refuse_key_values(given)
            super()._prepare_cache_for_generation(
                generation_config, model_kwargs, generation_mode, *args, **kwargs
            )
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = self._new_cache(generation_config)
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, VisualRWKVCache):
            refuse_dropped_cache(self, "generate()")
            cache.has_graph = not why_no_graph(self, generation_config, cache)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs,
    ):
        """Decode greedily or by sampling: by transformers' loop, or by a quicker one where it serves."""
        arguments = (input_ids, logits_processor, stopping_criteria, generation_config)
        if synced_gpus or why_stock_loop(self, generation_config, model_kwargs.get("past_key_values")):
            return super()._sample(*arguments, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)
        return DecodeLoop(self, *arguments, streamer, model_kwargs).run()

    def _new_cache(self, generation_config: GenerationConfig) -> VisualRWKVCache:
        """Return an empty cache of the kind that `generation_config` asks for."""
        implementation = generation_config.cache_implementation
        if implementation not in CACHES:
            raise ValueError(
                f"cache_implementation={implementation!r} has no meaning for a recurrent state of constant size; "
                f"use one of {', '.join(map(repr, CACHES))}."
            )
        cache = CACHES[implementation](self.config)
        if getattr(generation_config, "is_assistant", False):
            cache.activate_past_recording()
        return cache

    def _start_plan(
        self, plan: ReadingPlan, generation_config: GenerationConfig, model_kwargs: dict, mode: GenerationMode
    ) -> None:
        repeats = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
        mask = model_kwargs.get("attention_mask")
        # An assistant gets a copy of model_kwargs. One that is no model of ours would refuse the plan there, so it is
        # left out if it holds no more than the prompt, which the stock method reads at once.
        is_carried = (
            mode != GenerationMode.ASSISTED_GENERATION or plan.pictures.tensors or plan.kept is not None
        )
        if not is_carried:
            plan.store = None
        plan.start(self, None if mask is None else mask[::repeats], repeats, _turn_ends(generation_config))
        model_kwargs["past_key_values"] = cache = plan.cache
        if plan.user_cache is not None:
            cache._is_user_defined = True  # type: ignore[attr-defined]
        if plan.for_assistant:
            cache.activate_past_recording()
        if is_carried:
            model_kwargs["reading_plan"] = plan

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: VisualRWKVCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        reading_plan: ReadingPlan | None = None,
        **kwargs,
    ) -> dict:
        """Prepare a step like the stock method. The first step reads what the plan says, later steps read no prompt.

        Whether the prompt was read is asked of the cache: an assistant model's first step is not marked as such.
        """
        if reading_plan is not None and reading_plan.is_pending:
            input_ids, attention_mask = reading_plan.rest(input_ids, attention_mask)
            input_ids, features = self._read_ahead(reading_plan, input_ids)
            kwargs["next_sequence_length"] = None
            if features is not None:
                kwargs["mm_encoder_outputs"] = _as_encoded(features)
            is_first_iteration = True
        elif reading_plan is not None:
            reading_plan.leave(reading_plan.prompt_length)
        if past_key_values is not None:
            is_first_iteration = is_first_iteration or past_key_values.is_empty
            if not is_first_iteration and kwargs.get("next_sequence_length") == 1:
                attention_mask = (
                    None  # a new token is no padding; of a mask the stock method makes a larger one
                )
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        if not is_first_iteration and inputs.get("use_cache", True):
            for name in (*picture_inputs_of(self.config), "scan_orders", "mm_encoder_outputs"):
                inputs.pop(name, None)
            if inputs["input_ids"].shape[1] == 1:
                inputs.pop("attention_mask", None)  # a new token is no padding
        return inputs

    # --- reading a prompt -------------------------------------------------------------------------------

    def _without_pictures(self, inputs: dict) -> dict:
        """Return the inputs other than those of the vision tower."""
        return {name: value for name, value in inputs.items() if name not in picture_inputs_of(self.config)}

    def _unread_pictures(self, pictures: Pictures, inputs: Mapping[str, Any]) -> Pictures:
        """Return the pictures that a running cache has not read, where a whole chat is given with all its pictures.

        The stock method leaves out as many columns as the cache counts if the mask is as long as the ids. Where ids
        and pictures do not match they stay as they are: the model says what is wrong.
        """
        past, ids = inputs.get("past_key_values"), inputs.get("input_ids")
        mask = inputs.get("attention_mask")
        if not isinstance(past, VisualRWKVCache) or past.is_empty or not isinstance(ids, Tensor):
            return pictures
        num_read = int(past.get_seq_length())
        if ids.shape[1] <= num_read or (mask is not None and mask.shape != ids.shape):
            return pictures
        columns = self._placeholders(ids).nonzero()[:, 1]  # row by row
        lengths = [self.config.num_image_tokens_of(tiles) for tiles in pictures.tiles]
        if len(columns) != sum(lengths):
            return pictures
        return pictures.chosen([bool((places >= num_read).any()) for places in columns.split(lengths)])

    @torch.no_grad()
    def _encoded(self, pictures: Pictures) -> list[Tensor]:
        """Return the tokens of these pictures, N tensors [L, C]."""
        if not pictures.tiles:
            return []
        # Other rows in a matrix product might change how a picture's are rounded.
        alone = compute_device(self).type == "cpu"
        tokens: list[Tensor] = []
        for part in pictures.one_by_one() if alone else [pictures]:
            tensors = {name: self._moved(tensor) for name, tensor in part.tensors.items()}
            tokens += self.get_image_features(**tensors, return_dict=True).pooler_output
        return tokens

    def _read_ahead(self, plan: ReadingPlan, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Read all but the last piece of `ids` [B * repeats, T], what is left to read of the prompt.

        Returns:
            The last piece, and the picture tokens [sum of L, C] in it.
        """
        tokens = self._encoded(plan.unread)
        features = torch.cat(tokens) if tokens else None
        if features is None and not plan.ends:
            return ids, None
        counts = self._placeholders(ids).sum(1).tolist()  # picture tokens of each row
        repeats = len(ids) // len(plan.num_read)
        if features is not None and sum(counts[::repeats]) != len(features):
            return ids, features  # the model says what is wrong
        if features is not None and repeats > 1:
            rows = features.split(counts[::repeats])
            features = torch.cat([row for row in rows for _ in range(repeats)])
        if not plan.ends or (features is None and sum(counts)):
            return ids, features
        return self._read_pieces(plan, ids, features)

    def _read_pieces(
        self, plan: ReadingPlan, ids: Tensor, features: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Read `ids` [1, T] up to the last of the plan's ends, and leave the state after the last picture.

        Returns:
            The ids after that, and the picture tokens in them.
        """
        start = plan.num_read[0]
        placeholders = self._placeholders(ids)
        last_picture = int(placeholders[0].nonzero()[-1]) + 1 + start if bool(placeholders.any()) else 0
        for end in [end for end in plan.ends if end > start]:
            piece, ids = ids.split([end - start, ids.shape[1] - (end - start)], dim=1)
            pictures = {}
            if features is not None and (count := int(self._placeholders(piece).sum())):
                pictures, features = {"mm_encoder_outputs": _as_encoded(features[:count])}, features[count:]
            self.model(input_ids=self._moved(piece), past_key_values=plan.cache, use_cache=True, **pictures)
            if plan.cache.layers[0].record_past:
                plan.cache.crop(0)  # nobody will take back what is recorded of the prompt
            start = end
            if end == last_picture:
                plan.leave(end)
        return ids, features

    @torch.no_grad()
    def _read_prompt(
        self,
        inputs: Mapping[str, Any],
        kept: KeptState | None,
        store: StateStore | None,
        initial: TunedState | Sequence[TunedState | None] | None = None,
    ) -> tuple[Tensor, VisualRWKVCache]:
        """Read prompts as `generate()` does, with the same states.

        Args:
            inputs: the model's inputs [B, T], with padding on the left.
            kept: a state that has read their beginning, or None.
            store: the store of this call; None takes the model's.
            initial: what the rows begin with in place of zeros, one for all or one for each.

        Returns:
            The hidden states [B, C] of the last tokens, and a cache that has read everything.

        Raises:
            ValueError: the inputs were prepared for a whole prompt, or do not fit `kept` or `initial`; or the model
                trains with gradient checkpointing.
        """
        refuse_dropped_cache(self, "score()")
        if kept is not None and not is_kept(kept):
            raise ValueError(f"past_key_values must be a KeptState here, got {type(kept).__name__}.")
        store = self.state_store if store is None else store
        plan = ReadingPlan.of(self.config, {**inputs, "past_key_values": kept}, (None,), store, None, initial)
        if plan is None:
            raise ValueError(f"Answers are scored from input_ids and pictures, got {', '.join(inputs)}.")
        plan.start(self, inputs.get("attention_mask"), 1, _turn_ends(self.generation_config))
        ids, mask = plan.rest(inputs["input_ids"], inputs.get("attention_mask"))
        ids, features = self._read_ahead(plan, ids)
        pictures = {} if features is None else {"mm_encoder_outputs": _as_encoded(features)}
        outputs = self.model(
            input_ids=self._moved(ids),
            attention_mask=None if mask is None else self._moved(mask),
            past_key_values=plan.cache,
            use_cache=True,
            **pictures,
        )
        plan.leave(plan.prompt_length)
        return outputs.last_hidden_state[:, -1], plan.cache

    def _moved(self, tensor: Tensor) -> Tensor:
        """Return a tensor where the model takes its inputs."""
        return tensor.to(compute_device(self))

    def _placeholders(self, input_ids: Tensor) -> Tensor:
        """Return which of `input_ids` [B, T] are picture tokens, bool [B, T]."""
        placeholder = getattr(self.config, "image_token_id", None)
        if placeholder is None:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        return input_ids == placeholder


def _records_past(cache: object) -> bool:
    """Return whether tokens that `cache` reads can be taken back."""
    return isinstance(cache, VisualRWKVCache) and bool(cache.layers[0].record_past)


def _as_encoded(features: Tensor | None) -> dict[str, BaseModelOutputWithPooling]:
    """Return picture tokens [sum of L, C] in the form in which `forward` takes encoded pictures."""
    if features is None or not len(features):
        return {}
    return {"image": BaseModelOutputWithPooling(pooler_output=[features])}


def _turn_ends(generation_config: GenerationConfig) -> Sequence[int]:
    """Return the token ids that end an answer."""
    ids = generation_config.eos_token_id
    if isinstance(ids, Tensor):
        ids = ids.flatten().tolist()
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)
