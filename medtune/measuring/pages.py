"""A report as sections of text, tables and charts, written as a page of HTML and as Markdown."""

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

STYLE = """
body { font: 15px/1.5 system-ui, "Noto Sans CJK SC", "Microsoft YaHei", sans-serif; max-width: 72rem;
       margin: 2rem auto; padding: 0 1rem; color: #1c2430; }
h1, h2 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #d5dae1; padding-bottom: .3rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: .8rem 0; font-size: 14px; }
th, td { border: 1px solid #d5dae1; padding: .35rem .6rem; text-align: left; vertical-align: top; }
th { background: #f1f4f8; } td:first-child { white-space: nowrap; }
svg { max-width: 100%; height: auto; } figure { margin: 1rem 0; } figcaption { color: #5a6675; font-size: 14px; }
.notice { background: #fff5e5; border-left: 4px solid #d98a00; padding: .6rem 1rem; }
p { overflow-wrap: anywhere; } .flag { white-space: nowrap; }
/* On a phone: tables of figures and charts are scrolled, answers are not. */
@media (max-width: 48rem) { .figures td { white-space: nowrap; } .answers td:first-child { white-space: normal; }
                            svg { max-width: none; width: 48rem; } }
"""
REPORT_NOTICE = (
    "Answers are generated, for research only, and no medical advice. 回答由模型生成，仅供研究，不构成医疗建议。"
)


@dataclass
class Table:
    header: list[str]
    rows: list[list[str]]


@dataclass
class Chart:
    name: str
    caption: str
    svg: str


@dataclass
class Section:
    title: str
    blocks: list[str | Table | Chart] = field(default_factory=list)


def to_html(title: str, sections: Sequence[Section]) -> str:
    parts = [
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>",
        f'<h1>{html.escape(title)}</h1><p class="notice">{REPORT_NOTICE}</p>',
    ]
    for section in sections:
        parts.append(f"<h2>{html.escape(section.title)}</h2>")
        for block in section.blocks:
            if isinstance(block, str):
                text = re.sub(r"--\w+", r'<span class="flag">\g<0></span>', html.escape(block))
                parts.append(f"<p>{text}</p>")
            elif isinstance(block, Chart):
                caption = html.escape(block.caption)
                picture = f'<div class="wide">{unique_ids(block)}</div>'
                parts.append(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
            else:
                head = "".join(f"<th>{html.escape(cell)}</th>" for cell in block.header)
                rows = "".join(
                    f"<tr>{''.join(f'<td>{line_breaks(cell)}</td>' for cell in row)}</tr>" for row in block.rows
                )
                kind = "figures" if len(block.header) > 2 else "answers"
                parts.append(f'<div class="wide"><table class="{kind}"><tr>{head}</tr>{rows}</table></div>')
    return "\n".join([*parts, "</body></html>"]) + "\n"


def unique_ids(chart: Chart) -> str:
    """The SVG with unique ids; otherwise several on one page would share glyphs and clip paths."""
    prefix = re.sub(r"\W", "-", chart.name)
    svg = re.sub(r'\bid="', f'id="{prefix}-', chart.svg)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", svg)


def line_breaks(text: str) -> str:
    return html.escape(text).replace("\n", "<br>")


def to_markdown(title: str, sections: Sequence[Section]) -> str:
    parts = [f"# {title}", REPORT_NOTICE]
    for section in sections:
        parts.append(f"## {section.title}")
        for block in section.blocks:
            if isinstance(block, str):
                parts.append(block)
            elif isinstance(block, Chart):
                parts.append(f"![{block.name}](charts/{block.name}.svg)\n\n{block.caption}")
            else:
                lines = [block.header, ["---"] * len(block.header), *block.rows]
                parts.append("\n".join("| " + " | ".join(map(markdown_cell, line)) + " |" for line in lines))
    return "\n\n".join(parts) + "\n"


def markdown_cell(text: str) -> str:
    """Escape the text for Markdown, so that `0.5g*24` keeps its asterisk."""
    return re.sub(r"[\\*~`$|]", r"\\\g<0>", html.escape(text, quote=False)).replace("\n", "<br>")
