"""Pictures that a request names: what cannot be loaded is the client's error, in a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image
from vllm.exceptions import VLLMError
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from ..pictures import pillows_limit


class PictureConnector(MediaConnector):
    """vLLM's loader of pictures by URL, whose every refusal has a status of 4xx.

    vLLM (0.32) answers a picture of too many pixels, a local file and an address that does not answer with 500, as if
    its server had failed.
    """

    def load_from_url(self, url: str, *args: Any, **kwargs: Any) -> Any:
        """Load what a URL names.

        Raises:
            ValueError: it cannot be loaded. Other errors of vLLM stay as they are if their status is 4xx.
        """
        with _clients_error():
            return super().load_from_url(url, *args, **kwargs)

    async def load_from_url_async(self, url: str, *args: Any, **kwargs: Any) -> Any:
        """Load what a URL names; see `load_from_url`."""
        with _clients_error():
            return await super().load_from_url_async(url, *args, **kwargs)


@contextmanager
def _clients_error() -> Iterator[None]:
    try:
        yield
    except (ValueError, VLLMError):
        raise
    except Image.DecompressionBombError as error:
        raise ValueError(f"The picture is too large: {pillows_limit()}.") from error
    except (NotImplementedError, RuntimeError) as error:  # of URLs that vLLM does not take
        raise ValueError(str(error)) from error
    except Exception as error:  # why a fetch has failed would tell about the network behind the server
        raise ValueError("The picture could not be fetched.") from error


def register_picture_connector() -> None:
    """Have the servers of this process load pictures with `PictureConnector`."""
    MEDIA_CONNECTOR_REGISTRY.register("http")(PictureConnector)
