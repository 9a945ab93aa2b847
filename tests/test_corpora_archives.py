"""Official archives: from disk, from a server on 127.0.0.1 that misbehaves, and archives that were tampered with."""

import hashlib
import http.server
import io
import os
import shutil
import tarfile
import threading
import time
import zipfile
from pathlib import Path

import datasets
import pytest
from corpora_trees import make_dcase2013, make_esc50

from datasets_scripts import archives, load_corpus
from datasets_scripts.corpus import Archive
from datasets_scripts.errors import CorpusError
from datasets_scripts.loading import CORPORA


@pytest.fixture(scope="module")
def dcase(tmp_path_factory):
    """A complete DCASE2013 tree and its two archives."""
    folder = tmp_path_factory.mktemp("dcase")
    make_dcase2013(folder / "tree")
    for part in ("scenes_stereo", "scenes_stereo_testset"):
        shutil.make_archive(str(folder / "archives" / part), "zip", folder / "tree", part)
    return folder


# ------------------------------------------------------------------------------------------------------------ on disk


def test_zip_and_folder_of_zips(dcase, tmp_path):
    expected = load_corpus("dcase2013", dcase / "tree", cache_dir=tmp_path)
    for data_dir in (dcase / "archives", dcase / "archives" / "scenes_stereo.zip"):
        found = load_corpus("dcase2013", data_dir, cache_dir=tmp_path)
        assert found["digest"][:] == expected["digest"][:]


def test_tar_gz_is_unpacked_once(tmp_path, monkeypatch):
    make_esc50(tmp_path / "ESC-50")
    for junk in (".DS_Store", "._1-10000-A-0.wav"):  # published archives have such files
        (tmp_path / "ESC-50" / "audio" / junk).write_bytes(b"\0")
    file = tmp_path / "my copy.tar.gz"
    with tarfile.open(file, "w:gz", compresslevel=1) as archive:
        archive.add(tmp_path / "ESC-50", "ESC-50")
    assert len(load_corpus("esc50", file, cache_dir=tmp_path / "cache")) == 2000
    monkeypatch.setattr(archives, "unpack", lambda *_: pytest.fail("unpacked again"))
    assert len(load_corpus("esc10", file, cache_dir=tmp_path / "cache")) == 400


