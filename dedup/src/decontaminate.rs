//! Decontamination: documents that hold runs of words of an evaluation set.
//!
//! Texts of the evaluation sets and of the corpus are cut into the same shingles ([`crate::shingles`]). A
//! document that shares an n-gram of `ngram` words with a record of an evaluation set is reported with
//! benchmark, record and the beginning of the first, and dropped, or loses the words. Records of fewer words are looked for as a
//! whole, down to `min_ngram` words; what is shorter still says nothing and is counted. A benchmark of which nothing
//! is long enough is refused: all documents would pass for clean of it.
//!
//! In scripts without spaces a word of the segmentation is a character or little more, and 13 of them are a common phrase.
//! Where more than half of the words of a text are such, both limits are doubled.
//!
//! An n-gram that very many records of one evaluation set hold, as a question that all of them begin with, counts like any other, but
//! is told of the first of these records alone: else each document with it would be told of each of them.
//!
//! | stage | task | rows |
//! | --- | --- | --- |
//! | `decontaminate` | document shard | selection `id`, `ordinal` (`drop`) or documents (`mask`); dropped with `rule`, `benchmark`, `record`, `ngrams` |
//! | its table `decontaminate_matches` | | a row for each document and record that met: `ordinal`, `benchmark`, `record`, `ngrams`, `excerpt` |

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use arrow::array::{
    ArrayRef, AsArray, RecordBatch, StringArray, StringViewBuilder, StructArray, UInt32Array, UInt32Builder,
    UInt64Array,
};
use arrow::compute::cast;
use arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef, UInt64Type};
use async_trait::async_trait;
use datafusion::common::{DataFusionError, exec_err};
use datafusion::logical_expr::{ColumnarValue, ScalarFunctionArgs, ScalarUDF, ScalarUDFImpl, Signature, Volatility};
use datafusion::prelude::col;
use pipeline::digest::Digest;
use pipeline::document::COLUMNS;
use pipeline::shard::{ShardWriter, part_name};
use pipeline::stage::RULE;
use pipeline::{Error, Output, Result, RowsRead, RunContext, Stage, Task, TaskContext, TaskReport};
use serde::{Deserialize, Serialize};

use crate::disk::{EXPECTED_DUPLICATES, check_room};
use crate::evaluation::{self, Record};
use crate::selection::ROW_BYTES as SELECTED_BYTES;
use crate::shingles::{Shingles, is_small_word};
use crate::texts::Texts;

/// What happens to a document that holds an n-gram of an evaluation set.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// The document goes.
    #[default]
    Drop,
    /// The words of the n-grams go; the document, if nothing is left.
    Mask,
}

/// One evaluation set.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Benchmark {
    /// Its name in reports.
    pub name: String,
    /// JSONL files, also `.gz` and `.zst`, `*` for any part of a name. Relative to the recipe's base directory.
    pub paths: Vec<String>,
    /// Fields whose text is looked for, each for itself; empty: every string in the record.
    #[serde(default)]
    pub fields: Vec<String>,
}

/// Decontamination in a recipe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DecontaminateConfig {
    /// Words of an n-gram; twice as many in a text that is mostly of single ideographs, kana, or the letters of Thai and other
    /// scripts without spaces.
    pub ngram: u32,
    /// Words that a text of an evaluation set has at least, twice as many likewise; shorter ones are not looked for.
    pub min_ngram: u32,
    /// What happens to the document.
    pub action: Action,
    /// What stands for masked words.
    pub mask: String,
    /// The evaluation sets.
    pub benchmarks: Vec<Benchmark>,
}

impl Default for DecontaminateConfig {
    fn default() -> Self {
        Self { ngram: 13, min_ngram: 8, action: Action::Drop, mask: String::new(), benchmarks: Vec::new() }
    }
}

/// What is in an evaluation set.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
struct Counts {
    name: String,
    records: u64,
    texts: u64,
    /// Texts of fewer than `min_ngram` words.
    too_short: u64,
}

