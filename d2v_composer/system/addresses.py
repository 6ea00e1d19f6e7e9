"""Parse addresses of files: a local path, https://…, or SCHEME://BUCKET/KEY in an object store.

Composer and Streaming parse addresses with urllib, which cuts '#', '?' and ';' off, and Composer fills in placeholders.
Addresses that they would read differently are refused.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, urlencode

from typing_extensions import Self

# Stores to which Composer can write.
STORES = ("s3", "gs", "oci", "azure", "dbfs")
WEB = ("http", "https")
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://|(dbfs):/")
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>]+")
# Query parameters in presigned addresses of S3 (both kinds), GCS, CloudFront and Azure, in lower case.
SIGNATURE_PREFIXES = ("x-amz-", "x-goog-")
SIGNATURE = {
    *("awsaccesskeyid", "googleaccessid", "signature", "expires", "policy", "key-pair-id"),
    *("sv", "ss", "srt", "sp", "st", "se", "spr", "sip", "sr", "sig", "skoid", "sktid", "skt", "ske", "sks", "skv"),
}
# Parameters that are not secret; any other may be a token.
HARMLESS = {"versionid", "generation", "revision", "version", "download", "raw"}
HIDDEN = "..."
# Characters with which urllib ends a path, or Composer begins a placeholder.
MISREAD = "#?;{}\\"
PLACEHOLDER = "placeholders such as {run_name} are not supported; in a YAML write ${run_name}"
# Limits of file systems and S3, in bytes; OWN_NAMES are reserved for a run's files (log, report, partial files).
LONGEST_NAME, LONGEST_PATH, LONGEST_KEY, OWN_NAMES = 255, 4095, 1024, 120


class Address(NamedTuple):
    """A file or folder: local, on a web server or in an object store."""

    scheme: str
    """Empty for a local path."""
    bucket: str
    path: str
    """In a store the key, without a slash at the end."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse an address; a local path may have any characters.

        Raises:
            ValueError: A store's address is malformed.
        """
        match = SCHEME.match(text)
        if match is None:
            return cls("", "", text)
        scheme, rest = match[1] or match[2], text[match.end() :]
        bucket, _, path = ("", "", rest) if match[2] else rest.partition("/")
        if scheme in WEB:
            return cls(scheme, bucket, path)
        _check_text(text)
        cut = [character for character in "#?" if character in text]
        if cut:
            raise ValueError(f"must not have {' or '.join(cut)}, which ends the address for a store, got {text!r}")
        path = path.rstrip("/")
        if (not bucket and scheme != "dbfs") or re.search(r"[][\s]", bucket):
            raise ValueError(f"must be {scheme}://BUCKET/…, got {text!r}")
        if path and not {"", ".", ".."}.isdisjoint(path.split("/")):
            raise ValueError(f"must have a name between any two slashes, not '.' or '..', got {text!r}")
        if _size(path) > LONGEST_KEY:
            raise ValueError(f"must have a key of at most {LONGEST_KEY} bytes, got {_size(path)}")
        return cls(scheme, bucket, path)

    @property
    def is_remote(self) -> bool:
        return self.scheme != ""


class RunFolder(NamedTuple):
    """A run's local folder and, if its files go to a store, their prefix in the bucket."""

    local: Path
    prefix: str | None = None
    """Empty for the bucket's root; ``None`` without a store."""
    address: str | None = None
    """Of the folder in the store, without a slash at the end; ``None`` without a store."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse a ``save_folder``.

        Raises:
            ValueError: It is malformed, or Composer would read it differently.
        """
        _check_characters(text)
        address = Address.parse(text)
        if address.scheme not in ("", *STORES) or not _composer_agrees(text, address):
            raise ValueError(f"must be a folder or an address in one of {', '.join(STORES)}, got {text!r}")
        local = Path(address.path or ".")
        _check_lengths(local)
        if not address.is_remote:
            return cls(local, None, None)
        if _size(address.path) > LONGEST_KEY - OWN_NAMES:
            raise ValueError(f"must have a key of at most {LONGEST_KEY - OWN_NAMES} bytes, got {_size(address.path)}")
        return cls(local, address.path, text.rstrip("/"))

    def key(self, name: str) -> str | None:
        """Return the key of one of the run's files in the bucket; ``None`` without a store."""
        return None if self.prefix is None else f"{self.prefix}/{name}".lstrip("/")


