"""`pairstream finetune predict`: write texts about many pictures, in batches, and go on after a kill."""

from __future__ import annotations

import glob
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.faults import Fault, FaultLog, FaultRecord
from data.samples import index_shards, is_text, read_sample
from data.tar import ShardReader
from data.transforms import decode_image
from pairstream.atomic import check_place, write_text
from pairstream.progress import ProgressBar

QUESTIONS = ("vqa", "choose")  # tasks that answer questions
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Job:
    """One text to write.

    Attributes:
        identity: What its line begins with: `image`, and `question_id` where shards have questions. Unique.
        image: The encoded picture.
        question: To be answered; None for a caption.
        text: The post that goes with the picture, for a classifier.
    """

    identity: dict[str, Any]
    image: bytes
    question: str | None = None
    text: str | None = None

    @property
    def name(self) -> str:
        """The identity as one text, to find it again."""
        return json.dumps(self.identity, sort_keys=True)


def predict(
    *,
    model: Path,
    images: tuple[str, ...],
    out: Path,
    question: str | None = None,
    examples: Path | None = None,
    batch_size: int = 32,
    device: str = "auto",
    max_faults: float = 0.01,
    overwrite: bool = False,
) -> None:
    """Write captions, answers or labels of pictures, one JSON object a line.

    A run that was killed goes on where it stopped when the same command is given again: what is written is kept, a
    half-written last line is dropped.

    Args:
        model: A saved task model's folder, or a run folder of `pairstream finetune`.
        images: Picture files, folders or globs of them; or shards (folders, files, globs, braces, URLs of .tar).
        out: The .jsonl file. Each line has image, and caption; or question and answer; or label and probabilities.
        question: Asked about every picture. Shards may bring their own (`questions` in the JSON) instead.
        examples: A table of a few pictures with captions (or questions and answers) that stand in front of every
            picture; for models trained with `shots`, or with a language model that can go on from examples.
        batch_size: Texts written at a time.
        device: auto, cpu, cuda or cuda:N.
        max_faults: Share of unusable pictures past which the work stops; each is left out and counted.
        overwrite: Begin anew, whatever --out holds.
    """
    from finetune.examples import read_examples
    from finetune.opening import open_task_model
    from finetune.saved import opened

    if batch_size < 1:
        raise ValueError(f"--batch-size {batch_size}: expected at least 1")
    source = find_pictures(images)
    with opened(model) as (folder, content):
        task = content["task"]
        kind = task["kind"]
    if kind == "match":
        raise ValueError(
            f"{folder} tells whether texts match: use load_classifier(folder).match(pictures, texts) of "
            "finetune.fusion.model"
        )
    if kind == "mixed":  # it does both: what is wanted shows in the question
        kind = "caption" if question is None else "vqa"
        task = {**task, "kind": kind}
    check_question(kind, question, source)
    shown = [] if examples is None else read_examples(examples, kind)
    settings = {"model": str(folder.resolve()), "question": question}
    settings |= {"examples": hashlib.sha256(repr(shown).encode()).hexdigest()[:16] if shown else None}
    done = resume(out, settings, overwrite=overwrite)
    writer = Writer(open_task_model(folder, device=device), kind, shown)
    log, written = FaultLog(max_faults), 0
    log.add((), len(done))  # max_faults is a share of all, whichever call looked at them
    with out.open("a", encoding="utf-8") as file, ProgressBar("predict", source.count) as bar:
        for jobs in batches(source.jobs(task, question, done, log, bar), batch_size):
            for line in writer.write(jobs, log):
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                written += 1
            file.flush()
        log.judge(final=True)
    left = f", {log.counts.total()} left out ({dict(log.counts)})" if log.counts else ""
    before = f", {len(done)} were there before" if done else ""
    print(f"{out}: {written} lines written{before}{left}", file=sys.stderr)


