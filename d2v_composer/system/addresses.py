"""Parse and check addresses of files, local or remote, and hide secrets in texts."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode

from typing_extensions import Self

# An exported student, beside its run and on the Hugging Face hub.
STUDENT_FILE = "student.safetensors"
# Name of a run's lock file. A folder with this file, here or in a store, belongs to a run.
MARK = ".in_use"
# Stores to which Composer can write.
STORES = ("s3", "gs", "oci", "azure", "dbfs")
WEB = ("http", "https")
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(dbfs):/")
# What comes before an '@' and is secret: USER:PASSWORD, of any characters after a scheme, unless ':' and digits are a
# port; a token on a web server; and USER:PASSWORD at a word's start. A limit keeps a hostile text from taking minutes.
LOGIN = re.compile(
    r"(://)[^\s/:@]*:(?!\d*(?:[/?#]|$))\S{0,999}@|((?:https?|s?ftp)://)[^/?#\n]*@"
    r"|((?:^|[\s='\"([{,]))[^\s/:@='\"([{,]+:[^\s/]{1,999}@"
)
# Query and fragment of an address, without a sentence's punctuation after it.
_LAST = r"[^\s\"'<>\\:;,.)}\]#]"
QUERY = re.compile(rf"(://[^\s?#]*)(?:\?([^\s#]*{_LAST})?)?(#(?:\S*{_LAST})?)?")
# Names of values that are secret wherever they stand, as in loggers.wandb.init_kwargs.settings.api_key.
_NAME = r"[\w-]{0,30}(?:passw(?:or)?d|secret|(?:api|access)_?key|(?:access|auth)_?token)|token"
NAME = re.compile(_NAME, re.IGNORECASE)
NAMED = re.compile(rf"\b((?:{_NAME})['\"]?(?:=|: ?))(?:\"[^\"]*\"|'[^']*'|[^\s,}}'\"]+)", re.IGNORECASE)
HIDDEN = "hidden"
# Query parameters of presigned addresses: S3 (both kinds), GCS, CloudFront and Azure.
SIGNATURE = re.compile(
    r"x-(amz|goog)-.*|awsaccesskeyid|googleaccessid|signature|expires|policy|key-pair-id|"
    r"s([vspterk]|ss|rt|pr|ip|ig|k[a-z]{1,3})",
    re.IGNORECASE,
)
# Parameters that are not secret; any other may be a token.
HARMLESS = re.compile("versionid|generation|revision|version|download|raw", re.IGNORECASE)
# What a run's own folder and checkpoints may be called. Composer parses these paths with urllib, which cuts '#', '?'
# and ';' off and sees a scheme before ':', and it fills in placeholders in braces: it would save elsewhere, silently.
CHARACTERS = re.compile(r"[\w ./@%=+,~-]+")


class Address(NamedTuple):
    """A file or folder: local, on a web server or in an object store."""

    scheme: str
    """Scheme such as ``s3``; empty for a local path."""
    bucket: str
    path: str
    """Local path; in a store, the key without a trailing slash; on a web server, the text after the host."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse an address."""
        match = SCHEME.match(text)
        if match is None:
            return cls("", "", text)
        scheme, rest = match[1] or match[2], text[match.end() :]
        bucket, _, path = ("", "", rest) if match[2] else rest.partition("/")
        if scheme in WEB:
            return cls(scheme, bucket, path)
        # Composer and Streaming would read another key.
        parts = path.rstrip("/").split("/") if path else []
        is_odd = re.search(r"[][]", bucket) or re.search(r"[#?\s]", bucket + path.replace(" ", ""))
        if is_odd or not (bucket or scheme == "dbfs") or not {"", ".", ".."}.isdisjoint(parts):
            form = "dbfs:/PATH" if scheme == "dbfs" else f"{scheme}://BUCKET/KEY"
            raise ValueError(
                f"expected {form} without '#', '?', tabs or line breaks, where BUCKET has no spaces or brackets and no "
                f"part of the path is empty, '.' or '..'; got {text!r}"
            )
        return cls(scheme, bucket, path.rstrip("/"))

    @property
    def is_remote(self) -> bool:
        return self.scheme != ""


