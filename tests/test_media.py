"""vipo.media: what goes into a file comes out of it, in order; what is broken is named."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from vipo.media import (
    IMAGE_SUFFIXES,
    LOSSLESS_SIDE,
    find_media,
    name_media,
    read_fps,
    read_frames,
    write_animation,
    write_image,
    write_video,
)


def scene(height: int = 24, width: int = 32) -> np.ndarray:
    """Smooth colours that differ in every corner and channel, (Y, X, 3) uint8."""
    rows, columns = np.linspace(0, 200, height)[:, None], np.linspace(0, 200, width)[None]
    return np.stack(np.broadcast_arrays(rows + 30, columns + 20, 230 - (rows + columns) / 2), -1).astype(np.uint8)


def as_frames(picture: np.ndarray) -> Tensor:
    return torch.from_numpy(picture.copy()).movedim(-1, 0)[None].float() / 255


def counting(frames: int, height: int = 32, width: int = 48) -> Tensor:
    """Clip whose frame i has the brightness 20 + 10 i of 255, (F, 3, Y, X)."""
    return ((20 + 10 * torch.arange(frames)) / 255).view(-1, 1, 1, 1).expand(-1, 3, height, width)


def save_video(path: Path, frames: Tensor, codec: str, **options: str) -> None:
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = frames.shape[2], frames.shape[3], "yuv420p"
        for frame in frames:
            pixels = (frame * 255).round().to(torch.uint8).movedim(0, -1).contiguous().numpy()
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode(None))


def order(frames: Tensor) -> list[int]:
    """The frame indices that `counting` encoded."""
    return (((frames.mean((1, 2, 3)) * 255) - 20) / 10).round().int().tolist()


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_a_picture_comes_back(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture{suffix.upper()}"
    write_image(path, as_frames(scene())[0])
    frames = read_frames(path)
    assert frames.shape == (1, 3, 24, 32) and frames.dtype == torch.float32 and frames.is_contiguous()
    lossy = suffix in (".jpg", ".jpeg", ".webp")
    assert (frames - as_frames(scene())).abs().max() <= (0.1 if lossy else 0)
    assert (frames - as_frames(scene())).abs().mean() <= (0.02 if lossy else 0)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]  # no .partial


def test_modes_of_pictures(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 24 * 32).reshape(24, 32).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "sixteen.png")
    torch.testing.assert_close(read_frames(tmp_path / "sixteen.png")[0, 2], torch.from_numpy(grey / 65535).float())

    alpha = np.dstack([scene(), np.full((24, 32), 51, np.uint8)])  # one fifth of the colour on white
    Image.fromarray(alpha).save(tmp_path / "alpha.png")
    on_white = 0.2 * as_frames(scene()) + 0.8
    torch.testing.assert_close(read_frames(tmp_path / "alpha.png"), on_white, rtol=0, atol=1 / 255)

    clear = Image.new("P", (4, 4), 1)
    clear.putpalette([255, 0, 0, 0, 0, 255])
    clear.putpixel((0, 0), 0)
    clear.save(tmp_path / "palette.png")
    clear.save(tmp_path / "clear.png", transparency=1)
    assert read_frames(tmp_path / "palette.png")[0, :, 0, :2].T.tolist() == [[1, 0, 0], [0, 0, 1]]
    assert read_frames(tmp_path / "clear.png")[0, :, 0, :2].T.tolist() == [[1, 0, 0], [1, 1, 1]]

    Image.fromarray(scene()).convert("L").save(tmp_path / "grey.png")
    frames = read_frames(tmp_path / "grey.png")
    assert torch.equal(frames[:, 0], frames[:, 2])

    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "ink.jpg", quality=95)
    torch.testing.assert_close(
        read_frames(tmp_path / "ink.jpg")[0, :, 8, 8], torch.tensor([1.0, 0.0, 0.0]), rtol=0, atol=0.02
    )

    Image.fromarray(np.full((4, 4), 2.0, np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(ValueError, match=r"float.tif: not readable: pixels of mode F outside 0 to 1"):
        read_frames(tmp_path / "float.tif")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = scene()
    # how a camera stores the upright picture under each tag (EXIF 2.32, section 4.6.4)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: upright.swapaxes(0, 1)[::-1, ::-1],
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(read_frames(tmp_path / "turned.png"), as_frames(upright))


def test_a_second_picture_inside_a_jpeg_is_not_a_frame(tmp_path: Path) -> None:
    main = Image.fromarray(scene())
    main.save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=[main.resize((8, 8))])
    assert read_frames(tmp_path / "phone.jpg").shape == (1, 3, 24, 32)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_an_animation_keeps_count_and_order(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"clip{suffix}"
    pictures = [Image.fromarray((frame.movedim(0, -1) * 255).round().byte().numpy()) for frame in counting(6)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=125)
    assert order(read_frames(path)) == [0, 1, 2, 3, 4, 5]
    assert order(read_frames(path, max_frames=4)) == [0, 1, 2, 3]
    if suffix == ".gif":
        assert read_fps(path) == pytest.approx(1000 / 120)  # GIF counts in hundredths of a second


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [(".mp4", "libx264"), (".mov", "libx264"), (".mkv", "libx264"), (".webm", "libvpx-vp9"), (".avi", "mpeg4")],
)
def test_a_video_keeps_count_and_order(tmp_path: Path, suffix: str, codec: str) -> None:
    path = tmp_path / f"clip{suffix}"
    save_video(path, counting(20), codec)
    frames = read_frames(path)
    assert frames.shape == (20, 3, 32, 48) and order(frames) == list(range(20))
    assert order(read_frames(path, max_frames=7)) == list(range(7))
    assert read_fps(path) == pytest.approx(8)


def test_a_written_video_keeps_its_colours(tmp_path: Path) -> None:
    colours = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 0], [0.2, 0.5, 0.8]])
    frames = colours[:, :, None, None].expand(-1, -1, 32, 32)
    write_video(tmp_path / "folder" / "clip.mp4", frames, fps=12.5)
    # 8-bit luma and chroma, and H.264 at crf 16
    torch.testing.assert_close(read_frames(tmp_path / "folder" / "clip.mp4"), frames, rtol=0, atol=0.03)
    assert read_fps(tmp_path / "folder" / "clip.mp4") == pytest.approx(12.5)
    assert [entry.name for entry in (tmp_path / "folder").iterdir()] == ["clip.mp4"]
    with av.open(str(tmp_path / "folder" / "clip.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.colorspace) == ("h264", "yuv420p", 1)


@pytest.mark.parametrize(("height", "width"), [(31, 48), (32, 47), (33, 45), (1, 1)])
def test_odd_sizes_are_padded_by_their_edge(tmp_path: Path, height: int, width: int) -> None:
    frames = as_frames(scene(height, width)).repeat(3, 1, 1, 1)
    write_video(tmp_path / "odd.mp4", frames, fps=8)
    read = read_frames(tmp_path / "odd.mp4")
    assert read.shape == (3, 3, height + height % 2, width + width % 2)
    torch.testing.assert_close(read[:, :, :height, :width], frames, rtol=0, atol=0.1)
    torch.testing.assert_close(read[:, :, -1, -1], frames[:, :, -1, -1], rtol=0, atol=0.1)


def test_a_turned_video_is_upright(tmp_path: Path) -> None:
    pixels = np.zeros((32, 48, 3), np.uint8)
    pixels[:16, :24] = 255  # white at the top left
    with av.open(str(tmp_path / "phone.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        stream.set_display_rotation(90)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        container.mux(stream.encode(None))
    with av.open(str(tmp_path / "phone.mp4")) as container:
        turn = next(container.decode(video=0)).rotation
    frames = read_frames(tmp_path / "phone.mp4")
    assert abs(turn) == 90 and frames.shape == (3, 3, 48, 32)
    corner = frames[0, 0, -8, 8] if turn == 90 else frames[0, 0, 8, -8]  # counter-clockwise, clockwise
    assert corner > 0.9 and frames[0, 0].mean() == pytest.approx(0.25, abs=0.05)


def test_every_truncation_is_named(tmp_path: Path) -> None:
    clip = counting(12) + 0.05 * torch.rand(12, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    save_video(tmp_path / "whole.mp4", clip, "libx264", movflags="faststart")
    save_video(tmp_path / "whole.mkv", clip, "libx264")
    save_video(tmp_path / "whole.webm", clip, "libvpx-vp9")
    save_video(tmp_path / "whole.avi", clip, "mpeg4")
    pictures = [Image.fromarray((frame.movedim(0, -1) * 255).byte().numpy()) for frame in clip]
    pictures[0].save(tmp_path / "whole.gif", save_all=True, append_images=pictures[1:])
    for suffix in (".png", ".jpg", ".webp", ".bmp", ".tif"):
        pictures[0].save(tmp_path / f"whole{suffix}")
    for whole in sorted(tmp_path.glob("whole.*")):
        content = whole.read_bytes()
        read_frames(whole)
        for share in (0.1, 0.3, 0.5, 0.8):
            cut = tmp_path / f"cut{whole.suffix}"
            cut.write_bytes(content[: int(share * len(content))])
            with pytest.raises(ValueError, match=rf"^{cut}: ") as caught:
                read_frames(cut)
            assert "\n" not in str(caught.value)


def test_a_cut_between_two_packets_is_noticed(tmp_path: Path) -> None:
    """FFmpeg takes such a file's end for the end of the clip."""
    for name, options in (("clip.mp4", {"movflags": "faststart"}), ("clip.mkv", {})):
        path = tmp_path / name
        save_video(path, counting(20), "libx264", **options)
        with av.open(str(path)) as container:
            places = sorted(packet.pos for packet in container.demux(video=0) if packet.pos)
        # a Matroska block starts some bytes before its packet; the first half of the clip stays whole
        path.write_bytes(path.read_bytes()[: places[10] - (0 if name.endswith("mp4") else 16)])
        with pytest.raises(ValueError, match=r"truncated|damaged|not readable"):
            read_frames(path)


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "empty.mp4").touch()
    for name in ("text.png", "text.gif", "text.mp4", "text.webm"):
        (tmp_path / name).write_text("hello " * 100)
    buffer = io.BytesIO()
    Image.fromarray(scene()).save(buffer, "png")
    (tmp_path / "notes.txt").write_bytes(buffer.getvalue())
    for name, message in (
        ("empty.png", r"the file is empty \(0 bytes\)"),
        ("empty.mp4", r"the file is empty \(0 bytes\)"),
        ("text.png", "not readable: no picture format that Pillow knows; is the file complete"),
        ("text.gif", "not readable: no picture format"),
        ("text.mp4", "not readable: Invalid data found"),
        ("text.webm", "not readable: Invalid data found"),
        ("notes.txt", "not a picture or video by its name, expected one of .png"),
        ("missing.png", "no such file"),
        (".", "not a picture or video"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            read_frames(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value) and "\n" not in str(caught.value)
    for name in ("text.gif", "text.mp4", "missing.mp4"):
        with pytest.raises(ValueError, match=name):
            read_fps(tmp_path / name)


def test_frames_of_several_sizes_are_refused(tmp_path: Path) -> None:
    first = Image.fromarray(scene())
    first.save(tmp_path / "pages.tif", save_all=True, append_images=[first.resize((10, 12))])
    with pytest.raises(ValueError, match=r"pages.tif: its frames have several sizes \(10x12, 32x24\), expected one"):
        read_frames(tmp_path / "pages.tif")


def test_wrong_calls_are_refused(tmp_path: Path) -> None:
    frames = counting(2)
    with pytest.raises(ValueError, match="max_frames: expected at least 1, got 0"):
        read_frames(tmp_path / "a.png", max_frames=0)
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="expected fps >= 0.01"):
            write_video(tmp_path / "a.mp4", frames, fps)
    with pytest.raises(ValueError, match="ending in .mp4"):
        write_video(tmp_path / "a.gif", frames, 8)
    with pytest.raises(ValueError, match="at least one frame"):
        write_video(tmp_path / "a.mp4", frames[:0], 8)
    with pytest.raises(ValueError, match="expected shape"):
        write_image(tmp_path / "a.png", frames)
    with pytest.raises(ValueError, match="ending in one of"):
        write_image(tmp_path / "a.txt", frames[0])
    assert list(tmp_path.iterdir()) == []


def test_an_animation_comes_back(tmp_path: Path) -> None:
    clip = torch.rand(5, 3, 40, 64, generator=torch.Generator().manual_seed(0))
    write_animation(tmp_path / "deep" / "clip.webp", clip, fps=8)
    frames = read_frames(tmp_path / "deep" / "clip.webp")
    torch.testing.assert_close(frames, clip, rtol=0, atol=0.5 / 255 + 1e-6)  # without loss
    assert read_fps(tmp_path / "deep" / "clip.webp") == 8
    with Image.open(tmp_path / "deep" / "clip.webp") as image:
        assert image.info["loop"] == 0  # for ever
    assert [entry.name for entry in (tmp_path / "deep").iterdir()] == ["clip.webp"]  # no .partial

    large = counting(4, height=20, width=LOSSLESS_SIDE + 2)
    write_animation(tmp_path / "large.webp", large, fps=8)
    assert order(read_frames(tmp_path / "large.webp")) == [0, 1, 2, 3]
    noise = torch.rand(2, 3, 16, LOSSLESS_SIDE + 2, generator=torch.Generator().manual_seed(1))
    for width, lossless in ((LOSSLESS_SIDE, True), (LOSSLESS_SIDE + 2, False)):
        write_animation(tmp_path / "noise.webp", noise[..., :width], fps=8)
        difference = (read_frames(tmp_path / "noise.webp") - noise[..., :width]).abs().amax()
        assert (difference < 1 / 255) == lossless


def test_equal_frames_of_an_animation_become_one_of_their_time(tmp_path: Path) -> None:
    clip = counting(3)[[0, 0, 1, 1, 1, 2]]
    write_animation(tmp_path / "clip.webp", clip, fps=10)
    assert order(read_frames(tmp_path / "clip.webp")) == [0, 1, 2]
    with Image.open(tmp_path / "clip.webp") as image:
        times = [frame.copy().info["duration"] for frame in ImageSequence.Iterator(image)]
    assert times == [200, 300, 100]
    write_animation(tmp_path / "clip.webp", clip[:1], fps=10)
    assert order(read_frames(tmp_path / "clip.webp")) == [0]


def test_what_is_no_animation_is_refused(tmp_path: Path) -> None:
    frames = counting(2)
    for path, given, fps, message in (
        ("a.gif", frames, 8.0, "ending in .webp"),
        ("a.webp", frames, 0.0, r"fps in \(0, 1000\]"),
        ("a.webp", frames[:0], 8.0, "at least one frame"),
        ("a.webp", frames[0], 8.0, "expected shape|wrong number"),
    ):
        with pytest.raises(ValueError, match=message):
            write_animation(tmp_path / path, given, fps)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, counting(2), 8)
    before = path.read_bytes()

    def fail(frame: Tensor) -> Image.Image:
        raise OSError("no space left on device")

    monkeypatch.setattr("vipo.media.to_image", fail)
    with pytest.raises(OSError, match="no space"):
        write_video(path, counting(3), 8)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == ["clip.mp4"]


