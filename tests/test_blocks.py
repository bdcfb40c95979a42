"""Durable blocks: every record once and in order, whatever is killed, however many workers there are."""

import contextlib
import errno
import os
import random
import shutil
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from trl_tract.files import blocks
from trl_tract.files.blocks import BlockLog, Record, Report
from trl_tract.files.journal import JsonlRows, KnownRows, read_json, read_jsonl, write_json, write_jsonl
from trl_tract.files.shards import Shard

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


def make_log(directory: Path, rows: int | list[Any] = 10, shard: Shard | None = None, **settings: Any) -> BlockLog:
    known = KnownRows(list(range(rows)) if isinstance(rows, int) else rows)
    return BlockLog(directory, settings, "a test run", rows=known, block_size=3, shard=shard)


def numbered(rows: list[Any], first: int, report: Report) -> list[Record]:
    return [{"row": number} for number in range(first, first + len(rows))]


def run(log: BlockLog, work: Any = numbered, **options: Any) -> bool:
    def write(records: Iterator[Record]) -> None:
        write_jsonl(log.directory / "final.jsonl", records)

    return log.run(work, write, ("final.jsonl",), **options)


def final_rows(directory: Path) -> list[int]:
    return [record["row"] for record in read_jsonl(directory / "final.jsonl")]


@pytest.mark.parametrize("rows", [0, 1, 3, 10])
def test_every_row_once_and_in_order(tmp_path, rows):
    assert run(make_log(tmp_path, rows))
    assert final_rows(tmp_path) == list(range(rows))


def test_the_count_of_rows_never_goes_back(tmp_path, monkeypatch):
    # That a block is on disk is seen when rows of the next one are done already.
    seen = []

    class Bar:
        n = 0

        def update(self, count):
            self.n += count
            seen.append(self.n)

        def refresh(self):
            seen.append(self.n)

    def work(rows, first, report):
        for _ in rows:
            report(1)
        time.sleep(0.05)  # for the block before to be written
        return numbered(rows, first, report)

    monkeypatch.setattr(blocks, "progress", lambda **settings: contextlib.nullcontext(Bar()))
    run(make_log(tmp_path), work)
    assert seen == sorted(seen)
    assert seen[-1] == 10