/// The n-grams of all evaluation sets.
struct Index {
    names: Vec<String>,
    counts: Vec<Counts>,
    records: Vec<Record>,
    /// By length in words: n-gram and the records that hold it.
    grams: BTreeMap<usize, HashMap<u64, Vec<u32>>>,
    /// A bit for some of the bits of every n-gram: most n-grams of a corpus end here.
    filter: Vec<u64>,
    /// N-grams of which not all records are told.
    common: u64,
}

/// Records of an evaluation set with one n-gram that are all told; of more it is the first.
const MOST_RECORDS: usize = 100;

/// Bits of the filter: 128 KiB, which stay in the cache.
const FILTER_BITS: u32 = 20;

/// Give the texts of evaluation set `number` that are looked for to `take`: the number of the record in its set, from 1, and its
/// name; words of an n-gram, and the n-grams.
///
/// # Errors
/// [`Error::Setting`] for a set of which nothing would be found.
fn each_text(
    config: &DecontaminateConfig,
    benchmark: &Benchmark,
    number: usize,
    base: &Path,
    mut take: impl FnMut(u64, &str, usize, &[u64]),
) -> Result<Counts> {
    let mut counts = Counts { name: benchmark.name.clone(), ..Counts::default() };
    let (mut shingles, mut places) = (Shingles::default(), Vec::new());
    evaluation::read(benchmark, base, |name, texts| {
        counts.records += 1;
        for text in texts {
            counts.texts += 1;
            shingles.words(text, &mut places);
            let small = places.iter().filter(|place| is_small_word(&text[place.start..place.end])).count();
            let times = if 2 * small > places.len() { 2 } else { 1 };
            if places.len() < config.min_ngram as usize * times {
                counts.too_short += 1;
                continue;
            }
            let n = places.len().min(config.ngram as usize * times);
            take(counts.records, &name, n, shingles.again(n));
        }
    })?;
    if counts.too_short == counts.texts {
        return Err(Error::setting(
            format!("decontaminate.benchmarks.{number}"),
            format!(
                "{}: none of the {} texts of its {} records has min_ngram = {} words, so nothing of it would be found: \
                 name other fields, lower min_ngram, or leave it out",
                counts.name, counts.texts, counts.records, config.min_ngram
            ),
        ));
    }
    Ok(counts)
}

impl Index {
    fn load(config: &DecontaminateConfig, base: &Path) -> Result<Self> {
        let mut index = Self {
            names: config.benchmarks.iter().map(|b| b.name.clone()).collect(),
            records: Vec::new(),
            grams: BTreeMap::new(),
            filter: vec![0; 1 << (FILTER_BITS - 6)],
            counts: Vec::new(),
            common: 0,
        };
        for (number, benchmark) in config.benchmarks.iter().enumerate() {
            let before = index.records.len() as u32;
            let mut last = 0;
            let counts = each_text(config, benchmark, number, base, |record, name, n, grams| {
                if record != last {
                    last = record;
                    index.records.push(Record { benchmark: number, name: name.into() });
                }
                let record = index.records.len() as u32 - 1;
                for &gram in grams {
                    let slot = filter_slot(gram);
                    index.filter[slot / 64] |= 1 << (slot % 64);
                    let records = index.grams.entry(n).or_default().entry(gram).or_default();
                    let own = records.len() - records.partition_point(|held| *held < before);
                    if records.last() != Some(&record) && own <= MOST_RECORDS {
                        records.push(record);
                    }
                }
            })?;
            index.counts.push(counts);
        }
        let benchmark = |record: &u32| index.records[*record as usize].benchmark;
        for held in index.grams.values_mut().flat_map(HashMap::values_mut).filter(|held| held.len() > MOST_RECORDS) {
            let all = held.len();
            let told = |of: &[u32]| of[..if of.len() > MOST_RECORDS { 1 } else { of.len() }].to_vec();
            *held = held.chunk_by(|a, b| benchmark(a) == benchmark(b)).flat_map(told).collect();
            index.common += u64::from(held.len() < all);
        }
        Ok(index)
    }

