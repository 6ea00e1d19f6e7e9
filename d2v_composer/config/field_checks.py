"""Checks of single fields that need more than a comparison; each raises ValueError."""

from d2v_composer.config.limits import suggest
from d2v_composer.evaluation.metric_names import PROBES
from d2v_composer.models.sizes import MAX_WIDTH
from d2v_composer.models.timm_config import parse_image_size
from d2v_composer.system.addresses import Address, check_path

__all__ = ["check_cache_limit", "check_image_size", "check_load_path", "check_probes", "check_references"]

REFERENCES = ("pixels", "encoder", "teacher")


def check_cache_limit(limit: int | str) -> None:
    from streaming.base.util import bytes_to_int  # takes seconds

    try:
        bytes_to_int(limit)
    except ValueError:
        raise ValueError(f"must be bytes or a size such as '100gb', got {limit!r}") from None


def check_load_path(text: str) -> None:
    """Refuse an address or path that Composer would look up elsewhere."""
    if not Address.parse(text).is_remote:
        check_path(text)


def check_image_size(size: int | str) -> None:
    try:
        parse_image_size(size)
    except ValueError:
        raise ValueError(
            f"must be a number of pixels or HEIGHTxWIDTH, each from 1 to {MAX_WIDTH}, got {size!r}"
        ) from None


def check_probes(names: list[str]) -> None:
    for name in names:
        if name not in PROBES:
            raise ValueError(f"no such probe {name!r}{suggest(name, list(PROBES))}")


def check_references(names: list[str]) -> None:
    for name in names:
        if name not in REFERENCES:
            raise ValueError(f"no such reference {name!r}{suggest(name, REFERENCES)}")
