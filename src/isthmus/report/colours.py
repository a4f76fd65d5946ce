"""The page's colours by what they are for, in light and in dark; the plots use the same ones."""

from collections.abc import Mapping

# Text colours reach a contrast of 4.5 : 1 on every background they stand on, and lines of plots 3 : 1 (WCAG 2.2 AA).
LIGHT: Mapping[str, str] = {
    "paper": "#ffffff",
    "surface": "#f5f6f8",
    "text": "#1b2127",
    "muted": "#57616c",
    "rule": "#d8dde3",
    "shadow": "#c3c9d0",
    "axis": "#7d8792",
    "aligned": "#0b5cad",
    "naive": "#b4470a",
    "notice": "#fff5e2",
    "notice_text": "#6e4400",
    "notice_edge": "#c98a17",
    "alarm": "#fdeceb",
    "alarm_text": "#8a1a14",
    "alarm_edge": "#c5372c",
    "model_0": "#0b7466",
    "model_1": "#7a3aa8",
    "model_2": "#a3215f",
    "model_3": "#6a6300",
    "model_4": "#3d5a80",
    "some_0": "#4d7ea8",
    "some_1": "#8a6fb3",
    "some_2": "#4f8a5b",
}
DARK: Mapping[str, str] = {
    "paper": "#14181d",
    "surface": "#1c2229",
    "text": "#e3e8ed",
    "muted": "#9fabb7",
    "rule": "#333c46",
    "shadow": "#475462",
    "axis": "#76828e",
    "aligned": "#70b4f7",
    "naive": "#f19a5b",
    "notice": "#32270f",
    "notice_text": "#f1cf8c",
    "notice_edge": "#a67c22",
    "alarm": "#3b1b19",
    "alarm_text": "#f7b9b2",
    "alarm_edge": "#c0504a",
    "model_0": "#4cc9b0",
    "model_1": "#c79bf2",
    "model_2": "#f58fbd",
    "model_3": "#cfc65a",
    "model_4": "#a3bede",
    "some_0": "#5d8db8",
    "some_1": "#9480c2",
    "some_2": "#63a070",
}


def css_variables(palette: Mapping[str, str]) -> str:
    """The palette as CSS custom properties: `--notice-text: #6e4400; …`."""
    return " ".join(f"{css_name(name)}: {colour};" for name, colour in palette.items())


def css_name(name: str) -> str:
    """The CSS custom property of a colour."""
    return "--" + name.replace("_", "-")
