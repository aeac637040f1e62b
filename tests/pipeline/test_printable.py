"""Text of others on a terminal: it shows, and does nothing; URLs lose their secrets."""

import io

import pytest

from sbp_fast.errors import UserError
from sbp_fast.pipeline.credentials import strip_credentials, without_credentials
from sbp_fast.pipeline.progress import Console, print_error, print_line, printable

HOSTILE = "a\x1b]0;title\x07b\u202egnp.exe\x9bc\r\nerror: forged\udc80"


def test_printable_escapes_what_steers_a_terminal_and_leaves_other_text() -> None:
    assert printable("Grüße, 世界 👩‍🔬") == "Grüße, 世界 👩‍🔬"
    assert printable(HOSTILE) == r"a\x1b]0;title\x07b\u202egnp.exe\x9bc\r\nerror: forged\udc80"


def test_lines_errors_and_progress_print_hostile_text_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    print_line(HOSTILE)
    print_error(UserError(HOSTILE, "is hostile", "rename it"))
    console = Console(force_plain=True)
    console.say(HOSTILE)
    with console.stage(HOSTILE), console.task(HOSTILE, 1, "files") as task:
        task.advance(1, HOSTILE)
    printed = capsys.readouterr()
    assert not set("\x1b\x07\x9b\r\u202e\udc80") & set(printed.out + printed.err)
    assert not any(line.startswith("error: forged") for line in (printed.out + printed.err).splitlines())


def test_console_prints_strings_of_tables_escaped() -> None:
    console, written = Console(force_plain=True), io.StringIO()
    console.rich.file = written
    console.rich.print(HOSTILE, markup=False)
    assert not set("\x1b\x07\x9b\u202e") & set(written.getvalue())


@pytest.mark.parametrize(
    ("url", "stripped"),
    [
        ("https://me:secret@host/v1", "https://host/v1"),
        ("s3://key:p@ss@bucket/file", "s3://bucket/file"),
        ("https://host/f?id=1&token=abc&page=2", "https://host/f?id=1&token=***&page=2"),
        ("https://host/f?X-Amz-Signature=abc", "https://host/f?X-Amz-Signature=***"),
        ("mail me@example.org", "mail me@example.org"),
        ("https://host/path@2", "https://host/path@2"),
    ],
)
def test_urls_lose_their_secrets_and_nothing_else(url: str, stripped: str) -> None:
    assert without_credentials(url) == stripped
    assert strip_credentials({"corpus": [url, 1]}) == {"corpus": [stripped, 1]}
