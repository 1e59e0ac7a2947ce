"""The few pieces of SVG that our figures are made of."""

from __future__ import annotations

from xml.sax.saxutils import escape

INK, GREY = "#111827", "#4b5563"


def text(x: float, y: float, words: str, color: str = INK, anchor: str = "start", size: int = 13) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" text-anchor="{anchor}" font-size="{size}">'
        f"{escape(words)}</text>"
    )


def ground(width: int, height: int, title: str, below: str) -> list[str]:
    """The beginning of a figure: a white ground, what it shows, and of what."""
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" font-family="system-ui, sans-serif" font-size="13">',
        f"<title>{escape(f'{title}: {below}')}</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        text(16, 26, title, size=16),
        text(16, 46, below, GREY),
    ]
