"""The lines of gateways and workers on the hub's stderr."""

import io
import json
import logging
import sys
from pathlib import Path

import pytest

from hub.local.log_stream import CHUNK_BYTES, FREE_BYTES, forwarded_logs
from hub.observability.log_format import Format, JsonFormatter, TextFormatter
from tests.support.models import wait_until

RAY = ":job_id:01000000\n:actor_name:ServeReplica:karst-hub:worker\nINFO 2026-11-28 18:52:19,740 serve 1 -- Started.\n"
TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 1\nValueError: kh_0123456789abcdef\n'


def own_line(format: Format, message: str) -> str:
    record = logging.LogRecord("hub.worker", logging.WARNING, __file__, 1, message, None, None)
    return (JsonFormatter() if format == "json" else TextFormatter()).format(record)


def copied(folder: Path, format: Format) -> list[str]:
    stream = io.StringIO()
    with forwarded_logs(lambda: sorted(folder.glob("*.err")), stream, format):
        pass
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("format", ["json", "text"])
def test_own_lines_are_copied_as_they_are_and_ordinary_lines_of_ray_are_not(tmp_path: Path, format: Format) -> None:
    own = [own_line(format, f"message {number} é") for number in range(3)]
    (tmp_path / "1.err").write_text(RAY + "\n".join(own[:2]) + "\n", encoding="utf-8")
    (tmp_path / "2.err").write_text(own[2] + "\n" + RAY, encoding="utf-8")
    assert copied(tmp_path, format) == own


def test_other_text_is_one_json_line_without_secrets(tmp_path: Path) -> None:
    own = own_line("json", "a message")
    (tmp_path / "1.err").write_text(f"{TRACEBACK}{own}\nsomething is odd\n")
    first, second, third = map(json.loads, copied(tmp_path, "json"))
    assert (first["level"], first["logger"]) == ("error", "ray")
    assert first["message"].endswith("ValueError: ***")
    assert second["message"] == "a message"
    assert (third["level"], third["message"]) == ("warning", "something is odd")


def test_other_text_stays_text_without_secrets(tmp_path: Path) -> None:
    (tmp_path / "1.err").write_text(TRACEBACK)
    assert copied(tmp_path, "text")[-1] == "ValueError: ***"


def test_lines_appear_while_the_hub_runs_and_only_when_they_are_whole(tmp_path: Path) -> None:
    stream, file = io.StringIO(), tmp_path / "1.err"
    line = own_line("json", "slow")
    with forwarded_logs(lambda: [file], stream, "json"):
        file.write_text(f"{line}\n{line[:20]}")
        wait_until(lambda: stream.getvalue() == f"{line}\n", what="the first line")
        with file.open("a") as more:
            more.write(f"{line[20:]}\n")
        wait_until(lambda: stream.getvalue() == f"{line}\n{line}\n", what="the second line")


def test_a_line_that_never_ends_does_not_stop_the_others(tmp_path: Path) -> None:
    line = own_line("text", "after")
    (tmp_path / "1.err").write_bytes(b"x" * (2 * CHUNK_BYTES) + b"\n" + line.encode() + b"\n")
    assert copied(tmp_path, "text")[-1] == line


def test_copied_lines_do_not_stay_on_the_disk(tmp_path: Path) -> None:
    file, stream = tmp_path / "1.err", io.StringIO()
    line = own_line("text", "m" * 1000).encode() + b"\n"
    count = 3 * FREE_BYTES // len(line)
    with file.open("ab", buffering=0) as writer, forwarded_logs(lambda: [file], stream, "text"):
        writer.write(line * count)
        wait_until(lambda: stream.getvalue().count("\n") == count, 30, "all lines")
        writer.write(line)  # where the file ends, as before
    assert stream.getvalue().encode() == line * (count + 1)
    assert file.stat().st_size == len(line) * (count + 1)
    assert file.stat().st_blocks * 512 < 2 * FREE_BYTES


def test_a_stream_that_is_closed_does_not_stop_the_hub(tmp_path: Path) -> None:
    (tmp_path / "1.err").write_text("text\n")
    with io.TextIOWrapper(io.BytesIO()) as closed:
        pass
    with forwarded_logs(lambda: [tmp_path / "1.err"], closed, "json"):
        print("the hub", file=sys.stderr)