class RunFolder(NamedTuple):
    """A run's local folder and, if the run's files are uploaded, the folder in the store."""

    local: Path
    address: str | None = None
    """Address of the folder in the store, without a trailing slash; ``None`` without a store."""

    @classmethod
    def parse(cls, text: str, run_name: str = "run") -> Self:
        """Parse a ``save_folder``, in which ``{run_name}`` stands for ``run_name``.

        The key of a store's address is also the path of the local folder.
        """
        text = text.replace("{run_name}", run_name)
        address = Address.parse(text)
        if address.scheme not in ("", *STORES) or not re.fullmatch(r"[\w.-]*", address.bucket):
            raise ValueError(
                f"expected a folder or SCHEME://BUCKET/KEY, where SCHEME is one of {', '.join(STORES)}, and BUCKET has "
                f"only letters, digits, '.', '_' and '-'; got {text!r}"
            )
        place_to_write(text)
        check_path(address.path)
        return cls(Path(address.path), text.rstrip("/") if address.is_remote else None)

    def __str__(self) -> str:
        return self.address or str(self.local)


def place_to_write(text: str | Path) -> str:
    """Check where a command is to write; return the absolute path, or the address without a trailing slash."""
    address = Address.parse(os.path.expanduser(text))
    place = str(text).rstrip("/") if address.is_remote else os.path.abspath(address.path)
    if not address.path or os.path.dirname(place) == place:
        raise ValueError(f"expected a path or address to write to, not the root of a disk or bucket, got {str(text)!r}")
    return place


def check_run_name(name: str) -> None:
    """Check that a run's name can be the name of a folder."""
    if "/" in name or name in (".", ".."):
        raise ValueError(f"expected a name without '/', other than '.' and '..', got {name!r}")
    check_path(name)


def check_path(path: str) -> None:
    """Check that a path has only characters that Composer uses as written."""
    if not CHARACTERS.fullmatch(path) or path != path.strip() or path.startswith("//"):
        hint = "; {run_name} in save_folder is the only placeholder" if "{" in path else ""
        raise ValueError(
            "expected only letters, digits, inner spaces and the characters ./@%=+,~-_ (no // at the start), "
            f"got {path!r}{hint}"
        )


def canonical_address(address: str) -> str:
    """Return an address without login, signature and fragment.

    The result may still hold a token: hash the result, and do not show it.
    """
    return _rewrite(address, lambda name: not SIGNATURE.fullmatch(name))


def file_name(address: str | Path) -> str:
    """Return the file name at the end of an address or a path."""
    text = str(address)
    return Path(text.partition("#")[0].partition("?")[0] if "://" in text else text).name


def hide_secrets(value: Any) -> Any:
    """Return a text or a JSON value with passwords, signatures and possible tokens hidden."""
    if isinstance(value, str):
        return NAMED.sub(rf"\1{HIDDEN}", _rewrite(value, lambda name: HARMLESS.fullmatch(name) is not None))
    if isinstance(value, Mapping):
        return {key: HIDDEN if item and NAME.fullmatch(str(key)) else hide_secrets(item) for key, item in value.items()}
    return [*map(hide_secrets, value)] if isinstance(value, list | tuple) else value


def _rewrite(text: str, keeps: Callable[[str], bool]) -> str:
    """Shorten the addresses in a text: remove logins, fragments, and the query parameters that ``keeps`` rejects."""

    def shorten(match: re.Match[str]) -> str:
        pairs = [(name, value) for name, value in parse_qsl(match[2] or "", keep_blank_values=True) if keeps(name)]
        return match[1] + (f"?{urlencode(pairs)}" if pairs else "")

    return QUERY.sub(shorten, LOGIN.sub(r"\1\2\3", text))
