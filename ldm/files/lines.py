"""Text files with one thing a line, such as captions."""

from pathlib import Path

from ldm.errors import NotFound, Refusal

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")  # endings of files that hold more than a line's words


def read_lines(path: str | Path, option: str = "prompts") -> list[str]:
    """-> a file's lines, stripped of spaces; a newline at the end of the file begins no further line.

    A line ends at a newline and nowhere else: captions from the web hold U+2028 and the like. A byte order mark at the file's
    beginning is dropped. Errors name the setting `option`.

    Raises:
        NotFound: there is no such file. Refusal: it is a table, or not UTF-8.
    """
    if not Path(path).is_file():
        raise NotFound(f"{option}={path}: there is no such file; it should hold one prompt a line.")
    if Path(path).suffix.lower() in TABLES:
        raise Refusal(f"{option}={path} is a table; wanted a text file with one prompt a line: write its captions into one.")
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refusal(f"{option}={path} is no text in UTF-8 ({error}); save it as UTF-8.") from error
    return [line.strip() for line in text.removesuffix("\n").split("\n")] if text else []
