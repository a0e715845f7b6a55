"""State tuning: the state from which a model begins to read, learned for a task while every weight stays as it is.

A model begins with zeros. A `TunedState` begins with what training has made of them: a WKV state for each head and the
tokens that the token shifts carry, 0.3 % of the parameters of a model of 0.2 billion. Many tasks then share one model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .cache_visualrwkv import VisualRWKVCache
from .generations import GENERATIONS
from .layer_state import CHANNEL_MIX_SHIFT, TIME_MIX_SHIFT, WKV, LayerState, PlainStateHolder
from .placement import block_devices, compute_device, text_model_of
from .state_file import model_fingerprint, refuse_other, refuse_other_shapes, replace_file
from .state_store import StateStore
from .time_mix import at_least_float32

FILE_NAME = "tuned_state.safetensors"
FORMAT = "visualrwkv_hf.tuned_state"
ATTRIBUTE = "tuned_state"
"""Where the text model has the state that is being trained."""
MAX_BYTES = 2**30


class TunedState(nn.Module):
    """The state from which a model begins to read; all parameters are in float32.

    ```python
    tuned = TunedState.attach(model)  # freezes the model: training changes this state alone
    VisualRWKVTrainer(model, arguments, train_dataset=data, data_collator=collator).train()
    tuned.detach(model)
    tuned.save_pretrained("dutch")
    model.generate(**inputs, initial_state=TunedState.from_pretrained("dutch"))
    ```

    Attributes:
        layers: for each layer `wkv` [H, K, V] and, if they are trained, `token_shift0` and `token_shift1` [C]; nothing
            for a layer that begins with zeros.
        base_model: the name or folder of the model that it is for.
        fingerprint: what identifies that model.
    """

    def __init__(self, tensors: Sequence[dict[str, Tensor]], base_model: str, fingerprint: dict[str, Any]):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ParameterDict({name: nn.Parameter(tensor.float()) for name, tensor in layer.items()})
            for layer in tensors
        )
        self.base_model, self.fingerprint = base_model, fingerprint

    @classmethod
    def of(cls, model: Any, train_tokens: bool = True, layers: Sequence[int] | None = None) -> TunedState:
        """Return a state of zeros for `model`, on its device: what the model begins with.

        Args:
            model: a model of this package.
            train_tokens: whether the tokens that the token shifts carry are part of it.
            layers: numbers of the layers whose states are part of it; None takes all.

        Raises:
            ValueError: there are no such layers.
        """
        text = model.config.get_text_config(decoder=True)
        specs = [spec for spec in GENERATIONS[text.rwkv_version].states if train_tokens or spec.name == WKV]
        chosen = set(range(text.num_hidden_layers)) if layers is None else set(layers)
        if not chosen or not chosen <= set(range(text.num_hidden_layers)):
            raise ValueError(
                f"layers must be some of 0 to {text.num_hidden_layers - 1}, got {sorted(chosen)}."
            )
        device = compute_device(model)
        zeros = [
            {spec.name: torch.zeros(spec.shape(text), device=device) for spec in specs} if i in chosen else {}
            for i in range(text.num_hidden_layers)
        ]
        return cls(zeros, model.name_or_path, model_fingerprint(model))

    @classmethod
    def attach(cls, model: Any, state: TunedState | None = None, **options: Any) -> TunedState:
        """Freeze `model` and let it begin every text with a state that can be trained. Return this state.

        Args:
            model: a model of this package. Saving it saves this state alone from now on.
            state: one to go on with; None begins with zeros.
            options: for a new one, as of [`~TunedState.of`].

        Raises:
            ValueError: the model has such a state already, or `state` is another model's.
        """
        if attached(model) is not None:
            raise ValueError("The model has a tuned state already: detach() it first.")
        state = cls.of(model, **options) if state is None else state.to(compute_device(model))
        state.refuse_other_model(model)
        for weight in model.parameters():
            weight.requires_grad_(False)
        state.requires_grad_(True)
        setattr(text_model_of(model), ATTRIBUTE, state)
        return state

    def detach(self, model: Any) -> None:
        """Let `model` begin with zeros again. Its weights stay frozen."""
        if attached(model) is self:
            setattr(text_model_of(model), ATTRIBUTE, None)

    def refuse_other_model(self, model: Any) -> None:
        """Raise `ValueError` that names the differences if this state is not for `model`."""
        refuse_other("The tuned state", self.fingerprint, model_fingerprint(model), "model", "is for")
        refuse_other_shapes("The tuned state", self._rows(1), model.config)

    def _rows(self, count: int) -> list[dict[str, Tensor]]:
        """Return the states of each layer for `count` samples, [count, ...]; what is not trained is zeros."""
        layers: list[Any] = [*self.layers]
        wkv = next(layer[WKV] for layer in layers if len(layer))
        token = wkv.new_zeros(self.fingerprint["hidden_size"])
        zeros = {TIME_MIX_SHIFT: token, CHANNEL_MIX_SHIFT: token, WKV: torch.zeros_like(wkv)}
        return [
            {name: tensor.expand(count, *tensor.shape) for name, tensor in {**zeros, **layer}.items()}
            for layer in layers
        ]

    def holders(
        self, count: int, dtype: torch.dtype, devices: Sequence[torch.device]
    ) -> list[PlainStateHolder]:
        """Return what `run_blocks` continues from, for `count` samples of a model of `dtype`; differentiable.

        Without gradients these are copies: what decodes a token writes the next state in place.
        """

        def begun(tensor: Tensor, device: torch.device) -> Tensor:
            tensor = (tensor.to(dtype) if tensor.dim() == 2 else at_least_float32(tensor)).to(device)
            return tensor if torch.is_grad_enabled() else tensor.clone(memory_format=torch.contiguous_format)

        return [
            PlainStateHolder(LayerState({name: begun(t, device) for name, t in layer.items()}))
            for layer, device in zip(self._rows(count), devices, strict=True)
        ]

    def to_cache(self, model: Any, count: int = 1) -> VisualRWKVCache:
        """Return a cache in which `count` samples have read nothing yet and begin with this state."""
        return initial_cache(self, model, count)

    # --- files ----------------------------------------------------------------------------------------

    @property
    def identity(self) -> str:
        """A hash of the values."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode() + tensor.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write the state into `folder` as `tuned_state.safetensors`, whole or not at all."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        base = Path(self.base_model)
        about = {
            "base_model": base.name if base.is_dir() else self.base_model,  # a path means nothing elsewhere
            "fingerprint": self.fingerprint,
        }
        tensors = {name: t.detach().float().cpu().contiguous() for name, t in self.state_dict().items()}
        replace_file(Path(folder) / FILE_NAME, save(tensors, {"format": FORMAT, "about": json.dumps(about)}))

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike, model: Any = None, **hub: Any) -> TunedState:
        """Read a state from a folder, or from a repository of the Hub.

        Args:
            source: the folder or the repository's id.
            model: the model that it is for; None leaves the check to its use.
            hub: options of `huggingface_hub.hf_hub_download`, e.g. `revision` and `token`; for a repository only.

        Raises:
            ValueError: the file is no tuned state, or another model's.
            OSError: there is none, or it cannot be fetched.
        """
        path = Path(source) / FILE_NAME
        if not Path(source).is_dir():
            from huggingface_hub import hf_hub_download
            from huggingface_hub.errors import HFValidationError

            try:
                path = Path(hf_hub_download(str(source), FILE_NAME, **hub))
            except HFValidationError as error:
                raise FileNotFoundError(f"There is no folder {source}.") from error
        elif not path.is_file():
            raise FileNotFoundError(f"There is no {FILE_NAME} in {source}.")
        tensors, about = _read(path)
        count = about["fingerprint"]["num_hidden_layers"]
        state = cls(_by_layer(path, tensors, count), about["base_model"], about["fingerprint"])
        if model is None:
            return state
        state.refuse_other_model(model)
        return state.to(compute_device(model))

    def push_to_hub(
        self, repo_id: str, token: str | None = None, private: bool | None = None, **upload: Any
    ) -> None:
        """Upload the state to a repository of the Hub, which is made if there is none.

        Args:
            repo_id: of the repository. Files other than the state's own stay as they are.
            token: the one to use; None takes the user's own.
            private: whether a new repository is private; None leaves that to the owner's settings.
            upload: options of `HfApi.upload_folder` such as `commit_message`, `revision` and `create_pr`.
        """
        import tempfile

        from huggingface_hub import HfApi

        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api.upload_folder(repo_id=repo_id, folder_path=folder, **upload)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES} bytes.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        about = json.loads(metadata["about"])
        sizes = [about["fingerprint"][name] for name in ("hidden_size", "num_hidden_layers")]
        is_ours = metadata.get("format") == FORMAT and all(type(n) is int and 0 < n < 2**16 for n in sizes)
        is_ours &= isinstance(about["base_model"], str)
    except (SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not a tuned state.") from error
    if not is_ours or not all(
        t.dtype == torch.float32 and bool(t.isfinite().all()) for t in tensors.values()
    ):
        raise ValueError(f"{path} is not a tuned state of finite numbers in float32.")
    return tensors, about


def _by_layer(path: Path, tensors: dict[str, Tensor], count: int) -> list[dict[str, Tensor]]:
    layers: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name, tensor in tensors.items():
        parts = name.split(".")
        if len(parts) != 3 or parts[0] != "layers" or not parts[1].isdecimal() or int(parts[1]) >= count:
            raise ValueError(f"{path} is not a tuned state: it has a tensor {name[:60]!r}.")
        layers[int(parts[1])][parts[2]] = tensor
    if not any(layers) or any(layer and WKV not in layer for layer in layers):
        raise ValueError(f"{path} is not a tuned state: a layer has no WKV state.")
    return layers


def initial_cache(
    initial: TunedState | Sequence[TunedState | None], model: Any, count: int
) -> VisualRWKVCache:
    """Return a cache in which `count` samples have read nothing, each beginning with its tuned state; None is zeros.

    Raises:
        ValueError: there are not as many states as samples, or one is another model's.
    """
    states: Iterable[TunedState | None]
    states = [initial] * count if isinstance(initial, TunedState) else list(initial)
    if len(states) != count:
        raise ValueError(f"initial_state has {len(states)} states, the inputs are of {count} samples.")
    for state in {id(state): state for state in states if state is not None}.values():
        state.refuse_other_model(model)
    begun = [TunedState.of(model) if state is None else state for state in states]
    rows = [state._rows(1) for state in begun]
    layers = [
        {
            name: torch.cat([layer[name].detach().to(device) for layer in of_layer]).to(
                model.dtype if of_layer[0][name].dim() == 2 else torch.float32
            )
            for name in of_layer[0]
        }
        for device, *of_layer in zip(block_devices(model), *rows, strict=True)
    ]
    return VisualRWKVCache.from_layers(layers, 0)


class InitialStates:
    """Take a cache's place in a forward pass through which gradients flow to the inputs: it begins, and keeps nothing.

    A cache keeps its states in place, which the backward pass would find overwritten.

    Attributes:
        layers: for each layer what holds its states.

    Raises:
        ValueError: as `initial_cache`; or the model is training with gradient checkpointing, which takes no cache.
    """

    is_empty = False

    def __init__(self, initial: TunedState | Sequence[TunedState | None], model: Any, count: int):
        if model.training and text_model_of(model).gradient_checkpointing:
            raise ValueError(
                "initial_state and gradient checkpointing exclude each other: call model.eval(), or attach the state."
            )
        tensors = initial_cache(initial, model, count).layer_tensors()
        self.layers = [PlainStateHolder(LayerState(dict(layer))) for layer in tensors]

    def advance(self, num_tokens: int) -> None:
        """Count nothing: nobody asks how many tokens were read."""


def identity_of(initial: TunedState | Sequence[TunedState | None]) -> str:
    """Return a name for what a reading begins with, under which its states are stored."""
    states = [initial] if isinstance(initial, TunedState) else initial
    return " ".join("zeros" if state is None else state.identity for state in states)


def store_of_beginning(
    store: StateStore | None, model: Any, initial: TunedState | Sequence[TunedState | None] | None
) -> StateStore | None:
    """Return the part of `store` whose states began as a reading begins: with `initial`, or as `model` does."""
    if store is None:
        return None
    store, begun = store.of_model(model), _beginning(model, initial)
    return store if begun is None else store.of_beginning(identity_of(begun))


def identity_of_beginning(model: Any, initial: TunedState | None) -> str | None:
    """Return the identity of what a reading of one sample begins with; None for zeros."""
    begun = _beginning(model, initial)
    return None if begun is None else begun.identity


def _beginning(model: Any, initial: Any) -> Any:
    """Return what a reading begins with: `initial`, or else what is attached to `model`; None for zeros."""
    return attached(model) if initial is None else initial


def attached(model: Any) -> TunedState | None:
    """Return the tuned state that `model` begins with, if any."""
    return getattr(text_model_of(model), ATTRIBUTE, None)


__all__ = ["TunedState"]
