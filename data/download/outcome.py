"""What came of a download: the manifest, every failure by its cause, who opted out, and what to try again."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from data.download.worker import RESULT_COLUMNS, WORK, cause_of, shard_name
from data.shards import MANIFEST
from pairstream.atomic import write_text

pc: Any = pyarrow.compute  # its functions are made when it is imported
OPT_OUT = ("opt_out_header", "opt_out_robots")
FINAL = (*OPT_OUT, "bad_row", "bad_url", "missing_caption")  # asking again changes nothing, or is not wanted
FAILURES = "failures.parquet"
OPT_OUT_REPORT = "opt_out.csv"
SUMMARY = "download.json"


@dataclass
class Outcome:
    """What a download holds.

    Attributes:
        rows: Rows of the list that were tried.
        samples: Pictures in the shards.
        shards: Tar files.
        failed: Rows without a picture, by cause.
        opted_out: Hosts whose owners forbid the use, with their number of rows.
    """

    rows: int = 0
    samples: int = 0
    shards: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    opted_out: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        share = f" ({self.samples / self.rows:.1%})" if self.rows else ""
        lines = [f"{self.samples:,} of {self.rows:,} pictures{share} in {self.shards:,} shards"]
        lines += [f"  {cause:<20}{count:>12,}" for cause, count in self.failed.items()]
        return "\n".join(lines)


def done_parts(folder: Path) -> dict[int, dict[str, Any]]:
    """The records of the finished parts by number."""
    paths = sorted((folder / WORK / "done").glob("*.json"))
    return {int(path.stem): json.loads(path.read_text(encoding="utf-8")) for path in paths}


def failures(folder: Path, parts: dict[int, dict[str, Any]], rounds: Iterable[range]) -> Iterator[pa.Table]:
    """Every row that has no picture, as it stands after all attempts.

    Args:
        folder: The folder of shards.
        parts: `done_parts`.
        rounds: The numbers of the parts of each further attempt, in order.

    Yields:
        Per part, the rows of its parquet file that failed and were not tried again, with `cause`, `detail`, `part`.
    """
    later = [number for numbers in rounds for number in numbers if number in parts]
    attempt_of = {number: turn for turn, numbers in enumerate(rounds, 1) for number in numbers}
    tried: dict[int, list[pa.Array]] = {}
    for number in later:
        rows = pq.read_table(folder / f"{shard_name(number)}.parquet", columns=["source_row"])["source_row"]
        tried.setdefault(attempt_of[number], []).append(rows.combine_chunks())
    for number, record in parts.items():
        table = pq.read_table(folder / f"{shard_name(number)}.parquet")
        table = table.filter(pc.not_equal(table["status"], "success"))
        again = [
            rows for turn, arrays in tried.items() if turn > attempt_of.get(number, 0) for rows in arrays
        ]
        if again and table.num_rows:
            seen = pc.is_in(table["source_row"], value_set=pa.concat_arrays(again))
            table = table.filter(pc.invert(seen))
        said = [cause_of(*pair) for pair in zip(
            table["error_message"].to_pylist(), table["status"].to_pylist(), strict=True)]  # fmt: skip
        table = table.append_column("cause", pa.array([cause for cause, _ in said], pa.string()))
        table = table.append_column("detail", pa.array([detail for _, detail in said], pa.string()))
        skipped = pa.Table.from_pylist(
            record["skipped"],
            pa.schema(
                [
                    ("source_row", pa.int64()),
                    ("url", pa.string()),
                    ("cause", pa.string()),
                    ("detail", pa.string()),
                ]
            ),
        )
        joined = pa.concat_tables([table, skipped], promote_options="default")
        if joined.num_rows:
            yield joined.append_column("part", pa.array([number] * joined.num_rows, pa.int64()))


def rows_to_retry(
    folder: Path, parts: dict[int, dict[str, Any]], rounds: Iterable[range], causes: Iterable[str] | None
) -> Iterator[pa.Table]:
    """The failed rows that are worth another attempt, as they stood in the list.

    Args:
        folder: The folder of shards.
        parts: `done_parts`.
        rounds: As for `failures`.
        causes: Only failures of these causes; None takes all but `FINAL`.
    """
    for table in failures(folder, parts, list(rounds)):
        if causes is None:
            wanted = pc.invert(pc.is_in(table["cause"], value_set=pa.array(FINAL)))
        else:
            wanted = pc.is_in(table["cause"], value_set=pa.array(list(causes), pa.string()))
        table = table.filter(pc.and_(wanted, pc.is_valid(table["caption"])))
        drop = [name for name in (*RESULT_COLUMNS, "cause", "detail", "part") if name in table.column_names]
        if table.num_rows:
            yield table.drop_columns(drop)


def write_outcome(folder: Path, rounds: list[range], settings: dict[str, Any]) -> Outcome:
    """Write the manifest, the failures, the opt-out report and the summary.

    Args:
        folder: The folder of shards.
        rounds: The numbers of the parts of each further attempt.
        settings: How the download was run, for the summary.
    """
    parts = done_parts(folder)
    outcome = Outcome()
    shards = {}
    for number, record in parts.items():
        outcome.samples += record["samples"]
        if not any(number in numbers for numbers in rounds):
            outcome.rows += record["rows"]
        if record["samples"]:
            entry = {key: record[key] for key in ("samples", "bytes", "sha256")}
            shards[f"{shard_name(number)}.tar"] = entry
    outcome.shards = len(shards)
    manifest = {"format": "webdataset", "samples": outcome.samples, "shards": shards}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")

    causes: Counter[str] = Counter()
    hosts: Counter[str] = Counter()
    report = io.StringIO()
    listed = csv.writer(report, lineterminator="\n")
    listed.writerow(("url", "host", "by", "detail"))
    kinds = pa.schema(
        [(name, pa.string()) for name in ("url", "caption", "cause", "detail")]
        + [("source_row", pa.int64()), ("part", pa.int64())]
    )
    temporary = folder / f".tmp-{FAILURES}"
    with pq.ParquetWriter(temporary, kinds) as writer:
        for table in failures(folder, parts, rounds):
            writer.write_table(table.select(kinds.names).cast(kinds))
            causes.update(table["cause"].to_pylist())
            opted = table.filter(pc.is_in(table["cause"], value_set=pa.array(OPT_OUT)))
            for url, cause, detail in zip(
                *(opted[key].to_pylist() for key in ("url", "cause", "detail")), strict=True
            ):
                host = urlsplit(url).netloc
                hosts[host] += 1
                listed.writerow((url, host, cause.removeprefix("opt_out_"), detail))
    temporary.replace(folder / FAILURES)
    write_text(folder / OPT_OUT_REPORT, report.getvalue())
    outcome.failed = dict(causes.most_common())
    outcome.opted_out = dict(hosts.most_common())
    summary = {
        "rows": outcome.rows,
        "samples": outcome.samples,
        "shards": outcome.shards,
        "failed": outcome.failed,
        "opted_out_hosts": dict(hosts.most_common(1000)),
        "attempts": 1 + len(rounds),
        **settings,
    }
    write_text(folder / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
    return outcome