    /// Find the n-grams of a text. `spans` are the words that belong to any, merged, in order; the result is
    /// the records they are of, with the number of n-grams and the first place.
    fn find(
        &self,
        text: &str,
        shingles: &mut Shingles,
        places: &mut Vec<Range<usize>>,
        spans: &mut Vec<Range<usize>>,
    ) -> BTreeMap<u32, (u32, Range<usize>)> {
        let mut found: BTreeMap<u32, (u32, Range<usize>)> = BTreeMap::new();
        let mut words: Vec<Range<usize>> = Vec::new();
        // Cut into words once, whatever the number of lengths.
        shingles.words(text, places);
        for (&n, grams) in &self.grams {
            if places.len() < n {
                continue;
            }
            for (first, gram) in shingles.again(n).iter().enumerate() {
                let slot = filter_slot(*gram);
                if self.filter[slot / 64] >> (slot % 64) & 1 == 0 {
                    continue;
                }
                let Some(records) = grams.get(gram) else { continue };
                words.push(first..first + n);
                let place = places[first].start..places[first + n - 1].end;
                for &record in records {
                    found.entry(record).or_insert((0, place.clone())).0 += 1;
                }
            }
        }
        words.sort_unstable_by_key(|w| (w.start, w.end));
        spans.clear();
        for span in words {
            let bytes = places[span.start].start..places[span.end - 1].end;
            match spans.last_mut() {
                Some(last) if bytes.start <= last.end => last.end = last.end.max(bytes.end),
                _ => spans.push(bytes),
            }
        }
        found
    }
}

fn filter_slot(gram: u64) -> usize {
    (gram >> (64 - FILTER_BITS)) as usize
}

/// A document met a record.
struct Match {
    ordinal: u64,
    record: u32,
    ngrams: u32,
    excerpt: String,
}

/// Matches that are held until they are written.
const HELD_MATCHES: usize = 4096;

/// Where matches are written, in the order of the rows: a plan has one partition.
struct Matches {
    index: Arc<Index>,
    schema: SchemaRef,
    writer: Option<ShardWriter>,
}

impl Matches {
    fn create(task: &TaskContext, index: Arc<Index>) -> Result<Self> {
        let schema = Arc::new(Schema::new(vec![
            Field::new("ordinal", DataType::UInt64, false),
            Field::new("benchmark", DataType::Utf8, false),
            Field::new("record", DataType::Utf8, false),
            Field::new("ngrams", DataType::UInt32, false),
            Field::new("excerpt", DataType::Utf8, false),
        ]));
        let name = Path::new("matches").join(part_name(task.index()));
        let writer = ShardWriter::create(task.stage_dir(), name, schema.clone(), Vec::new())?;
        Ok(Self { index, schema, writer: Some(writer) })
    }

    /// Write matches.
    fn write(&mut self, matches: &[Match]) -> Result<()> {
        let Some(writer) = &mut self.writer else { return Ok(()) };
        let index = &self.index;
        let record = |m: &Match| &index.records[m.record as usize];
        let columns: Vec<ArrayRef> = vec![
            Arc::new(UInt64Array::from_iter_values(matches.iter().map(|m| m.ordinal))),
            Arc::new(StringArray::from_iter_values(matches.iter().map(|m| &index.names[record(m).benchmark]))),
            Arc::new(StringArray::from_iter_values(matches.iter().map(|m| &record(m).name))),
            Arc::new(UInt32Array::from_iter_values(matches.iter().map(|m| m.ngrams))),
            Arc::new(StringArray::from_iter_values(matches.iter().map(|m| &m.excerpt))),
        ];
        writer.write(RecordBatch::try_new(self.schema.clone(), columns)?)
    }
}

/// Characters of the corpus that a match shows.
const EXCERPT_CHARS: usize = 160;

/// Bytes of a match in Parquet, about: a record's name, and an excerpt that is compressed.
const MATCH_BYTES: u64 = 128;

/// Stage `decontaminate`.
pub struct DecontaminateStage {
    config: DecontaminateConfig,
    texts: Texts,
    base: PathBuf,
}

impl DecontaminateStage {
    /// Name of the stage.
    pub const NAME: &str = "decontaminate";

