"""`pairstream data curate RECIPE`: shards in, the shards worth training on and a report out."""

from __future__ import annotations

import contextlib
import csv
import gzip
import hashlib
import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from data.curate import records as store
from data.curate.decide import METHODS, Decision, decide
from data.curate.jobs import results
from data.curate.look import LEAK, Look, causes, tools
from data.curate.page import summarise, write_report
from data.curate.recipe import Balance, CurateRecipe, PictureHashes, UrlDomains
from data.curate.records import UNUSABLE, Records
from data.curate.write import WriteShard, plan_shards
from data.faults import FaultLog
from data.fetch import is_remote
from data.index import cache_home
from data.shards import MANIFEST, expand_shards, write_manifest
from pairstream.atomic import TEMPORARY, aside, fsync_path, write_text
from pairstream.command import read_recipe_command
from pairstream.progress import ProgressBar
from pairstream.recipe import dump_recipe

WORK = "_curate"  # the folder of unfinished things inside the folder of shards
RESULTS = (MANIFEST, "metrics.json", "report.html", "report.json", "recipe.resolved.yaml", "dropped.csv.gz")
WHERE = {"distributor", "cluster", "processes", "max_faults"}  # keys that do not change the result
FLAGS = {
    "--overwrite": "starts anew, replacing what `out` holds",
    "--quiet": "shows no progress and no summary",
}


def curate(argv: Sequence[str]) -> int:
    """Run the command.

    Args:
        argv: The words after `pairstream data curate`.

    Returns:
        0.

    Raises:
        What `run` raises.
    """
    found = read_recipe_command("data", CurateRecipe, argv, "data curate", FLAGS)
    if found is None:
        return 0
    recipe, flags = found
    quiet = "--quiet" in flags
    metrics = run(recipe, overwrite="--overwrite" in flags, progress=not quiet)
    if not quiet:
        print(as_text(recipe, metrics), file=sys.stderr)
    return 0


