"""File systems that lack something: locks, or bringing a folder onto the disk."""

from __future__ import annotations

import errno
import os

import pytest

from nemo_bard.base import files
from nemo_bard.base.errors import system_errors_of


def refuse(number):
    def refused(*_):
        raise OSError(number, os.strerror(number))

    return refused


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_a_run_goes_on_with_one_warning(tmp_path, monkeypatch, caplog, number):
    monkeypatch.setattr("fcntl.flock", refuse(number))
    with files.locked(tmp_path / "run"):
        assert files.is_locked(tmp_path / "run") is None
        assert files.ran_here(tmp_path / "run")
    (record,) = caplog.records
    assert "is on a file system without locks" in record.getMessage()
    monkeypatch.setattr("fcntl.flock", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output"), files.locked(tmp_path / "run"):
        pass
    with pytest.raises(OSError, match="Input/output"):
        files.is_locked(tmp_path / "run")


def test_a_file_system_that_cannot_sync_is_written_to_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", refuse(errno.EINVAL))
    files.write_json(tmp_path / "a" / "x.json", {"a": 1})
    files.sync_tree(tmp_path)
    assert files.read_json(tmp_path / "a" / "x.json") == {"a": 1}
    monkeypatch.setattr("os.fsync", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        files.write_json(tmp_path / "a" / "x.json", {"a": 2})
    assert files.read_json(tmp_path / "a" / "x.json") == {"a": 1}
    files.write_json(tmp_path / "a" / "x.json", {"a": 3}, durable=False)
    assert files.read_json(tmp_path / "a" / "x.json") == {"a": 3}


def test_what_the_system_refuses_becomes_one_line():
    line = r"^run_dir x cannot be used: Read-only file system \(x/y\)$"
    with pytest.raises(ValueError, match=line), system_errors_of("run_dir x cannot be used"):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "x/y")
    with pytest.raises(PermissionError), system_errors_of("run_dir x cannot be used"):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES), "x/y")
