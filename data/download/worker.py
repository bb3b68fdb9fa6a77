"""What a worker process does with one part of a list: img2dataset's work, wrapped.

img2dataset fetches, resizes and writes. Around it: its requests go through `data.download.polite`, its files
appear in the folder when the part is finished, and a small JSON file says what came of the part.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import traceback
import urllib.request
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # its import would ask the network for a newer version

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it says in its own ways that its age shows
    from img2dataset.downloader import Downloader, is_disallowed
    from img2dataset.resizer import Resizer
    from img2dataset.writer import WebDatasetSampleWriter

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from data.download.polite import AGENT, Journal, Manners, PictureOpener, director
from data.faults import Fault
from data.pictures import Picture
from pairstream.atomic import fsync_path, write_text

WORK = "_download"  # the folder of unfinished things inside the folder of shards
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # a stranger's bytes: no others are tried
ID_DIGITS = 5  # of a shard's name
CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # what http.client refuses in an address, beside the space
# What img2dataset adds to the columns of a part.
RESULT_COLUMNS = (
    "key",
    "status",
    "error_message",
    "width",
    "height",
    "original_width",
    "original_height",
    "sha256",
)
# What img2dataset itself says, and how it is counted here.
SAID = {
    "Use of image disallowed by X-Robots-Tag directive": "opt_out_header",
    "hash mismatch": "hash_mismatch",
    "image too small": "too_small_image",
    "image area too large": "too_large_image",
    "aspect ratio too large": "aspect_ratio",
    "Image decoding error": "undecodable_image",
}


def shard_name(number: int) -> str:
    return f"{number:0{ID_DIGITS}d}"


def cause_of(message: str | None, status: str) -> tuple[str, str]:
    """Cause and detail of a failure from img2dataset's `error_message`."""
    text = message or ""
    if text in SAID:
        return SAID[text], text
    cause, colon, detail = text.partition(": ")
    if (colon or " " not in cause) and cause.replace("_", "").isalnum() and cause.islower():
        return cause, detail
    return ("undecodable_image" if status == "failed_to_resize" else "network_error"), text


class UprightResizer(Resizer):
    """img2dataset's resizer, which itself ignores EXIF orientation and burns 16-bit pictures out to white."""

    def __call__(self, img_stream: io.BytesIO, blurring_bbox_list: Any = None) -> Any:
        img_stream.seek(0)
        data = img_stream.read()
        try:
            picture = Picture(data, formats=FORMATS)
            if picture.orientation != 1 or (picture.image is not None and picture.image.mode.startswith("I")):
                img_stream = io.BytesIO()
                Image.fromarray(picture.pixels()).save(img_stream, "PNG", compress_level=1)
        except Fault as fault:
            return None, None, None, None, None, str(fault)
        img_stream.seek(0)
        return super().__call__(img_stream, blurring_bbox_list)