@pytest.mark.parametrize("keep", [200, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["zip", "gztar"])
def test_incomplete_archive(dcase, tmp_path, kind, keep):
    file = Path(shutil.make_archive(str(tmp_path / "sounds"), kind, dcase / "tree"))
    content = file.read_bytes()
    file.write_bytes(content[: int(keep if keep > 1 else keep * len(content))])
    with pytest.raises(CorpusError, match=str(file)):
        load_corpus("dcase2013", file, cache_dir=tmp_path / "cache")
    assert not list((tmp_path / "cache" / "dls_corpora").glob("*.incomplete"))


def test_archive_with_changed_bytes(dcase, tmp_path):
    file = tmp_path / "scenes_stereo.zip"
    content = bytearray((dcase / "archives" / "scenes_stereo.zip").read_bytes())
    content[2000] ^= 255
    file.write_bytes(content)
    with pytest.raises(CorpusError, match="damaged or incomplete"):
        load_corpus("dcase2013", file, cache_dir=tmp_path / "cache")


def zip_with(tmp_path, name, link_to=None):
    file = tmp_path / "evil.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("scenes_stereo/ok.wav", b"fine")
        info = zipfile.ZipInfo(name)
        info.create_system = 3
        info.external_attr = ((0o120777 if link_to else 0o100644) << 16) | 0
        archive.writestr(info, link_to or b"owned")
    return file


def tar_with(tmp_path, name, **member):
    file = tmp_path / "evil.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("scenes_stereo/"), None)
        info = tarfile.TarInfo(name)
        for key, value in member.items():
            setattr(info, key, value)
        info.size = 0 if member else 5
        archive.addfile(info, io.BytesIO(b"" if member else b"owned"))
    return file


@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        (zip_with, {"name": "../escaped.txt"}),
        (zip_with, {"name": "a/../../escaped.txt"}),
        (zip_with, {"name": "..\\escaped.txt"}),
        (zip_with, {"name": "/tmp/escaped.txt"}),
        (zip_with, {"name": "C:/escaped.txt"}),
        (zip_with, {"name": "scenes_stereo/link.wav", "link_to": "/etc/passwd"}),
        (tar_with, {"name": "../escaped.txt"}),
        (tar_with, {"name": "/tmp/escaped.txt"}),
        (tar_with, {"name": "a/link", "type": tarfile.SYMTYPE, "linkname": "../../../etc"}),
        (tar_with, {"name": "a/link", "type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
        (tar_with, {"name": "a/hard", "type": tarfile.LNKTYPE, "linkname": "../../secret"}),
        (tar_with, {"name": "a/fifo", "type": tarfile.FIFOTYPE}),
    ],
)
def test_archive_that_leads_out_is_refused(make, arguments, tmp_path):
    file = make(tmp_path, **arguments)
    with pytest.raises(CorpusError, match="refused") as error:
        load_corpus("dcase2013", file, cache_dir=tmp_path / "cache")
    assert str(file) in str(error.value)
    assert arguments["name"] in str(error.value)
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert not left
    assert not list(tmp_path.rglob("escaped.txt"))
    assert not Path("/tmp/escaped.txt").exists()


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "tree"
    for number in range(40):
        (folder / f"{number:02d}.wav").parent.mkdir(exist_ok=True)
        (folder / f"{number:02d}.wav").write_bytes(os.urandom(700))
    return folder


@pytest.mark.parametrize("kind", ["tar", "gztar", "bztar", "xztar", "zip"])
def test_what_is_unpacked_is_what_was_packed(tree, tmp_path, kind):
    archives.unpack(Path(shutil.make_archive(str(tmp_path / "a"), kind, tmp_path, "tree")), tmp_path / "out")
    for path in tree.iterdir():
        assert (tmp_path / "out" / "tree" / path.name).read_bytes() == path.read_bytes()
        assert (tmp_path / "out" / "tree" / path.name).stat().st_mode == path.stat().st_mode


def test_a_tar_whose_middle_is_damaged_is_not_a_shorter_one(tree, tmp_path):
    file = Path(shutil.make_archive(str(tmp_path / "a"), "tar", tree))
    content = file.read_bytes()
    place = content.index(b"./10.wav")
    file.write_bytes(content[:place] + b"?" + content[place + 1 :])
    with pytest.raises(CorpusError, match=r"damaged or incomplete .bad checksum"):
        archives.unpack(file, tmp_path / "out")
    file.write_bytes(content[:place])  # cut between two members
    with pytest.raises(CorpusError, match=r"damaged or incomplete .empty header"):
        archives.unpack(file, tmp_path / "out")


@pytest.mark.parametrize("kind", ["tar", "gztar", "bztar", "xztar", "zip"])
def test_damage_anywhere_is_said_in_one_line(tree, tmp_path, kind):
    file = Path(shutil.make_archive(str(tmp_path / "a"), kind, tree))
    content, refused = file.read_bytes(), 0
    for number in range(60):
        place = len(content) * number // 60
        file.write_bytes(content[:place] + bytes([content[place] ^ 0xA5]) + content[place + 1 :])
        try:
            archives.unpack(file, tmp_path / f"out{number}")
        except CorpusError as error:
            refused += 1
            assert str(file) in str(error) and "\n" not in str(error)
    assert refused > (5 if kind == "tar" else 50)  # nothing in a tar tells of damaged content


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/".join("a" * 1500), "refused, it holds more than 50 folders"),
        ("a/" * 1500 + "b.wav", "refused, it holds more than 50 folders"),
        ("", "refused, it holds a file without a name|damaged"),
        (".", "refused, it holds a file without a name|damaged"),
        ("x" * 300 + ".wav", "File name too long"),
        ("a\nb/../c.wav", r"a path that leads out of it: a\\nb"),
    ],
)
@pytest.mark.parametrize("make", [zip_with, tar_with])
def test_names_that_no_file_can_have(make, name, said, tmp_path):
    with pytest.raises(CorpusError, match=said) as error:
        archives.unpack(make(tmp_path, name), tmp_path / "out")
    assert "\n" not in str(error.value)


def test_zip_whose_names_are_no_utf8(tmp_path):
    file = zip_with(tmp_path, "scenes_stereo/ä.wav")
    file.write_bytes(file.read_bytes().replace("ä".encode(), b"\xff\xfe"))
    with pytest.raises(CorpusError, match="damaged or incomplete"):
        archives.unpack(file, tmp_path / "out")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_tar_that_would_fill_the_memory(tmp_path, kind):
    info = tarfile.TarInfo("bomb")
    info.type, info.size = kind, 1 << 33
    file = tmp_path / "bomb.tar"
    file.write_bytes(tarfile.TarInfo("a.wav").tobuf() + info.tobuf(tarfile.GNU_FORMAT))
    with open(file, "ab") as sparse:
        sparse.truncate(1 << 33)
    with pytest.raises(CorpusError, match="name or attributes of 8589934592 bytes"):
        archives.unpack(file, tmp_path / "out")


