"""vipo.files: the old file or the new one, never half."""

from pathlib import Path

import pytest

from vipo.files import write_atomically
from vipo.manifest import fault, seal


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "file"
    write_atomically(path, lambda partial: partial.write_text("old") and None)
    place = path.stat().st_ino

    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_atomically(path, fail)
    assert path.read_text() == "old" and [entry.name for entry in path.parent.iterdir()] == ["file"]
    write_atomically(path, "new")
    assert path.read_text() == "new" and path.stat().st_ino != place  # not the old one rewritten


def test_a_sealed_folder_knows_its_bytes(tmp_path: Path) -> None:
    """vipo.manifest; what is wrong with a damaged checkpoint is tested in test_resume."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one").write_text("1")
    seal(tmp_path)
    assert fault(tmp_path) == ""
    (tmp_path / "a" / "one").write_text("2")
    assert fault(tmp_path) == "a/one is damaged: its SHA-256 is not the one written"
    seal(tmp_path)
    assert fault(tmp_path) == ""
