"""Pages from templates: one HTML file each, which loads nothing from the network."""

import base64
import io
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from PIL import Image

from distributed.config import flat_fields

TEMPLATES = Path(__file__).parent / "templates"


@cache
def environment() -> jinja2.Environment:
    """The templates; a name that a template uses and that is not given is an error."""
    env = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    env.filters |= {"fixed": fixed, "signed": signed, "count": count, "data_uri": data_uri}
    env.globals |= {"style": _asset("page.css"), "script": _asset("page.js")}
    return env


def render(template: str, **values: Any) -> str:
    """The page of a template; everything in `values` is escaped, except `Markup`."""
    return environment().get_template(template).render(**values)


def fixed(value: float | None, digits: int = 2) -> str:
    """`12.30`; an en dash if there is no value."""
    return "–" if value is None else f"{value:.{digits}f}"


def signed(value: float | None, digits: int = 2) -> str:
    """`+0.30`; an en dash if there is no value."""
    return "–" if value is None else f"{value:+.{digits}f}"


def count(value: float) -> str:
    """`12,000`."""
    return f"{value:,.0f}"


def data_uri(image: Image.Image, quality: int | None = None) -> str:
    """A picture as an address that contains it; WebP of a quality, or PNG (lossless)."""
    buffer = io.BytesIO()
    if quality is None:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "WEBP", quality=quality, method=4)
    kind = "png" if quality is None else "webp"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _asset(name: str) -> Markup:
    return Markup((TEMPLATES / name).read_text())


def differences(configs: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Fields that are not equal in all configurations: (`section.field`, a value of each).

    Args:
        configs: run -> its configuration; a field that one lacks is shown as None.
    """
    flat = [flat_fields(config) for config in configs.values()]
    names = dict.fromkeys(name for one in flat for name in one)
    rows = [(name, [one.get(name) for one in flat]) for name in names]
    return [(name, values) for name, values in rows if any(v != values[0] for v in values)]
