"""Near-duplicate removal beside its peers, on one JSONL file, in one run, one process and one core after the other.

    python3 -m venv peers
    peers/bin/pip install "datatrove[processing,io]==0.10.1" "xxhash==3.8.2" spacy "rensa==0.5.0" zstandard
    peers/bin/python dedup/benches/peers.py DOCUMENTS.jsonl[.zst] target/release/fulgurite [MEGABYTES [ROUNDS]]

datatrove 0.10.1 does not run with xxhash 4 ("Strings must be encoded before hashing"), hence the pin. Everybody gets the
first MEGABYTES of text (6) of the file as plain JSONL, 5-word shingles and 14 bands of 8 permutations. Figures are processor
time, which other work on the machine moves less than the clock: `getrusage` for what runs here, `wait4` for
fulgurite. What is imported or loaded once is not counted for the peers; a fulgurite process is counted whole, the median of
ROUNDS (5).
"""
import contextlib, io, json, os, resource, shutil, statistics, subprocess, sys, tempfile


def documents(path, megabytes):
    """The first records of the file, as many as have so much text; and the bytes of that."""
    raw = open(path, "rb")
    if path.endswith(".zst"):
        import zstandard
        raw = zstandard.ZstdDecompressor().stream_reader(raw)
    texts, size = [], 0
    for line in io.TextIOWrapper(raw, encoding="utf-8"):
        texts.append(json.loads(line)["text"])
        size += len(texts[-1].encode())
        if size >= megabytes * 1e6:
            break
    return texts, size / 1e6


def seconds():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def write(path, texts):
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps({"text": t}) + "\n" for t in texts)


def datatrove(work, texts, size):
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup.minhash import (
        MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupFilter, MinhashDedupSignature)
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter

    config = MinhashConfig()

    def stages(dir):
        os.makedirs(dir, exist_ok=True)

        def reader():
            return JsonlReader(dir, compression=None, glob_pattern="docs.jsonl")

        def run(name, steps, tasks=1):
            start = seconds()
            # Every task tells what it does, at length.
            with contextlib.redirect_stderr(io.StringIO()):
                LocalPipelineExecutor(steps, tasks=tasks, workers=1, logging_dir=f"{dir}/log_{name}").run()
            return seconds() - start

        return [
            run("signatures", [reader(), MinhashDedupSignature(f"{dir}/sig", config=config)]),
            run("buckets", [MinhashDedupBuckets(f"{dir}/sig", f"{dir}/buckets", config=config)], 14),
            run("cluster", [MinhashDedupCluster(f"{dir}/buckets", f"{dir}/remove", config=config)]),
            run("filter", [reader(), MinhashDedupFilter(f"{dir}/remove"), JsonlWriter(f"{dir}/out", compression=None)]),
        ]

    os.makedirs(f"{work}/warm")
    write(f"{work}/warm/docs.jsonl", texts[:20])
    stages(f"{work}/warm")
    os.makedirs(f"{work}/datatrove")
    write(f"{work}/datatrove/docs.jsonl", texts)
    times = stages(f"{work}/datatrove")
    kept = sum(1 for name in os.listdir(f"{work}/datatrove/out") for _ in open(f"{work}/datatrove/out/{name}", "rb"))
    print(f"datatrove: stages {[round(t, 2) for t in times]} s, first {size / times[0]:.3f} MB/s, "
          f"all {size / sum(times):.3f} MB/s, {kept} documents kept")
    return size / times[0], size / sum(times)


def rensa(texts, size):
    from rensa import RMinHash

    start = seconds()
    words = [t.lower().split() for t in texts]
    shingles = [[" ".join(w[i:i + 5]) for i in range(max(1, len(w) - 4))] for w in words]
    shingling = seconds() - start
    start = seconds()
    for s in shingles:
        m = RMinHash(num_perm=112, seed=42)
        m.update(s)
        m.digest()
    hashing = seconds() - start
    print(f"rensa RMinHash: hashing of ready shingles {size / hashing:.1f} MB/s, with shingling in Python "
          f"{size / (hashing + shingling):.1f} MB/s")
    return size / (hashing + shingling)


def fulgurite(work, binary, mode, compression, size, rounds, peers):
    with open(f"{work}/{mode}.toml", "w") as f:
        f.write(f'name = "peers"\n\n[ingest]\ncompression = "{compression}"\n\n[[ingest.inputs]]\nsource = "text"\n'
                f'paths = ["datatrove/docs.jsonl"]\n\n[near]\nmode = "{mode}"\n')

    def run(*more):
        """Processor seconds of a run from nothing."""
        shutil.rmtree(f"{work}/{mode}", ignore_errors=True)
        command = [binary, "run", "-q", "--threads", "1", "--run-dir", f"{work}/{mode}", *more, f"{work}/{mode}.toml"]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            sys.exit(f"{' '.join(command)}: exit code {child.returncode}")
        return used.ru_utime + used.ru_stime

    to_bands = statistics.median(run("--until", "near_signatures") for _ in range(rounds))
    all_of_it = statistics.median(run() for _ in range(rounds))
    with open(f"{work}/{mode}/curate/manifest.json") as f:
        kept = json.load(f)["totals"]["rows_kept"]
    print(f"fulgurite {mode}, texts {compression}: to bands on disk {to_bands:.2f} s, {size / to_bands:.1f} MB/s, "
          f"{size / to_bands / peers[0]:.0f} times datatrove's; all {all_of_it:.2f} s, {size / all_of_it:.1f} MB/s, "
          f"{size / all_of_it / peers[1]:.0f} times; {kept} documents kept")


def main():
    path, binary, *rest = sys.argv[1:]
    texts, size = documents(path, float(rest[0]) if rest else 6.0)
    rounds = int(rest[1]) if len(rest) > 1 else 5
    print(f"{len(texts)} documents, {size:.1f} MB of text")
    work = tempfile.mkdtemp()
    try:
        peers = datatrove(work, texts, size)
        rensa(texts, size)
        for mode in ("compatible", "fast"):
            for compression in ("zstd:1", "none"):
                fulgurite(work, os.path.abspath(binary), mode, compression, size, rounds, peers)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
