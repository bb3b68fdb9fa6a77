"""`pairstream data list`: the sets that are known, with size, terms, where they are and what they are for."""

from __future__ import annotations

import json as jsonlib
import sys
from dataclasses import asdict, dataclass

RESEARCH = "research use"
FLICKR_TERMS = "annotations CC BY 4.0; each photograph has its own Flickr licence"
LINKS = "links and captions only; each picture belongs to its owner"


@dataclass(frozen=True)
class Source:
    """A set, as the table shows it.

    Attributes:
        name: What `prepare` or `download` calls it.
        command: `prepare` (a set that is unpacked on the disk), `download` (a list of URLs), or both.
        size: Pictures and texts.
        licence: The terms, as the authors state them; read them where the set comes from.
        source: Where it is to be had.
        purpose: What it is for.
    """

    name: str
    command: str
    size: str
    licence: str
    source: str
    purpose: str


SOURCES = (
    Source("flickr8k", "prepare", "8,000 photographs, 5 captions each", RESEARCH,
           "https://hockenmaier.cs.illinois.edu/8k-pictures.html", "captioning, retrieval, quick runs"),
    Source("flickr30k", "prepare", "31,783 photographs, 5 captions each", RESEARCH,
           "https://shannon.cs.illinois.edu/DenotationGraph/", "captioning, retrieval (Karpathy's test split)"),
    Source("coco", "prepare", "123,287 photographs, 5 captions each", FLICKR_TERMS,
           "https://cocodataset.org/#download", "captioning, retrieval (Karpathy's test split)"),
    Source("nocaps", "prepare", "4,500 photographs, 10 captions each (val)", "captions CC BY 2.0; Open Images pictures",
           "https://nocaps.org/download", "judging captions of things that COCO does not have"),
    Source("visual_genome", "prepare", "108,077 photographs, 5.4 million regions, 1.7 million questions", "CC BY 4.0",
           "https://homes.cs.washington.edu/~ranjay/visualgenome/", "pretraining, regions, VQA"),
    Source("conceptual_captions", "prepare", "3.3 or 12.4 million pairs, once fetched", LINKS,
           "`pairstream data download cc3m` or `cc12m`", "pretraining"),
    Source("laion", "prepare", "whatever was fetched", LINKS,
           "`pairstream data download laion400m`, `laion2b`, `relaion2b` or `datacomp`", "pretraining"),
    Source("sbu", "prepare, download", "1 million pairs", LINKS,
           "https://www.cs.rice.edu/~vo9/sbucaptions/", "pretraining"),
    Source("vqav2", "prepare", "204,721 photographs, 1.1 million questions, 10 answers each", FLICKR_TERMS,
           "https://visualqa.org/download.html", "VQA"),
    Source("gqa", "prepare", "113,018 photographs, 1.7 million balanced questions, 1 answer each", "CC BY 4.0",
           "https://cs.stanford.edu/people/dorarad/gqa/download.html", "VQA that needs composition"),
    Source("okvqa", "prepare", "14,055 questions on COCO photographs, 10 answers each", FLICKR_TERMS,
           "https://okvqa.allenai.org/download.html", "VQA that needs knowledge"),
    Source("textvqa", "prepare", "28,408 photographs, 45,336 questions, 10 answers each", "CC BY 4.0",
           "https://textvqa.org/dataset/", "VQA that needs reading"),
    Source("vizwiz", "prepare", "32,842 questions by blind people, 10 answers each; or 39,181 captioned", "CC BY 4.0",
           "https://vizwiz.org/tasks-and-datasets/vqa/", "VQA and captioning of hard photographs"),
    Source("easy_vqa", "prepare", "5,000 pictures of shapes, 48,248 questions, 1 answer each", "MIT",
           "the Python package easy-vqa", "quick VQA runs, offline"),
    Source("nlvr", "prepare", "92,244 pictures with a true or false sentence", "CC BY 4.0",
           "https://github.com/lil-lab/nlvr", "image-text classification: true or false"),
    Source("nlvr2", "prepare", "107,292 pairs of photographs with a true or false sentence",
           "CC BY 4.0; pictures on request", "https://github.com/lil-lab/nlvr",
           "image-text classification: true or false over two photographs"),
    Source("mvsa_single", "prepare", "5,129 tweets, 1 annotator (4,511 of them agree)", RESEARCH,
           "https://mcrlab.net/research/mvsa-sentiment-analysis-on-multi-view-social-data/", "sentiment of posts"),
    Source("mvsa_multiple", "prepare", "19,600 tweets, 3 annotators (17,024 of them agree)", RESEARCH,
           "https://mcrlab.net/research/mvsa-sentiment-analysis-on-multi-view-social-data/", "sentiment of posts"),
    Source("hateful_memes", "prepare", "10,000 memes", "Meta's licence, for research, on request",
           "https://hatefulmemeschallenge.com", "image-text classification: hateful or not"),
    Source("scenes", "prepare", "as many as one asks for, drawn", "CC BY-SA 4.0 (art of OpenMoji)",
           "the extra `data`; it is drawn on this machine", "the whole path offline"),
    Source("csv", "prepare, download", "a table of one's own; download also takes .parquet", "yours",
           "your disk, or URLs", "your own pairs"),
    Source("hf", "prepare", "any set that the library `datasets` opens: hf:OWNER/NAME or hf:FOLDER", "see its card",
           "https://huggingface.co/datasets", "anything with a column of pictures and one of texts"),
    Source("cc3m", "download", "3.3 million pairs", LINKS,
           "https://ai.google.com/research/ConceptualCaptions/download", "pretraining, clean captions"),
    Source("cc12m", "download", "12.4 million pairs", LINKS,
           "https://github.com/google-research-datasets/conceptual-12m", "pretraining"),
    Source("laion400m", "download", "413 million pairs", LINKS,
           "https://laion.ai/blog/laion-400-open-dataset/", "pretraining"),
    Source("laion2b", "download", "2.3 billion pairs", LINKS, "https://laion.ai/blog/laion-5b/", "pretraining"),
    Source("relaion2b", "download", "2.1 billion pairs", LINKS, "https://laion.ai/blog/relaion-5b/",
           "pretraining; LAION-2B without links to suspected abuse"),
    Source("datacomp", "download", "12.8 million to 12.8 billion pairs", "index CC BY 4.0; " + LINKS,
           "https://github.com/mlfoundations/datacomp", "pretraining, studies of filtering"),
    Source("redcaps", "download", "12 million pairs", "annotations CC BY 4.0; pictures belong to their owners",
           "https://redcaps.xyz", "pretraining"),
)  # fmt: skip


def show(*, json: bool = False) -> int:
    """List the sets that are known: a table on a terminal, a line for each into a pipe.

    Args:
        json: As JSON instead of a table.

    Returns:
        0.
    """
    if json:
        print(jsonlib.dumps([asdict(source) for source in SOURCES], indent=1, ensure_ascii=False))
        return 0
    if not sys.stdout.isatty():  # a pipe gets a whole line for each set
        for source in SOURCES:
            rest = (source.size, source.purpose, source.licence, source.source)
            print(f"{source.name:<21}{source.command:<19}{' | '.join(rest)}")
        return 0
    from rich.console import Console
    from rich.table import Table

    columns = ("name", "command", "size", "licence", "source", "what it is for")
    table = Table(*columns, show_lines=False, pad_edge=False, box=None, header_style="bold")
    for source in SOURCES:
        table.add_row(*asdict(source).values())
    Console().print(table)
    return 0
