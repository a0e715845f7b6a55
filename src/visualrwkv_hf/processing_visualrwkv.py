"""Processor of VisualRWKV: makes the model's inputs of pictures and of chat messages, or text with `<image>`."""

import os
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import __version__
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_utils import ImageInput, make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessingKwargs, ProcessorMixin, Unpack

from .chat_template import TURN_END, collapse, release_chat_template
from .configuration_visualrwkv import VisualRWKVConfig
from .film_prompts import (
    SAMPLING_OPTIONS,
    around_pictures,
    as_placeholders,
    films_as_pictures,
    films_marked,
    has_films,
    sampling_of,
    with_frames,
)
from .image_tokens import ImageTokens, class_token_places
from .pictures import open_picture
from .remote_code import PROCESSOR_CODE, copy_code
from .scan_orders import num_directions, sequence_orders
from .thin_pictures import CUTTING_FIELDS, middle_of_thin

SHORT_ANSWER = "Answer the question using a single word or phrase."

CONFIG_FIELDS = (
    "image_position",
    "num_tile_tokens",
    "pooled_grid",
    "class_token",
    "scan",
    "compressor_num_layers",
    "compressor_num_tokens",
    "compressor_per_tile",
    "compressor_reduction",
)
"""What the processor must know of the model: attributes of the configuration, by the same names here."""

VALUE_FIELDS = {"do_rescale", "rescale_factor", "do_convert_rgb"}
"""Options of transformers' image processors that say what the values of an array mean."""


class VisualRWKVProcessorKwargs(ProcessingKwargs, total=False):  # type: ignore[call-arg]
    """Options of a call beside those of every processor."""

    return_scan_orders: bool
    pad_prompt_to_multiple_of: int | None
    _defaults: dict = {}  # type: ignore[misc]  # transformers up to 5.19 reads it of every processor


