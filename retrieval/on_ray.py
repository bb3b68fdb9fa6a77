"""Parts of embeddings made on a Ray cluster: each actor loads the model once and makes whole parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pairstream.errors import require
from pairstream.progress import ProgressBar
from retrieval.job import EmbedJob, make_parts
from retrieval.parts import part_is_done


class PartMaker:
    """What runs on the cluster: a batch of part numbers in, the numbers of parts made out."""

    def __init__(
        self,
        folder: str,
        job: EmbedJob,
        model: str,
        pretrained: str | None,
        device: str,
        workers: int,
        max_faults: float,
    ):
        from pretrain.encoder import load_encoder

        self.encoder = load_encoder(model, pretrained=pretrained, device=device)
        self.folder, self.job, self.workers, self.max_faults = folder, job, workers, max_faults

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        for number in batch["part"].tolist():
            make_parts(
                self.folder,
                self.job,
                self.encoder,
                [number],
                workers=self.workers,
                max_faults=self.max_faults,
            )
        return {"part": batch["part"]}


def make_parts_on_ray(
    folder: str | Path,
    job: EmbedJob,
    model: str,
    *,
    pretrained: str | None = None,
    device: str = "auto",
    workers: int = 0,
    max_faults: float = 0.01,
    actors: int | None = None,
) -> int:
    """Make all parts that are not there yet with Ray Data.

    Rows go straight from an actor to the shared folder; only part numbers travel. A lost machine costs the parts
    it was at: Ray gives them to another. The share of bad samples is judged within each part and at the end.

    Args:
        folder: What `start_job` claimed, on storage that all machines see.
        job: The job.
        model: As for `load_encoder`, readable on all machines.
        pretrained: open_clip's tag of weights.
        device: A torch device for each actor; `auto` for its GPU where the cluster has some.
        workers: Loader processes of each actor.
        max_faults: Share of bad samples past which it stops.
        actors: How many; one a GPU of the cluster, or one for each two CPUs, when None.

    Returns:
        Parts made now.

    Raises:
        ImportError: Ray is not installed.
        ValueError: What `make_parts` raises in an actor.
    """
    ray = require("ray", "ray", "embedding on a Ray cluster")
    ray_data: Any = require("ray.data", "ray", "embedding on a Ray cluster")
    missing = [number for number in range(len(job.shards)) if not part_is_done(folder, number)]
    if not missing:
        return 0
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False)
    try:
        resources = ray.cluster_resources()
        gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 1))
        on_gpu = gpus > 0 and device in ("auto", "cuda")
        wanted = actors or (gpus if on_gpu else max(1, cpus // 2))
        ray_data.DataContext.get_current().enable_progress_bars = False
        done = ray_data.from_items(
            [{"part": number} for number in missing], override_num_blocks=len(missing)
        ).map_batches(
            PartMaker,
            fn_constructor_args=(
                str(Path(folder).resolve()),
                job,
                model,
                pretrained,
                device if on_gpu or device != "auto" else "cpu",
                workers,
                max_faults,
            ),
            batch_size=1,
            num_gpus=1 if on_gpu else 0,
            num_cpus=1,
            compute=ray_data.ActorPoolStrategy(size=min(wanted, len(missing))),
        )
        with ProgressBar("embed", len(missing)) as bar:
            for _ in done.iter_rows():
                bar.advance()
    except ray.exceptions.RayTaskError as error:
        cause = error.cause
        while getattr(cause, "__cause__", None) is not None and not isinstance(cause, ValueError):
            cause = cause.__cause__
        raise (cause if isinstance(cause, ValueError) else ValueError(str(cause))) from error
    finally:
        if ours:
            ray.shutdown()
    return len(missing)
