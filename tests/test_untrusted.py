"""The one reader of files from outside: regular files of bounded size, links that stay inside."""

import os
import socket
import threading

import pytest

from sqft_export.errors import MAX_MESSAGE_CHARACTERS, DamagedError, UserError
from sqft_export.textfiles import read_json
from sqft_export.untrusted import (
    MAX_CONFIG_BYTES,
    entries_of,
    files_inside,
    parse_json,
    path_inside,
    read_bounded,
)

REVISION = "0123456789abcdef0123456789abcdef01234567"


def make_pipe(path):
    os.mkfifo(path)


def make_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def make_loop(path):
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (make_pipe, "a pipe"),
        (make_socket, "a socket"),
        (make_loop, "is a circular link"),
        (lambda path: path.mkdir(), "is a folder; a file is expected"),
        (lambda path: path.symlink_to("/dev/zero"), "a device"),
        (lambda path: path.symlink_to("nowhere"), "is a broken link"),
        (lambda path: None, "No such file"),
    ],
)
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, make, fault):
    make(tmp_path / "config.json")
    found = []

    def read():
        with pytest.raises(UserError, match=fault) as refused:
            read_json(tmp_path / "config.json")
        found.append(str(refused.value))

    reader = threading.Thread(target=read, daemon=True)  # opening a pipe would wait for ever
    reader.start()
    reader.join(20)
    assert len(found) == 1 and "\n" not in found[0]


def test_a_file_beyond_its_limit_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("w") as stream:
        stream.truncate(2**40)  # takes no space on the disk
    with pytest.raises(UserError, match=r"has 1,099,511,627,776 bytes; at most 16,777,216 are"):
        read_json(tmp_path / "config.json")
    (tmp_path / "exact").write_bytes(b"x" * 100)
    assert read_bounded(tmp_path / "exact", 100) == b"x" * 100
    with pytest.raises(UserError, match="at most 99 are read"):
        read_bounded(tmp_path / "exact", 99)
    assert MAX_CONFIG_BYTES == 2**24


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' appears twice"),
        (r'{"ab": 1, "\u0061b": 2}', "the key 'ab' appears twice"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": -Infinity}', "-Infinity is not a JSON number"),
        ('{"a": ' + "9" * 5000 + "}", "not JSON"),
        ('{"' + "k" * 10**6 + '": 1, "' + "k" * 10**6 + '": 1}', "appears twice"),
    ],
)
def test_json_that_readers_may_take_in_two_ways_is_refused(text, fault):
    with pytest.raises(UserError, match=fault) as refused:
        parse_json(text, "x.json", finite=True)
    assert len(str(refused.value)) < 1000


def test_messages_are_bounded_whatever_they_name():
    for kind in (UserError, DamagedError):
        assert len(str(kind("x" * 10**7))) < MAX_MESSAGE_CHARACTERS + 100
    assert str(UserError("short")) == "short"


def snapshot(root, repository="models--a--b", revision=REVISION):
    folder = root / repository / "snapshots" / revision
    folder.mkdir(parents=True)
    (root / repository / "blobs").mkdir()
    (root / repository / "blobs" / "12").write_text("{}")
    (root / repository / "refs").mkdir()
    (root / repository / "refs" / "main").write_text("secret")
    return folder


def test_links_of_the_hubs_cache_lead_to_its_blobs_alone(tmp_path):
    folder = snapshot(tmp_path)
    (folder / "config.json").symlink_to("../../blobs/12")
    assert path_inside(folder, folder / "config.json").name == "12"
    (folder / "other.json").symlink_to("../../refs/main")
    with pytest.raises(UserError, match=r"is a link to .*refs/main, outside the folder"):
        path_inside(folder, folder / "other.json")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.json").symlink_to("../../../blobs/12")
    assert path_inside(folder / "onnx", folder / "onnx" / "model.json").name == "12"


@pytest.mark.parametrize(
    ("repository", "revision"),
    [("models--a--b", "model"), ("anything", REVISION), ("models--a--b", REVISION.upper())],
)
def test_a_folder_that_only_looks_like_the_hubs_cache_is_none(tmp_path, repository, revision):
    folder = snapshot(tmp_path, repository, revision)
    (folder / "notes.txt").symlink_to("../../blobs/12")
    with pytest.raises(UserError, match="outside the folder"):
        path_inside(folder, folder / "notes.txt")


def test_blobs_that_are_a_link_themselves_are_not_followed(tmp_path):
    folder = snapshot(tmp_path)
    blobs = folder.parent.parent / "blobs"
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    (folder / "config.json").symlink_to("../../blobs/12")
    with pytest.raises(UserError, match="outside the folder"):
        path_inside(folder, folder / "config.json")


def test_every_entry_of_a_folder_is_listed_and_links_are_not_walked(tmp_path):
    (tmp_path / "deep" / "empty").mkdir(parents=True)
    (tmp_path / "deep" / "file").write_text("x")
    (tmp_path / "again").symlink_to(".")
    names = [str(path.relative_to(tmp_path)) for path in entries_of(tmp_path)]
    assert names == ["again", "deep/empty", "deep/file"]
    assert [path.name for path in files_inside(tmp_path)] == ["file"]
    os.mkfifo(tmp_path / "deep" / "pipe")
    with pytest.raises(UserError, match=r"deep/pipe: is no regular file \(a pipe\)"):
        files_inside(tmp_path)
