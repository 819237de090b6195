"""The cache folder, and files that are whole or absent."""

from pathlib import Path

import pytest

from zbench.cache import atomic_write, cache_dir, check_writable, new_folder
from zbench.errors import UserError


def test_the_cache_folder_is_the_one_that_zbench_cache_names(monkeypatch, tmp_path):
    monkeypatch.setenv("ZBENCH_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "mine"


def test_without_it_the_cache_folder_follows_the_xdg_specification(monkeypatch, tmp_path):
    monkeypatch.delenv("ZBENCH_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "zbench"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/paths/are/invalid")
    assert cache_dir() == tmp_path / ".cache" / "zbench"


@pytest.mark.parametrize("data", ["größe\n", b"\x00\xff"])
def test_a_written_file_holds_the_data_and_leaves_nothing_beside_it(tmp_path, data):
    path = tmp_path / "new" / "file"
    atomic_write(path, data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_text("old")

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_has_the_permissions_of_any_other_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    atomic_write(tmp_path / "atomic", "")
    modes = {Path(tmp_path / name).stat().st_mode for name in ("plain", "atomic")}
    assert len(modes) == 1


def test_a_folder_that_cannot_be_written_is_refused_and_one_that_can_leaves_no_trace(tmp_path):
    check_writable(tmp_path / "not" / "there" / "yet")
    check_writable(tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for bad in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none")):
        with pytest.raises(UserError, match=r"cannot write to .*choose another folder with --out"):
            check_writable(bad)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_folder_below_one_that_may_not_be_searched_is_refused(tmp_path, denied):
    with pytest.raises(UserError, match=f"cannot write to {denied / 'out'}: Permission denied; choose another"):
        check_writable(denied / "out")


def test_a_folder_whose_files_cannot_be_written_is_not_left_behind(tmp_path, monkeypatch):
    assert {path.name for path in new_folder(tmp_path, "whole", {"a": "1", "b/c": b"2"}).rglob("*")} == {"a", "b", "c"}

    def disk_full(descriptor):
        if any(tmp_path.glob("part-*/a")):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", disk_full)
    with pytest.raises(UserError, match=r"cannot write .*/part-[\d-]+/b: No space left on device"):
        new_folder(tmp_path, "part", {"a": "1", "b": "2"})
    assert not list(tmp_path.glob("part*"))
