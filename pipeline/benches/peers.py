"""The peers of the benchmarks beside it, one process and one core each, in processor time.

    python -m venv peers && peers/bin/pip install "datatrove[processing,io]" spacy trafilatura
    peers/bin/python peers.py filter DOCUMENTS.jsonl    # datatrove: Gopher repetition and quality, C4, FineWeb
    peers/bin/python peers.py extract PAGES.jsonl       # trafilatura: pages, F1 against the gold text

DOCUMENTS.jsonl has a field `text`; datatrove reads it and writes JSON lines of what is kept, as it does by default. Ours
over the same file: `cargo bench --workspace --bench filter -- DIRECTORY 1 DOCUMENTS.jsonl`. PAGES.jsonl is what
`cargo bench --workspace --bench extract -- PAGES.jsonl` takes: lines with `html` and `gold`.
"""
import collections
import json
import os
import re
import sys
import tempfile
import time


def megabytes(path):
    with open(path, encoding="utf-8") as lines:
        return sum(len(json.loads(line)["text"].encode()) for line in lines) / 1e6


def filter_documents(path):
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.filters import (
        C4QualityFilter, FineWebQualityFilter, GopherQualityFilter, GopherRepetitionFilter)
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    size = megabytes(path)
    folder, name = os.path.split(os.path.abspath(path))
    with tempfile.TemporaryDirectory() as work:
        # Lines without a terminal mark stay: that rule rewrites texts, the others decide on documents.
        steps = [JsonlReader(folder, compression=None, glob_pattern=name), GopherRepetitionFilter(),
                 GopherQualityFilter(), C4QualityFilter(filter_no_terminal_punct=False), FineWebQualityFilter(),
                 JsonlWriter(f"{work}/kept")]
        executor = LocalPipelineExecutor(steps, tasks=1, workers=1, logging_dir=f"{work}/log")
        wall, cpu = time.perf_counter(), time.process_time()
        executor.run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    print(f"datatrove filters: {size:.2f} MB, {wall:.1f} s, {size / wall:.3f} MB/s; "
          f"{cpu:.1f} s of processor, {size / cpu:.3f} MB/s")


def words(text):
    return collections.Counter(re.findall(r"\w+", text.lower()))


def extract_pages(path):
    import trafilatura

    pages = [json.loads(line) for line in open(path, encoding="utf-8")]
    size = sum(len(page["html"].encode()) for page in pages) / 1e6
    for mode in ({}, {"fast": True}, {"favor_recall": True}):
        start = time.process_time()
        texts = [trafilatura.extract(page["html"], **mode) or "" for page in pages]
        cpu = time.process_time() - start
        f1 = []
        for page, text in zip(pages, texts):
            if page["gold"] is None:
                continue
            found, gold = words(text), words(page["gold"])
            common = sum((found & gold).values())
            f1.append(2 * common / max(1, sum(found.values()) + sum(gold.values())))
        print(f"trafilatura {mode}: F1 {sum(f1) / len(f1):.3f}, {len(pages) / cpu:.1f} pages/s, {size / cpu:.1f} MB/s")


if __name__ == "__main__":
    kind, file = sys.argv[1:3]
    {"filter": filter_documents, "extract": extract_pages}[kind](file)