class Writer:
    """A task model behind one method, for all kinds of tasks."""

    def __init__(self, model: Any, kind: str, examples: Sequence[tuple[Any, ...]] = ()):
        self.model, self.kind = model, kind
        self.after = {"examples": examples} if examples else {}

    def write(self, jobs: list[Job], log: FaultLog) -> Iterator[dict[str, Any]]:
        """The lines of a batch; pictures that cannot be decoded are left out and counted."""
        good, inputs, faults = [], [], []
        for job in jobs:
            try:
                inputs.append(decode_image(job.image))
                good.append(job)
            except Fault as fault:
                faults.append(FaultRecord(fault.cause, str(job.identity["image"]), "", fault.detail))
        for place, job in reversed(list(enumerate(good))):
            # One of a shard's many; where --question is too long for all, the model says so once.
            why = self.too_long(job) if "question_id" in job.identity else None
            if why is not None:
                faults.append(FaultRecord("question_too_long", str(job.identity["image"]), "", why))
                del good[place], inputs[place]
        log.add(faults, len(jobs))
        log.judge()
        if not good:
            return
        names = [job.name for job in good]
        if self.kind == "caption":
            captions = self.model.caption(inputs, names=names, **self.after)
            for job, caption in zip(good, captions, strict=True):
                yield {**job.identity, "caption": caption}
        elif self.kind in QUESTIONS:
            questions = [job.question or "" for job in good]
            named = {} if self.kind == "choose" else {"names": names}
            answers = self.model.answer(inputs, questions, **named, **self.after)
            for job, asked, answer in zip(good, questions, answers, strict=True):
                yield {**job.identity, "question": asked, "answer": answer}
        else:
            from finetune.fusion.task import said

            found = self.model.classify(inputs, [job.text for job in good])
            for job, probabilities in zip(good, found, strict=True):
                yield {
                    **job.identity,
                    **said(probabilities, self.model.several),
                    "probabilities": probabilities,
                }

    def too_long(self, job: Job) -> str | None:
        """Why a question does not fit the language model's context; None when it does."""
        if self.kind != "vqa" or self.after:
            return None
        try:
            self.model.check_question(job.question or "")
        except ValueError as error:
            return str(error)
        return None


@dataclass(frozen=True)
class Pictures:
    """Picture files."""

    paths: list[str]
    own_questions = False

    @property
    def count(self) -> int:
        return len(self.paths)

    def jobs(
        self, task: dict[str, Any], question: str | None, done: set[str], log: FaultLog, bar: ProgressBar
    ) -> Iterator[Job]:
        """What is still to be done, read one by one."""
        for path in self.paths:
            bar.advance()
            job = Job({"image": path}, b"", question)
            if job.name in done:
                continue
            try:
                yield Job(job.identity, Path(path).read_bytes(), question)
            except OSError as error:
                log.add([FaultRecord("missing_image", path, "", str(error))], 1)
                log.judge()


class Shards:
    """Shards of pictures."""

    own_questions = True

    def __init__(self, words: tuple[str, ...]):
        self.indices = index_shards(words)
        self.count = sum(map(len, self.indices))
        keys = Counter(index.key(sample) for index in self.indices for sample in range(len(index)))
        self.unique = all(times == 1 for times in keys.values())

    def jobs(
        self, task: dict[str, Any], question: str | None, done: set[str], log: FaultLog, bar: ProgressBar
    ) -> Iterator[Job]:
        """What is still to be done; samples that are done are not read."""
        started = (
            {json.loads(name)["image"] for name in done}
            if task["kind"] not in QUESTIONS or question
            else set()
        )
        number = 0
        with ShardReader() as reader:
            for index in self.indices:
                for sample in range(len(index)):
                    bar.advance()
                    key = index.key(sample)
                    name = key if self.unique else f"{index.name}/{key}"
                    number += 1
                    if name in started:
                        continue
                    try:
                        raw = read_sample(index, sample, number - 1, reader)
                        found = list(self.jobs_of(raw, name, task, question))
                    except Fault as fault:
                        log.add([FaultRecord(fault.cause, index.name, key, fault.detail)], 1)
                        log.judge()
                        continue
                    yield from (job for job in found if job.name not in done)

    @staticmethod
    def jobs_of(raw: Any, name: str, task: dict[str, Any], question: str | None) -> Iterator[Job]:
        """The texts to write about one sample."""
        if task["kind"] not in QUESTIONS:
            text = raw.record.get(task.get("text_key", "text"))
            yield Job({"image": name}, raw.image, None, text if isinstance(text, str) else None)
            return
        if question is not None:
            yield Job({"image": name}, raw.image, question)
            return
        entries = raw.record.get("questions")
        if not isinstance(entries, list) or not entries:
            raise Fault("missing_question", "no `questions` in KEY.json, and no --question")
        for place, entry in enumerate(entries):
            asked = entry.get("question") if isinstance(entry, dict) else None
            if not isinstance(asked, str) or not asked.strip() or not is_text(asked):
                raise Fault("bad_question", f"question {place} is empty or no text: {entry!r}"[:200])
            identity = {"image": name, "question_id": entry.get("question_id", f"{raw.key}/{place}")}
            yield Job(identity, raw.image, asked)


