"""`pairstream serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import tyro

from pairstream.errors import require
from serve.keys import Keys, read_keys
from serve.settings import Batching, Fetching, Scaling, Settings, Sources


def serve(
    *,
    model: str,
    captioner: Path | None = None,
    vqa: Path | None = None,
    classifier: Path | None = None,
    index: Path | None = None,
    data: tuple[str, ...] = (),
    pretrained: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_keys: Path | None = None,
    open_to_all: bool = False,
    allowed_hosts: tuple[str, ...] = (),
    allow_urls: bool = False,
    explain: tuple[str, ...] = ("chefer", "gradcam", "rollout", "occlusion"),
    rate: float = 100.0,
    max_batch: int = 32,
    queue: int = 256,
    deadline: float = 30.0,
    replicas: tuple[int, int] | None = None,
    cluster: str | None = None,
    replica_cpus: float = 1.0,
    replica_gpus: float = 0.0,
    replica_requests: float = 8.0,
    device: str = "auto",
) -> None:
    """Serve models over HTTP, with a page for people at /.

    Args:
        model: A checkpoint or run folder, a name open_clip knows, or hf-hub:ORG/REPO.
        captioner: A captioning run; gives /v1/caption.
        vqa: A VQA run; gives /v1/vqa.
        classifier: A classification run; gives /v1/sentiment.
        index: A folder that `retrieval index` wrote; gives /v1/search.
        data: The shards of the index; their pictures are shown among the results.
        pretrained: open_clip's tag of weights, for a name.
        host: Address to listen on. Other than a loopback address needs --api-keys.
        port: Port; 0 takes a free one.
        api_keys: A file of API keys, one a line. Without it everybody on this machine may ask.
        open_to_all: Listen beyond this machine without keys.
        allowed_hosts: Names by which the server may be addressed, beside those of this machine.
        allow_urls: Take pictures by http(s) address, from public addresses only.
        explain: Methods of heatmaps that may be asked for; `--explain off` takes none. Those that are not there by
            default cost dozens to hundreds of passes for each map.
        rate: Requests a second of each key, or of each address without keys; 0 is no limit.
        max_batch: Items of one forward pass at the most.
        queue: Items that may wait for embeddings.
        deadline: Seconds after which a request is given up.
        replicas: On a Ray cluster: the least and the most copies of the service.
        cluster: The cluster's address, `auto` for the one that this machine belongs to; without it one is started here.
        replica_cpus: CPUs of each copy.
        replica_gpus: GPUs of each copy; a fraction shares one.
        replica_requests: Requests in progress for each copy that their number is steered by.
        device: auto, cpu, cuda or cuda:N.
    """
    for module in ("fastapi", "httptools", "uvicorn", "prometheus_client", "httpcore"):
        require(module, "serve", "`pairstream serve`")
    os.environ.setdefault(
        "OMP_WAIT_POLICY", "PASSIVE"
    )  # before torch: idle threads must not spin between requests
    from serve.server import is_loopback, make_server

    if not is_loopback(host) and api_keys is None and not open_to_all:
        raise ValueError(
            f"--host {host} can be reached from other machines: give --api-keys FILE, or --open-to-all if everybody "
            "there may use it"
        )
    settings = Settings(
        explain_methods=explain_methods(explain),
        fetching=Fetching(enabled=allow_urls),
        embedding=Batching(batch=max_batch, queue=queue, deadline=deadline),
        decoding=Batching(batch=min(16, max_batch), queue=min(64, queue), deadline=max(60.0, deadline)),
        explaining=Batching(batch=1, queue=min(16, queue), deadline=max(60.0, deadline)),
        rate=rate,
        allowed_hosts=(*Settings().allowed_hosts, *allowed_hosts)
        if is_loopback(host)
        else allowed_hosts or ("*",),
    )
    keys = Keys() if api_keys is None else read_keys(api_keys)
    if cluster is not None and replicas is None:
        raise ValueError("--cluster goes with --replicas LEAST MOST")
    sources = Sources(
        model=str(Path(model).resolve()) if Path(model).exists() else model,  # a name of a hub stays one
        captioner=where(captioner),
        vqa=where(vqa),
        classifier=where(classifier),
        index=where(index),
        data=data,
        pretrained=pretrained,
        device=device,
    )
    if replicas is not None:
        if port == 0:
            raise ValueError("--replicas needs a --port: the proxies of all machines listen on the same")
        scaling = Scaling(
            least=replicas[0],
            most=replicas[1],
            cpus=replica_cpus,
            gpus=replica_gpus,
            ongoing=replica_requests,
        )
        serve_on_cluster(sources, scaling, settings, keys, {"cluster": cluster, "host": host, "port": port})
        return
    from serve.app import create_app
    from serve.models import load_models, settle

    models = load_models(**dict(sources))

    def listening(bound: int) -> None:
        name = f"[{host}]" if ":" in host else host
        print(
            f"PairStream serves {models.identity.name} at http://{name}:{bound}/ (Ctrl-C ends it)", flush=True
        )

    server = make_server(create_app(models, settings, keys=keys), host=host, port=port, listening=listening)
    settle()
    server.run()


def where(path: Path | None) -> str | None:
    """A path as other processes find it."""
    return None if path is None else str(path.resolve())


def serve_on_cluster(
    sources: Sources, scaling: Scaling, settings: Settings, keys: Keys, place: dict[str, Any]
) -> None:
    """Run replicas until the end is asked for.

    Raises:
        ImportError: Ray Serve is not installed.
        FileNotFoundError: No model there.
    """
    require("ray.serve", "ray", "serving on a Ray cluster")
    from serve.cluster import application, run

    def started() -> None:
        print(
            f"PairStream serves {Path(sources.model).name} on {scaling.least} to {scaling.most} replicas at "
            f"http://{place['host']}:{place['port']}/ (Ctrl-C ends it)",
            flush=True,
        )

    run(application(sources, settings, keys, scaling), started, **place)


def explain_methods(names: tuple[str, ...]) -> tuple[str, ...]:
    """Methods as `--explain` gives them, each checked with what it needs.

    Raises:
        ValueError: No such method.
        ImportError: The extra `explain` is not installed.
    """
    from explain.methods import NEEDS, check_method

    if names == ("off",):
        return ()
    for name in names:
        check_method(name)
        for module in NEEDS.get(name, ()):
            require(module, "explain", f"heatmaps by {name}")
    return names


def main(argv: list[str]) -> int | None:
    """Entry point of `pairstream serve`."""
    tyro.cli(serve, args=argv, prog="pairstream serve")
