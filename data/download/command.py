"""`pairstream data download`: a list of URLs and captions -> shards, by img2dataset."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from data.download.distribute import distribute
from data.download.files import list_files
from data.download.presets import PRESETS, Preset
from data.download.tables import Columns, choose_columns, count_rows, join_tables, read_parts, require_urls
from pairstream.atomic import check_place, write_text
from pairstream.errors import nearest, require
from pairstream.progress import ProgressBar

OPT_OUT_HEADERS = ("noai", "noimageai", "noindex", "noimageindex")
FOLDERS = ("rows", "parts", "journal", "done", "failed")


def download(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    /,
    *,
    out: Path,
    table: tuple[str, ...] | None = None,
    url_column: str | None = None,
    caption_column: str | None = None,
    keep_columns: tuple[str, ...] | None = None,
    limit: int | None = None,
    samples_per_shard: int = 10_000,
    image_size: int = 256,
    min_image_size: int = 0,
    verify_hash: Literal["auto", "yes", "no"] = "auto",
    distributor: Literal["multiprocessing", "pyspark", "ray"] = "multiprocessing",
    cluster: str | None = None,
    processes: int | None = None,
    threads: int = 64,
    timeout: float = 20.0,
    max_bytes: int = 50_000_000,
    host_rate: float = 20.0,
    robots: bool = True,
    respect_opt_out: bool = True,
    retry_failed: bool = False,
    retry_causes: tuple[str, ...] | None = None,
    quiet: bool = False,
) -> int:
    """Fetch the pictures of a list of URLs, and write them with their captions as shards.

    The same command goes on where a killed one stopped, and asks for nothing twice that it had got.

    Args:
        source: cc3m, cc12m, laion400m, laion2b, relaion2b, datacomp, sbu or redcaps (with --table), or a list of one's
            own: .csv, .tsv, .parquet, .jsonl or .json, a folder of them, or a glob.
        out: The folder of the shards.
        table: The files of a published list, as its authors hand them out.
        url_column: The column of URLs; found by itself under its usual names.
        caption_column: The column of captions; likewise.
        keep_columns: Further columns that the samples' JSON keeps; all that hold single values when not given.
        limit: Only the first so many rows.
        samples_per_shard: Rows of the list that make one shard (it holds those that could be had).
        image_size: Shorter side in pixels that larger pictures are brought to; smaller ones stay as they are.
        min_image_size: Leave out pictures with a shorter side than this.
        verify_hash: Leave out pictures whose SHA-256 is not the list's `sha256`; auto does so for datacomp.
        distributor: Where the work is done: processes of this machine, or a Spark or Ray cluster.
        cluster: Address of the cluster (auto or HOST:PORT for ray, spark://HOST:PORT for pyspark); without it one is
            started on this machine.
        processes: Worker processes on this machine; one per core when not given.
        threads: Requests at the same time in each process.
        timeout: Seconds without an answer, and seconds for a whole picture.
        max_bytes: Larger files are dropped.
        host_rate: Requests a second to one host, over all processes that share --out; 0 for no limit.
        robots: Ask for each host's robots.txt, and obey it.
        respect_opt_out: Leave out pictures whose X-Robots-Tag says noai, noimageai, noindex or noimageindex.
        retry_failed: Ask again for those pictures that failed, and for nothing else.
        retry_causes: With --retry-failed: only failures of these causes, such as timeout http_503.
        quiet: No progress and no summary.

    Returns:
        0.
    """
    outcome = run(
        source,
        out,
        list(table or ()),
        columns=(url_column, caption_column, keep_columns),
        limit=limit,
        samples_per_shard=samples_per_shard,
        image_size=image_size,
        min_image_size=min_image_size,
        verify_hash=verify_hash,
        distributor=distributor,
        cluster=cluster,
        processes=processes or os.cpu_count() or 1,
        threads=threads,
        timeout=timeout,
        max_bytes=max_bytes,
        host_rate=host_rate,
        robots=robots,
        opt_out=OPT_OUT_HEADERS if respect_opt_out else (),
        retry=(retry_failed, retry_causes),
        quiet=quiet,
    )
    if not quiet:
        print(f"{source} -> {out}: {outcome}", file=sys.stderr)
        if outcome.failed:
            print(f"every failure is in {out / 'failures.parquet'}", file=sys.stderr)
        if outcome.opted_out:
            print(f"who opted out is in {out / 'opt_out.csv'}", file=sys.stderr)
    return 0


def run(
    source: str,
    out: Path,
    table: Sequence[str],
    *,
    columns: tuple[str | None, str | None, Sequence[str] | None],
    limit: int | None,
    samples_per_shard: int,
    image_size: int,
    min_image_size: int,
    verify_hash: str,
    distributor: str,
    cluster: str | None,
    processes: int,
    threads: int,
    timeout: float,
    max_bytes: int,
    host_rate: float,
    robots: bool,
    opt_out: tuple[str, ...],
    retry: tuple[bool, Sequence[str] | None],
    quiet: bool,
) -> Any:
    """The work of `download`; returns its `Outcome`."""
    check_numbers(
        samples_per_shard=samples_per_shard, image_size=image_size, processes=processes, threads=threads,
        timeout=timeout, max_bytes=max_bytes,
    )  # fmt: skip
    if limit is not None and limit < 1:
        raise ValueError(f"--limit must be at least 1 row, got {limit}")
    if host_rate < 0:
        raise ValueError(f"--host-rate is in requests a second (0: no limit), got {host_rate:g}")
    if retry[1] and not retry[0]:
        raise ValueError("--retry-causes says which failures to try again: add --retry-failed")
    require_img2dataset()
    preset, files = open_source(source, table)
    chosen = choose_columns(files[0], preset, *columns)
    verify = bool(preset and preset.verify) if verify_hash == "auto" else verify_hash == "yes"
    if verify and "source_sha256" not in chosen.kept.values():
        if verify_hash == "yes":
            raise ValueError(
                f"--verify-hash yes needs a column sha256, and {files[0]} has none (or --keep-columns drops it)"
            )
        verify = False

    from data.download.outcome import done_parts, rows_to_retry, write_outcome
    from data.download.polite import Manners
    from data.download.worker import WORK, PartDownloader

    out = Path(out).resolve()
    work = out / WORK
    plan = open_plan(out, work, files, chosen, samples_per_shard, image_size, limit)
    rounds = [range(first, first + count) for first, count in plan["retries"]]
    done = done_parts(out)
    planned = plan["parts"] + sum(map(len, rounds))
    if retry[0]:
        if len(done) < planned:
            raise ValueError(
                f"{out} is not finished ({len(done):,} of {planned:,} parts): "
                "run the command without --retry-failed first"
            )
        again = stage(rows_to_retry(out, done, rounds, retry[1]), samples_per_shard, work, planned)
        if again:
            rounds.append(range(planned, planned + again))
            plan["retries"].append([planned, again])
            write_text(work / "plan.json", json.dumps(plan, indent=1))
            planned += again
        elif retry[1] and not quiet:
            print(f"no picture failed for {' or '.join(retry[1])}: nothing is tried again", file=sys.stderr)
    kept = [*chosen.kept.values(), *(["boxes"] if chosen.boxes else [])]
    downloader = PartDownloader(
        out,
        Manners(timeout, max_bytes, host_rate, robots, opt_out, work / "hosts"),
        kept,
        verify=verify,
        samples_per_shard=samples_per_shard,
        threads=threads,
        image_size=image_size,
        min_image_size=min_image_size,
    )
    tables = read_parts(files, chosen, samples_per_shard, plan["rows"])
    jobs = itertools.chain(first_jobs(tables, work, done), later_jobs(rounds, work, done))
    if len(done) < planned:
        with Watch(work / "done", len(done), planned, show=not quiet):
            distribute(distributor, downloader, jobs, processes, cluster)
    settings = {
        "source": source,
        "files": [str(path) for path in files],
        "robots": robots,
        "opt_out": list(opt_out),
        "host_rate": host_rate,
        "image_size": image_size,
    }
    outcome = write_outcome(out, rounds, settings)
    missing = planned - len(done_parts(out))
    if missing:
        said = sorted((work / "failed").glob("*.txt"))
        why = f" The first one says: {said[0].read_text(encoding='utf-8')}" if said else ""
        raise ValueError(
            f"{missing:,} of {planned:,} parts could not be finished; what is done is kept, the same command tries the "
            f"others again.{why}"
        )
    for name in ("rows", "parts", "journal", "failed"):
        shutil.rmtree(work / name, ignore_errors=True)
    (work / "hosts").unlink(missing_ok=True)
    return outcome


def check_numbers(**numbers: float) -> None:
    for name, value in numbers.items():
        if value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be above 0, got {value:g}")


def require_img2dataset() -> None:
    """Make sure that img2dataset can be imported.

    Raises:
        ImportError: It is absent, or this Python is too new for it.
    """
    if sys.version_info >= (3, 13):
        raise ImportError(
            "`pairstream data download` needs img2dataset, which stops below Python 3.13 (it uses the module imghdr): "
            f"this is Python {sys.version_info.major}.{sys.version_info.minor}. Download with Python 3.10 to 3.12; "
            "every other command reads the shards with any Python."
        )
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # its import would ask the network for a newer version
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        require("img2dataset", "download", "`pairstream data download`")


def open_source(source: str, table: Sequence[str]) -> tuple[Preset | None, list[Path]]:
    """The preset and the files that a source means.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A published list without --table, or a file with one.
    """
    preset = PRESETS.get(source)
    if preset is not None:
        if not table:
            raise ValueError(
                f"{source} needs --table: {preset.about}, to be had at {preset.get}; give its files, a folder or a glob"
            )
        return preset, list_files(table)
    if table:
        raise ValueError(
            f"--table goes with a published list, and {source!r} is none of {', '.join(PRESETS)}"
            f"{nearest(source, PRESETS)}"
        )
    try:
        return None, list_files([source])
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}, or one of {', '.join(PRESETS)}{nearest(source, PRESETS)}"
        ) from None


def open_plan(
    out: Path,
    work: Path,
    files: Sequence[Path],
    columns: Columns,
    samples_per_shard: int,
    image_size: int,
    limit: int | None,
) -> dict[str, Any]:
    """The plan of a download: made when it begins, read when it goes on.

    Raises:
        FileExistsError: The folder holds other things, or is a file.
        ValueError: It holds a download with another list or other settings, or the list holds no URLs.
    """
    asked = {
        "files": [[path.name, path.stat().st_size] for path in files],
        "columns": {"url": columns.url, "caption": columns.caption, "kept": columns.kept},
        "samples_per_shard": samples_per_shard,
        "image_size": image_size,
        "limit": limit,
    }
    path = work / "plan.json"
    if path.is_file():
        plan = json.loads(path.read_text(encoding="utf-8"))
        for key, value in asked.items():
            if plan["asked"][key] != value:
                raise ValueError(
                    f"{out} holds a download with {key} = {plan['asked'][key]}, and now it is {value}: give the same "
                    "again to go on with it, or choose another --out"
                )
    else:
        if out.exists() and not out.is_dir():
            raise FileExistsError(f"--out {out} is a file: expected a folder")
        held = sorted(entry.name for entry in out.iterdir() if entry != work) if out.is_dir() else []
        if held:
            raise FileExistsError(f"--out {out} holds {held[0]} ... and no download: choose another folder")
        rows = min(count_rows(files, columns), limit or sys.maxsize)
        if not rows:
            raise ValueError(f"{files[0]}: no row in the list")
        require_urls(files, columns)
        check_place(out, "--out")
        plan = {"asked": asked, "rows": rows, "parts": -(-rows // samples_per_shard), "retries": []}
        work.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(plan, indent=1))
    for name in FOLDERS:
        (work / name).mkdir(exist_ok=True)
    return plan


def first_jobs(tables: Iterator[Any], work: Path, done: dict[int, Any]) -> Iterator[tuple[int, str]]:
    """The parts of the list that are not done, each with its rows in a file."""
    from data.download.worker import shard_name, write_table

    for number, table in enumerate(tables):
        if number not in done:
            path = work / "rows" / f"{shard_name(number)}.arrow"
            write_table(table, path)
            yield number, str(path)


def later_jobs(rounds: Sequence[range], work: Path, done: dict[int, Any]) -> Iterator[tuple[int, str]]:
    """The parts of further attempts that are not done; their rows were written when the attempt began."""
    from data.download.worker import shard_name

    for number in itertools.chain.from_iterable(rounds):
        if number not in done:
            yield number, str(work / "rows" / f"{shard_name(number)}.arrow")


def stage(tables: Iterator[Any], size: int, work: Path, first: int) -> int:
    """Write rows for another attempt as full parts; returns the number of parts."""
    import pyarrow as pa

    from data.download.worker import shard_name, write_table

    waiting: list[Any] = []
    parts = 0

    def write(final: bool) -> None:
        nonlocal waiting, parts
        while waiting and (final or sum(table.num_rows for table in waiting) >= size):
            joined = join_tables(pa, waiting)
            write_table(
                joined.slice(0, size).combine_chunks(), work / "rows" / f"{shard_name(first + parts)}.arrow"
            )
            parts += 1
            rest = joined.slice(size)
            waiting = [rest] if rest.num_rows else []

    for table in tables:
        waiting.append(table)
        write(False)
    write(True)
    return parts


class Watch:
    """Shows how many parts are done, by looking into the folder of their records."""

    def __init__(self, folder: Path, done: int, total: int, *, show: bool):
        self.folder, self.done = folder, done
        self.bar = ProgressBar("download, in shards", total, start=done, show=show)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)

    def look(self) -> None:
        while not self.ended.wait(1.0):
            self.count()

    def count(self) -> None:
        now = sum(1 for entry in os.scandir(self.folder) if entry.name.endswith(".json"))
        if now > self.done:
            self.bar.advance(now - self.done)
            self.done = now

    def __enter__(self) -> Watch:
        self.bar.__enter__()
        self.thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.ended.set()
        self.thread.join()
        self.count()
        self.bar.__exit__(*error)
