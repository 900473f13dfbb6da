"""Names of classes and files from others, made safe for a terminal and a spreadsheet."""


def printable(text: str) -> str:
    r"""The text on one line; control characters, terminal escapes and invalid UTF-8 are written as ``\x1b``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def csv_cell(text: str) -> str:
    """The text as ``printable`` gives it, with an apostrophe before what a spreadsheet would read as a formula."""
    text = printable(text)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