# --------------------------------------------------------------------------------------------------------- downloading


class Server(http.server.ThreadingHTTPServer):
    """Serves `content` with ranges; `script` says, request by request, what goes wrong."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.script, self.ranges = b"", '"one"', [], []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/file"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, content = self.server, self.server.content
        fault = server.script.pop(0) if server.script else None
        wanted = self.headers.get("Range")
        server.ranges.append(wanted)
        if isinstance(fault, int):
            self.send_error(fault)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        if fault == "no ranges" or self.headers.get("If-Range", server.etag) != server.etag:
            start = 0
        if start >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", server.etag)
        if fault in ("no length", "cut, no length"):
            content = content[: len(content) // 3] if fault.startswith("cut") else content
        else:
            self.send_header("Content-Length", "abc" if fault == "odd length" else str(len(content) - start))
        self.send_header("Content-Type", "text/html; charset=utf-8" if fault == "page" else "application/zip")
        self.end_headers()
        if fault == "drip":
            for _ in range(100):
                self.wfile.write(b"x")
                time.sleep(0.02)
        self.wfile.write(content[start : start + len(content) // 3] if fault == "cut" else content[start:])


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(archives, "RETRY_DELAYS", (0, 0, 0))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def official(server, monkeypatch, dcase):
    """DCASE2013 whose official address is the server, as one archive with a known digest."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted((dcase / "tree").rglob("*.wav")):
            archive.write(path, path.relative_to(dcase / "tree"))
    server.content = file.getvalue()
    md5 = hashlib.md5(server.content).hexdigest()
    archive = Archive(server.url, "scenes.zip", size=len(server.content), md5=md5)
    monkeypatch.setattr(type(CORPORA["dcase2013"]), "archives", (archive,))
    return archive


def test_download_is_kept(server, official, tmp_path):
    assert len(load_corpus("dcase2013", cache_dir=tmp_path)) == 200
    assert len(load_corpus("dcase2013", cache_dir=tmp_path)) == 200
    assert server.ranges == [None], "one request in all"
    assert not list((tmp_path / "dls_downloads").glob("*.zip*[!k]")), "the archive takes room and is of no more use"


def test_downloaded_archive_that_leads_out(server, monkeypatch, tmp_path):
    server.content = zip_with(tmp_path, "../escaped.txt").read_bytes()
    monkeypatch.setattr(type(CORPORA["esc50"]), "archives", (Archive(server.url, "ESC-50-master.zip"),))
    with pytest.raises(CorpusError, match=r"ESC-50-master\.zip: refused.*delete it to download it again"):
        load_corpus("esc50", cache_dir=tmp_path / "cache")


def test_interrupted_transfer_is_resumed(server, official, tmp_path):
    server.script = ["cut", "cut"]
    assert len(load_corpus("dcase2013", cache_dir=tmp_path)) == 200
    third = len(server.content) // 3
    assert server.ranges == [None, f"bytes={third}-", f"bytes={2 * third}-"]


@pytest.mark.parametrize("fault", ["odd length", "no length"])
def test_server_that_does_not_say_how_long_the_file_is(server, official, tmp_path, fault):
    server.script = [fault]
    assert len(load_corpus("dcase2013", cache_dir=tmp_path)) == 200


def test_page_instead_of_an_archive(server, official, tmp_path):
    server.script = ["page"]
    with pytest.raises(CorpusError, match=r"answers with a page instead of the file.*scenes\.zip by other means"):
        load_corpus("dcase2013", cache_dir=tmp_path)


@pytest.mark.parametrize("kind", ["zip", "gztar"])
def test_cut_body_without_length_or_digest_is_not_kept(server, monkeypatch, tree, tmp_path, kind):
    server.content = Path(shutil.make_archive(str(tmp_path / "a"), kind, tree)).read_bytes()
    server.script = ["cut, no length"]
    with pytest.raises(CorpusError, match=r"is no archive, or one whose end is missing\. It was deleted"):
        archives.download(Archive(server.url, "ESC-50-master.zip"), tmp_path / "cache")
    assert archives.download(Archive(server.url, "ESC-50-master.zip"), tmp_path / "cache").is_file()