class PartDownloader(Downloader):
    """img2dataset's downloader of one part, with manners and bookkeeping.

    Args:
        folder: The folder of shards.
        manners: How to ask.
        columns: Columns of the parts besides `source_row`, `url` and `caption`.
        verify: Leave out pictures whose sha256 is not `source_sha256`.
        samples_per_shard: Rows of a full part.
        threads: Requests at the same time.
        image_size: Shorter side in pixels that larger pictures are brought to.
        min_image_size: Pictures with a shorter side are left out.
    """

    def __init__(
        self,
        folder: Path,
        manners: Manners,
        columns: list[str],
        *,
        verify: bool,
        samples_per_shard: int,
        threads: int,
        image_size: int,
        min_image_size: int,
    ):
        self.folder, self.manners, self.verify = folder, manners, verify
        boxes = "boxes" if "boxes" in columns else None
        blurrer = None
        if boxes:
            from img2dataset.blurrer import BoundingBoxBlurrer

            blurrer = BoundingBoxBlurrer()
        super().__init__(
            sample_writer_class=WebDatasetSampleWriter,
            resizer=UprightResizer(
                image_size,
                "keep_ratio",
                resize_only_if_bigger=True,
                downscale_interpolation="area",
                encode_quality=95,
                encode_format="jpg",
                skip_reencode=False,
                min_image_size=min_image_size,
                blurrer=blurrer,
            ),
            thread_count=threads,
            save_caption=True,
            extract_exif=False,
            output_folder=str(folder / WORK / "parts"),
            column_list=["source_row", *columns, *(["sha256"] if verify else []), "caption", "url"],
            timeout=manners.timeout,
            number_sample_per_shard=samples_per_shard,
            oom_shard_count=ID_DIGITS,
            compute_hash="sha256",
            verify_hash_type="sha256" if verify else None,
            encode_format="jpg",
            retries=0,
            user_agent_token=AGENT,
            disallowed_header_directives=list(manners.opt_out) or None,
            blurring_bbox_col=boxes,
        )

    def __call__(self, row: tuple[int, str]) -> tuple[bool, tuple[int, str]]:
        try:
            self.download_shard(row)
        except Exception as error:
            text = "".join(traceback.format_exception_only(error)).strip()
            write_text(self.folder / WORK / "failed" / f"{shard_name(row[0])}.txt", text)
            return False, row
        return True, row

    def download_shard(self, row: tuple[int, str]) -> None:
        number, rows_file = row
        name, work = shard_name(number), self.folder / WORK
        if (work / "done" / f"{name}.json").is_file():  # a cluster may run a task twice
            return
        with pa.OSFile(rows_file) as file:
            table = pa.ipc.open_file(file).read_all()
        table, skipped = usable(table)
        if self.verify:
            table = table.append_column("sha256", table["source_sha256"])
        part = work / "parts" / f"{name}.arrow"
        write_table(table, part)
        journal = Journal(work / "journal" / name)
        opener = PictureOpener(self.manners, journal, director(self.manners), is_disallowed)
        urllib.request.install_opener(opener)  # type: ignore[arg-type]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the age of its libraries, once a picture
                super().download_shard((number, str(part)))
        finally:
            urllib.request.install_opener(None)  # type: ignore[arg-type]
            journal.close()
        self.finish(name, table, skipped)
        Path(rows_file).unlink(missing_ok=True)
        (work / "journal" / name).unlink(missing_ok=True)
        (work / "failed" / f"{name}.txt").unlink(missing_ok=True)

    def finish(self, name: str, table: pa.Table, skipped: list[dict[str, Any]]) -> None:
        """Move the part's files to their place and write down what came of it."""
        parts = self.folder / WORK / "parts"
        outcome = pq.read_table(parts / f"{name}.parquet", columns=["source_row", "status", "error_message"])
        causes = Counter(entry["cause"] for entry in skipped)
        samples = 0
        for status, message in zip(
            outcome["status"].to_pylist(), outcome["error_message"].to_pylist(), strict=True
        ):
            if status == "success":
                samples += 1
            else:
                causes[cause_of(message, status)[0]] += 1
        lost = set(table["source_row"].to_pylist()) - set(outcome["source_row"].to_pylist())
        for source_row in sorted(lost):  # img2dataset prints what went wrong and goes on
            skipped.append({"source_row": source_row, "url": "", "cause": "not_written", "detail": ""})
            causes["not_written"] += 1
        record: dict[str, Any] = {"rows": table.num_rows + len(skipped) - len(lost), "samples": samples}
        record |= {"causes": dict(causes), "skipped": skipped}
        tar = parts / f"{name}.tar"
        if samples:
            fsync_path(tar)
            digest = hashlib.sha256()
            with tar.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            record |= {"bytes": tar.stat().st_size, "sha256": digest.hexdigest()}
            tar.replace(self.folder / tar.name)
        else:
            tar.unlink()
        for suffix in (".parquet", "_stats.json"):
            (parts / f"{name}{suffix}").replace(self.folder / f"{name}{suffix}")
        write_text(self.folder / WORK / "done" / f"{name}.json", json.dumps(record))


def usable(table: pa.Table) -> tuple[pa.Table, list[dict[str, Any]]]:
    """The rows that have a URL and a caption, and what is wrong with the others."""
    keep: list[bool] = []
    skipped: list[dict[str, Any]] = []
    for source_row, url, caption in zip(
        *(table[name].to_pylist() for name in ("source_row", "url", "caption")), strict=True
    ):
        cause = None
        if url is None and caption is None:
            cause = "bad_row"
        elif not is_link(url or ""):
            cause = "bad_url"
        elif not (caption or "").strip():
            cause = "missing_caption"
        keep.append(cause is None)
        if cause is not None:
            skipped.append({"source_row": source_row, "url": url or "", "cause": cause, "detail": ""})
    table = table.filter(pa.array(keep, pa.bool_()))
    links = pa.array([url.strip() for url in table["url"].to_pylist()], pa.string())
    return table.set_column(table.column_names.index("url"), "url", links), skipped


def is_link(text: str) -> bool:
    """Whether a server can be asked for it: http or https, in one line."""
    text = text.strip()
    return text.lower().startswith(("http://", "https://")) and CONTROL.search(text) is None


def write_table(table: pa.Table, path: Path) -> None:
    """A table as an Arrow file, complete or not there."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    with pa.OSFile(str(temporary), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    temporary.replace(path)