    /// Over the documents of `selection` (all, if `None`), whose text is in stage `documents`. Paths of the
    /// evaluation sets are relative to `base`.
    pub fn new(config: DecontaminateConfig, documents: &str, selection: Option<&str>, base: &Path) -> Result<Self> {
        let refuse = |key: &str, what: &str| Err(Error::setting(format!("decontaminate.{key}"), what));
        if config.min_ngram == 0 || config.min_ngram > config.ngram {
            return refuse("min_ngram", "must be at least 1 and at most ngram");
        }
        if config.benchmarks.is_empty() {
            return refuse("benchmarks", "there is none: name the evaluation sets to look for");
        }
        Ok(Self { config, texts: Texts::new(documents, selection), base: base.into() })
    }
}

#[async_trait]
impl Stage for DecontaminateStage {
    fn name(&self) -> &str {
        Self::NAME
    }

    fn version(&self) -> u32 {
        3
    }

    fn inputs(&self) -> Vec<String> {
        self.texts.stages()
    }

    fn config(&self) -> Result<serde_json::Value> {
        let mut files = BTreeMap::new();
        for benchmark in &self.config.benchmarks {
            for path in evaluation::files(benchmark, &self.base)? {
                let digest = Digest::of_file(&path).map_err(|e| Error::io(&path, e))?;
                files.insert(path.strip_prefix(&self.base).unwrap_or(&path).display().to_string(), digest);
            }
        }
        Ok(serde_json::json!({ "config": self.config, "files": files }))
    }

    fn check_settings(&self, _: &BTreeMap<String, SchemaRef>) -> Result<()> {
        // A benchmark that cannot be found is told before any work; the index is made by the first task that wants it.
        let mut sets = self.config.benchmarks.iter().enumerate();
        sets.try_for_each(|(number, set)| each_text(&self.config, set, number, &self.base, |_, _, _, _| {}).map(|_| ()))
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let documents = self.texts.count(run)?;
        let rows = match self.config.action {
            Action::Drop => documents * SELECTED_BYTES,
            Action::Mask => self.texts.stored_bytes(run)?,
        };
        let met = (documents as f64 * EXPECTED_DUPLICATES) as u64 * MATCH_BYTES;
        check_room(run, Self::NAME, rows + met)?;
        self.texts.tasks(run)
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let index = task.run.shared("evaluation sets", || Index::load(&self.config, &self.base))?;
        let read = task.run.shard(self.texts.chosen(), task.index())?.rows;
        let session = crate::selection::session(task);
        let matches = Arc::new(Mutex::new(Matches::create(task, index.clone())?));
        session.register_udf(ScalarUDF::from(Contamination {
            signature: Signature::any(2, Volatility::Volatile),
            index: index.clone(),
            config: self.config.clone(),
            matches: matches.clone(),
        }));
        let rows = self.texts.rows(task, &session, task.index()).await?;
        crate::selection::register(&session, "documents", rows)?;
        let mask = self.config.action == Action::Mask;
        let found = session
            .sql("select *, contamination(ordinal, text) as found from documents")
            .await?
            .unnest_columns(&["found"])?;
        let kept: Vec<&str> = if mask { COLUMNS.to_vec() } else { vec!["id", "ordinal"] };
        let names = |name: &&str| match *name {
            "text" => datafusion::prelude::ident("found.text").alias("text"),
            name => col(name),
        };
        let mut columns: Vec<_> = kept.iter().map(names).collect();
        columns.extend(
            [RULE, "benchmark", "record", "ngrams"].map(|n| datafusion::prelude::ident(format!("found.{n}")).alias(n)),
        );
        let output = Output { kept: &kept, dropped: &["id", "ordinal", RULE, "benchmark", "record", "ngrams"] };
        let mut report = task.write(found.select(columns)?, output, RowsRead::Known(read)).await?;
        if let Some(writer) = matches.lock().unwrap_or_else(|e| e.into_inner()).writer.take() {
            report.notes = serde_json::json!({
                "benchmarks": index.counts,
                "common_ngrams": index.common,
                "matches": writer.rows(),
            });
            report.files.push(writer.finish()?);
        }
        Ok(report)
    }
}

/// `contamination(ordinal, text)`: the verdict on a document, and its text without the n-grams.
struct Contamination {
    signature: Signature,
    index: Arc<Index>,
    config: DecontaminateConfig,
    /// What was found.
    matches: Arc<Mutex<Matches>>,
}

