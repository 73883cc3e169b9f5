"""Pictures of every kind: read as RGB, alike in the pipeline and from a dataset, in bounded memory."""

import contextlib
import functools
import http.server
import io
import json
import sys
import threading
import time
from base64 import b64encode, encodebytes

import numpy as np
import pytest
import torch
from conftest import run_script
from PIL import EpsImagePlugin, Image, ImageFile
from transformers import CLIPImageProcessor, DetrImageProcessor, ViTImageProcessor

from mmcot.pictures.reading import read_pictures
from mmcot.problems.sources import load_problems
from modeling_mmcot import pictures_mmcot
from modeling_mmcot.pictures_mmcot import (
    MAX_PIXELS,
    as_pictures,
    as_rgb,
    build_image_processor,
    in_pillow_backend,
    stack_pixels,
)
from modeling_mmcot.vision_mmcot import TOWERS


def read_both_ways(file):
    """Read a file as the pipeline and as training and prediction do, and check that the pictures are equal."""
    row = {"question": "What is it?", "images": [file.name]}
    (file.parent / "problems.jsonl").write_text(json.dumps(row))
    (problem,) = load_problems(f"test={file.parent / 'problems.jsonl'}", "test")
    (from_path,), (from_problem,) = as_pictures(file), as_pictures(read_pictures(problem))
    assert from_path.tobytes() == from_problem.tobytes() and from_path.size == from_problem.size
    assert from_path.mode == "RGB"
    return from_path


def test_drops_transparency(tmp_path):
    picture = Image.new("RGBA", (8, 6), (10, 20, 30, 0))
    picture.save(tmp_path / "x.png")
    assert read_both_ways(tmp_path / "x.png").getpixel((3, 3)) == (10, 20, 30)


@pytest.mark.parametrize("transparent", [False, True])
def test_converts_palette_to_rgb(tmp_path, transparent):
    picture = Image.new("P", (8, 6), 1)
    picture.putpalette([0, 0, 0, 200, 100, 50])
    picture.save(tmp_path / "x.png", **({"transparency": 0} if transparent else {}))
    assert read_both_ways(tmp_path / "x.png").getpixel((3, 3)) == (200, 100, 50)


def test_scales_16_bit_grey(tmp_path):
    picture = Image.new("I;16", (3, 1))
    for column, value in enumerate((0, 32768, 65535)):
        picture.putpixel((column, 0), value)
    picture.save(tmp_path / "x.png")
    assert [read_both_ways(tmp_path / "x.png").getpixel((n, 0))[0] for n in range(3)] == [0, 127, 255]


def test_converts_cmyk_to_rgb(tmp_path):
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(tmp_path / "x.jpg", quality=100)
    red, green, blue = read_both_ways(tmp_path / "x.jpg").getpixel((9, 9))
    assert red > 240 and green < 15 and blue < 15


def test_applies_exif_orientation(tmp_path):
    picture = Image.new("RGB", (40, 20), "white")
    picture.paste("red", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees: the first column is the top row
    picture.save(tmp_path / "x.png", exif=exif)
    upright = read_both_ways(tmp_path / "x.png")
    assert upright.size == (20, 40)
    assert upright.getpixel((10, 5)) == (255, 0, 0) and upright.getpixel((10, 35)) == (255, 255, 255)


def test_reads_first_frame_of_animation(tmp_path):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for name in ("x.gif", "x.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=50, lossless=True)
        assert read_both_ways(tmp_path / name).getpixel((3, 3)) == (255, 0, 0)


PROCESSORS = {
    "paper_detr": TOWERS["detr"].paper_image_processor,
    "paper_vit": TOWERS["vit"].paper_image_processor,
    "detr": {"image_processor_type": "DetrImageProcessor"},
    "clip": {"image_processor_type": "CLIPImageProcessor"},
}


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1), (20000, 30)])
@pytest.mark.parametrize("name", PROCESSORS)
def test_bounds_pixels_of_extreme_shapes(tmp_path, name, size):
    Image.new("RGB", size, "red").save(tmp_path / "x.png")
    pixels = build_image_processor(PROCESSORS[name])(read_both_ways(tmp_path / "x.png"), return_tensors="pt")
    assert pixels["pixel_values"].shape[1] == 3 and 0 < pixels["pixel_values"].numel() <= 3 * MAX_PIXELS


