"""Safe Markdown: the text of strangers as HTML that loads nothing and runs nothing."""

from __future__ import annotations

from functools import lru_cache

from markdown_it import MarkdownIt
from markupsafe import Markup


@lru_cache(maxsize=1)
def _markdown() -> MarkdownIt:
    """HTML stays text; no pictures, which would be asked from other servers; links name no referrer.

    markdown-it itself refuses links by javascript:, vbscript:, file: and data:.
    """
    parser = MarkdownIt("js-default", {"html": False, "linkify": False, "breaks": True}).disable(["image"])
    parser.add_render_rule("link_open", _link)
    for name in ("fence", "code_block"):
        parser.add_render_rule(name, _scrolled(name))
    parser.add_render_rule("table_open", _table)
    return parser


def _scrolled(name: str):
    """Wide code is moved sideways by the arrow keys of who has no mouse, so it can be focused."""

    def render(renderer, tokens, index, options, env) -> str:
        text: str = getattr(renderer, name)(tokens, index, options, env)
        return text.replace("<pre>", '<pre tabindex="0">', 1)

    return render


def _table(renderer, tokens, index, options, env) -> str:
    tokens[index].attrSet("tabindex", "0")
    return renderer.renderToken(tokens, index, options, env)


def _link(renderer, tokens, index, options, env) -> str:
    tokens[index].attrSet("rel", "noreferrer noopener nofollow")
    tokens[index].attrSet("target", "_blank")
    return renderer.renderToken(tokens, index, options, env)


def markdown(text: str) -> Markup:
    return Markup(_markdown().render(text))
