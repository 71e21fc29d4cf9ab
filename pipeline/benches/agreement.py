"""How far the rules of a run agree with datatrove's filters, document by document, and why they differ where they do.

    python -m venv peers && peers/bin/pip install "datatrove[processing,io]" spacy zstandard
    peers/bin/python agreement.py sample N MAX_CHARS OUT.jsonl FILE...   # N documents of each file (.jsonl, .jsonl.zst), by hash
    peers/bin/python agreement.py compare DOCUMENTS.jsonl FULGURITE      # the table

`compare` runs FULGURITE (the program) with the profiles gopher, c4 and fineweb over the file, and datatrove's own filters with
their defaults over the same texts. Between the two stand ports of datatrove's filters to this file, in which each convention
that docs/SIGNALS.md names can be exchanged for ours. Without an exchange a port must give datatrove's verdict on every
document, with all of them ours: both are counted, so that an explanation cannot be wrong unseen. The reason of a difference
is the smallest set of conventions whose exchange gives our verdict.
"""
import collections
import hashlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile

import regex

WHITE = "\t\n\x0b\x0c\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200b))) + "\u2028\u2029\u202f\u205f\u3000"
RUNS = re.compile(f"[^{WHITE}]+")
ALPHANUMERIC = regex.compile(r"[\p{Alphabetic}\p{Nd}\p{Nl}\p{No}]")
ALPHABETIC = regex.compile(r"\p{Alphabetic}")
# Scripts without spaces: datatrove is told English here, and our words of them are those of UAX #29, which no port here cuts.
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
STOP_WORDS = {"the", "be", "to", "of", "and", "that", "have", "with"}
CITATION = re.compile(r"\[([0-9]*|edit|citation needed)]$")
CLOSERS = "\"')]}”’»"
ABBREVIATIONS = set("Mr Mrs Ms Dr Prof St Sr Jr Gen Col Capt Lt Rev Hon Gov Sen Rep Fig Eq Vol vs cf".split())


def part(count, whole):
    """A fraction; 0 of nothing."""
    return count / whole if whole else 0.0


def our_lines(text):
    return [line for line in (line.strip(WHITE) for line in text.split("\n")) if line]


def our_paragraphs(text):
    groups = itertools.groupby((line.strip(WHITE) for line in text.split("\n")), key=bool)
    return [tuple(lines) for filled, lines in groups if filled]


def ends_sentence(word):
    core = word.rstrip(CLOSERS)
    if not core.endswith("."):
        return core.endswith(("?", "!"))
    stem = core[:-1]
    if stem.endswith(".."):
        return False
    while stem and not ALPHANUMERIC.match(stem[0]):
        stem = stem[1:]
    return not (stem in ABBREVIATIONS or regex.fullmatch(r"\p{Alphabetic}(\.\p{Alphabetic})*", stem))


def our_sentences(line):
    ends = [ends_sentence(word) for word in RUNS.findall(line)]
    return sum(ends) + (not ends[-1] if ends else 0)


def repeated(elements, length=len):
    """All but the first occurrences: how many, and their characters."""
    seen, count, chars = set(), 0, 0
    for element in elements:
        if element in seen:
            count += 1
            chars += length(element)
        seen.add(element)
    return count, chars


class Document:
    """A text and its words, as datatrove and as we cut them."""

    def __init__(self, text):
        from datatrove.utils.text import split_into_words

        self.text = text
        self.theirs = split_into_words(text)
        self.ours = RUNS.findall(text)

    def words(self, ours):
        return self.ours if "words" in ours else self.theirs


