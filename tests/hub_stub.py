"""A stub of the Hugging Face hub on loopback: the data sets of a folder, ORG/NAME/REVISION/…."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest
import yaml
from huggingface_hub import constants, file_download


class Hub(ThreadingHTTPServer):
    """The server; ``asked`` lists the files that were fetched."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        parts = unquote(self.path.partition("?")[0]).strip("/").split("/")
        if parts[0] == "api":
            repository, revision = parts[2:4], "/".join(parts[5:]) or "main"
            folder = self.server.folder.joinpath(*repository, revision)
            files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
            card = folder / "README.md"
            answer = {
                "id": "/".join(repository),
                "sha": commit_of(folder),
                "siblings": [{"rfilename": file} for file in files],
                "cardData": yaml.safe_load(card.read_text().split("---")[1]) if card.exists() else {},
            }
            self.answer(json.dumps(answer).encode(), folder.exists())
            return
        organization, name, _, revision, *path = parts[parts[0] == "datasets" :]
        repository = self.server.folder / organization / name
        revisions = [child for child in repository.rglob("*") if revision in (commit_of(child), child.name)]
        folder = (revisions or [repository])[0]
        file = folder.joinpath(*path)
        if self.command == "GET":
            self.server.asked.append("/".join(path))
        self.answer(file.read_bytes() if file.is_file() else b"", file.is_file(), commit_of(folder))

    do_HEAD = do_GET  # noqa: N815

    def answer(self, content: bytes, exists: bool, commit: str = "") -> None:
        self.send_response(200 if exists else 404)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def commit_of(folder: Path) -> str:
    """Return the commit of a branch, which changes with its files."""
    changed = sorted(path.stat().st_mtime_ns for path in folder.rglob("*"))
    return hashlib.sha1(f"{folder}{changed}".encode()).hexdigest()


@contextmanager
def serve(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Let this process's hub client ask the stub, with a cache of its own."""
    with Hub(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        monkeypatch.setenv("TORCH_HOME", str(cache))
        yield server
        server.shutdown()
