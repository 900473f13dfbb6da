"""Names that others chose, of classes and files, made fit for a terminal and a spreadsheet."""


def printable(text: str) -> str:
    r"""The text on one line; control characters, terminal escapes and what is not UTF-8 are written as ``\x1b``."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def csv_cell(text: str) -> str:
    """The text as ``printable`` gives it, with an apostrophe before what a spreadsheet would take for a formula."""
    text = printable(text)
    return f"'{text}" if text[:1] in ("=", "+", "-", "@") else text