def gopher_quality(document, ours):
    from datatrove.utils.text import PUNCTUATION_SET

    text, words = document.text, document.words(ours)
    if "symbols" in ours:
        real, alphabetic = [w for w in words if ALPHANUMERIC.search(w)], sum(bool(ALPHABETIC.search(w)) for w in words)
    else:
        real = [w for w in words if any(c not in PUNCTUATION_SET for c in w)]
        alphabetic = sum(any(c.isalpha() for c in w) for w in words)
    mean = part(sum(map(len, real)), len(real))
    lines = our_lines(text) if "blank lines" in ours else text.splitlines()
    bullets = ("•", "-", "*") if "bullets" in ours else ("•", "-")
    failed = {
        "words": not 50 <= len(real) <= 100_000,
        "mean length": not 3 <= mean <= 10,
        "hashes": part(text.count("#"), len(words)) > 0.1,
        "ellipses": part(text.count("...") + text.count("…"), len(words)) > 0.1,
        "bullets": part(sum(line.lstrip().startswith(bullets) for line in lines), len(lines)) > 0.9,
        "line ends": part(sum(line.rstrip().endswith(("...", "…")) for line in lines), len(lines)) > 0.3,
        "alphabetic": part(alphabetic, len(words)) < 0.8,
        "stop words": len(STOP_WORDS & set(words)) < 2,
    }
    return [name for name, is_so in failed.items() if is_so]


def gopher_repetition(document, ours):
    text, words = document.text, document.words(ours)
    if "lines" in ours:
        lines, paragraphs, chars = our_lines(text), our_paragraphs(text), lambda lines: sum(map(len, lines))
    else:
        lines, paragraphs, chars = re.split("\n+", text), re.split("\n{2,}", text.strip()), len
    whole = sum(map(len, our_lines(text))) if "line characters" in ours else len(text)
    failed = {}
    for name, elements, length, most in (("paragraphs", paragraphs, chars, 0.3), ("lines", lines, len, 0.3)):
        count, size = repeated(elements, length)
        failed[name] = part(count, len(elements)) > most
        failed[f"characters of {name}"] = part(size, whole) > 0.2
    of_words = "n-gram characters" in ours
    whole = sum(map(len, words)) if of_words else len(text)
    for n, most in ((2, 0.2), (3, 0.18), (4, 0.16)):
        grams = collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
        if grams:
            (gram, count), = grams.most_common(1)
            size = count * (sum(map(len, gram)) + (0 if of_words else n - 1))
            failed[f"top {n}-gram"] = part(size, whole) > most
    for n, most in ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.1)):
        seen, size, at = set(), 0, 0
        while at + n <= len(words):
            # datatrove compares n-grams with nothing between the words.
            gram = tuple(words[at : at + n]) if of_words else "".join(words[at : at + n])
            if gram in seen:
                size += sum(map(len, gram))
                at += n
            else:
                seen.add(gram)
                at += 1
        failed[f"{n}-grams"] = part(size, whole) > most
    return [name for name, is_so in failed.items() if is_so]


def c4(document, ours):
    from datatrove.pipeline.filters.c4_filters import CITATION_REGEX
    from datatrove.utils.text import split_into_sentences

    marks = (".", "?", "!", '"') if "apostrophes" in ours else (".", "?", "!", '"', "'")
    sentences, kept, failed = our_sentences if "sentences" in ours else lambda l: len(split_into_sentences(l)), 0, set()
    for line in document.text.split("\n") if "line ends" in ours else document.text.splitlines():
        line = line.strip()
        words = line.split()
        if "whole page" in ours:
            failed |= {"lorem ipsum"} if "lorem ipsum" in line.lower() else set()
            failed |= {"curly bracket"} if "{" in line else set()
        if "long words" not in ours and any(len(word) > 1000 for word in words):
            continue
        end = line = line if "citations" in ours else CITATION_REGEX.sub("", line)
        while mark := CITATION.search(end):
            end = end[: mark.start()]
        if not end.endswith(marks) or end.endswith("...") or len(words) < 3:
            continue
        lower = line.lower()
        if "lorem ipsum" in lower:
            failed.add("lorem ipsum")
        if "javascript" in lower:
            continue
        if "{" in line:
            failed.add("curly bracket")
        if any(phrase in lower for phrase in POLICY):
            continue
        kept += sentences(line)
    return sorted(failed | ({"sentences"} if kept < 5 else set()))


