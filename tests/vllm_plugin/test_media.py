"""Loading a picture by its URL: which errors are the client's, and which are not."""

from types import SimpleNamespace

import pytest

aiohttp = pytest.importorskip("aiohttp", reason="comes with vLLM")

DATA, ADDRESS = "data:image/png;base64,AAAA", "http://127.0.0.1/picture.png"


@pytest.mark.parametrize(
    "url, raised, kind, said",
    [
        (DATA, OSError("secret"), ValueError, "The picture could not be read."),
        (DATA, SyntaxError("secret"), ValueError, "The picture could not be read."),
        (ADDRESS, aiohttp.ClientError("secret"), ValueError, "The picture could not be fetched."),
        (ADDRESS, TimeoutError("secret"), ValueError, "The picture could not be fetched."),
        (DATA, MemoryError("its own"), MemoryError, "its own"),
        (DATA, RuntimeError("its own"), RuntimeError, "its own"),
        (ADDRESS, NotImplementedError("its own"), NotImplementedError, "its own"),
        (ADDRESS, AttributeError("its own"), AttributeError, "its own"),
    ],
)
def test_only_what_a_client_can_cause_is_its_error(url, raised, kind, said):
    from vllm.multimodal.media import ImageMediaIO

    from visualrwkv_hf.vllm.media import PictureConnector

    def fail(*args, **options):
        raise raised

    pictures = ImageMediaIO()
    pictures.load_base64 = fail
    connector = PictureConnector(connection=SimpleNamespace(get_bytes=fail))
    with pytest.raises(kind) as error:
        connector.load_from_url(url, pictures)
    assert (type(error.value), str(error.value)) == (kind, said)