def run(recipe: CurateRecipe, *, overwrite: bool = False, progress: bool = False) -> dict[str, Any]:
    """Curate a set.

    A run that was killed goes on when it is started again with the same recipe, and gives the same files. Where the
    work is done (`distributor`, `cluster`, `processes`) may change in between, and `max_faults`.

    Args:
        recipe: What to do.
        overwrite: Start anew.
        progress: Show a bar.

    Returns:
        The content of `metrics.json`.

    Raises:
        FileExistsError: `out` holds something else, or the result of another recipe.
        ValueError: No shards, too many faults, nothing left, a list or an encoder that cannot be read.
        ImportError: A library is absent.
    """
    out = Path(recipe.out).resolve()
    names = expand_shards(recipe.shards)
    theirs = expand_shards(recipe.leaks.shards) if recipe.leaks else []
    if out in {Path(name).resolve().parent for name in names if not is_remote(name)}:
        raise ValueError(f"out: {out} is the folder of the shards that come in: choose another one")
    if shared := sorted(set(names) & set(theirs)):
        raise ValueError(
            f"leaks: shards: {shared[0]} is one of the shards that come in, whose samples would all go"
        )
    work = out / WORK
    done = out / "metrics.json"
    with alone(out):
        if overwrite or not done.is_file():
            tools.cache_clear()  # lists may have changed since an earlier run of this process
            tools(
                recipe.model_dump_json(), False
            )  # a fault of the recipe is told before the folder is claimed
        open_plan(recipe, out, names, theirs, overwrite)
        if done.is_file():
            clean(out)
            return read_object(done)
        look = Look(recipe, work / "looked")
        log = FaultLog(recipe.max_faults)
        do("curate, in shards read", look, names, look.path, recipe, progress, log)
        evaluation = None
        if recipe.leaks is not None:
            other = Look(recipe, work / "looked" / "evaluation", evaluation=True)
            do("evaluation set", other, theirs, other.path, recipe, progress, FaultLog(recipe.max_faults))
            evaluation = store.join([store.load(other.path(number)) for number in range(len(theirs))])
        records = store.join([store.load(look.path(number)) for number in range(len(names))])
        decision = settle(recipe, work / "decision.npz", records, evaluation)
        return finish(recipe, out, records, evaluation, decision, progress)


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Let one process at a time work on a folder."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: {out} is a file: expected a folder")
    locks = cache_home() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    lock = FileLock(locks / hashlib.sha256(str(out).encode("utf-8", "surrogateescape")).hexdigest()[:16])
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(
            f"out: another process is at work on {out}; wait for it, or choose another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def open_plan(recipe: CurateRecipe, out: Path, names: list[str], theirs: list[str], overwrite: bool) -> None:
    """Claim the folder of a result, or go on with what it holds.

    Raises:
        FileExistsError: It holds something else, or the result of another recipe or of other shards.
    """
    asked = json.loads(
        json.dumps(
            {
                "recipe": recipe.model_dump(mode="json", exclude=WHERE),
                "shards": [[name, size_of(name)] for name in names],
                "evaluation": [[name, size_of(name)] for name in theirs],
                "lists": {str(path): digest_of(path) for path in lists_of(recipe)},
            }
        )
    )
    path = out / WORK / "plan.json"
    held = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
    other = [
        name for name in held if name not in (*RESULTS, WORK) and not name.endswith((".tar", ".tar.idx"))
    ]
    other = [name for name in other if not name.startswith(TEMPORARY)]
    if path.is_file() and not overwrite:
        before = read_object(path)
        for what, value in asked.items():
            if before.get(what) != value:
                differing = difference(what, before.get(what), value)
                raise FileExistsError(
                    f"out: {out} holds a curation with {differing}: give the same again to go on with it, replace it "
                    "with --overwrite, or choose another folder"
                )
        return
    if other:
        raise FileExistsError(
            f"out: {out} holds other files than a curation ({other[0]} ...): choose another folder"
        )
    if held and not overwrite:
        raise FileExistsError(
            f"out: {out} holds {len(held)} files already ({held[0]} ...): choose another folder, or replace them with "
            "--overwrite"
        )
    for name in held:
        shutil.rmtree(out / name) if (out / name).is_dir() else (out / name).unlink()
    write_text(path, json.dumps(asked, indent=1) + "\n")


def difference(what: str, before: Any, now: Any) -> str:
    """The first thing in which two plans differ, in words."""
    if what != "recipe" or not isinstance(before, dict):
        return f"other {what}"
    key = next(key for key in {**before, **now} if before.get(key) != now.get(key))
    return f"{key} = {json.dumps(before.get(key))[:200]}, and now it is {json.dumps(now.get(key))[:200]}"


def read_object(path: Path) -> dict[str, Any]:
    """What a JSON file of an earlier run holds.

    Raises:
        ValueError: It is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"expected an object, got {type(found).__name__}")
    except ValueError as error:
        raise ValueError(
            f"out: {path} is damaged ({error}): start anew with --overwrite, or choose another folder"
        ) from error
    return found


def size_of(name: str) -> int | None:
    return None if is_remote(name) else Path(name).stat().st_size


def lists_of(recipe: CurateRecipe) -> list[Path]:
    """The files that a recipe names."""
    files = [
        path for rule in recipe.filters if isinstance(rule, UrlDomains | PictureHashes) for path in rule.files
    ]
    return files + ([recipe.balance.entries] if isinstance(recipe.balance, Balance) else [])


def digest_of(path: Path) -> str | None:
    """None for a file that is not there; the filter that needs it says so."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None


def do(
    what: str,
    look: Callable[..., Any],
    names: list[str],
    path: Callable[[int], Path],
    recipe: CurateRecipe,
    progress: bool,
    log: FaultLog,
) -> None:
    """Look at all shards that have no records yet, and judge the faults of all of them."""
    done = {number for number in range(len(names)) if path(number).is_file()}
    for number in sorted(done):
        known = store.load(path(number))
        log.add(known.faults, max(len(known), sum(fault.count for fault in known.faults if not fault.key)))
    jobs = [(number, name) for number, name in enumerate(names) if number not in done]
    with ProgressBar(what, len(names), start=len(done), show=progress) as bar:
        for seen in results(look, jobs, recipe):
            log.add(seen.faults, seen.samples + sum(fault.count for fault in seen.faults if not fault.key))
            log.judge()
            bar.advance(note=f"{log.seen:,} samples")
    log.judge(final=True)


def settle(recipe: CurateRecipe, path: Path, records: Records, evaluation: Records | None) -> Decision:
    """The decision, made once: shards are written by it, and those of a killed run must fit those of the next."""
    if not path.is_file():
        decide(recipe, records, evaluation).save(path)
    return Decision.load(path)


def finish(
    recipe: CurateRecipe,
    out: Path,
    records: Records,
    evaluation: Records | None,
    decision: Decision,
    progress: bool,
) -> dict[str, Any]:
    """Write report and shards; the manifest and `metrics.json` come last."""
    metrics = summarise(recipe, records, decision)
    write_report(out, recipe, records, evaluation, decision, metrics)
    write_dropped(out / "dropped.csv.gz", recipe, records, evaluation, decision)
    dump_recipe(recipe, out / "recipe.resolved.yaml")
    if not metrics["kept"]:
        told = ", ".join(f"{cause} {count:,}" for cause, count in metrics["dropped"].items() if count)
        raise ValueError(
            f"nothing is left of {metrics['samples']:,} samples ({told or 'the shards hold none'}), so no shard was "
            f"written; {out / 'report.html'} shows examples of each. Loosen the recipe and use --overwrite."
        )
    write = WriteShard(out, out / WORK / "written")
    planned = list(plan_shards(records, decision.verdicts, recipe.samples_per_shard))
    jobs = [(number, pieces) for number, pieces in enumerate(planned) if not write.entry(number).is_file()]
    with ProgressBar(
        "curate, in shards written", len(planned), start=len(planned) - len(jobs), show=progress
    ) as bar:
        for _ in results(write, jobs, recipe):
            bar.advance()
    entries: dict[str, dict[str, Any]] = {}
    for number in range(len(planned)):
        entries |= json.loads(write.entry(number).read_text(encoding="utf-8"))
    write_manifest(out, entries)
    write_text(out / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False) + "\n")
    clean(out)
    return metrics