def fineweb(document, ours):
    from datatrove.utils.text import TERMINAL_PUNCTUATION

    text, words = document.text, document.words(ours)
    lines = our_lines(text) if "trimmed lines" in ours else [line for line in text.split("\n") if line.strip()]
    whole = sum(map(len, lines)) if "line characters" in ours else len(text.replace("\n", ""))
    newlines = (text.strip(WHITE) if "newlines" in ours else text).count("\n")
    marks = tuple(TERMINAL_PUNCTUATION)
    failed = {
        "terminal marks": part(sum(line.endswith(marks) for line in lines), len(lines)) < 0.12,
        "short lines": part(sum(len(line) <= 30 for line in lines), len(lines)) > 0.67,
        "repeated lines": part(repeated(lines)[1], whole) > 0.01,
        "newlines": part(newlines, len(words)) > 0.3,
    }
    return [name for name, is_so in failed.items() if is_so]


# Port, conventions of ours, and how our rules are named.
FILTERS = {
    "Gopher quality": (gopher_quality, ["words", "symbols", "blank lines", "bullets"], r"gopher_(?!duplicate|top)"),
    "Gopher repetition": (gopher_repetition, ["words", "lines", "line characters", "n-gram characters"],
                          r"gopher_(duplicate|top)"),
    "C4": (c4, ["sentences", "whole page", "citations", "apostrophes", "long words", "line ends"], r"c4_"),
    "FineWeb": (fineweb, ["words", "trimmed lines", "line characters", "newlines"], r"fineweb_"),
}


def sample(count, most, out, files):
    """`count` documents of each file, those of the least hashes among texts of at most `most` characters."""
    import zstandard

    with open(out, "w", encoding="utf-8") as to:
        for path in files:
            raw = open(path, "rb")
            lines = zstandard.ZstdDecompressor().stream_reader(raw) if path.endswith(".zst") else raw
            found = {}
            for line in io.TextIOWrapper(lines, encoding="utf-8"):
                text = json.loads(line)["text"]
                if text.strip() and len(text) <= most:
                    found[hashlib.sha256(text.encode()).digest()] = text
            for key in sorted(found)[:count]:
                source = os.path.basename(path).split("-0")[0].split(".")[0]
                to.write(json.dumps({"text": found[key], "source": source}, ensure_ascii=False) + "\n")


def our_rules(path, program, clean=""):
    """Of each document of the file, in order: its text as the run read it, and the rules that drop it. `clean`: a table of the recipe
    that is put before the signals."""
    recipe = f"""
name = "agreement"
[[ingest.inputs]]
source = "documents"
paths = [{json.dumps(os.path.abspath(path))}]
{clean}
[signals]
only = ["gopher", "c4", "fineweb"]
[filter]
profiles = ["gopher", "c4", "fineweb"]
"""
    with tempfile.TemporaryDirectory() as work:
        with open(f"{work}/recipe.toml", "w") as out:
            out.write(recipe)
        run = f"{work}/run"
        subprocess.run([program, "run", "-q", "--until", "filter", "--run-dir", run, f"{work}/recipe.toml"], check=True,
                       stdout=subprocess.DEVNULL)
        rows = {}
        queries = ["select ordinal, text from ingest", "select ordinal, rules from filter_dropped"]
        queries += ["select ordinal, array[rule] as rules from clean_dropped"] if clean else []
        for query in queries:
            found = subprocess.run([program, "sql", run, query, "--json"], check=True, capture_output=True).stdout
            for row in map(json.loads, found.decode().splitlines()):
                rows.setdefault(row["ordinal"], {}).update(row)
    return [(rows[at]["text"], rows[at].get("rules", [])) for at in sorted(rows)]


