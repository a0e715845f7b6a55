"""A scheduler that never cuts a picture, for models whose layers read the patches in different orders."""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler


class _WholePictures:
    """Completes `disable_chunked_mm_input`.

    With that option vLLM stops before a picture that does not fit into what is left of a step. But in the next step
    the request begins exactly at the picture, and there vLLM (0.32) cuts it if other requests have left too few
    tokens.
    """

    def _try_schedule_encoder_inputs(
        self,
        request: Any,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple:
        end = num_computed_tokens + num_new_tokens
        for feature in request.mm_features:
            first, length = feature.mm_position.offset, feature.mm_position.length
            if num_computed_tokens == first and end < first + length:
                return [], 0, encoder_compute_budget, [], []  # the request waits for the next step
        return super()._try_schedule_encoder_inputs(  # type: ignore[misc]
            request, num_computed_tokens, num_new_tokens, encoder_compute_budget, *args, **kwargs
        )


class WholePictureScheduler(_WholePictures, Scheduler):
    """vLLM's scheduler, which never cuts a picture."""


class WholePictureAsyncScheduler(_WholePictures, AsyncScheduler):
    """vLLM's scheduler for asynchronous steps, which never cuts a picture."""


def whole_picture_scheduler(*, vllm_config: Any, **kwargs: Any) -> Scheduler:
    """Return the scheduler that the engine's configuration asks for: whether steps are asynchronous is known late."""
    is_async = vllm_config.scheduler_config.async_scheduling
    cls = WholePictureAsyncScheduler if is_async else WholePictureScheduler
    return cls(vllm_config=vllm_config, **kwargs)
