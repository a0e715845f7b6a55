"""What all models share: initialisation, loading with clear refusals, saving with remote code, logits and loss."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.generation.configuration_utils import CompileConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .configuration_visualrwkv import VisualRWKVTextConfig
from .decode_graph import GraphedStep
from .decompression import decompress_the_rest, decompress_when_used, towers_convert_alone
from .generations import GENERATIONS
from .loss_visualrwkv import is_worth_slicing, sliced_loss, visualrwkv_loss
from .remote_code import push_saved, ship_remote_code
from .tuned_state import attached

HUB_ARGUMENTS = ("commit_message", "commit_description", "private", "revision", "create_pr", "tags")
"""Arguments of `save_pretrained(push_to_hub=True)` that are for the upload."""


class VisualRWKVPreTrainedModel(PreTrainedModel):
    """The base class of all models of this package."""

    config_class = VisualRWKVTextConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["RwkvBlock"]
    _skip_keys_device_placement = ["past_key_values", "state"]
    _is_stateful = False  # a recorded past can be taken back: assisted decoding works
    _can_compile_fullgraph = True
    _supports_sdpa = True  # the vision tower's attention
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Tell the Trainer whether the loss is divided by the labels of all accumulated batches.

        A mean over samples is not: the Trainer then averages the losses of the accumulated batches itself.
        """
        return self.config.get_text_config().loss_reduction == "token"

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, _halves_of_blocks()):
            module.init_weights()  # type: ignore[operator]
        elif isinstance(module, nn.Linear):
            # torch's own default. RWKV-7 initialises the linear layers of a block itself, after this.
            init.kaiming_uniform_(module.weight, a=5**0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -1e-4, 1e-4)  # small, because ln0 normalises it (RWKV-LM)
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(
        cls, *args, output_loading_info: bool = False, ignore_mismatched_sizes: bool = False, **kwargs
    ):
        """Load a model like [`~transformers.PreTrainedModel.from_pretrained`], with errors instead of warnings.

        Raises:
            ValueError: if the checkpoint lacks tensors of the model, has others or has some of other shapes (unless
                `ignore_mismatched_sizes=True`: then those of the model are initialised), or holds NaN or infinite
                weights; or if a tensor-parallel plan is asked for.
        """
        _refuse_tensor_parallelism(cls.__name__, kwargs)
        with towers_convert_alone():
            model, info = super().from_pretrained(
                *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        source = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        if not ignore_mismatched_sizes:
            _refuse_misfit(cls.__name__, source, info)
        if not model.__dict__.pop("is_checked", False):  # by a quantizer that reads each weight once
            refuse_non_finite(model, source)
        decompress_when_used(model)
        return (model, info) if output_loading_info else model

    def save_pretrained(
        self,
        save_directory,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs,
    ) -> None:
        """Save the model like [`~transformers.PreTrainedModel.save_pretrained`], with the code that loads it.

        A model with adapters (`add_adapter`, `load_adapter`) saves these alone, as transformers does: their folder
        has no `config.json` and needs no code. So does a model with a [`TunedState`] attached.
        """
        upload = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        repo_id = kwargs.pop("repo_id", Path(save_directory).name)
        if (tuned := attached(self)) is not None:
            if is_main_process:
                tuned.save_pretrained(save_directory)
            if is_main_process and push_to_hub:
                upload.pop("tags", None)  # are a card's, and a state has none
                tuned.push_to_hub(repo_id, kwargs.get("token"), **upload)
            return
        before = self._get_files_timestamps(save_directory) if Path(save_directory).is_dir() else {}
        make_base_paths_absolute(self)
        decompress_the_rest(self)
        super().save_pretrained(
            save_directory, is_main_process=is_main_process, state_dict=state_dict, **kwargs
        )
        if not is_main_process:
            return
        if not getattr(self, "_hf_peft_config_loaded", False):
            ship_remote_code(save_directory)
        if push_to_hub:  # not by transformers, which would upload before the code is there
            push_saved(self, save_directory, repo_id, before, token=kwargs.get("token"), **upload)


def make_base_paths_absolute(model: nn.Module) -> None:
    """Make the folder that a model's adapters name as their base model absolute, if it is a folder.

    A relative path would be written into `adapter_config.json` and found from one working directory only.
    """
    for config in (getattr(model, "peft_config", None) or {}).values():
        folder = getattr(config, "base_model_name_or_path", None)
        if folder and Path(folder).is_dir():
            config.base_model_name_or_path = str(Path(folder).resolve())


def _halves_of_blocks() -> tuple[type, ...]:
    return tuple({cls for row in GENERATIONS.values() for cls in (row.time_mix, row.channel_mix)})  # type: ignore[misc]


# --- the head ---------------------------------------------------------------------------------------------


class LanguageModelHead:
    """Logits and loss from the last hidden states, for a model with an `lm_head`.

    Attributes:
        skip_logits: whether a training step leaves out the logits; see [`~LanguageModelHead.logits_and_loss`]. Set it
            to False on a model for a trainer that reads `output.logits` of training steps.
    """

    skip_logits: bool | None = None
    lm_head: nn.Module
    config: Any

    def get_compiled_call(self, compile_config: CompileConfig | None) -> Callable[..., Any]:
        """Return what `generate()` calls for a decoding step on a GPU: with options the stock compiled call, else ours.

        Ours replays a CUDA graph, or compiles the step if the cache is a static one.
        """
        compiled = super().get_compiled_call  # type: ignore[misc]
        return (
            GraphedStep(self, lambda: compiled(None)) if compile_config is None else compiled(compile_config)
        )

    def logits_and_loss(
        self,
        hidden_states: Tensor,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool | None = None,
        shift_labels: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the logits [B, T, vocab_size] (or None) and, with labels, the loss (or None).

        Args:
            hidden_states: [B, T, C].
            labels: [B, T], -100 where there is none; the label of position t + 1 is predicted at position t.
            logits_to_keep: keep the logits of the last n positions (0: all), or of those that it indexes.
            skip_logits: True computes the loss in slices and returns no logits; False always returns them. None
                takes the attribute `skip_logits`; if that is None too, a step with gradients whose logits would
                exceed 256 MiB skips them.
            shift_labels: [B, T], labels moved to the positions that predict them; used instead of `labels`.
            **options: `num_items_in_batch`, `label_smoothing` and `cu_seq_lens_q` of [`visualrwkv_loss`].

        Raises:
            ValueError: labels of another shape, `skip_logits=True` without labels, or `shift_labels` from a process
                that holds only a part of each sequence.
        """
        config = self.config.get_text_config()
        if shift_labels is not None:
            refuse_sharded_sequences()
        targets = shift_labels if shift_labels is not None else labels
        skip = self.skip_logits if skip_logits is None else skip_logits
        if targets is None:
            if skip_logits:
                raise ValueError("skip_logits=True needs labels: there would be neither logits nor a loss.")
        elif is_worth_slicing(hidden_states, config.vocab_size) if skip is None else skip:
            loss = sliced_loss(
                hidden_states, self.lm_head, labels, config, shift_labels=shift_labels, **options
            )
            return None, loss
        if targets is None:
            return self.lm_head(kept_positions(hidden_states, logits_to_keep)), None
        logits = self.lm_head(hidden_states)
        loss = visualrwkv_loss(logits, labels, config, shift_labels=shift_labels, **options)
        return kept_positions(logits, logits_to_keep), loss


def predicts_next_token(model_class: Any) -> Any:
    """Tell transformers' Trainer that the logits of a class are those of the next token; a class decorator.

    With `label_smoothing_factor` the Trainer computes the loss itself, and moves the labels by one position only for
    classes that this table of transformers' names. The package adds its names there too, but code that a model folder
    brought along runs without the package.
    """
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(model_class.config_class.model_type, model_class.__name__)
    return model_class


def kept_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Return the positions of `hidden_states` [B, T, C] whose logits are asked for."""
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    return hidden_states[:, logits_to_keep]


# --- refusals ---------------------------------------------------------------------------------------------


def refuse_output_attentions(output_attentions: bool | None) -> None:
    """Raise `ValueError` if attention maps are asked for."""
    if output_attentions:
        raise ValueError(
            "output_attentions=True: RWKV computes no attention maps. For those of the vision encoders call "
            "get_image_features(..., output_attentions=True)."
        )


def refuse_sharded_sequences() -> None:
    """Raise `ValueError` in a process of accelerate's context or sequence parallelism.

    Such a process holds a part of each sequence, and the state would start from zero in every part.
    """
    state = getattr(sys.modules.get("accelerate.state"), "AcceleratorState", None)
    config = state and state._shared_state.get("parallelism_config")
    if config is not None and (config.cp_enabled or config.sp_enabled):
        raise ValueError(
            "Context or sequence parallelism splits each sequence over processes, and the recurrent state would start "
            f"from zero in each part: set cp_size ({config.cp_size}) and sp_size ({config.sp_size}) to 1."
        )


def _refuse_tensor_parallelism(model_name: str, arguments: dict[str, Any]) -> None:
    for name in ("tp_plan", "tp_size"):
        if arguments.get(name) is not None:
            raise ValueError(
                f"{model_name} has no tensor-parallel plan, got {name}={arguments[name]!r}: the token shift, the "
                "low-rank maps and the norm per head would have to be split by heads together with the matrices. "
                "Use device_map, FSDP or DeepSpeed for a model larger than one device."
            )


def _refuse_misfit(model_name: str, source: object, info: dict) -> None:
    """Refuse a checkpoint whose tensors are not the model's; a base model ignores the head of a whole one."""
    unexpected = [key for key in info["unexpected_keys"] if not key.startswith("lm_head.")]
    misshapen = [f"{key} {list(found)} for {list(wanted)}" for key, found, wanted in info["mismatched_keys"]]
    for names, problem in (
        (info["missing_keys"], "lacks {} tensors of {}: {}"),
        (unexpected, "has {} tensors that {} does not: {}"),
        (misshapen, "has {} tensors of another shape than {}: {}"),
    ):
        if names:
            raise ValueError(
                f"{source} {problem.format(len(names), model_name, _some(sorted(names)))}. "
                "ignore_mismatched_sizes=True initialises them with new weights."
            )


def refuse_non_finite(
    model: nn.Module, source: object = "the model", done: Callable[[Tensor], None] | None = None
) -> None:
    """Raise `ValueError` naming the weights that hold NaN or infinity.

    Weights on disk and those of tensor subclasses (quantised, distributed) are not read.

    Args:
        model: has the weights.
        source: names them in the error.
        done: called with each weight that has been read.
    """
    broken = []
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        if type(weight.detach()) is not torch.Tensor or weight.is_meta:
            continue
        if not _is_finite(weight):
            broken.append(name)
        if done is not None:
            done(weight)
    if broken:
        raise ValueError(f"{source} has NaN or infinite weights in {len(broken)} tensors: {_some(broken)}.")


def _is_finite(weight: Tensor) -> bool:
    if not weight.is_floating_point() or not weight.numel():
        return True
    weight = weight.detach()
    # torch compares no numbers of 8 bits; some of their formats have NaN and no infinity.
    low, high = torch.aminmax(weight.float() if weight.itemsize == 1 else weight)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def _some(names: Sequence[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


__all__ = ["VisualRWKVPreTrainedModel"]