def test_server_that_sends_a_byte_now_and_then(server, official, monkeypatch, tmp_path):
    monkeypatch.setattr(archives, "TIMEOUT", 0.3)
    server.script = ["drip"] * 10
    with pytest.raises(CorpusError, match=r"the server sends \d+ bytes a second"):
        load_corpus("dcase2013", cache_dir=tmp_path)
    assert len(server.ranges) == 1 + len(archives.RETRY_DELAYS)


def test_interrupted_run_is_resumed_by_the_next(server, official, tmp_path):
    server.script = ["cut", 404]
    with pytest.raises(CorpusError, match=f"{server.url} could not be downloaded .HTTP 404"):
        load_corpus("dcase2013", cache_dir=tmp_path)
    server.script = []
    assert len(load_corpus("dcase2013", cache_dir=tmp_path)) == 200
    assert server.ranges[-1] == f"bytes={len(server.content) // 3}-"


def test_server_that_cannot_resume_starts_again(server, official, tmp_path):
    server.script = ["cut", "no ranges"]
    assert len(load_corpus("dcase2013", cache_dir=tmp_path)) == 200


def test_file_that_changed_on_the_server_is_not_patched_together(server, official, tmp_path):
    published, server.content = server.content, bytes(len(server.content))
    server.script = ["cut", 404]
    with pytest.raises(CorpusError):
        load_corpus("dcase2013", cache_dir=tmp_path)
    server.content, server.etag = published, '"two"'
    assert len(load_corpus("dcase2013", cache_dir=tmp_path)) == 200


def test_server_error_is_retried_then_reported(server, official, tmp_path):
    server.script = [503, 500]
    assert len(load_corpus("dcase2013", cache_dir=tmp_path)) == 200
    assert len(server.ranges) == 3
    server.script = [503] * 10
    with pytest.raises(CorpusError, match=r"HTTP 503.*scenes\.zip by other means"):
        load_corpus("dcase2013", cache_dir=tmp_path / "other")
    assert len(server.ranges) == 3 + 1 + len(archives.RETRY_DELAYS)


def test_no_server(server, official, tmp_path):
    server.shutdown()
    server.server_close()
    with pytest.raises(CorpusError, match="could not be downloaded"):
        load_corpus("dcase2013", cache_dir=tmp_path)


@pytest.mark.parametrize("change", ["digest", "size"])
def test_wrong_file_is_refused_and_not_kept(server, official, tmp_path, change):
    server.content = bytes(len(server.content)) if change == "digest" else server.content + b"more"
    with pytest.raises(CorpusError, match="md5" if change == "digest" else "bytes instead of"):
        load_corpus("dcase2013", cache_dir=tmp_path)
    assert sorted(path.suffix for path in (tmp_path / "dls_downloads").iterdir()) in ([], [".lock"])


def test_tampered_archive_without_a_digest_is_refused_by_its_content(server, monkeypatch, tmp_path):
    """ESC-50's archive has no stable digest: what is inside must be right."""
    make_esc50(tmp_path / "ESC-50-master")
    next((tmp_path / "ESC-50-master" / "audio").iterdir()).unlink()
    server.content = Path(shutil.make_archive(str(tmp_path / "t"), "zip", tmp_path, "ESC-50-master")).read_bytes()
    monkeypatch.setattr(type(CORPORA["esc50"]), "archives", (Archive(server.url, "ESC-50-master.zip"),))
    with pytest.raises(CorpusError, match=r"1 listed but absent.*delete .* to download it again"):
        load_corpus("esc50", cache_dir=tmp_path / "cache")


def test_offline_mode_downloads_nothing(server, official, monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(CorpusError, match=r"HF_HUB_OFFLINE is set: unset it, or give data_dir"):
        load_corpus("dcase2013", cache_dir=tmp_path)
    assert server.ranges == []


def test_official_addresses():
    urls = {
        name: [archive.url for archive in CORPORA[name].archives]
        for name in ("esc10", "esc50", "urbansound8k", "dcase2013")
    }
    assert urls["esc10"] == urls["esc50"] == ["https://github.com/karoldvl/ESC-50/archive/master.zip"]
    assert urls["urbansound8k"] == ["https://zenodo.org/record/1203745/files/UrbanSound8K.tar.gz"]
    assert [os.path.basename(url) for url in urls["dcase2013"]] == ["scenes_stereo.zip", "scenes_stereo_testset.zip"]
