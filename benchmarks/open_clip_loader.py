"""The peer of data_loading.py: open_clip's own training loader, asked over standard input.

It runs in the peers' environment (`make peers`), because open_clip's loader needs an older webdataset than the
one that resolves beside it. One JSON object a line comes in (shards, samples, batch_size; or captions), one
goes out (samples, CPU seconds).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import open_clip
import torch
import webdataset
from open_clip.transform import image_transform
from open_clip_train.data import get_wds_dataset


def run(task: dict, preprocess, tokenizer) -> dict:
    args = argparse.Namespace(
        train_data=task["shards"],
        train_num_samples=task["samples"],
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        batch_size=task["batch_size"],
        workers=0,  # this process is the worker
        world_size=1,
        seed=0,
    )
    loader = get_wds_dataset(args, preprocess, is_train=True, tokenizer=tokenizer).dataloader
    start = time.process_time()
    seen = 0
    for images, texts in loader:
        assert images.dtype == torch.float32
        assert len(images) == len(texts)
        seen += len(images)
    return {"samples": seen, "seconds": time.process_time() - start}


def main() -> None:
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {int(sys.argv[1])})
    preprocess = image_transform(
        224, is_train=True, mean=open_clip.OPENAI_DATASET_MEAN, std=open_clip.OPENAI_DATASET_STD
    )
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    versions = {module.__name__: module.__version__ for module in (open_clip, torch, webdataset)}
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever is printed must not come between the answers
    print(json.dumps(versions), file=answers, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        if "captions" in task:
            tokenizer(task["captions"])  # its cache of words is warm from here on
            answer = {}
        else:
            answer = run(task, preprocess, tokenizer)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
