"""Opening pictures: every kind of picture, the formats and sizes that are opened, and refusals."""

import base64
import http.server
import io
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny import one_encoder, picture
from tiny_training import tiny_model, tiny_processor

from visualrwkv_hf import pictures
from visualrwkv_hf.pictures import FORMATS, open_picture, to_rgb

# --- kinds of pictures ----------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "HSV", "RGBX"])
def test_mode_is_converted_as_pillow_does(mode):
    image = picture().convert("L").convert(mode) if mode == "PA" else picture().convert(mode)
    assert to_rgb(image).mode == "RGB"
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


def test_transparency_is_dropped_not_blended():
    image = picture().convert("RGBA")
    image.putalpha(0)
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(picture()))


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_grey_of_16_bits_is_scaled_not_clipped(mode):
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    dtype = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    image = Image.frombytes(mode, (16, 16), values.astype(dtype).tobytes())
    assert np.array_equal(np.asarray(to_rgb(image)), np.repeat(np.arange(256).reshape(16, 16, 1), 3, axis=-1))


def test_16_bit_png_is_scaled(tmp_path):
    Image.fromarray(np.full((4, 4), 32896, dtype=np.uint16)).save(tmp_path / "deep.png")
    assert np.asarray(open_picture(tmp_path / "deep.png")).tolist() == [[[128] * 3] * 4] * 4


def test_values_outside_a_modes_range_are_refused():
    with pytest.raises(ValueError, match="from 0 to 65535, got -1 to 70000"):
        to_rgb(Image.fromarray(np.array([[-1, 70000]], dtype=np.int32)))
    with pytest.raises(ValueError, match=r"from 0 to 255, got 0 to 256\.5"):
        to_rgb(Image.fromarray(np.array([[0, 256.5]], dtype=np.float32)))


def test_arrays_and_tensors_are_the_picture():
    image = picture()
    pixels = np.asarray(image)
    same = {
        "channels last": pixels,
        "channels first": np.moveaxis(pixels, -1, 0),
        "tensor": torch.from_numpy(pixels.copy()),
        "float": pixels / 255,
        "float16": (pixels / 255).astype(np.float16),
        "float tensor": torch.from_numpy(pixels / 255).permute(2, 0, 1),
        "int64": pixels.astype(np.int64),
        "uint16": pixels.astype(np.uint16) * 257,
        "alpha": np.dstack([pixels, np.zeros((30, 40), dtype=np.uint8)]),
    }
    for name, array in same.items():
        assert np.array_equal(np.asarray(open_picture(array)), pixels), name
    grey = pixels[..., 0]
    for array in (grey, grey[..., None], grey[None], grey / 255):
        assert np.array_equal(np.asarray(open_picture(array)), np.dstack([grey] * 3))
    assert np.asarray(open_picture(np.array([[True, False]]))).tolist() == [[[255] * 3, [0] * 3]]
    batch = one_encoder()(np.stack([pixels, pixels]))["pixel_values"]
    assert np.array_equal(batch[0], batch[1]) and len(batch) == 2


def test_an_array_means_the_same_to_every_tower():
    """transformers' own processors would take True for 1 of 255, and 0.5 for 0.5 of 255."""
    processor = tiny_processor(tiny_model())
    pixels = np.asarray(picture(60, 60))

    def seen(images, **options) -> np.ndarray:
        return np.stack(processor(images=images, text="<image>", **options)["pixel_values"])

    expected = seen(Image.fromarray(pixels))
    first = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
    for array in (
        pixels,
        first,
        pixels / 255,
        torch.from_numpy(first),
        pixels[None],
        pixels.astype(np.int64),
    ):
        assert np.array_equal(seen(array), expected)
    assert np.array_equal(seen(first, input_data_format="channels_first"), expected)
    assert np.array_equal(seen(pixels / 255, do_rescale=False), seen(first / 255, do_rescale=False))
    white = seen(Image.new("RGB", (60, 60), "white"))
    assert np.array_equal(seen(np.full((60, 60), True)), white)
    for strange in (np.full((9, 9), 1j), np.full((9, 9, 3), "x"), np.full((9, 9, 3), None)):
        with pytest.raises(ValueError, match=r"Picture 1: .* must hold bool, integers or floats, got"):
            seen(strange)


