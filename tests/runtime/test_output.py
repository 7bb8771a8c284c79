"""Test the files that commands write: complete or absent, with the mode of the user's umask; printable text."""

import io
import os
import sys

import pytest

from megavit.errors import ConfigError, escape_unprintable, printable
from megavit.runtime.output import check_writable, complete_file


def test_an_error_during_a_write_leaves_the_old_file_unchanged_and_no_other_file(tmp_path):
    def write_half():
        with complete_file(out) as temporary:
            temporary.write_text("half")
            raise ZeroDivisionError

    out = tmp_path / "deep" / "out.csv"
    for before in (None, "before"):
        with pytest.raises(ZeroDivisionError):
            write_half()
        assert (out.read_text() if out.exists() else None) == before
        out.write_text("before")
        assert os.listdir(out.parent) == ["out.csv"]


def test_a_file_has_the_mode_of_the_users_umask_even_if_a_library_replaces_it(tmp_path):
    umask = os.umask(0o027)
    try:
        with complete_file(tmp_path / "out.safetensors") as temporary:
            temporary.unlink()
            temporary.touch(mode=0o600)
            assert temporary.suffix == ".safetensors"
    finally:
        os.umask(umask)
    assert (tmp_path / "out.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_link_stays_one(tmp_path):
    (tmp_path / "link.csv").symlink_to(tmp_path / "out.csv")
    with complete_file(tmp_path / "link.csv") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "link.csv").is_symlink() and (tmp_path / "out.csv").read_text() == "x"


def test_a_file_that_cannot_be_written_is_rejected_in_one_line_before_any_computation(tmp_path):
    (tmp_path / "file").touch()
    for path, why in ((tmp_path / "file" / "x.csv", "(File exists|Not a directory)"), (tmp_path, "it is a folder")):
        with pytest.raises(ConfigError, match=f"out={path} cannot be written: {why}; choose another place"):
            check_writable(path)
    check_writable(tmp_path / "x.csv")
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_is_reported_in_one_line_and_no_file_is_left(small_disk):
    out = small_disk("64k") / "out.csv"
    full = r"out\.csv cannot be written: No space left on device"
    with pytest.raises(ConfigError, match=full), complete_file(out) as temporary:
        temporary.write_bytes(bytes(200_000))
    assert not os.listdir(out.parent)


def test_names_that_are_no_utf8_can_be_printed(monkeypatch):
    name = os.fsdecode(b"caf\xe9")
    assert printable(name) == printable(b"caf\xe9") == "caf\\xe9" and printable("é") == "é"
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
    escape_unprintable()
    print(name, flush=True)
    assert sys.stdout.buffer.getvalue() == b"caf\\udce9\n"