def test_names_are_unique(tmp_path: Path) -> None:
    for name in ("in/a.png", "in/a.mp4", "in/A.gif", "in/b/a.png", "in/maps.json.png", "in/out/c.png", "x.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    given = [tmp_path / "in", tmp_path / "in" / "a.png", tmp_path / "in" / "b" / "a.png", tmp_path / "x.png"]
    found = name_media(given, skipped=[tmp_path / "in" / "out"], reserved=["maps.json"])
    assert {name: str(path.relative_to(tmp_path)) for name, (path, _) in found.items()} == {
        "A": "in/A.gif",
        "a-2": "in/a.mp4",
        "a-3": "in/a.png",
        "b/a": "in/b/a.png",
        "maps.json-2": "in/maps.json.png",
        "x": "x.png",
    }
    assert [str(relative) for _, relative in found.values()] == ["A", "a", "a", "b/a", "maps.json", "x"]
    assert list(name_media([tmp_path / "in" / "out"], skipped=[tmp_path / "in" / "out"])) == ["c"]  # asked for by name
    with pytest.raises(ValueError, match="nothing there beside"):
        name_media([tmp_path / "x.png"], skipped=[tmp_path / "x.png"])


def test_find_media(tmp_path: Path) -> None:
    for name in ("b.png", "a.PNG", "notes.txt", ".hidden.png", "below/c.mp4", ".cache/d.png", "below/deep/e.gif"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.png").mkdir()
    names = [str(path.relative_to(tmp_path)) for path in find_media([tmp_path])]
    assert names == ["a.PNG", "b.png", "below/c.mp4", "below/deep/e.gif"]
    given = [tmp_path / "notes.txt", tmp_path / ".hidden.png", tmp_path / "b.png", tmp_path]
    assert [path.name for path in find_media(given)] == ["notes.txt", ".hidden.png", "b.png", "a.PNG", "c.mp4", "e.gif"]
    with pytest.raises(ValueError, match=f"no such file or folder: {tmp_path / 'absent'}"):
        find_media([tmp_path, tmp_path / "absent"])
    with pytest.raises(ValueError, match=r"folder.png: no picture or video there; expected files ending in .png"):
        find_media([tmp_path / "folder.png"])
    with pytest.raises(ValueError, match="no input"):
        find_media([])
