"""A link to a file outside docs/ works in the repository; on the site its text stands alone."""

from __future__ import annotations

import posixpath
import re
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: object) -> str:
    folder = posixpath.dirname(page.file.src_uri)

    def rendered(link: re.Match[str]) -> str:
        outside = posixpath.normpath(posixpath.join(folder, link[2])).startswith("..")
        return link[1] if outside else link[0]

    return re.sub(r"\[([^\]]+)\]\(((?:\.\./)+[^)#]*)\)", rendered, markdown)