impl std::fmt::Debug for Contamination {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Contamination").field("config", &self.config).finish_non_exhaustive()
    }
}

// Two functions are the same where they write to the same place.
impl PartialEq for Contamination {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.matches, &other.matches)
    }
}

impl Eq for Contamination {}

impl std::hash::Hash for Contamination {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.matches).hash(state);
    }
}

impl Contamination {
    fn fields() -> Fields {
        Fields::from(vec![
            Field::new(RULE, DataType::Utf8View, true),
            Field::new("benchmark", DataType::Utf8View, true),
            Field::new("record", DataType::Utf8View, true),
            Field::new("ngrams", DataType::UInt32, true),
            Field::new("text", DataType::Utf8View, false),
        ])
    }
}

impl ScalarUDFImpl for Contamination {
    fn name(&self) -> &str {
        "contamination"
    }

    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn return_type(&self, _: &[DataType]) -> datafusion::error::Result<DataType> {
        Ok(DataType::Struct(Self::fields()))
    }

    fn invoke_with_args(&self, args: ScalarFunctionArgs) -> datafusion::error::Result<ColumnarValue> {
        let ordinals = args.args[0].to_array(args.number_rows)?;
        let texts = cast(&args.args[1].to_array(args.number_rows)?, &DataType::Utf8View)?;
        let Some(ordinals) = ordinals.as_primitive_opt::<UInt64Type>() else {
            return exec_err!("contamination takes an ordinal and a text");
        };
        let mut matches = self.matches.lock().unwrap_or_else(|e| e.into_inner());
        let mut write = |found: &[Match]| matches.write(found).map_err(|e| DataFusionError::External(Box::new(e)));
        let mut all = Vec::new();
        let (mut shingles, mut places, mut spans) = (Shingles::default(), Vec::new(), Vec::new());
        let (mut rules, mut benchmarks) = (StringViewBuilder::new(), StringViewBuilder::new());
        let (mut records, mut ngrams, mut masked) =
            (StringViewBuilder::new(), UInt32Builder::new(), StringViewBuilder::new());
        for (ordinal, text) in ordinals.values().iter().zip(texts.as_string_view()) {
            let text = text.unwrap_or_default();
            let found = self.index.find(text, &mut shingles, &mut places, &mut spans);
            let first = found.iter().max_by_key(|(record, (n, _))| (*n, std::cmp::Reverse(**record)));
            let rest = (self.config.action == Action::Mask && !spans.is_empty())
                .then(|| mask(text, &spans, &self.config.mask));
            let rule = match (&rest, first) {
                (_, None) => None,
                (None, Some(_)) => Some("contaminated"),
                (Some(rest), Some(_)) => rest.trim().is_empty().then_some("nothing_left"),
            };
            rules.append_option(rule);
            let record = first.map(|(record, _)| &self.index.records[*record as usize]);
            benchmarks.append_option(record.map(|r| &self.index.names[r.benchmark]));
            records.append_option(record.map(|r| &r.name));
            ngrams.append_option(first.map(|(_, (n, _))| *n));
            masked.append_value(rest.as_deref().unwrap_or(text));
            all.extend(found.into_iter().map(|(record, (ngrams, place))| Match {
                ordinal: *ordinal,
                record,
                ngrams,
                excerpt: text[place].chars().take(EXCERPT_CHARS).collect(),
            }));
            if all.len() >= HELD_MATCHES {
                write(&all)?;
                all.clear();
            }
        }
        write(&all)?;
        let columns: Vec<ArrayRef> = vec![
            Arc::new(rules.finish()),
            Arc::new(benchmarks.finish()),
            Arc::new(records.finish()),
            Arc::new(ngrams.finish()),
            Arc::new(masked.finish()),
        ];
        Ok(ColumnarValue::Array(Arc::new(StructArray::new(Self::fields(), columns, None))))
    }
}

/// `text` with `mask` for every span.
fn mask(text: &str, spans: &[Range<usize>], mask: &str) -> String {
    let mut rest = String::with_capacity(text.len());
    let mut from = 0;
    for span in spans {
        rest.push_str(&text[from..span.start]);
        rest.push_str(mask);
        from = span.end;
    }
    rest.push_str(&text[from..]);
    rest
}
