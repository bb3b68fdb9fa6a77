"""The same service on a Ray cluster: replicas of it behind Ray Serve's proxies, more of them when queues grow."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI

from pairstream.errors import require
from serve.keys import Keys
from serve.settings import Scaling, Settings, Sources

NAME = "pairstream"
PURPOSE = "serving on a Ray cluster"


def application(sources: Sources, settings: Settings, keys: Keys, scaling: Scaling) -> Any:
    """The Ray Serve application: every replica loads the models and runs `serve.app.create_app`.

    Limits, rates and queues are each replica's own. A replica takes no more requests at once than its queues hold.

    Raises:
        ImportError: Ray Serve is not installed.
    """
    ray_serve = require("ray.serve", "ray", PURPOSE)

    def build() -> FastAPI:
        from serve.app import create_app
        from serve.models import load_models, settle

        app = create_app(load_models(**dict(sources)), settings, keys=keys)
        settle()
        return app

    deployment = ray_serve.deployment(
        name=NAME,
        ray_actor_options={"num_cpus": scaling.cpus, "num_gpus": scaling.gpus},
        max_ongoing_requests=settings.embedding.queue,
        graceful_shutdown_timeout_s=60.0,
        autoscaling_config={
            "min_replicas": scaling.least,
            "max_replicas": scaling.most,
            "target_ongoing_requests": scaling.ongoing,
            "upscale_delay_s": scaling.up_seconds,
            "downscale_delay_s": scaling.down_seconds,
        },
    )
    return deployment(ray_serve.ingress(build)()).bind()


@contextmanager
def running(app: Any, *, cluster: str | None = None, host: str = "127.0.0.1", port: int = 8000):
    """Ray Serve with the application, until the block ends.

    Args:
        app: What `application` made.
        cluster: The cluster's address (`auto` for the one of this machine); None starts one here, and ends it.
        host: Address of the proxies, one on each machine that has a replica.
        port: Their port.

    Raises:
        ConnectionError: No cluster at that address.
        RuntimeError: The replicas do not start; why is in Ray's logs.
    """
    ray, ray_serve = require("ray", "ray", PURPOSE), require("ray.serve", "ray", PURPOSE)
    ours = not ray.is_initialized()
    if ours:
        ray.init(
            address=cluster or "local", log_to_driver=False, include_dashboard=False if not cluster else None
        )
    try:
        ray_serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
        ray_serve.run(app, name=NAME, route_prefix="/")
        yield
    finally:
        ray_serve.shutdown()
        if ours:
            ray.shutdown()


def replicas() -> int:
    """Replicas that answer at this moment."""
    ray_serve = require("ray.serve", "ray", PURPOSE)
    found = ray_serve.status().applications[NAME].deployments[NAME]
    return int(found.replica_states.get("RUNNING", 0))


def run(app: Any, started: Callable[[], None], **place: Any) -> None:
    """Serve until Ctrl-C or SIGTERM; see `running` for the other arguments."""
    ended = threading.Event()
    with running(app, **place):
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda *_: ended.set())
        started()
        ended.wait()