class VisualRWKVProcessor(ProcessorMixin):
    r"""Image processor and tokenizer in one call. [`~VisualRWKVProcessor.from_config`] makes the processor of a model.

    Chats: `processor.apply_chat_template(messages, ...)`. Messages have the roles user and assistant; a system
    message may come first, and its text is put before the first user message's. Blank lines are removed from texts,
    so that only the template ends a turn; a text that holds `<image>` or `<|endoftext|>` is refused with jinja's
    `TemplateError`. Texts given to `processor(text=...)` are taken as they are: there every `<image>` is a picture,
    so build them from trusted text only.

    image_processor, tokenizer:
        The parts.
    chat_template (`str`, *optional*):
        The jinja template. A saved processor has its own.
    num_tile_tokens (`int`, defaults to 1):
        Tokens of a picture, of one tile if the image processor tiles; as in [`VisualRWKVConfig`], like
        `compressor_num_layers`, `compressor_num_tokens`, `compressor_per_tile` and `compressor_reduction`.
    image_position (`"first"`, `"middle"` or `"last"`, defaults to `"first"`):
        Where chats place the pictures of a message.
    scan (`str`, defaults to `"unidirectional"`):
        In which order the layers read a picture, as in [`VisualRWKVConfig`], like `pooled_grid` and
        `class_token`.
    pad_prompt_to_multiple_of (`int`, *optional*):
        If given, unmasked tokens `"\n\n"` are put before every prompt until its length is a multiple of this, as
        the original RWKV-7 code does (16) in each forward. The original thus moves the prompt with every generated
        token; here it stays in place, so only the first token is predicted from the same input.
    """

    valid_processor_kwargs = VisualRWKVProcessorKwargs

    def __init__(
        self,
        image_processor,
        tokenizer,
        chat_template=None,
        num_tile_tokens: int = 1,
        image_position: str = "first",
        scan: str = "unidirectional",
        pooled_grid: tuple[int, int] = (0, 0),
        class_token: str = "none",
        compressor_num_layers: int = 0,
        compressor_num_tokens: int | None = None,
        compressor_per_tile: bool = False,
        compressor_reduction: str = "pool",
        pad_prompt_to_multiple_of: int | None = None,
    ):
        self.image_token = tokenizer.image_token
        self.image_token_id = tokenizer.image_token_id
        self.num_tile_tokens = num_tile_tokens
        self.image_position = image_position
        self.scan = scan
        self.pooled_grid = list(pooled_grid)
        self.class_token = class_token
        self.compressor_num_layers = compressor_num_layers
        self.compressor_num_tokens = compressor_num_tokens
        self.compressor_per_tile = compressor_per_tile
        self.compressor_reduction = compressor_reduction
        self.pad_prompt_to_multiple_of = pad_prompt_to_multiple_of
        super().__init__(image_processor, tokenizer, chat_template=chat_template)

    def num_image_tokens_of(self, num_tiles: int) -> int:
        """Tokens of a picture that the image processor cut into `num_tiles` tiles."""
        rule = ImageTokens(
            tokens_per_tile=self.num_tile_tokens,
            kept=self.compressor_num_tokens if self.compressor_num_layers else None,
            per_tile=self.compressor_per_tile,
            reduction=self.compressor_reduction,
        )
        return rule.count(num_tiles)

    @classmethod
    def from_config(
        cls, config: VisualRWKVConfig, image_processor, tokenizer, **overrides
    ) -> "VisualRWKVProcessor":
        """Return a processor for a model: what it must know of the model comes from `config`, unless in `overrides`.

        Raises:
            ValueError: if the tokenizer's placeholder is not the model's.
        """
        if tokenizer.image_token_id != config.image_token_id:
            raise ValueError(
                f"The tokenizer's image_token_id ({tokenizer.image_token_id}) must be the configuration's "
                f"({config.image_token_id})."
            )
        fields = {name: getattr(config, name) for name in CONFIG_FIELDS} | overrides
        fields.setdefault("chat_template", release_chat_template(fields["image_position"]))
        return cls(image_processor, tokenizer, **fields)

    def to_dict(self) -> dict:
        """Return the fields, and where remote code finds the class."""
        return super().to_dict() | {"auto_map": dict(PROCESSOR_CODE)}

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Write the fields, and the code that reads them beside them, so that a push uploads both."""
        super().to_json_file(json_file_path)
        folder = Path(json_file_path).parent
        copy_code(folder, PROCESSOR_CODE)
        # Its files may lie elsewhere than these: transformers caches the code of a class with what the class imports.
        if copy_its_code := getattr(
            self.image_processor, "copy_code_to", None
        ):  # transformers' own have none
            copy_its_code(folder)

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """Render chats as transformers' `ProcessorMixin.apply_chat_template` does.

        The template has two variables: `image_position` (defaults to the processor's) and `sandwich_history`; see
        the template. In a message's content a key whose value is None counts as absent, as in rows of a data set
        that lack a column.

        A film, `{"type": "video", "path": ...}`, is read as its frames, each a picture. The options `num_frames` and
        `fps` say which frames, see [`FrameSampling`]. With `tokenize=False` the text has `<video>` in the place of a
        film; give it to the processor together with `videos`.

        Raises:
            ValueError: if this is not a list of messages, a film cannot be read, or `continue_final_message` is given
                for a message that is not the assistant's.
            jinja2.TemplateError: for messages that the template refuses.
        """
        _check_chats(conversation)
        conversation = _without_none(conversation)
        template = chat_template or self.chat_template
        is_ours = isinstance(template, str) and "image_position" in template
        if is_ours:
            kwargs.setdefault("image_position", self.image_position)
        if kwargs.get("continue_final_message"):
            _check_continued(conversation)
            if is_ours:
                conversation = _ending_as_rendered(conversation)
        if kwargs.get("return_assistant_tokens_mask") and not hasattr(
            self, "_adjust_assistant_masks_indices"
        ):
            raise ImportError(
                f"transformers {__version__} would get return_assistant_tokens_mask wrong after a picture: "
                "it needs a newer version."
            )
        if not has_films(conversation):
            return super().apply_chat_template(conversation, chat_template, **kwargs)
        if kwargs.get("tokenize"):
            options = dict(kwargs.pop("processor_kwargs", None) or {})
            options |= {name: kwargs.pop(name) for name in SAMPLING_OPTIONS if name in kwargs}
            conversation = with_frames(conversation, sampling_of(options))
            return super().apply_chat_template(
                conversation, chat_template, processor_kwargs=options, **kwargs
            )
        conversation, is_film = as_placeholders(conversation)
        text = super().apply_chat_template(conversation, chat_template, **kwargs)
        return films_marked(text, is_film, self.image_token)

    def __call__(
        self,
        images: ImageInput | None = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        **kwargs: Unpack[VisualRWKVProcessorKwargs],
    ) -> BatchFeature:
        """Make the model's inputs of pictures, films and text.

        Args:
            images: pictures, paths, URLs or base64 texts: one, a list in the order of the placeholders, or
                one list for every text.
            text: one text or several, with one `<image>` for every picture and one `<video>` for every film.
            videos: films, as for [`film_frames`]: one, a list in the order of the placeholders, or one list for every
                text. Without films `<video>` is text like any other.
            kwargs: `num_frames` or `fps` say which frames of a film are taken, see [`FrameSampling`].
                `return_scan_orders`: whether to add `scan_orders`, int64 [B, D, T]: position p of the sequence
                is read from position scan_orders[b, d, p], in layers l with l mod D = d.
                `pad_prompt_to_multiple_of`: see the class; 1 turns the processor's own setting off.
                All others as for any processor, e.g. `padding=True`, `return_tensors="pt"`. Padding is on the left
                unless the tokenizer says otherwise.

        Returns:
            `input_ids`, `attention_mask` [B, T] and what the image processor gives.

        Raises:
            ValueError: if pictures and placeholders do not match in number, a picture cannot be read or would be
                truncated, or options contradict one another.
        """
        options: dict[str, Any] = dict(kwargs)
        sampling = sampling_of(options)
        if videos is not None:
            if text is None:
                raise ValueError("A film needs a text with <video>, which says where its frames are placed.")
            is_single = isinstance(text, str)
            text, images = films_as_pictures(text, images, videos, sampling, self.image_token)
            text, images = (text[0], images[0]) if is_single else (text, images)
        return_scan_orders = options.pop("return_scan_orders", False)
        multiple = options.pop("pad_prompt_to_multiple_of", None) or self.pad_prompt_to_multiple_of
        if multiple and text is not None:
            options = _padded_to_multiple(options, multiple)
        data = super().__call__(images, text, **options)
        if multiple and "input_ids" in data:
            self._lengthen_prompts(data, multiple)
        if return_scan_orders:
            data["scan_orders"] = self._scan_orders(data["input_ids"])
        return data

    def _merge_kwargs(self, *args, **kwargs):
        """Sort the options of a call by part. transformers up to 5.19 looks for a part behind each of our own."""
        args = tuple(ProcessingKwargs if arg is VisualRWKVProcessorKwargs else arg for arg in args)
        return super()._merge_kwargs(*args, **kwargs)

    def question_inputs(self, question: str, state) -> dict[str, torch.Tensor]:
        """Return the inputs of `generate` for a question about what `model.watch()` has read.

        Args:
            question: the text.
            state: the cache that `model.watch()` returned. Hand a copy of it to `generate` as `past_key_values`.

        Returns:
            `input_ids` int64 [1, T], the new words alone, and `attention_mask` [1, read + T], whose length says so.

        Raises:
            jinja2.TemplateError: the chat template refuses the question.
        """
        _, after = around_pictures(self, question)
        ids = self.tokenizer(after, return_tensors="pt", add_special_tokens=False)["input_ids"]
        mask = torch.ones(1, state.get_seq_length() + ids.shape[1], dtype=torch.long)
        return {"input_ids": ids, "attention_mask": mask}

    def _lengthen_prompts(self, data: BatchFeature, multiple: int) -> None:
        """Turn the last pads before each prompt into turn ends, so that its length becomes a multiple."""
        (turn_end_id,) = self.tokenizer.encode(TURN_END, add_special_tokens=False)
        for ids, mask in zip(data["input_ids"], data["attention_mask"]):
            length = int(sum(mask))
            start, missing = len(ids) - length, -length % multiple
            for position in range(start - missing, start):
                ids[position] = turn_end_id
                mask[position] = 1

    def _scan_orders(self, input_ids) -> torch.Tensor:
        lengths = {len(ids) for ids in input_ids}
        if len(lengths) > 1:
            raise ValueError(
                f"return_scan_orders needs texts of one length, got {sorted(lengths)}: use padding=True."
            )
        image_mask = torch.as_tensor(input_ids) == self.image_token_id  # [B, T]
        height, width = self.pooled_grid
        if self.scan == "unidirectional" or not height:
            identity = torch.arange(image_mask.shape[1])
            return identity.repeat(len(image_mask), num_directions(self.scan), 1)
        return sequence_orders(image_mask, self.scan, height, width, *class_token_places(self.class_token))

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        """Open the pictures one by one, so that an error can say which one it is; cut thin ones to what is seen."""
        if images is not None:
            options = kwargs | (kwargs.get("images_kwargs") or {})
            number = count(1)
            images = _map_nested(images, lambda picture: _open_numbered(picture, next(number), options))
            if not options.keys() & set(CUTTING_FIELDS):
                images = _map_nested(images, self._without_what_is_cut_off)
            images = images if next(number) > 1 else None
        return super().prepare_inputs_layout(images=images, text=text, **kwargs)

    def _without_what_is_cut_off(self, picture):
        is_opened = isinstance(picture, Image.Image)
        return middle_of_thin(picture, self.image_processor) if is_opened else picture

    def validate_inputs(self, images=None, text=None, **kwargs):
        """Refuse a number of pictures that is not that of the placeholders, text by text if pictures are nested."""
        if text is not None:
            samples = [text] if isinstance(text, str) else text
            refuse_half_characters(samples)
            wanted = [sample.count(self.image_token) for sample in samples]
            nested = isinstance(images, list) and all(isinstance(sample, list) for sample in images)
            given = [len(sample) for sample in images] if nested else _number_of(images)
            if given != (wanted if nested else sum(wanted)):
                raise ValueError(
                    f"Every {self.image_token} needs one picture: the number of {self.image_token} tokens in the "
                    f"prompts should be the same as the number of pictures, found {wanted} {self.image_token} in "
                    f"the texts and {given} pictures."
                )
        super().validate_inputs(images=images, text=text, **kwargs)

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs) -> str:
        """Return the placeholders of one picture."""
        num_tiles = int(image_inputs["num_tiles"][image_idx]) if "num_tiles" in image_inputs else 1
        return self.image_token * self.num_image_tokens_of(num_tiles)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs) -> MultiModalData:
        """Return how many tokens and tiles pictures of these sizes (height, width) take."""
        if image_sizes is None:
            return MultiModalData()
        tiles_of = getattr(
            self.image_processor, "get_number_of_image_patches", lambda height, width, kwargs: 1
        )
        num_tiles = [tiles_of(height, width, kwargs) for height, width in image_sizes]
        return MultiModalData(
            num_image_tokens=[self.num_image_tokens_of(n) for n in num_tiles], num_image_patches=num_tiles
        )

    def post_process_image_text_to_text(
        self,
        generated_outputs,
        skip_special_tokens: bool = True,
        prompt_length: int | None = None,
        **kwargs,
    ) -> list[str]:
        r"""Decode generated ids to texts.

        Args:
            generated_outputs: what `generate` gave, [B, T] or [T].
            skip_special_tokens: whether to leave out pads and placeholders.
            prompt_length: number of tokens of the prompt, e.g. `inputs["input_ids"].shape[1]`, or 0 if the ids hold
                none: the text is then the answer alone, up to the first `"\n\n"` and stripped, as in the original's
                evaluation. None: all of it, prompt included, without white space at the end.
            kwargs: for `tokenizer.batch_decode`.
        """
        rows = torch.atleast_2d(torch.as_tensor(generated_outputs))[:, prompt_length or 0 :]
        texts = self.tokenizer.batch_decode(rows, skip_special_tokens=skip_special_tokens, **kwargs)
        if prompt_length is None:
            return [text.rstrip() for text in texts]
        return [text.split(TURN_END)[0].strip() for text in texts]


def _check_chats(conversation) -> None:
    """Refuse what transformers would fail on before it reaches the template, which refuses the rest."""
    if not isinstance(conversation, list | tuple):
        raise ValueError(f"A chat is a list of messages, got {type(conversation).__name__}.")
    is_batch = bool(conversation) and isinstance(conversation[0], list | tuple)
    for chat in conversation if is_batch else [conversation]:
        if not chat:
            raise ValueError("A chat needs at least one message, got none.")
        for message in chat:
            _check_message(message)


def _without_none(conversation):
    """Return the chats without those keys of content parts whose value is None."""
    if isinstance(conversation[0], list | tuple):
        return [_without_none(chat) for chat in conversation]
    return [
        {**message, "content": [_present(part) for part in message["content"]]}
        if isinstance(message.get("content"), list | tuple)
        else message
        for message in conversation
    ]


def _present(part: Mapping) -> dict:
    return {key: value for key, value in part.items() if value is not None}


def _check_message(message) -> None:
    if not isinstance(message, Mapping):
        raise ValueError(f"A message is a dictionary with role and content, got {type(message).__name__}.")
    content = message.get("content")
    if content is not None and not isinstance(content, str | list | tuple):
        raise ValueError(f"A message's content must be a text or a list, got {type(content).__name__}.")
    for part in content if isinstance(content, list | tuple) else ():
        if not isinstance(part, Mapping) or "type" not in part:
            raise ValueError(
                "What a message's content lists are dictionaries with a type, such as {'type': 'text', 'text': ...}, "
                f"got {str(part)[:80]}."
            )


def refuse_half_characters(texts: Iterable[str]) -> None:
    """Raise `ValueError` for a text with lone surrogates, such as the JSON text "\\ud83d" gives."""
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"A text holds half of a character, {text[error.start]!a} at place {error.start}."
            ) from error


def _check_continued(conversation) -> None:
    """Refuse to continue a user message: the sandwich repeats it, and its turn has an end."""
    chats = conversation if isinstance(conversation[0], (list, tuple)) else [conversation]
    for chat in chats:
        role = chat[-1]["role"]
        if role != "assistant":
            raise ValueError(f"Only an assistant message can be continued, the last one is of role {role!r}.")


def _ending_as_rendered(conversation):
    """Return the chats with the last text of each as the template writes it: transformers looks for it there."""
    if isinstance(conversation[0], list | tuple):
        return [_ending_as_rendered(chat) for chat in conversation]
    *before, last = conversation
    content = last.get("content")
    if isinstance(content, str):
        return [*before, {**last, "content": collapse(content)}]
    parts = list(content or ())
    for place in reversed(range(len(parts))):
        if isinstance(text := parts[place].get("text"), str):
            parts[place] = {**parts[place], "text": collapse(text)}
            return [*before, {**last, "content": parts}]
    return conversation


def _padded_to_multiple(kwargs: dict, multiple: int) -> dict:
    """Return options that leave room before every prompt to lengthen it to a multiple."""
    if kwargs.get("padding_side", "left") != "left":
        raise ValueError(
            "pad_prompt_to_multiple_of lengthens prompts at the front: padding_side must be 'left'."
        )
    padding = kwargs.get("padding") or True
    return kwargs | {"padding": padding, "pad_to_multiple_of": multiple, "padding_side": "left"}


def _map_nested(items, function: Callable):
    is_batch = isinstance(items, np.ndarray | torch.Tensor) and items.ndim == 4
    if is_batch or isinstance(items, (list, tuple)):
        return [_map_nested(item, function) for item in items]
    return function(items)


def _number_of(images) -> int:
    return 0 if images is None else len(make_flat_list_of_images(images))


def _open_numbered(picture, number: int, options: Mapping):
    """Return the picture, decoded and in RGB; an array is returned as it is if the call's options describe its values.

    Raises:
        ValueError: if it cannot be read or has no pixels; the message says which one it is.
    """
    if (
        isinstance(picture, np.ndarray | torch.Tensor)
        and options.keys() & VALUE_FIELDS
        and 0 not in picture.shape
    ):
        return picture
    try:
        return open_picture(picture, options.get("input_data_format"))
    except ValueError as error:
        raise ValueError(f"Picture {number}: {error}") from error


__all__ = ["VisualRWKVProcessor"]
