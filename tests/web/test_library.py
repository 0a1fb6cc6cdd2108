"""The library comes from the npm registry, unchanged or not at all."""

import io
import tarfile
import threading
from pathlib import Path

import pytest

from sqft_export.errors import UserError
from sqft_export.web import library
from sqft_export.web.server import open_server


@pytest.fixture
def registry(tmp_path, monkeypatch):
    with open_server(tmp_path, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(library, "REGISTRY", f"http://127.0.0.1:{server.server_port}")
        yield tmp_path
        server.shutdown()


def test_a_changed_archive_is_refused(registry: Path, tmp_path_factory):
    place = registry / library.TRANSFORMERS_JS.url.removeprefix(library.REGISTRY + "/")
    place.parent.mkdir(parents=True)
    with tarfile.open(place, "w:gz") as archive:
        content = b"export const env = {};"
        member = tarfile.TarInfo("package/dist/transformers.min.js")
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    folder = tmp_path_factory.mktemp("library")
    with pytest.raises(UserError, match=r"found SHA-512 .*, expected V3"):
        library.fetch_library(folder)
    assert list(folder.iterdir()) == []


def test_a_missing_archive_is_one_message(registry: Path, tmp_path):
    with pytest.raises(UserError, match=r"can't be downloaded .*404.*without --bundle"):
        library.fetch_library(tmp_path)
