"""Tables in our documents, for tests that hold them against the code."""

from pathlib import Path


def rows_under(header: str, document: Path) -> list[list[str]]:
    """The cells, without back quotes, of the table in `document` that has this first line."""
    _, _, rest = document.read_text("utf-8").partition(f"{header}\n")
    assert rest, f"{document.name} has no table that begins with {header}"
    lines = [line for line in rest.partition("\n\n")[0].splitlines() if not line.startswith("|---")]
    return [[cell.strip().replace("`", "") for cell in line.strip("|").split(" | ")] for line in lines]
