"""Where the shards are worked on: in this process, in others of this machine, or on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from data.check import each_job
from data.curate.recipe import CurateRecipe
from pairstream.errors import require


@dataclass(frozen=True)
class Failed:
    """A job that could not be done; it comes back in place of a result, since errors lose their words on the way."""

    said: str


@dataclass(frozen=True)
class Guarded:
    """A piece of work whose errors come back as results; it is pickled."""

    work: Callable[..., Any]

    def __call__(self, *job: Any) -> Any:
        try:
            return self.work(*job)
        except (ValueError, TypeError, OSError, ImportError) as error:
            return Failed(f"{str(error) or type(error).__name__}")


def results(work: Callable[..., Any], jobs: list[tuple[Any, ...]], recipe: CurateRecipe) -> Iterator[Any]:
    """Do all jobs; results come as they are ready.

    Args:
        work: Called as `work(*job)`; its results are small, for what is large goes into files.
        jobs: The jobs.
        recipe: Says where.

    Raises:
        ImportError: Ray is asked for and absent.
        ValueError: A job failed, or the cluster did.
    """
    if not jobs:
        return
    guarded = Guarded(work)
    if recipe.distributor == "ray":
        done = on_ray(guarded, jobs, recipe)
    else:
        done = each_job(guarded, jobs, recipe.processes)
    for result in done:
        if isinstance(result, Failed):
            raise ValueError(result.said)
        yield result


def on_ray(work: Guarded, jobs: list[tuple[Any, ...]], recipe: CurateRecipe) -> Iterator[Any]:
    """The same on Ray: one task a shard, and never many more of them than there are processors.

    A machine that is lost costs the shards it was at, which Ray gives to another one.
    """
    from data.download.distribute import ray_session

    ray: Any = require("ray", "ray", "distributor: ray")
    try:
        with ray_session(recipe.processes, recipe.cluster):
            resources = ray.cluster_resources()
            gpus = 1 if recipe.encoder is not None and resources.get("GPU", 0) >= 1 else 0
            task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(run)
            shared = ray.put(work)
            waiting = iter(jobs)
            ahead = 2 * max(1, int(resources.get("CPU", 1)))
            running = [task.remote(shared, job) for job, _ in zip(waiting, range(ahead), strict=False)]
            while running:
                done, running = ray.wait(running)
                following = next(waiting, None)
                if following is not None:
                    running.append(task.remote(shared, following))
                yield ray.get(done[0])
    except (ValueError, TypeError, OSError, ImportError):
        raise
    except Exception as error:  # Ray has errors of its own
        raise ValueError(
            f"distributor: ray: {str(error)[:400] or type(error).__name__}. Can every machine import pairstream, and "
            "see the shards and out under the same paths? What is done is kept: the same command goes on."
        ) from error


def run(work: Guarded, job: tuple[Any, ...]) -> Any:
    """What a task does."""
    return work(*job)
