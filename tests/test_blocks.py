"""Durable blocks: every record once and in order, whatever is killed, however many workers there are."""

import errno
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trl_tract.files.blocks import BlockLog, Record, Report, Shard
from trl_tract.files.journal import JsonlRows, read_jsonl, write_jsonl

HOSTILE = [
    "\x00nul",
    "line\nbreak\r\n",
    "\u2028separator\u2029",
    "\u202eright to left",
    "<script>",
    "\U0001f600",
    "\x1b[2J",
    '"]}\n{"block": 0, "records": [',
    "[RESULT] 5",
    "x" * 2**20,
]


def make_log(directory: Path, rows: int = 10, shard: Shard | None = None, **settings: Any) -> BlockLog:
    return BlockLog(directory, settings, "a test run", rows=rows, block_size=3, shard=shard)


def numbered(numbers: range, report: Report) -> list[Record]:
    return [{"row": number} for number in numbers]


def run(log: BlockLog, work: Any = numbered, **options: Any) -> bool:
    final = log.directory / "final.jsonl"

    def write(records: Iterator[Record]) -> None:
        write_jsonl(final, records)

    return log.run(work, final, write, **options)


def final_rows(directory: Path) -> list[int]:
    return [record["row"] for record in read_jsonl(directory / "final.jsonl")]


@pytest.mark.parametrize("rows", [0, 1, 3, 10])
def test_every_row_once_and_in_order(tmp_path, rows):
    assert run(make_log(tmp_path, rows))
    assert final_rows(tmp_path) == list(range(rows))


def test_a_finished_run_does_no_work_again(tmp_path):
    run(make_log(tmp_path))
    assert run(make_log(tmp_path), work=None)


def test_a_journal_cut_at_any_byte_is_continued(tmp_path):
    run(make_log(tmp_path / "whole"))
    journal = (tmp_path / "whole" / "blocks" / "worker-1-of-1.jsonl").read_bytes()
    for cut in range(len(journal) + 1):
        directory = tmp_path / f"cut-{cut}"
        log = make_log(directory)
        log._lock.release()
        (directory / "blocks" / "worker-1-of-1.jsonl").write_bytes(journal[:cut])
        run(make_log(directory))
        assert (directory / "blocks" / "worker-1-of-1.jsonl").read_bytes() == journal, cut
        assert final_rows(directory) == list(range(10)), cut


def test_a_journal_damaged_in_its_middle_is_named_and_not_guessed(tmp_path):
    log = make_log(tmp_path)
    for block in range(3):
        log.append(block, numbered(log.rows_of(block), int))
    log._lock.release()
    journal = tmp_path / "blocks" / "worker-1-of-1.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(lines[0] + b"\x00" * (len(lines[1]) - 1) + b"\n" + lines[2])
    with pytest.raises(ValueError, match=r"worker-1-of-1.jsonl"):
        make_log(tmp_path)


def test_hostile_text_is_stored_and_read_back_unchanged(tmp_path):
    def hostile(numbers: range, report: Report) -> list[Record]:
        return [{"text": HOSTILE[number]} for number in numbers]

    run(make_log(tmp_path, len(HOSTILE)), hostile)
    assert [record["text"] for record in read_jsonl(tmp_path / "final.jsonl")] == HOSTILE


def test_a_full_disk_keeps_what_was_written_and_says_how_to_go_on(tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    log = make_log(tmp_path)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"6 of 10 rows"):
        run(log)
    monkeypatch.undo()
    assert make_log(tmp_path).finished_rows == 6


def test_after_a_full_disk_the_run_ends_with_every_row(tmp_path, monkeypatch):
    log = make_log(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        run(log)
    monkeypatch.undo()
    run(make_log(tmp_path))
    assert final_rows(tmp_path) == list(range(10))


def test_a_disk_that_is_full_for_the_result_alone_says_how_to_go_on(tmp_path):
    def full(records: Iterator[Record]) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match=r"10 of 10 rows"):
        make_log(tmp_path).run(numbered, tmp_path / "final.jsonl", full)
    assert run(make_log(tmp_path), work=None)