def test_three_by_three_array_asks_for_its_layout():
    pixels = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    last = open_picture(pixels, "channels_last")
    first = open_picture(pixels, "channels_first")
    assert np.array_equal(np.asarray(last), pixels)
    assert np.array_equal(np.asarray(first), np.moveaxis(pixels, 0, -1))


def test_files_paths_and_base64_are_the_picture(tmp_path):
    image, path = picture(), tmp_path / "a.png"
    image.save(path)
    text = base64.b64encode(path.read_bytes()).decode()
    for source in (path, str(path), text, f"data:image/png;base64,{text}", image):
        assert np.array_equal(np.asarray(open_picture(source)), np.asarray(image))
    nested = one_encoder()([[str(path)], [image, path]])["pixel_values"]
    assert len(nested) == 3 and np.array_equal(nested[0], nested[2])


def test_texts_of_a_file_are_not_kept(tmp_path):
    """A few kilobytes of a PNG can hold many megabytes of them."""
    texts = PngInfo()
    texts.add_text("note", "x" * 2**16, zip=True)
    for mode in ("RGB", "P"):
        picture().convert(mode).save(tmp_path / "a.png", pnginfo=texts)
        assert not open_picture(tmp_path / "a.png").info


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert open_picture(tmp_path / "a.gif").getpixel((0, 0)) == (255, 0, 0)


def test_a_file_is_turned_upright_and_an_opened_picture_is_not(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    picture(40, 30).save(tmp_path / "turned.png", exif=exif)
    assert open_picture(tmp_path / "turned.png").size == (30, 40)
    assert open_picture(Image.open(tmp_path / "turned.png")).size == (40, 30)


# --- refusals -------------------------------------------------------------------------------------


def truncated_png() -> bytes:
    buffer = io.BytesIO()
    picture(100, 100).save(buffer, "PNG")
    return buffer.getvalue()[:4000]


@pytest.mark.parametrize("content", [b"", b"no picture", truncated_png()], ids=["empty", "text", "truncated"])
def test_file_that_is_no_picture_is_named(tmp_path, content):
    path = tmp_path / "broken.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"Picture 2: '.*broken\.png' cannot be read as a picture"):
        one_encoder()([picture(), path])


@pytest.mark.parametrize("kind", ["file", "bytes", "base64", "opened"])
def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch, kind):
    path, image = tmp_path / "big.png", picture(40, 30)
    image.save(path)
    content = path.read_bytes()
    sources = {
        "file": path,
        "bytes": content,
        "base64": base64.b64encode(content).decode(),
        "opened": Image.open(path),
    }
    assert open_picture(sources[kind], max_pixels=1200).size == (40, 30)
    sources["opened"] = Image.open(path)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("was decoded"))
    with pytest.raises(ValueError, match=r"is too large: .*, and at most 1,199 pixels are decoded"):
        open_picture(sources[kind], max_pixels=1199)


