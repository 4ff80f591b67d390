"""Downloads: cached, resumed where they broke off, checked; and a file that is not the one asked for is never kept."""
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mlray.sources.fetch import find
from mlray.values.data import Source
from mlray.values.errors import DataError, Unavailable

CONTENT = bytes(range(256)) * 4000


@pytest.fixture
def archive():
    "A server that breaks off in the middle of its first answer, and then honours `Range`."
    asked: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            asked.append(wanted)
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(CONTENT) - start))
            self.end_headers()
            self.wfile.write(CONTENT[start:] if wanted else CONTENT[:300_000])

        def log_message(self, *args): pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/rows.csv", asked
    server.shutdown()


def source(url: str, digest: str = hashlib.sha256(CONTENT).hexdigest()) -> Source: return Source(file="rows.csv", url=url, sha256=digest)


def test_a_broken_download_goes_on_where_it_stopped(archive, settings):
    url, asked = archive
    with pytest.raises(Unavailable, match="Try again"): find(source(url), settings)
    path = find(source(url), settings)
    assert path.read_bytes() == CONTENT and asked == [None, "bytes=300000-"]
    assert find(source(url), settings) == path and len(asked) == 2, "the second time it is there"


def test_another_file_is_not_kept(archive, settings):
    url, _ = archive
    for _ in range(2):
        with pytest.raises((DataError, Unavailable)): find(source(url, "0" * 64), settings)
    assert not [p for p in (settings.home / "downloads").iterdir() if p.suffix != ".part"]
    with pytest.raises(Unavailable): find(source(url, "0" * 64), settings)


def test_a_folder_of_data_is_looked_in_first(archive, settings, tmp_path):
    url, asked = archive
    (tmp_path / "data").mkdir()
    (tmp_path / "data/rows.csv").write_bytes(CONTENT)
    assert find(source(url), settings.model_copy(update={"data": tmp_path / "data"})) == tmp_path / "data/rows.csv" and not asked
    (tmp_path / "data/rows.csv").write_bytes(b"altered")
    with pytest.raises(DataError, match="sha256"): find(source(url), settings.model_copy(update={"data": tmp_path / "data"}))
