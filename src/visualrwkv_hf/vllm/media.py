"""Pictures that a request names: what cannot be loaded is the client's error, in a sentence."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partialmethod
from typing import Any

import aiohttp
from PIL import Image
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector

from ..pictures import pillows_limit

FAILURES = (OSError, aiohttp.ClientError, EOFError, SyntaxError, struct.error)
"""The errors of a fetch, and of Pillow's decoders for a damaged file, that are no `ValueError`."""


class PictureConnector(MediaConnector):
    """vLLM's loader of pictures by URL, whose every refusal has a status of 4xx.

    vLLM (0.32) answers a picture of too many pixels, a local file and an address that does not answer with 500, as if
    its server had failed. It also makes pictures RGB in another way than `to_rgb`, which gets them as they are here.
    """

    fetch_image = partialmethod(MediaConnector.fetch_image, image_mode=None)
    fetch_image_async = partialmethod(MediaConnector.fetch_image_async, image_mode=None)

    def load_from_url(self, url: str, *args: Any, **kwargs: Any) -> Any:
        """Load what a URL names.

        Raises:
            ValueError: it cannot be loaded. Other errors of vLLM stay as they are if their status is 4xx.
        """
        with self._clients_error(url):
            return super().load_from_url(url, *args, **kwargs)

    async def load_from_url_async(self, url: str, *args: Any, **kwargs: Any) -> Any:
        """Load what a URL names; see `load_from_url`."""
        with self._clients_error(url):
            return await super().load_from_url_async(url, *args, **kwargs)

    @contextmanager
    def _clients_error(self, url: str) -> Iterator[None]:
        scheme = url[:5].lower()
        if scheme == "file:" and self.allowed_local_media_path is None:
            raise ValueError(
                "Cannot load local files: the server was started without --allowed-local-media-path."
            )
        try:
            yield
        except Image.DecompressionBombError as error:
            raise ValueError(f"The picture is too large: {pillows_limit()}.") from error
        except NotImplementedError as error:
            if scheme != "data:":
                raise
            raise ValueError("A data URL must be base64.") from error
        except FAILURES as error:  # why a fetch has failed would tell about the network behind the server
            verb = "read" if scheme in ("data:", "file:") else "fetched"
            raise ValueError(f"The picture could not be {verb}.") from error


def register_picture_connector() -> None:
    """Have the servers of this process load pictures with `PictureConnector`."""
    MEDIA_CONNECTOR_REGISTRY.register("http")(PictureConnector)