def test_pillows_own_limit_holds_too(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    picture(40, 30).save(tmp_path / "big.png")
    with pytest.raises(ValueError, match=r"big\.png.* is too large: at most 200 pixels are decoded"):
        open_picture(tmp_path / "big.png")


def test_a_small_file_of_many_pixels_is_refused(tmp_path):
    """A black PNG of 20,000 x 20,000 pixels has 49 kB, and would take 1.2 GB."""
    monster = Image.new("1", (20_000, 20_000))
    monster.save(tmp_path / "bomb.png")
    assert (tmp_path / "bomb.png").stat().st_size < 100_000
    with pytest.raises(
        ValueError, match=r"bomb\.png' cannot be read as a picture: it is too large: at most 178,9"
    ):
        open_picture(tmp_path / "bomb.png")


READABLE = [name for name in FORMATS if name in pictures._readable_formats()]
REFUSED = ["PPM", "TGA", "ICO", "PCX", "EPS", "PDF", "IM", "SGI", "JPEG2000", "DDS", "QOI"]
"""Formats that Pillow writes, and reads but for PDF, and that nobody needs from a stranger."""


@pytest.mark.parametrize("name", READABLE)
def test_usual_formats_are_opened(tmp_path, name):
    picture().save(tmp_path / "a", format=name)
    assert open_picture(tmp_path / "a").size == (40, 30)


@pytest.mark.parametrize("name", REFUSED)
def test_other_formats_are_refused(tmp_path, name):
    path = tmp_path / "a.png"
    try:
        picture().save(path, format=name)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow does not write {name}")
    sources = [path, path.read_bytes(), base64.b64encode(path.read_bytes()).decode()]
    for source in sources:
        with pytest.raises(ValueError, match="not a file in one of the formats PNG, JPEG, WEBP"):
            open_picture(source)
    with pytest.raises(ValueError, match=r"Picture 1: .*not a file in one of the formats"):
        tiny_processor(tiny_model())(images=[str(path)], text="<image>")


@pytest.mark.parametrize("source", ["damaged", "cut", "text", "short"])
def test_errors_quote_no_contents_and_no_addresses(source):
    content = truncated_png()
    text = {
        "damaged": base64.b64encode(b"x" * 9 + content).decode(),
        "cut": base64.b64encode(content).decode(),
        "text": "!" * 100_000,
        "short": base64.b64encode(content[:60]).decode(),
    }[source]
    for given in (text, f"data:image/png;base64,{text}", f"DATA:image/PNG;base64,{text}"):
        with pytest.raises(ValueError) as caught:
            open_picture(given)
        message = str(caught.value)
        assert len(message) < 400 and "0x" not in message and text[:40] not in message


@pytest.fixture
def served():
    """A server on this machine; yields its address and what it serves, by path."""
    pages: dict[str, bytes] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200 if self.path in pages else 404)
            self.end_headers()
            self.wfile.write(pages.get(self.path, b""))

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", pages
        server.shutdown()


def test_a_url_is_downloaded_within_limits(served, monkeypatch):
    address, pages = served
    buffer = io.BytesIO()
    picture().save(buffer, "PNG")
    pages |= {"/a.png": buffer.getvalue(), "/secret": b"password=1234" * 100}
    assert np.array_equal(np.asarray(open_picture(f"{address}/a.png")), np.asarray(picture()))
    with pytest.raises(ValueError, match="/secret' cannot be read as a picture: it is not a file") as caught:
        open_picture(f"{address}/secret")
    assert "password" not in str(caught.value) and "cGFzc3dvcmQ" not in str(caught.value)
    with pytest.raises(ValueError, match=r"/missing' cannot be read as a picture: .*404"):
        open_picture(f"{address}/missing")
    monkeypatch.setattr(pictures, "MAX_DOWNLOAD_BYTES", 1000)
    with pytest.raises(ValueError, match="the download is larger than 1,000 bytes"):
        open_picture(f"{address}/a.png")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "NoneType cannot be read as a picture: it must be a Pillow picture"),
        ("/no/such/file.png", "'/no/such/file.png' cannot be read"),
        (b"bytes", "bytes cannot be read"),
        (Image.new("RGB", (0, 5)), "it has no pixels: its size is 0 x 5"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"without pixels: shape \(0, 4, 3\)"),
        (np.zeros((5, 4, 2), dtype=np.uint8), "channel"),
        (np.zeros(4), r"got shape \(4,\)"),
        (np.full((4, 4), 7.5), "dtype float64 must have values from 0 to 1, got 7.5 to 7.5"),
        (np.full((4, 4), np.nan), "got nan to nan"),
        (np.full((4, 4), 1j), "must hold bool, integers or floats, got complex128"),
        (np.full((4, 4, 3), 1, dtype=np.complex64), "got complex64"),
        (np.full((4, 4), "x"), "got <U1"),
        (np.full((4, 4), b"x"), r"got \|S1"),
        (np.full((4, 4), None), "got object"),
        (np.zeros((4, 4), dtype="datetime64[s]"), r"got datetime64\[s\]"),
        (np.zeros((4, 4), dtype=[("r", "u1"), ("g", "u1")]), "floats, got"),
        (torch.zeros(4, 4, dtype=torch.complex64), "got complex64"),
        (np.full((4, 4), 300), "dtype int64 must have values from 0 to 255, got 300 to 300"),
    ],
)
def test_what_is_no_picture_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        open_picture(source)
