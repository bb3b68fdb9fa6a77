"""One process of the shared evaluation in test_suite.py: what it got, and how much of the work it did.

Arguments: a folder with suite.yaml, pairs/ and model/, this process's number, the number of processes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pretrain.encoder import Encoder, load_encoder
from retrieval.evaluator import RetrievalEvaluator, SuiteEvaluator


def main() -> None:
    folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=world)
    encoded = {"images": 0, "texts": 0}

    def counting(name: str):
        real = getattr(Encoder, f"encode_{name}")

        def counted(self, rows):
            encoded[name] += len(rows)
            return real(self, rows)

        setattr(Encoder, f"encode_{name}", counted)

    counting("images")
    counting("texts")
    encoder = load_encoder(folder / "model", device="cpu")
    result: dict = {"pairs": RetrievalEvaluator(str(folder / "pairs"), batch_size=4).run(encoder)}
    result["encoded_of_pairs"] = dict(encoded)
    result["suite"] = SuiteEvaluator(str(folder / "suite.yaml"), quick=False).run(encoder)
    result["encoded"] = dict(encoded)
    next((folder / "classes").rglob("*.jpg")).write_bytes(
        b"no picture"
    )  # both ranks do; one of them reads it
    dist.barrier()
    try:
        SuiteEvaluator(str(folder / "suite.yaml"), quick=False).run(encoder)
    except Exception as error:
        result["error"] = f"{type(error).__name__}: {error}"
    (folder / f"rank{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
