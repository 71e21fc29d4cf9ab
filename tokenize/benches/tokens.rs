//! From text to tokens and from shards to batches, over the prose that ships with the quickstart:
//!
//! `cargo bench -p tokenize --bench tokens`
//!
//! One thread, but for the loader, whose prefetch thread does the work.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};

use arrow::array::{ArrayRef, ListArray, RecordBatch, UInt16Array};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Schema};
use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use pipeline::Shard;
use pipeline::shard::{PendingWriter, part_name};
use tokenize::functions::token_field;
use tokenize::loader::{Loader, LoaderConfig};
use tokenize::shard::{ShardMetadata, TokenShardWriter};
use tokenize::train::Trainer;
use tokenize::{Encoder, TokenizerConfig};
use tokenizers::Tokenizer;

type Error = Box<dyn std::error::Error>;

fn main() {
    tokenizers::parallelism::set_parallelism(false);
    divan::main();
}

struct Corpus {
    documents: Vec<String>,
    json: String,
    encoder: Encoder,
}

static CORPUS: LazyLock<Corpus> =
    LazyLock::new(|| corpus().unwrap_or_else(|error| panic!("the quickstart's prose: {error}")));

fn corpus() -> Result<Corpus, Error> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/quickstart/corpus/prose.jsonl.zst");
    let jsonl = zstd::decode_all(File::open(path)?)?;
    let records = serde_json::Deserializer::from_slice(&jsonl).into_iter::<serde_json::Value>();
    let text = |record: serde_json::Value| Some(record.get("text")?.as_str()?.to_owned());
    let documents =
        records.map(|r| text(r?).ok_or("a record without text".into())).collect::<Result<Vec<_>, Error>>()?;
    let mut trainer = Trainer::new(&TokenizerConfig { vocab_size: 32_000, ..TokenizerConfig::default() })?;
    trainer.feed(&documents.iter().map(String::as_str).collect::<Vec<_>>());
    let tokenizer = trainer.finish(|_| true)?.ok_or("nobody stopped the training")?;
    let json = tokenizer.to_string(false).map_err(|e| e.to_string())?;
    let encoder = Encoder::from_bytes(json.as_bytes(), Path::new("tokenizer.json"))?;
    Ok(Corpus { documents, json, encoder })
}

impl Corpus {
    fn bytes(&self) -> BytesCount {
        BytesCount::new(self.documents.iter().map(String::len).sum::<usize>())
    }
}

#[divan::bench(sample_count = 5)]
fn encode(bencher: Bencher<'_, '_>) {
    let corpus = &*CORPUS;
    let mut ids = Vec::new();
    bencher.counter(corpus.bytes()).bench_local(|| {
        ids.clear();
        corpus.documents.iter().for_each(|text| corpus.encoder.encode(text, &mut ids).unwrap_or_default());
        black_box(ids.len())
    });
}

#[divan::bench(sample_count = 5)]
fn encode_batch_of_tokenizers(bencher: Bencher<'_, '_>) {
    let corpus = &*CORPUS;
    let tokenizer = Tokenizer::from_bytes(&corpus.json).unwrap_or_else(|error| panic!("{error}"));
    bencher
        .counter(corpus.bytes())
        .with_inputs(|| corpus.documents.clone())
        .bench_local_values(|texts| tokenizer.encode_batch(texts, false).map(|encodings| encodings.len()).ok());
}

/// The tokens of the corpus, forty times over, as one shard.
fn shard(dir: &Path) -> Result<Shard, Error> {
    let corpus = &*CORPUS;
    let element = token_field(corpus.encoder.vocabulary_size());
    let tokens = Field::new("tokens", DataType::List(element.clone()), false);
    let schema = Arc::new(Schema::new(vec![tokens]));
    let metadata = ShardMetadata {
        tokenizer: corpus.encoder.digest(),
        vocabulary_size: corpus.encoder.vocabulary_size(),
        eos_id: 2,
        seed: 0,
        documents: 0,
        tokens: 0,
    };
    let name = part_name(0);
    let path: PathBuf = dir.join(&name);
    let file = PendingWriter::create(dir, name)?;
    let mut writer = TokenShardWriter::new(file, path.clone(), schema.clone(), metadata)?;
    for text in std::iter::repeat_n(&corpus.documents, 40).flatten() {
        let mut ids = Vec::new();
        corpus.encoder.encode(text, &mut ids)?;
        let offsets = OffsetBuffer::from_lengths([ids.len()]);
        let values: ArrayRef = Arc::new(UInt16Array::from_iter_values(ids.iter().map(|&id| id as u16)));
        let row: ArrayRef = Arc::new(ListArray::try_new(element.clone(), offsets, values, None)?);
        writer.write(&RecordBatch::try_new(schema.clone(), vec![row])?)?;
    }
    let (file, _) = writer.finish()?;
    std::fs::rename(&file.temporary, &path)?;
    let entry = file.entry;
    Ok(Shard { index: 0, path, rows: entry.rows, bytes: entry.bytes, xxh3: entry.xxh3 })
}

/// Batches of 16 × 2048 tokens, over two epochs: packed, shuffled, with document starts.
#[divan::bench(sample_count = 1, sample_size = 1)]
fn load_two_epochs(bencher: Bencher<'_, '_>) {
    let dir = tempfile::tempdir().unwrap_or_else(|error| panic!("{error}"));
    let shard = shard(dir.path()).unwrap_or_else(|error| panic!("{error}"));
    let config = LoaderConfig { rows: 16, sequence_length: 2048, ..LoaderConfig::default() };
    let mut loader = Loader::open(&[shard], config).unwrap_or_else(|error| panic!("{error}"));
    let steps = 2 * loader.tokens_per_epoch() / (16 * 2048);
    bencher
        .counter(ItemsCount::new(steps * 16 * 2048))
        .bench_local(|| (0..steps).map(|step| loader.batch(step).map_or(0, |batch| batch.tokens.len())).sum::<usize>());
}
