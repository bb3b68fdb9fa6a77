"""The run folder: `recipe.resolved.yaml`, `log.jsonl`, `checkpoints/`, `metrics.json`, `report.html`."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from pairstream.atomic import write_text
from pairstream.recipe import Config, dump_recipe


class RunFolder:
    """One run's folder; every write to it goes through here.

    Args:
        path: The folder, usually `runs/NAME`.
        resume: Continue what lies there; when False, a folder that holds a run is refused.
        overwrite: Remove an earlier run of that name first.
        writes: False on ranks above 0, where every write is a no-op.

    Raises:
        FileExistsError: A run lies there and neither `resume` nor `overwrite` was given.
    """

    def __init__(
        self, path: str | Path, *, resume: bool = False, overwrite: bool = False, writes: bool = True
    ):
        self.path = Path(path)
        self.writes = writes
        if not writes:
            return
        holds = self.log_path.exists() or self.checkpoints.exists()
        if holds and overwrite and not resume:
            shutil.rmtree(self.path)
        elif holds and not resume:
            raise FileExistsError(
                f"{self.path} already holds a run. Continue it with --resume, replace it with --overwrite, "
                "or give this one another name with --run NAME."
            )
        self.path.mkdir(parents=True, exist_ok=True)

    @property
    def log_path(self) -> Path:
        return self.path / "log.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def write_recipe(self, recipe: Config) -> None:
        """Write `recipe.resolved.yaml`."""
        if self.writes:
            dump_recipe(recipe, self.path / "recipe.resolved.yaml")

    def log(self, record: dict[str, Any]) -> None:
        """Append one JSON object as a line; floats that are not finite become null."""
        if self.writes:
            with self.log_path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite(record)) + "\n")

    def read_log(self) -> list[dict[str, Any]]:
        """All whole lines of the log; a last line cut by a kill is left out."""
        if not self.log_path.exists():
            return []
        records = []
        for line in self.log_path.read_text(encoding="utf-8").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return records

    def rewind_log(self, step: int) -> None:
        """Drop lines of steps after `step`, so that a resumed run does not log a step twice."""
        if self.writes and self.log_path.exists():
            kept = [record for record in self.read_log() if record.get("step", 0) <= step]
            write_text(self.log_path, "".join(json.dumps(record) + "\n" for record in kept))

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write `metrics.json`."""
        if self.writes:
            write_text(self.path / "metrics.json", json.dumps(finite(metrics), indent=2) + "\n")


def finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON does not have, by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value