def check_run_name(name: str) -> None:
    """Check that a name can be a folder's, locally and in every store.

    Raises:
        ValueError: It cannot.
    """
    if "/" in name or name in (".", ".."):
        raise ValueError(f"must be a name without '/', got {name!r}")
    _check_characters(name)
    if not _composer_agrees(f"/{name}", Address("", "", f"/{name}")):
        raise ValueError(f"must be a name that Composer does not read differently, got {name!r}")
    _check_lengths(Path(name))


def check_path(path: str) -> None:
    """Check that Composer reads a local path as it is written.

    Raises:
        ValueError: It does not.
    """
    _check_characters(path)
    if not _composer_agrees(path, Address("", "", path)):
        raise ValueError(f"must be a path that does not look like an address, got {path!r}")


def _check_characters(text: str) -> None:
    _check_text(text)
    if "{" in text or "}" in text:
        raise ValueError(f"{PLACEHOLDER}, got {text!r}")
    if any(character in text for character in MISREAD):
        raise ValueError(f"must not have any of # ? ; {{ }} \\, got {text!r}")


def _check_text(text: str) -> None:
    if not text or not text.isprintable() or text != text.strip():
        raise ValueError(f"must be printable characters without spaces around them, got {text!r}")


def _check_lengths(path: Path) -> None:
    longest = max(map(_size, path.parts), default=0)
    if longest > LONGEST_NAME:
        raise ValueError(f"must have names of at most {LONGEST_NAME} bytes, got one of {longest}")
    size = _size(str(path.absolute()))
    if size > LONGEST_PATH - OWN_NAMES:
        raise ValueError(f"must be a path of at most {LONGEST_PATH - OWN_NAMES} bytes, got {size}")


def _composer_agrees(text: str, address: Address) -> bool:
    """Return whether Composer parses the same store, bucket and path."""
    from composer.utils import parse_uri  # takes seconds, and only a run's own folder needs it

    try:
        scheme, bucket, path = parse_uri(text)
    except ValueError:  # from urllib, for brackets
        return False
    return (scheme, bucket, path.rstrip("/") if scheme else path) == tuple(address)


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogateescape"))


def identity(address: str) -> str:
    """Return an address without login, signature and fragment, to be hashed, not shown.

    A new signature does not change it. Other query parameters stay: they may identify the file.
    """
    return _rewrite(address, [(name, value) for name, value in _query(address) if not _signs(name)])


def is_address(text: str) -> bool:
    """Return whether a text is an address, malformed or not, rather than a local path."""
    return SCHEME.match(text) is not None


def file_name(address: str | Path) -> str:
    """Return the file name at the end of an address or a path."""
    text = str(address)
    return Path(text.partition("#")[0].partition("?")[0] if "://" in text else text).name


def hide_secrets(text: str) -> str:
    """Remove logins, signatures and possible tokens from the addresses in a text."""

    def hide(match: re.Match[str]) -> str:
        shown = ((name, value if name.lower() in HARMLESS else HIDDEN) for name, value in _query(match[0]))
        return _rewrite(match[0], [(name, value) for name, value in shown if not _signs(name)])

    return URL.sub(hide, text)


def hide_all_secrets(value: Any) -> Any:
    """Hide the secrets in every text of nested dicts and lists."""
    if isinstance(value, dict):
        return {name: hide_all_secrets(each) for name, each in value.items()}
    if isinstance(value, list):
        return [hide_all_secrets(each) for each in value]
    return hide_secrets(value) if isinstance(value, str) else value


def _query(address: str) -> list[tuple[str, str]]:
    # Not urlsplit, which refuses some hosts.
    return parse_qsl(address.partition("#")[0].partition("?")[2], keep_blank_values=True)


def _rewrite(address: str, query: list[tuple[str, str]]) -> str:
    scheme, _, rest = address.partition("#")[0].partition("?")[0].partition("://")
    host, slash, path = rest.partition("/")
    login = host.rpartition("@")[0]
    if ":" in login or scheme.lower() in (*WEB, "ftp", "sftp"):  # oci://BUCKET@NAMESPACE has no login
        host = host.rpartition("@")[2]
    return f"{scheme}://{host}{slash}{path}" + (f"?{urlencode(query)}" if query else "")


def _signs(name: str) -> bool:
    return name.lower().startswith(SIGNATURE_PREFIXES) or name.lower() in SIGNATURE
