"""vipo.files: the old file or the new one, never half."""

from pathlib import Path

import pytest

from vipo.files import write_atomically


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
