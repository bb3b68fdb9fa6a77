"""One process of test_ranking_processes.py: rank its share, and leave what it got.

Arguments: a folder with rows.npz, this process's number, the number of processes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from retrieval.metrics import retrieval_ranks


def main() -> None:
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world)
    rows = np.load(folder / "rows.npz")
    rankings = retrieval_ranks(rows["image"], rows["text"], rows["owner"], block=32, over_ranks=True)
    counts = {
        f"{number}_{name}": getattr(ranking, name).numpy()
        for number, ranking in enumerate(rankings)
        for name in ("query", "above", "level", "right")
    }
    np.savez(folder / f"rank{rank}.npz", **counts)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