def test_a_result_that_cannot_be_written_leaves_nothing_half_written(tmp_path):
    def broken() -> Iterator[Record]:
        yield {"row": 0}
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left"):
        write_jsonl(tmp_path / "final.jsonl", broken())
    assert list(tmp_path.iterdir()) == []


class TestTwoRuns:
    def test_at_once_on_one_directory_are_refused(self, tmp_path):
        held = make_log(tmp_path)
        with pytest.raises(RuntimeError, match="another process is at work"):
            make_log(tmp_path)
        assert held.finished_rows == 0

    def test_with_different_numbers_of_workers_are_refused(self, tmp_path):
        held = make_log(tmp_path, shard=Shard(0, 2))
        with pytest.raises(RuntimeError, match="another process is at work"):
            make_log(tmp_path, shard=Shard(0, 3))
        assert held.shard.count == 2

    def test_one_after_the_other_are_not(self, tmp_path):
        run(make_log(tmp_path))
        assert make_log(tmp_path).complete

    def test_that_start_at_once_agree_on_the_settings(self, tmp_path):
        refused: list[Exception] = []
        barrier = threading.Barrier(8, timeout=60)

        def start(index: int) -> None:
            barrier.wait()
            try:
                make_log(tmp_path, shard=Shard(index, 8), model="a" if index % 2 else "b")
            except FileExistsError as error:
                refused.append(error)

        threads = [threading.Thread(target=start, args=(index,)) for index in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(refused) == 4


class TestShards:
    def test_the_last_job_of_an_array_writes_the_result(self, tmp_path):
        written = [run(make_log(tmp_path, shard=Shard.parse(f"{i}/3"))) for i in (2, 3, 1)]
        assert written == [False, False, True]
        assert final_rows(tmp_path) == list(range(10))

    def test_a_job_does_its_share_alone(self, tmp_path):
        run(make_log(tmp_path, shard=Shard.parse("1/2")))
        assert make_log(tmp_path, shard=Shard.parse("1/2")).finished_rows == 6  # blocks 0 and 2 of 3, 3, 3, 1

    def test_any_number_of_workers_goes_on(self, tmp_path):
        run(make_log(tmp_path, 40, shard=Shard.parse("2/3")))
        run(make_log(tmp_path, 40, shard=Shard.parse("1/2")))
        done: list[int] = []

        def work(numbers: range, report: Report) -> list[Record]:
            done.extend(numbers)
            return numbered(numbers, report)

        assert run(make_log(tmp_path, 40), work)
        assert final_rows(tmp_path) == list(range(40))
        assert 0 < len(done) < 30

    def test_processes_of_a_launcher_do_what_slow_ones_left(self, tmp_path):
        # Worker 2 of 2 never comes; worker 1 does its share, then the other's, and writes the result.
        assert run(make_log(tmp_path, shard=Shard(0, 2, helps=True)))
        assert final_rows(tmp_path) == list(range(10))

    def test_processes_of_a_launcher_share_the_rows(self, tmp_path):
        done: dict[int, list[int]] = {0: [], 1: []}
        meet = threading.Barrier(2, timeout=60)

        def start(index: int) -> None:
            log = make_log(tmp_path, 60, shard=Shard(index, 2, helps=True))

            def work(numbers: range, report: Report) -> list[Record]:
                if not done[index]:
                    meet.wait()
                done[index] += numbers
                return numbered(numbers, report)

            run(log, work)

        threads = [threading.Thread(target=start, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert final_rows(tmp_path) == list(range(60))
        assert min(len(done[0]), len(done[1])) >= 3

    @pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/", "a/b", "-1/2"])
    def test_another_form_is_named(self, text):
        with pytest.raises(ValueError, match="is not i/n with i from 1 to n"):
            Shard.parse(text)

    def test_a_launchers_environment_is_read(self, monkeypatch):
        monkeypatch.setenv("RANK", "2")
        monkeypatch.setenv("WORLD_SIZE", "4")
        assert Shard.from_launcher() == Shard(2, 4, helps=True)


class TestSeveralCalls:
    def test_run_at_once(self, tmp_path):
        meet = threading.Barrier(3, timeout=10)

        def work(numbers: range, report: Report) -> list[Record]:
            if numbers.start < 9:
                meet.wait()  # breaks unless three blocks are under way together
            return numbered(numbers, report)

        assert run(make_log(tmp_path), work, max_calls=3)
        assert final_rows(tmp_path) == list(range(10))

    def test_are_never_more_than_allowed(self, tmp_path):
        running, most, lock = 0, 0, threading.Lock()

        def work(numbers: range, report: Report) -> list[Record]:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            threading.Event().wait(0.01)
            with lock:
                running -= 1
            return numbered(numbers, report)

        run(make_log(tmp_path, 60), work, max_calls=4)
        assert most == 4

    def test_keep_what_was_under_way_when_one_fails(self, tmp_path):
        failed = threading.Event()

        def work(numbers: range, report: Report) -> list[Record]:
            if numbers.start == 0:
                failed.set()
                raise ValueError("block 0 went wrong")
            failed.wait(10)
            return numbered(numbers, report)

        with pytest.raises(ValueError, match="block 0 went wrong"):
            run(make_log(tmp_path), work, max_calls=2)
        assert make_log(tmp_path).finished_rows == 3


def test_an_interrupted_run_says_how_to_go_on(tmp_path, caplog):
    def interrupted(numbers: range, report: Report) -> list[Record]:
        if numbers.start == 6:
            raise KeyboardInterrupt
        return numbered(numbers, report)

    with pytest.raises(KeyboardInterrupt):
        run(make_log(tmp_path), interrupted)
    assert "stopped with 6 of 10 rows on disk" in caplog.text
    assert "Start the same again" in caplog.text


def test_an_interrupted_run_cancels_the_calls_under_way(tmp_path):
    cancelled = threading.Event()

    def work(numbers: range, report: Report) -> list[Record]:
        if numbers.start == 0:
            raise KeyboardInterrupt
        assert cancelled.wait(10)
        return []

    with pytest.raises(KeyboardInterrupt):
        run(make_log(tmp_path), work, cancel=cancelled.set)
    assert cancelled.is_set()


class TestJsonlRows:
    def test_are_the_files_rows_by_number(self, tmp_path):
        rows = [{"n": i, "text": text} for i, text in enumerate(HOSTILE)]
        write_jsonl(tmp_path / "rows.jsonl", rows)
        read = JsonlRows(tmp_path / "rows.jsonl")
        assert [read[i] for i in range(len(read))] == rows == list(read)

    def test_pass_over_blank_lines_and_need_no_last_newline(self, tmp_path):
        (tmp_path / "rows.jsonl").write_text('{"n": 0}\n\n{"n": 1}')
        assert list(JsonlRows(tmp_path / "rows.jsonl")) == [{"n": 0}, {"n": 1}]

    def test_name_a_broken_line(self, tmp_path):
        (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a":\n')
        with pytest.raises(ValueError, match=r"rows.jsonl, line 2: not JSON"):
            list(JsonlRows(tmp_path / "rows.jsonl"))

    def test_name_text_in_another_encoding(self, tmp_path):
        (tmp_path / "rows.jsonl").write_bytes('{"a": "é"}\n'.encode("latin-1"))
        with pytest.raises(ValueError, match=r"rows.jsonl, line 1: not JSON"):
            list(read_jsonl(tmp_path / "rows.jsonl"))


def test_settings_that_changed_are_named(tmp_path):
    run(make_log(tmp_path, model="a"))
    with pytest.raises(FileExistsError, match=r"model: 'a' there, 'b' now"):
        make_log(tmp_path, model="b")
    assert json.loads((tmp_path / "settings.json").read_text()) == {"model": "a", "rows": 10, "block_size": 3}
