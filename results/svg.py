"""Pictures as text: an SVG of a fixed width, readable on light and on dark pages."""

import math
from html import escape
from pathlib import Path

LIGHT = {"paper": "#ffffff", "ink": "#1f2328", "faint": "#59636e", "rule": "#d1d9e0"}
LIGHT |= {"orange": "#bc4c00", "blue": "#0969da", "green": "#1a7f37", "purple": "#8250df"}
LIGHT |= {"orange-pale": "#ffe2d1", "blue-pale": "#ddf4ff", "green-pale": "#dafbe1"}
DARK = {"paper": "#0d1117", "ink": "#e6edf3", "faint": "#9198a1", "rule": "#3d444d"}
DARK |= {"orange": "#ffa657", "blue": "#79c0ff", "green": "#7ee787", "purple": "#d2a8ff"}
DARK |= {"orange-pale": "#462a12", "blue-pale": "#0c2d5a", "green-pale": "#10381d"}


def style(colours):
    """.fill-NAME and .line-NAME for each colour."""
    return "".join(
        f".fill-{name} {{ fill: {c} }} .line-{name} {{ stroke: {c}; fill: none }}\n"
        for name, c in colours.items()
    )


class Picture:
    """Shapes on an opaque page, so that its own colours agree wherever it is shown."""

    def __init__(self, width, height, title):
        self.size, self.title, self.parts = (width, height), title, []
        self.rect(0, 0, width, height, "fill-paper")

    def add(self, tag, text="", **values):
        named = "".join(f' {k.replace("_", "-")}="{shown(v)}"' for k, v in values.items())
        self.parts.append(f"<{tag}{named}>{text}</{tag}>" if text else f"<{tag}{named}/>")

    def rect(self, x, y, width, height, style, **more):
        self.add("rect", x=x, y=y, width=width, height=height, **{"class": style}, **more)

    def box(self, x, y, width, height, colour, text, size=16, trained=True):
        """A rounded box with its text in the middle; pale and broken unless it is trained."""
        self.rect(x, y, width, height, f"fill-{colour}-pale", rx=6)
        dash = {} if trained else {"stroke_dasharray": "5 4"}
        self.rect(x, y, width, height, f"line-{colour}", rx=6, stroke_width=1.5, **dash)
        self.text(x + width / 2, y + height / 2 + size * 0.35, text, size=size, anchor="middle")

    def text(self, x, y, text, size=16, anchor="start", colour="ink", **more):
        more |= {"class": f"fill-{colour}", "font_size": size, "text_anchor": anchor}
        self.add("text", escape(text), x=x, y=y, **more)

    def line(self, points, colour="ink", width=1.5, **more):
        """Through (x, y) points."""
        points = " ".join(f"{shown(x)},{shown(y)}" for x, y in points)
        self.add(
            "polyline", points=points, **{"class": f"line-{colour}"}, stroke_width=width, **more
        )

    def arrow(self, a, b, colour="ink", **more):
        """From a to b, upright or level, with a head."""
        (x, y), size = b, 5
        dx, dy = (0, size if a[1] > y else -size) if a[0] == x else (size if a[0] > x else -size, 0)
        self.line([a, b], colour, **more)
        head = [(x + 1.6 * dx + 0.8 * dy, y + 1.6 * dy + 0.8 * dx), b]
        head += [(x + 1.6 * dx - 0.8 * dy, y + 1.6 * dy - 0.8 * dx)]
        self.line(head, colour)

    def dot(self, x, y, colour, r=5, full=True):
        kind = f"fill-{colour}" if full else f"line-{colour}"
        self.add("circle", cx=x, cy=y, r=r, **{"class": kind}, stroke_width=2)

    def save(self, file):
        Path(file).write_text(str(self), encoding="utf-8")

    def __str__(self):
        width, height = self.size
        font = 'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"'
        dark = f"@media (prefers-color-scheme: dark) {{\n{style(DARK)}}}\n"
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {font}>\n'
        head += f"<title>{escape(self.title)}</title>\n<style>\n{style(LIGHT)}{dark}</style>\n"
        return head + "\n".join(self.parts) + "\n</svg>\n"


def shown(value):
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


class Axes:
    """A rectangle of a picture in which numbers have a place; x or y may be logarithmic."""

    def __init__(self, picture, area, x, y, logx=False, logy=False):
        self.picture, self.area, self.x, self.y = picture, area, Scale(*x, logx), Scale(*y, logy)
        self.taken = []  # (x0, y0, x1, y1) of what labels must not cover

    def at(self, x, y):
        left, top, width, height = self.area
        return left + width * self.x(x), top + height * (1 - self.y(y))

    def frame(self, xticks, yticks, xlabel="", ylabel="", size=14):
        """ticks: {number: text}."""
        left, top, width, height = self.area
        for number, text in yticks.items():
            y = self.at(self.x.low, number)[1]
            self.picture.line([(left, y), (left + width, y)], "rule", 1)
            self.picture.text(left - 8, y + size * 0.35, text, size, "end", "faint")
        for number, text in xticks.items():
            x = self.at(number, self.y.low)[0]
            self.picture.line([(x, top + height), (x, top + height + 5)], "faint", 1)
            self.picture.text(x, top + height + 8 + size, text, size, "middle", "faint")
        if xlabel:
            self.picture.text(left + width, top + height + 26 + size, xlabel, size, "end", "faint")
        self.picture.text(left, top - 10, ylabel, size + 2, font_weight=600)

    def dot(self, x, y, colour, **more):
        x, y = self.at(x, y)
        self.picture.dot(x, y, colour, **more)
        self.taken.append((x - 6, y - 6, x + 6, y + 6))

    def curve(self, points, colour, **more):
        """A line through (x, y) points, which labels keep off, too."""
        places = [self.at(x, y) for x, y in points]
        self.picture.line(places, colour, 2, **more)
        for (x0, y0), (x1, y1) in zip(places, places[1:]):
            for n in range(21):
                x, y = x0 + (x1 - x0) * n / 20, y0 + (y1 - y0) * n / 20
                self.taken.append((x - 2, y - 2, x + 2, y + 2))

    def label(self, x, y, text, colour="ink", size=14):
        """Beside the point (x, y), where it covers nothing."""
        x, y = self.at(x, y)
        width = 0.58 * size * len(text)
        left, right = self.area[0], self.area[0] + self.area[2] + 8
        places = [(dx, dy) for dy in (5, -8, 18, -20, 30) for dx in (10, -10 - width)]
        places += [(-width / 2, dy) for dy in (24, -12, 38, -26)]
        for dx, dy in sorted(places, key=lambda place: abs(place[1] - 5)):
            box = (x + dx, y + dy - size, x + dx + width, y + dy + 3)
            if left <= box[0] and box[2] <= right and not any(meet(box, o) for o in self.taken):
                break
        self.taken.append(box)
        self.picture.rect(box[0], box[1], width, size + 3, "fill-paper")  # over the rules
        self.picture.text(box[0], box[3] - 3, text, size, colour=colour)


def meet(a, b):
    """Do two boxes (x0, y0, x1, y1) have a point in common?"""
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


class Scale:
    """low to high as 0 to 1."""

    def __init__(self, low, high, log=False):
        self.low, self.high, self.log = low, high, log

    def __call__(self, value):
        low, high, value = ((math.log(v) if self.log else v) for v in (self.low, self.high, value))
        return (value - low) / (high - low)