MEMORY_OF_A_BATCH = """
import resource, sys
from transformers import ViTImageProcessor
from modeling_mmcot.pictures_mmcot import as_pictures, build_image_processor, stack_pixels

processor = build_image_processor(ViTImageProcessor().to_dict())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
problems = [as_pictures(path) for path in sys.argv[1:]]
pixels = [[processor(picture, return_tensors="pt")["pixel_values"][0] for picture in problem] for problem in problems]
stack_pixels(pixels)
print(problems[0][0].size, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_reads_60_megapixels_in_bounded_memory(tmp_path):
    """Each of the eight pictures in a batch is shrunk before the next is decoded."""
    Image.new("RGB", (10_000, 6_000), "red").save(tmp_path / "x.jpg")
    *size, mebibytes = run_script("-c", MEMORY_OF_A_BATCH, *[tmp_path / "x.jpg"] * 8).stdout.split()
    assert size == ["(5000,", "3000)"]
    assert int(mebibytes) < 800, "8 x 43 MiB of shrunk pictures and one decoded; eight at full size are 1,373 MiB"


def test_decodes_large_jpeg_at_reduced_size(tmp_path, monkeypatch):
    """Both ways of reading do so, and the result looks like a full decode that is shrunk afterwards."""
    smooth = Image.linear_gradient("L").resize((6000, 4500))
    picture = Image.merge("RGB", (smooth, smooth, smooth.transpose(Image.Transpose.FLIP_TOP_BOTTOM)))
    picture.save(tmp_path / "x.jpg", quality=95)
    whole = as_rgb(Image.open(tmp_path / "x.jpg"))
    decoded = []
    load = ImageFile.ImageFile.load
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: decoded.append(self.size) or load(self))
    shrunk = read_both_ways(tmp_path / "x.jpg")
    assert set(decoded) == {(3000, 2250)} and shrunk.size == whole.size == (3000, 2250)
    assert np.abs(np.asarray(shrunk, dtype=int) - np.asarray(whole)).max() <= 4


def test_refuses_decompression_bomb(tmp_path, monkeypatch):
    """Pillow refuses pictures above twice its limit, which is lowered here so that a small picture exceeds it."""
    file = tmp_path / "x.png"
    Image.new("RGB", (300, 300)).save(file)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    with pytest.raises(ValueError, match="x.png.*too large.*90000 pixels"):
        as_pictures(file)
    with pytest.raises(ValueError, match="x.png is too large.*90000 pixels.*MAX_IMAGE_PIXELS"):
        read_pictures({"id": "1", "images": [{"bytes": None, "path": str(file)}]})


def encode_noise(file_format, size=(24, 18), **options):
    file = io.BytesIO()
    Image.effect_noise(size, 90).convert("RGB").save(file, file_format, **options)
    return file.getvalue()


# Pillow's decoder raises TypeError for the first, and its EXIF reader SyntaxError for the second.
DAMAGED = [
    encode_noise("TIFF").replace(b"\x11\x01\x04\x00\x01", b"\x11\x01\x07\x00\x01"),  # a strip offset of type bytes
    encode_noise("PNG", exif=b"Exif\x00\x00no exif at all"),
]


@pytest.mark.parametrize("content", DAMAGED, ids=["TypeError", "SyntaxError"])
def test_decoder_errors_get_the_usual_message(content):
    with pytest.raises(ValueError, match="picture given as bytes is not a complete image that Pillow can read"):
        as_pictures(content)


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_refuses_incomplete_picture(tmp_path, content):
    if content is None:
        file = io.BytesIO()
        Image.effect_noise((64, 64), 90).save(file, "PNG")
        content = file.getvalue()[:2000]
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match="picture .*x.png is not a complete image that Pillow can read"):
        as_pictures(str(tmp_path / "x.png"))


def test_refuses_object_that_is_neither_picture_nor_path():
    with pytest.raises(FileNotFoundError, match="picture 'nowhere.png': there is no such file"):
        as_pictures("nowhere.png")
    long = "A" * 1_000_001
    for value in (
        *(long, "data:image/png;base64," + "?" * 1_000_001, f"http://127.0.0.1:1/{long}", f"http://{long}"),
        *(f"http://a b/{long}", {"bytes": b"x", "path": long}, [[long]]),
    ):
        with pytest.raises(ValueError, match="base64|complete image|cannot be downloaded|a picture must be") as error:
            as_pictures(value)
        assert len(str(error.value)) < 1000, "messages shorten long values"
    with pytest.raises(FileNotFoundError, match="aaa….*png': there is no such file"):
        as_pictures("a" * 900 + ".png")


def test_every_input_type_gives_the_same_picture(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    picture = Image.effect_noise((50, 40), 80).convert("RGB")
    picture.save(tmp_path / "x.png")
    content, array = (tmp_path / "x.png").read_bytes(), np.asarray(picture)
    base64 = b64encode(content).decode()
    for kind in (
        *(picture, content, bytearray(content), io.BytesIO(content), (tmp_path / "x.png").open("rb")),
        *("~/x.png", tmp_path / "x.png", np.str_(tmp_path / "x.png"), {"bytes": None, "path": str(tmp_path / "x.png")}),
        *(base64, f"data:image/png;base64,{base64}", encodebytes(content).decode(), {"bytes": content, "path": None}),
        *(
            array,
            array / 255,
            array.transpose(2, 0, 1),
            torch.tensor(array),
            torch.tensor(array).permute(2, 0, 1) / 255,
            np.ascontiguousarray(array[:, :, ::-1])[:, :, ::-1],  # negative strides, as after OpenCV's BGR to RGB
            array.astype(np.uint16),
            array.astype(np.int64),
        ),
    ):
        assert as_pictures(kind)[0].tobytes() == picture.tobytes(), type(kind)
    assert as_pictures(np.zeros((4, 6), dtype=np.uint8))[0].size == (6, 4)


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros((4, 5, 4)), r"\(4, 5, 4\)"),
        (np.zeros((2, 4, 5, 3)), r"\(2, 4, 5, 3\)"),
        (np.zeros((0, 5, 3)), r"\(0, 5, 3\)"),
        (np.zeros(5), r"\(5,\)"),
        (np.full((4, 5, 3), 1.5), "float64 from 1.5"),
        (np.full((4, 5), np.nan), "float64 from nan"),
        (np.full((4, 5), -1), "int64 from -1"),
        (np.full((4, 5), 4096, dtype=np.uint16), "uint16 from 4096"),
        (np.ones((4, 5), dtype=bool), "bool"),
        (np.ones((4, 5), dtype=complex), "complex128"),
        (np.full((4, 5), None), "object"),
        (torch.ones(4, 5, dtype=torch.bool), "torch.bool"),
    ],
)
def test_refuses_array_that_is_no_picture(array, found):
    with pytest.raises(ValueError, match=f"a picture as an array .*found .*{found}"):
        as_pictures(array)


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n0 0 moveto\nshowpage\n%%EOF\n"


def test_refuses_postscript_picture(tmp_path, monkeypatch):
    """Under any file name, in the pipeline and from a dataset."""
    (tmp_path / "x.png").write_bytes(POSTSCRIPT)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was started"))
    for kind in (tmp_path / "x.png", POSTSCRIPT, {"bytes": POSTSCRIPT, "path": "x.png"}):
        with pytest.raises(ValueError, match="not a complete image that Pillow can read"):
            as_pictures(kind)
    with Image.open(tmp_path / "x.png") as opened, pytest.raises(ValueError, match="in the format EPS"):
        as_pictures(opened)  # as a server passes an uploaded picture
    with pytest.raises(ValueError, match="not an image that Pillow can read"):
        read_pictures({"id": "1", "images": [{"bytes": None, "path": str(tmp_path / "x.png")}]})


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves the files of a folder, and redirects; the response to /slow never ends."""

    def do_GET(self):
        if self.path.startswith("/to="):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to="))
            self.end_headers()
        elif self.path == "/slow":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.02)
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    """The address of a server, and the folder whose files it serves."""
    handler = functools.partial(Handler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", tmp_path
        server.shutdown()


def test_reads_url_and_refuses_damaged_or_absent_picture(served):
    address, folder = served
    (folder / "damaged.png").write_bytes(b"no picture")
    Image.new("RGB", (30, 20), "red").save(folder / "red.png")
    for url in (f"{address}/red.png", f"{address}/to=/red.png", f"{address}/to={address}/red.png"):
        assert as_pictures(url)[0].size == (30, 20)
    with pytest.raises(ValueError, match="damaged.png is not a complete image that Pillow can read"):
        as_pictures(f"{address}/damaged.png")
    with pytest.raises(ValueError, match="absent.png cannot be downloaded: .*404"):
        as_pictures(f"{address}/absent.png")


@pytest.mark.parametrize(
    "url", ["http://exa mple/x", "http://", "http://[::1", "http://\udcff/", "http://127.0.0.1:x/"]
)
def test_refuses_invalid_url(url):
    with pytest.raises(ValueError, match="picture http://.* cannot be downloaded"):
        as_pictures(url)


def test_limits_size_and_time_of_picture_download(served, monkeypatch):
    address, folder = served
    (folder / "large.png").write_bytes(encode_noise("PNG", (300, 300)))
    monkeypatch.setattr(pictures_mmcot, "MAX_DOWNLOAD", 1000)
    with pytest.raises(ValueError, match="large.png is larger than 1000 bytes"):
        as_pictures(f"{address}/large.png")
    monkeypatch.setattr(pictures_mmcot, "MAX_DOWNLOAD_TIME", 0.3)
    with pytest.raises(ValueError, match="slow cannot be downloaded: it takes longer than 0.3 seconds"):
        as_pictures(f"{address}/slow")


def test_refuses_redirect_into_private_network(served, monkeypatch):
    address, folder = served
    Image.new("RGB", (30, 20), "red").save(folder / "red.png")
    with pytest.raises(ValueError, match="cannot be downloaded: .*redirects to ftp:.*expected an http or https URL"):
        as_pictures(f"{address}/to=ftp://127.0.0.1/red.png")
    monkeypatch.setattr(pictures_mmcot, "is_public", lambda url: "127.0.0.1" in url)
    with pytest.raises(ValueError, match="cannot be downloaded: .*redirects to http://localhost.*is not public"):
        as_pictures(f"{address}/to={address.replace('127.0.0.1', 'localhost')}/red.png")


def test_is_public_recognizes_private_addresses():
    for host in (
        "127.0.0.1",
        "localhost",
        "10.0.0.1",
        "169.254.169.254",
        "[::1]",
        "[fe80::1]",
        "0.0.0.0",
        "2130706433",
    ):
        assert not pictures_mmcot.is_public(f"http://{host}:80/x.png"), host
    for host in ("93.184.216.34", "[2606:2800:220:1::1]", "no-such-host.invalid"):
        assert pictures_mmcot.is_public(f"https://{host}/x.png"), host


def test_keeps_rgb_of_ordinary_size_unchanged():
    picture = Image.effect_noise((90, 70), 80).convert("RGB")
    assert as_rgb(picture).tobytes() == picture.tobytes()


# Pixels.


def test_converts_image_processor_to_pillow_backend():
    picture = Image.effect_noise((333, 222), 80).convert("RGB")
    for processor in (
        DetrImageProcessor(size={"shortest_edge": 50, "longest_edge": 99}),
        ViTImageProcessor(),
        CLIPImageProcessor(),
    ):
        ours = in_pillow_backend(processor)
        assert type(ours).__name__ == f"{type(processor).__name__}Pil" and ours.to_dict() == processor.to_dict()
        assert "torchvision" not in sys.modules[type(ours).__module__].__dict__
        assert in_pillow_backend(ours) is ours
        pixels, theirs = (p(picture, return_tensors="pt")["pixel_values"] for p in (ours, processor))
        assert pixels.shape == theirs.shape and (pixels - theirs).abs().max() < 0.1


@pytest.mark.parametrize("name", ["pipeline", "AutoModel", "BatchFeature", "set_seed", "ViTModel", None, "__name__"])
def test_model_file_loads_only_image_processors(name):
    """`{"image_processor_type": "pipeline", "model": …, "trust_remote_code": true}` ran another repository's code."""
    with pytest.raises(ValueError, match="expected an image processor of transformers"):
        build_image_processor({"image_processor_type": name, "task": "text-generation", "trust_remote_code": True})


@pytest.mark.parametrize(
    "name", ["LayoutLMv2ImageProcessor", "LayoutLMv3ImageProcessorFast", "OneFormerImageProcessor"]
)
def test_image_processor_starts_no_program_and_reads_no_file(name):
    """Such settings of a model's file are Tesseract's command line and a file of another repository."""
    settings = {"tesseract_config": "-c debug_file=x", "repo_path": "evil/repo", "class_info_file": "x.json"}
    with pytest.raises(ValueError, match="starts no program and reads no other file"):
        build_image_processor({"image_processor_type": name, **settings})


@pytest.mark.parametrize("settings", ["pipeline", ["pipeline"], {"image_processor_type": "TimmWrapperImageProcessor"}])
def test_refuses_image_processor_settings_that_are_no_dict(settings):
    with pytest.raises(ValueError, match="expected a dict"):
        build_image_processor(settings)


def test_refuses_unknown_image_processor():
    with pytest.raises(ValueError, match="image_processor_type is 'NoProcessor'"):
        build_image_processor({"image_processor_type": "NoProcessor"})


def test_stacks_pictures_of_different_sizes_and_numbers():
    first, second = torch.ones(3, 4, 6), torch.ones(3, 5, 2)
    batch = stack_pixels([[first, second], [], [second]])
    assert batch["pixel_values"].shape == (3, 2, 3, 5, 6) and batch["pixel_mask"].shape == (3, 2, 5, 6)
    assert batch["pixel_mask"].sum(dim=(2, 3)).tolist() == [[24, 10], [0, 0], [10, 0]]
    assert torch.equal(batch["pixel_values"], batch["pixel_mask"][:, :, None].expand(-1, -1, 3, -1, -1).float())
    assert stack_pixels([[], []]) == {}
