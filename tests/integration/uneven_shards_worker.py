"""One process of test_uneven_shards.py: stream its part, with a collective at each batch, and leave what it saw.

Arguments: a folder with job.json and shards/, this process's number, the number of processes.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from data.stream import PairStream


def load(sample, rng):
    return sample.key


def collate(rows):
    return {"keys": rows}


def main() -> None:
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'meet'}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=120),  # a rank that has a batch more than another one fails here
    )
    stream = PairStream(
        str(folder / "shards"), load, collate, batch_size=job["batch_size"], rank=rank, world_size=world,
        workers=job["workers"],
    )  # fmt: skip
    seen = []
    for epoch in range(2):
        batches = []
        for batch in stream.epoch(epoch):
            rows = torch.tensor([len(batch["keys"])])
            dist.all_reduce(rows)  # as the gradients of a step
            batches.append({"step": batch.step, "keys": batch["keys"], "global": int(rows)})
        dist.barrier()
        seen.append(batches)
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
