"""Where the parts of a list are worked on: processes of this machine, or a Ray or Spark cluster.

The three are img2dataset's own distributors; here their sessions are opened, and kept quiet.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pairstream.errors import require

DISTRIBUTORS = ("multiprocessing", "pyspark", "ray")
SUBJOB = 1000  # parts of one Spark job


def distribute(
    name: str, downloader: Any, jobs: Iterable[tuple[int, str]], processes: int, cluster: str | None
) -> None:
    """Work on all parts; a part that fails is tried once more.

    Args:
        name: One of `DISTRIBUTORS`.
        downloader: Called with each part; it is pickled.
        jobs: Number and rows file of each part, read as needed.
        processes: Worker processes on one machine; a cluster decides by itself.
        cluster: Address of a running cluster (`ray`: `auto` or `HOST:PORT`; `pyspark`: `spark://HOST:PORT`); None
            starts one on this machine for as long as it takes.

    Raises:
        ImportError: The library of that distributor is absent.
        ValueError: A cluster with `multiprocessing`, or a cluster that cannot do the work.
    """
    distributor = require("img2dataset.distributor", "download", "downloading")
    if name == "multiprocessing":
        if cluster is not None:
            raise ValueError(
                "--cluster is the address of a Ray or Spark cluster: add --distributor ray or pyspark"
            )
        with quiet():
            distributor.multiprocessing_distributor(processes, downloader, jobs, SUBJOB, 1)
        return
    session = ray_session if name == "ray" else spark_session
    work = distributor.ray_distributor if name == "ray" else distributor.pyspark_distributor
    try:
        with session(processes, cluster), quiet():
            work(processes, downloader, jobs, SUBJOB, 1)
    except (OSError, ValueError, TypeError, ImportError):
        raise
    except Exception as error:  # each library has errors of its own, with a page of Java or C++ in them
        raise ValueError(
            f"--distributor {name}: {str(error)[:400] or type(error).__name__}. Can every worker import img2dataset "
            "and pairstream (PYSPARK_PYTHON names the Python of Spark's workers), and see --out under the same path? "
            "What is done is kept: the same command goes on."
        ) from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep img2dataset's own progress away from the terminal; worker processes are not affected."""
    with contextlib.redirect_stdout(io.StringIO()):
        bar: Any = require("img2dataset.distributor", "download", "downloading")
        shown = bar.tqdm
        bar.tqdm = lambda items: items
        try:
            yield
        finally:
            bar.tqdm = shown


def environment() -> dict[str, str]:
    """What workers need to find this package and to ask nobody for updates."""
    home = str(Path(__file__).resolve().parents[2])
    paths = [home, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(paths)), "NO_ALBUMENTATIONS_UPDATE": "1"}


@contextlib.contextmanager
def ray_session(processes: int, cluster: str | None) -> Iterator[None]:
    """A Ray session; one that is open already is used and left open."""
    ray = require("ray", "ray", "--distributor ray")
    if ray.is_initialized():
        yield
        return
    local: dict[str, Any] = {"num_cpus": processes, "include_dashboard": False} if cluster is None else {}
    address = cluster or ("local" if "RAY_ADDRESS" not in os.environ else None)
    if address is None:
        local = {}
    ray.init(
        address=address,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"env_vars": environment()},
        **local,
    )
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def spark_session(processes: int, cluster: str | None) -> Iterator[None]:
    """A Spark session; one that is active already (as under spark-submit) is used and left open."""
    os.environ.setdefault(
        "PYSPARK_PYTHON", sys.executable
    )  # its workers would take the first python3 otherwise
    sql = require("pyspark.sql", "spark", "--distributor pyspark")
    if sql.SparkSession.getActiveSession() is not None:
        yield
        return
    builder = sql.SparkSession.builder.appName("pairstream data download").config("spark.ui.enabled", "false")
    builder = builder.config("spark.ui.showConsoleProgress", "false").config("spark.log.level", "ERROR")
    for name, value in environment().items():
        builder = builder.config(f"spark.executorEnv.{name}", value)
    session = builder.master(cluster or f"local[{processes}]").getOrCreate()
    try:
        yield
    finally:
        session.stop()