def clean(out: Path) -> None:
    """Remove what a finished run needs no more, and what a killed one left."""
    for name in ("looked", "written"):
        shutil.rmtree(out / WORK / name, ignore_errors=True)
    for left in (
        out / WORK / "decision.npz",
        *out.glob(f"{TEMPORARY}*"),
        *(out / WORK).glob(f"{TEMPORARY}*"),
    ):
        left.unlink(missing_ok=True)


def write_dropped(
    path: Path, recipe: CurateRecipe, records: Records, evaluation: Records | None, decision: Decision
) -> None:
    """Every sample that went: shard, key, cause, and what it is a copy of."""
    names = causes(recipe)
    faults = {(fault.shard, fault.key): str(fault.cause) for fault in records.faults if fault.key}
    temporary = aside(path)
    # Row by row and without the time: equal runs give equal bytes, and a billion rows need no memory.
    with (
        temporary.open("wb") as raw,
        gzip.GzipFile("", "wb", 6, raw, mtime=0) as packed,
        io.TextIOWrapper(packed, "utf-8", "backslashreplace", newline="") as text,
    ):
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["shard", "key", "cause", "copy_of_shard", "copy_of_key", "detail"])
        for row in np.flatnonzero(decision.verdicts).tolist():
            cause, detail = names[decision.verdicts[row]], ""
            name = records.shards[records.place(row)[0]]
            source, other = records, int(decision.copy_of[row])
            if cause == LEAK and evaluation is not None:
                source, other = evaluation, int(decision.leak_of[row])
                detail = METHODS[decision.leak_by[row]]
            elif cause == UNUSABLE:
                detail = faults.get((name, records.key(row)), "")
            where = (source.shards[source.place(other)[0]], source.key(other)) if other >= 0 else ("", "")
            table.writerow([name, records.key(row), cause, *where, detail])
    fsync_path(temporary)
    temporary.replace(path)


def as_text(recipe: CurateRecipe, metrics: dict[str, Any]) -> str:
    """The outcome for people."""
    share = metrics["kept"] / max(metrics["samples"], 1)
    lines = [f"{metrics['kept']:,} of {metrics['samples']:,} samples stay ({share:.1%}) -> {recipe.out}"]
    lines += [f"  {cause:<22}{count:>10,}" for cause, count in metrics["dropped"].items() if count]
    return "\n".join([*lines, f"report: {Path(recipe.out) / 'report.html'}"])