def test_a_finished_run_does_no_work_again(tmp_path):
    run(make_log(tmp_path))
    assert run(make_log(tmp_path), work=None)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a run but its locks, by its path."""
    paths = (path for path in directory.rglob("*") if path.is_file() and not path.name.endswith(".lock"))
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def damaged(whole: dict[str, bytes], every: int) -> Iterator[tuple[str, bytes]]:
    """Each file cut at every n-th byte, and with a flipped bit in every n-th byte."""
    bits = random.Random(0)
    for name, content in whole.items():
        for place in range(bits.randrange(every), len(content), every):
            flipped = bytearray(content)
            flipped[place] ^= 1 << bits.randrange(8)
            yield from ((name, content[:place]), (name, bytes(flipped)))


EVERY = pytest.mark.parametrize("every", [29, pytest.param(1, marks=pytest.mark.slow)])


@EVERY
def test_no_cut_and_no_flipped_bit_changes_the_result(tmp_path, monkeypatch, every):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nobody cuts the power here
    run(make_log(tmp_path, model="a"))
    whole, refused = contents(tmp_path), set()
    for name, content in damaged(whole, every):
        (tmp_path / name).write_bytes(content)
        try:
            run(make_log(tmp_path, model="a"))
        except (ValueError, FileExistsError):
            refused.add(name)
            (tmp_path / name).write_bytes(whole[name])
        assert contents(tmp_path)["final.jsonl"] == whole["final.jsonl"], name
    assert refused == {"settings.json"}


@EVERY
def test_no_cut_and_no_flipped_bit_makes_another_block_of_an_unfinished_run(tmp_path, monkeypatch, every):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    log = make_log(tmp_path)
    for block in range(2):
        log.append(block, numbered(list(log.rows_of(block)), log.rows_of(block).start, int))
    log._lock.release()
    blocks = {name: content for name, content in contents(tmp_path).items() if name.startswith("blocks")}
    for name, content in damaged(blocks, every):
        (tmp_path / name).write_bytes(content)
        assert make_log(tmp_path).finished_rows == 3, name
        (tmp_path / name).write_bytes(blocks[name])
    assert make_log(tmp_path).finished_rows == 6


@pytest.mark.parametrize("rows", [10, ["the same"] * 10], ids=["other rows", "equal rows"])
def test_a_block_in_the_place_of_another_is_done_again(tmp_path, rows):
    run(make_log(tmp_path, rows))
    whole = contents(tmp_path)
    (tmp_path / "finished.json").unlink()
    (tmp_path / "blocks" / "000001.jsonl").write_bytes(whole["blocks/000000.jsonl"])
    assert make_log(tmp_path, rows).finished_rows == 7
    run(make_log(tmp_path, rows))
    assert contents(tmp_path) == whole


class TestFinished:
    def test_means_that_the_result_is_there(self, tmp_path, caplog):
        run(make_log(tmp_path))
        (tmp_path / "final.jsonl").unlink()
        assert not make_log(tmp_path).finished
        assert "final.jsonl missing" in caplog.text
        run(make_log(tmp_path), work=None)
        assert final_rows(tmp_path) == list(range(10))

    def test_means_that_the_result_was_not_cut_at_the_end_of_a_line(self, tmp_path):
        run(make_log(tmp_path))
        lines = (tmp_path / "final.jsonl").read_bytes().splitlines(keepends=True)
        (tmp_path / "final.jsonl").write_bytes(b"".join(lines[:7]))
        run(make_log(tmp_path), work=None)
        assert final_rows(tmp_path) == list(range(10))

    def test_does_not_need_the_blocks(self, tmp_path):
        run(make_log(tmp_path))
        for block in (tmp_path / "blocks").glob("*.jsonl"):
            block.unlink()
        assert make_log(tmp_path).finished


def test_a_block_that_is_damaged_while_the_result_is_written_is_done_again(tmp_path):
    log, written = make_log(tmp_path), []

    def write(records: Iterator[Record]) -> None:
        if not written:
            (tmp_path / "blocks" / "000002.jsonl").write_bytes(b"")
        written.append(0)
        write_jsonl(tmp_path / "final.jsonl", records)

    assert log.run(numbered, write, ("final.jsonl",))
    assert final_rows(tmp_path) == list(range(10))
    assert len(written) == 2


TEXTS = [f"row {number}" for number in range(10)]


class TestRowsThatChange:
    def worked_on(self, directory: Path, rows: list[Any]) -> list[int]:
        """The rows that a run over `rows` works on."""
        done: list[int] = []

        def work(rows: list[Any], first: int, report: Report) -> list[Record]:
            done.extend(range(first, first + len(rows)))
            return [{"text": row} for row in rows]

        run(make_log(directory, rows), work)
        assert [record["text"] for record in read_jsonl(directory / "final.jsonl")] == rows
        return done

    def test_cost_their_block_and_not_the_run(self, tmp_path, caplog):
        self.worked_on(tmp_path, TEXTS)
        assert self.worked_on(tmp_path, [*TEXTS[:4], "mended", *TEXTS[5:]]) == [3, 4, 5]
        assert (
            "1 blocks are of rows that have changed since and are generated again, the first for rows 3 to 5"
            in caplog.text
        )

    def test_are_done_when_they_are_added(self, tmp_path):
        self.worked_on(tmp_path, TEXTS)
        assert self.worked_on(tmp_path, [*TEXTS, "added"]) == [9, 10]

    def test_are_no_longer_in_the_result_when_they_are_taken_away(self, tmp_path):
        self.worked_on(tmp_path, TEXTS)
        assert self.worked_on(tmp_path, TEXTS[:6]) == []

    @pytest.mark.parametrize("kept", ["blocks", "finished.json"])
    def test_are_another_run_where_none_is_as_it_was(self, tmp_path, kept):
        self.worked_on(tmp_path, TEXTS)
        if kept == "blocks":
            (tmp_path / "finished.json").unlink()
        else:
            shutil.rmtree(tmp_path / "blocks")
        with pytest.raises(FileExistsError, match="of other rows"):
            make_log(tmp_path, ["another", *TEXTS])

    @pytest.mark.parametrize(("edited", "during"), [(0, 9), (9, 3)])
    def test_under_the_run_are_noticed_whether_they_were_read_or_not(self, tmp_path, edited, during):
        data, out = tmp_path / "rows.jsonl", tmp_path / "out"
        rows = [{"n": number} for number in range(10)]
        write_jsonl(data, rows)
        done: list[int] = []

        def work(given: list[Any], first: int, report: Report) -> list[Record]:
            if first == during:
                rows[edited] = {"n": -1}
                write_jsonl(data, rows)
            done.extend(range(first, first + len(given)))
            return given

        def log() -> BlockLog:
            return BlockLog(out, {}, "a test run", rows=KnownRows(JsonlRows(data)), block_size=3)

        with pytest.raises(RuntimeError, match=r"rows.jsonl.*changed while the rows were being worked on"):
            run(log(), work)
        assert not (out / "final.jsonl").exists()
        done.clear()
        run(log(), lambda given, first, report: given)
        assert list(read_jsonl(out / "final.jsonl")) == rows

    def test_under_the_run_and_back_again_leave_no_trace(self, tmp_path):
        data, out = tmp_path / "rows.jsonl", tmp_path / "out"
        rows = [{"n": number} for number in range(10)]
        write_jsonl(data, rows)

        def work(given: list[Any], first: int, report: Report) -> list[Record]:
            if first == 3:
                write_jsonl(data, [*rows[:9], {"n": -1}])
            return given

        def log() -> BlockLog:
            return BlockLog(out, {}, "a test run", rows=KnownRows(JsonlRows(data)), block_size=3)

        with pytest.raises(RuntimeError, match="row 9: changed while"):
            run(log(), work)
        write_jsonl(data, rows)
        run(log(), lambda given, first, report: given)
        assert list(read_jsonl(out / "final.jsonl")) == rows


@pytest.mark.parametrize(
    "name", ["final.jsonl", "settings.json.partial", "blocks", "blocks/000000.jsonl", "finished.json"]
)
def test_nothing_is_written_through_a_link(tmp_path, name):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    make_log(out)._lock.release()
    shutil.rmtree(out / "blocks")
    (out / name).parent.mkdir(exist_ok=True)
    elsewhere.mkdir() if name == "blocks" else elsewhere.write_text("precious")
    (out / name).symlink_to(elsewhere)
    with pytest.raises(FileExistsError, match=f"{Path(name).name} is a symbolic link to {elsewhere}"):
        make_log(out)
    assert list(elsewhere.iterdir()) == [] if name == "blocks" else elsewhere.read_text() == "precious"


def test_what_killed_workers_left_half_written_is_gone_in_the_end(tmp_path):
    make_log(tmp_path)._lock.release()
    for worker in ("1-of-1", "3-of-3", "2-of-2"):
        (tmp_path / "blocks" / f"000001.worker-{worker}.partial").write_text("half")
    for file in ("final.jsonl", "finished.json"):
        (tmp_path / f"{file}.partial").write_text("half")
    run(make_log(tmp_path))
    assert not list(tmp_path.rglob("*.partial"))


def test_what_a_worker_left_that_was_killed_behind_the_end_is_gone_at_the_next_start(tmp_path):
    run(make_log(tmp_path))
    (tmp_path / "blocks" / "000001.worker-2-of-2.partial").write_text("half")
    run(make_log(tmp_path))
    assert not list(tmp_path.rglob("*.partial"))


def test_a_kill_while_the_settings_are_written_leaves_a_directory_that_can_be_used(tmp_path):
    (tmp_path / "settings.json.partial").write_text("half")
    run(make_log(tmp_path))
    assert not list(tmp_path.rglob("*.partial"))


@pytest.fixture
def disk(monkeypatch) -> list[tuple[str, int]]:
    """What was asked of the disk, in order: to sync a file or directory, by its inode, or to give a file its name."""
    asked: list[tuple[str, int]] = []
    replace = os.replace

    def fsync(descriptor: int) -> None:
        held = os.fstat(descriptor)
        asked.append(("directory" if stat.S_ISDIR(held.st_mode) else "file" if held.st_size else "empty", held.st_ino))

    def rename(source: Path, target: Path) -> None:
        asked.append(("name", source.stat().st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    return asked


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (lambda file: write_json(file, {"a": 1}), "a.json"),
        (lambda file: write_jsonl(file, [{"a": 1}]), "a.jsonl"),
        (lambda file: make_log(file.parent.parent).append(0, [{"row": 0}]), "blocks/000000.jsonl"),
    ],
    ids=["json", "jsonl", "block"],
)
def test_a_file_is_on_disk_before_it_has_its_name_and_its_directory_after(tmp_path, disk, write, name):
    write(tmp_path / name)
    file, directory = (path.stat().st_ino for path in (tmp_path / name, (tmp_path / name).parent))
    assert disk[-3:] == [("file", file), ("name", file), ("directory", directory)]


def test_the_folder_of_blocks_is_on_disk_before_the_first_block(tmp_path, disk):
    make_log(tmp_path)
    assert disk[-1] == ("directory", tmp_path.stat().st_ino)
    assert disk[-2][0] == "directory"  # behind the settings, which were synced before the folder was made


def test_a_directory_deleted_under_the_run_is_not_said_to_be_kept(tmp_path):
    out = tmp_path / "out"

    def work(rows: list[Any], first: int, report: Report) -> list[Record]:
        if first == 3:
            shutil.rmtree(out)
        return numbered(rows, first, report)

    with pytest.raises(OSError, match=r"directory was deleted in the meantime\. Run the same command again"):
        run(make_log(out), work)


def test_hostile_text_is_stored_and_read_back_unchanged(tmp_path):
    def hostile(rows: list[Any], first: int, report: Report) -> list[Record]:
        return [{"text": HOSTILE[number]} for number in rows]

    run(make_log(tmp_path, len(HOSTILE)), hostile)
    assert [record["text"] for record in read_jsonl(tmp_path / "final.jsonl")] == HOSTILE


def test_a_full_disk_keeps_what_was_written_and_says_how_to_go_on(tmp_path, monkeypatch):
    real = os.replace

    def full(partial: Path, path: Path) -> None:
        if path.name == "000002.jsonl":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(partial, path)

    log = make_log(tmp_path, rows=9)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match=r"No space left on device with 6 of 9 rows"):
        run(log)
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.partial"))
    assert make_log(tmp_path, rows=9).finished_rows == 6


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
        make_log(tmp_path).run(numbered, full, ("final.jsonl",))
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
        with pytest.raises(RuntimeError, match="another process is working"):
            make_log(tmp_path)
        assert held.finished_rows == 0

    def test_with_different_numbers_of_workers_are_refused(self, tmp_path):
        held = make_log(tmp_path, shard=Shard(0, 2))
        with pytest.raises(RuntimeError, match="another process is working"):
            make_log(tmp_path, shard=Shard(0, 3))
        assert held.shard.count == 2

    def test_one_after_the_other_are_not(self, tmp_path):
        run(make_log(tmp_path))
        assert make_log(tmp_path).finished

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

        def work(rows: list[Any], first: int, report: Report) -> list[Record]:
            done.extend(rows)
            return numbered(rows, first, report)

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

            def work(rows: list[Any], first: int, report: Report) -> list[Record]:
                if not done[index]:
                    meet.wait()
                done[index] += rows
                return numbered(rows, first, report)

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
        with pytest.raises(ValueError, match="must be i/n with i from 1 to n"):
            Shard.parse(text)

    def test_a_launchers_environment_is_read(self, monkeypatch):
        monkeypatch.setenv("RANK", "2")
        monkeypatch.setenv("WORLD_SIZE", "4")
        assert Shard.from_launcher() == Shard(2, 4, helps=True)


class TestSeveralCalls:
    def test_run_at_once(self, tmp_path):
        meet = threading.Barrier(3, timeout=10)

        def work(rows: list[Any], first: int, report: Report) -> list[Record]:
            if first < 9:
                meet.wait()  # breaks unless three blocks are under way together
            return numbered(rows, first, report)

        assert run(make_log(tmp_path), work, max_calls=3)
        assert final_rows(tmp_path) == list(range(10))

    def test_are_never_more_than_allowed(self, tmp_path):
        running, most, lock = 0, 0, threading.Lock()

        def work(rows: list[Any], first: int, report: Report) -> list[Record]:
            nonlocal running, most
            with lock:
                running += 1
                most = max(most, running)
            threading.Event().wait(0.01)
            with lock:
                running -= 1
            return numbered(rows, first, report)

        run(make_log(tmp_path, 60), work, max_calls=4)
        assert most == 4

    def test_keep_what_was_under_way_when_one_fails(self, tmp_path):
        failed = threading.Event()

        def work(rows: list[Any], first: int, report: Report) -> list[Record]:
            if first == 0:
                failed.set()
                raise ValueError("block 0 went wrong")
            failed.wait(10)
            return numbered(rows, first, report)

        with pytest.raises(ValueError, match="block 0 went wrong"):
            run(make_log(tmp_path), work, max_calls=2)
        assert make_log(tmp_path).finished_rows == 3


def test_an_interrupted_run_says_how_to_go_on(tmp_path, caplog):
    def interrupted(rows: list[Any], first: int, report: Report) -> list[Record]:
        if first == 6:
            raise KeyboardInterrupt
        return numbered(rows, first, report)

    with pytest.raises(KeyboardInterrupt):
        run(make_log(tmp_path), interrupted)
    assert "stopped with 6 of 10 rows on disk" in caplog.text
    assert "Run the same command again" in caplog.text


def test_an_interrupted_run_cancels_the_calls_under_way(tmp_path):
    cancelled = threading.Event()

    def work(rows: list[Any], first: int, report: Report) -> list[Record]:
        if first == 0:
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
    assert read_json(tmp_path / "settings.json") == {"model": "a", "block_size": 3}