def find_pictures(words: tuple[str, ...]) -> Pictures | Shards:
    """What `--images` means: shards when anything ends in .tar or a folder holds some, else picture files.

    Raises:
        ValueError: Nothing there.
    """
    if any(".tar" in word or (Path(word).is_dir() and any(Path(word).glob("*.tar"))) for word in words):
        return Shards(words)
    paths: list[str] = []
    empty: list[str] = []
    for word in words:
        if Path(word).is_dir():
            found = sorted(str(path) for path in Path(word).rglob("*") if path.suffix.lower() in SUFFIXES)
            empty += [] if found else [word]
            paths += found
        elif Path(word).is_file():
            paths.append(word)
        else:
            found = sorted(glob.glob(word, recursive=True))  # noqa: PTH207 - the pattern may be absolute
            empty += [] if any(Path(path).is_file() for path in found) else [word]
            paths += found
    if not words:
        raise ValueError(
            "--images has no words: expected files, folders or globs of pictures, or .tar shards"
        )
    paths = [path for path in dict.fromkeys(paths) if Path(path).is_file()]
    if not paths:
        raise ValueError(
            f"no pictures at {', '.join(words)}: expected files, folders or globs of pictures, or .tar shards"
        )
    if empty:
        raise ValueError(
            f"nothing at {', '.join(empty)}, though the other places of --images have pictures: mend it or leave it out"
        )
    return Pictures(paths)


def check_question(kind: str, question: str | None, source: Pictures | Shards) -> None:
    """Refuse a question that would be overlooked, and a model of questions without any."""
    if question is not None and kind not in QUESTIONS:
        raise ValueError(f"--question goes with a model for vqa, this one is for {kind}")
    if kind in QUESTIONS and question is not None and not question.strip():
        raise ValueError("--question is empty: expected some words")
    if question is not None and not is_text(question):
        raise ValueError(f"--question {question!r} holds half a character: expected text that UTF-8 can hold")
    if kind in QUESTIONS and question is None and not source.own_questions:
        raise ValueError(
            "this model answers questions: give --question, or shards whose JSON has `questions`"
        )


def resume(out: Path, settings: dict[str, Any], *, overwrite: bool) -> set[str]:
    """What `out` has already; its half-written last line is cut off.

    The settings of the first run lie beside it, so that lines of two models are never mixed.

    Raises:
        ValueError: `out` was written with other settings, is no file of ours, or cannot be written.
    """
    beside = out.with_name(out.name + ".settings.json")
    if out.is_dir():
        raise ValueError(
            f"--out {out} is a folder: expected a .jsonl file, such as {out / 'predictions.jsonl'}"
        )
    check_place(out, "--out")
    # Nothing written yet: a run that broke before its first line is no reason to stay with its settings.
    if overwrite or not out.exists() or (not out.stat().st_size and beside.is_file()):
        out.write_bytes(b"")
        write_text(beside, json.dumps(settings, indent=2) + "\n")
        return set()
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    try:
        before = json.loads(beside.read_text(encoding="utf-8"))
        lines = [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]
        names = {
            json.dumps(
                {
                    "image": line["image"],
                    **({"question_id": line["question_id"]} if "question_id" in line else {}),
                },
                sort_keys=True,
            )
            for line in lines
        }
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{out} exists and is not what this command wrote ({error}): give another --out, or --overwrite"
        ) from error
    changed = [name for name, value in settings.items() if before.get(name) != value]
    if changed:
        raise ValueError(
            f"{out} was begun with another {' and '.join(changed)} ({before.get(changed[0])!r}): give another --out, "
            "or --overwrite to begin anew"
        )
    if len(whole) != len(content):
        with out.open("r+b") as file:
            file.truncate(len(whole))
    return names


def batches(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """Jobs in groups of `size`."""
    group: list[Job] = []
    for job in jobs:
        group.append(job)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