def compare(path, program):
    from datatrove.data import Document as Theirs
    from datatrove.pipeline import filters

    theirs = {"Gopher quality": filters.GopherQualityFilter(), "Gopher repetition": filters.GopherRepetitionFilter(),
              "C4": filters.C4QualityFilter(), "FineWeb": filters.FineWebQualityFilter()}
    counts = {name: collections.Counter() for name in FILTERS}
    reasons = {name: collections.Counter() for name in FILTERS}
    wrong = {name: [0, 0] for name in FILTERS}
    documents = our_rules(path, program)
    # C4's code looks for curly brackets only in the lines that it keeps: so do our rules behind our `clean`.
    cleaned = our_rules(path, program, "[clean]\nc4_lines = true\n")
    with open(path, encoding="utf-8") as lines:
        sources = [json.loads(line).get("source", "") for line in lines]
    read = len(documents)
    documents = [(text, rules, [r for r in cleaner if r[:3] in ("c4_", "no_")], source)
                 for (text, rules), (_, cleaner), source in zip(documents, cleaned, sources, strict=True)
                 if not UNSPACED.search(text)]
    lines_first = collections.Counter()
    by_source = collections.defaultdict(collections.Counter)
    for at, (text, rules, cleaner, source) in enumerate(documents):
        by_source[source]["documents"] += 1
        document = Document(text)
        for name, (port, conventions, pattern) in FILTERS.items():
            answer = theirs[name].filter(Theirs(text=text, id=str(at)))
            they_keep = answer is True
            dropped_by = [rule for rule in rules if re.match(pattern, rule)]
            we_keep = not dropped_by
            counts[name][we_keep, they_keep] += 1
            by_source[source][name] += we_keep == they_keep
            if name == "C4":
                lines_first[not cleaner, they_keep] += 1
            wrong[name][0] += bool(port(document, ())) == they_keep
            wrong[name][1] += bool(port(document, conventions)) == we_keep
            if we_keep == they_keep:
                continue
            sets = (s for size in range(1, len(conventions) + 1) for s in itertools.combinations(conventions, size))
            reason = next((s for s in sets if bool(port(document, s)) != we_keep), ("unexplained",))
            rule = dropped_by[0] if dropped_by else answer[1]
            reasons[name]["only ours" if they_keep else "only theirs", " and ".join(reason), rule] += 1
            if reason == ("unexplained",) and "FULGURITE_SHOW" in os.environ:
                print(name, dropped_by, answer, port(document, conventions), repr(text[:400]), file=sys.stderr)
    size = sum(len(text.encode()) for text, *_ in documents) / 1e6
    print(f"{len(documents)} documents, {size:.1f} MB ({read - len(documents)} in scripts without spaces left out)\n")
    print("| filter | both keep | both drop | only ours drops | only datatrove drops | agreement |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, c in [*counts.items(), ("C4, ours with `c4_lines`", lines_first)]:
        same = c[True, True] + c[False, False]
        print(f"| {name} | {c[True, True]} | {c[False, False]} | {c[False, True]} | {c[True, False]} "
              f"| {100 * same / max(1, len(documents)):.2f}% |")
    print("\n| filter | dropped by | convention that decides | documents | first rules |")
    print("| --- | --- | --- | --- | --- |")
    for name, found in reasons.items():
        together = collections.defaultdict(collections.Counter)
        for (who, reason, rule), count in found.items():
            together[who, reason][rule] += count
        for (who, reason), by_rule in sorted(together.items(), key=lambda item: -item[1].total()):
            most = ", ".join(f"`{rule}` {count}" for rule, count in by_rule.most_common(3))
            print(f"| {name} | {who} | {reason} | {by_rule.total()} | {most} |")
    print("\n| source | documents | " + " | ".join(FILTERS) + " |\n| --- |" + " --- |" * (1 + len(FILTERS)))
    for source, found in sorted(by_source.items(), key=lambda item: -item[1]["documents"]):
        shares = (f"{100 * found[name] / found['documents']:.0f}%" for name in FILTERS)
        print(f"| {source} | {found['documents']} | {' | '.join(shares)} |")
    print("\nDocuments on which a port differs from datatrove, and with all conventions from ours: "
          + "; ".join(f"{name} {a} and {b}" for name, (a, b) in wrong.items()))


if __name__ == "__main__":
    if sys.argv[1] == "sample":
        sample(int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5:])
    else:
        compare(*sys.argv[2:4])
