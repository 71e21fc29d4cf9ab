//! Stage `tokenizer`: one task that leaves a `tokenizer.json`.

use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use arrow::array::{AsArray, RecordBatch};
use arrow::compute::cast as cast_array;
use arrow::datatypes::DataType;
use async_trait::async_trait;
use pipeline::digest::Digest;
use pipeline::{Error, Event, Result, RunContext, Stage, Task, TaskContext, TaskReport};

use super::{TOKENIZER, refuse_empty, shard_metadata};
use crate::config::TokenizeConfig;
use crate::encoder::Encoder;
use crate::sample::Sample;
use crate::shuffle::is_held_out;
use crate::train::Trainer;

/// Name of the file in the stage's directory.
pub(super) const FILE: &str = "tokenizer.json";
/// Documents whose words are counted at a time, on all threads.
const FEED_DOCUMENTS: usize = 1024;
/// Bytes of text in them, about.
const FEED_BYTES: usize = 8 << 20;

/// Trains a tokenizer on a sample of the documents, or takes the one of the recipe.
pub(super) struct TrainTokenizer {
    config: TokenizeConfig,
    documents: String,
    seed: u64,
    /// Checksum of the file of the recipe that was looked into: settings are asked for several times.
    checked: OnceLock<Digest>,
}

#[async_trait]
impl Stage for TrainTokenizer {
    fn name(&self) -> &str {
        TOKENIZER
    }

    fn version(&self) -> u32 {
        3
    }

    fn inputs(&self) -> Vec<String> {
        match self.config.tokenizer.path {
            Some(_) => Vec::new(),
            None => vec![self.documents.clone()],
        }
    }

    fn config(&self) -> Result<serde_json::Value> {
        self.config.validate()?;
        let tokenizer = &self.config.tokenizer;
        Ok(match &tokenizer.path {
            Some(path) => {
                let digest = self.check_file(path)?;
                serde_json::json!({ "file": digest })
            }
            None => serde_json::json!({
                "training": tokenizer,
                "validation_fraction": self.config.validation_fraction,
                "seed": self.seed,
            }),
        })
    }

    async fn tasks(&self, run: &RunContext) -> Result<Vec<Task>> {
        let inputs = match self.config.tokenizer.path {
            Some(_) => serde_json::Value::Null,
            None => {
                refuse_empty(run, &self.documents)?;
                run.shards(&self.documents)?.iter().map(|s| s.xxh3.to_string()).collect()
            }
        };
        Ok(vec![Task { index: 0, inputs }])
    }

    async fn execute(&self, task: &TaskContext) -> Result<TaskReport> {
        let (json, documents, mut notes) = match &self.config.tokenizer.path {
            Some(path) => (std::fs::read(path).map_err(|e| Error::io(path, e))?, 0, serde_json::json!({})),
            None => self.train(task).await?,
        };
        // Also a check that what was trained or given can be used.
        let path = task.stage_dir().join(FILE);
        let encoder = Encoder::from_bytes(&json, self.config.tokenizer.path.as_ref().unwrap_or(&path))?;
        notes["vocabulary_size"] = encoder.vocabulary_size().into();
        let metadata = shard_metadata(&encoder, &self.config.tokenizer, self.seed, None)?;
        notes["eos_id"] = metadata.eos_id.into();
        for (role, id) in [("bos_id", metadata.bos_id), ("pad_id", metadata.pad_id)] {
            if let Some(id) = id {
                notes[role] = id.into();
            }
        }
        notes["fast"] = encoder.is_fast().into();
        if let Some(reason) = encoder.slow_because() {
            let path = encoder.path().display();
            tracing::warn!("{path}: texts are encoded by the `tokenizers` crate, several times slower: {reason}");
        }
        let mut file = task.create_file(FILE)?;
        file.write_all(&json).map_err(|e| Error::io(&path, e))?;
        let files = vec![file.finish(0)?];
        Ok(TaskReport { files, rows_read: documents, rows_kept: documents, notes, ..TaskReport::default() })
    }
}

impl TrainTokenizer {
    pub fn new(config: TokenizeConfig, documents: String, seed: u64) -> Self {
        Self { config, documents, seed, checked: OnceLock::new() }
    }

    /// The checksum of the file of the recipe, which has to be a tokenizer that has the tokens documents are put
    /// between: better said before hours of curation than after them.
    fn check_file(&self, path: &Path) -> crate::Result<Digest> {
        let config = &self.config.tokenizer;
        let fault = |reason: String| crate::Error::config("tokenizer.path", reason);
        let bytes = std::fs::read(path).map_err(|e| fault(format!("{}: {e}", path.display())))?;
        let digest = Digest::of(&bytes);
        if self.checked.get() == Some(&digest) {
            return Ok(digest);
        }
        let encoder = Encoder::from_bytes(&bytes, path).map_err(|e| fault(e.to_string()))?;
        let bos = self.config.add_bos.then_some(("bos_token", &config.bos_token));
        for (key, token) in [("eos_token", &config.eos_token)].into_iter().chain(bos) {
            encoder.token_id(token).map_err(|e| crate::Error::config(&format!("tokenizer.{key}"), e.to_string()))?;
        }
        // A file that changes meanwhile is looked into each time.
        let _ = self.checked.set(digest);
        Ok(digest)
    }

    /// The trained `tokenizer.json`, the number of documents it was trained on, and notes.
    async fn train(&self, task: &TaskContext) -> Result<(Vec<u8>, u64, serde_json::Value)> {
        let config = &self.config.tokenizer;
        let shards = task.run.shards(&self.documents)?;
        let rows: u64 = shards.iter().map(|shard| shard.rows).sum();
        // Of any documents in any order the sample is the same, so shards are read side by side.
        let sample = Arc::new(Mutex::new(Sample::new(config.sample_bytes, &config.source_weights, self.seed)));
        let (into, run, fraction) = (sample.clone(), task.run.clone(), self.config.validation_fraction);
        let take = move |batch: RecordBatch| -> Result<()> {
            offer(&batch, fraction, &into, |documents, bytes| {
                let message = format!("{} MB of text looked at", bytes / 1_000_000);
                run.emit(&Event::Progress { stage: TOKENIZER.into(), done: documents, total: Some(rows), message });
            })
        };
        task.each_batch_in_any_order(&self.documents, &["id", "source", "text"], take).await?;
        let sample = Arc::into_inner(sample).ok_or_else(|| Error::shard("the sample is still being taken"))?;
        let sample = sample.into_inner().unwrap_or_else(PoisonError::into_inner);
        for (source, bytes, wanted) in sample.too_small() {
            tracing::warn!(
                "the tokenizer's sample has {bytes} bytes of source {source}, all that there is, where \
                 tokenize.tokenizer.source_weights asks for {wanted}: lower sample_bytes to keep the proportions"
            );
        }
        let (seen, text_bytes) = sample.seen();
        let (texts, by_source) = sample.finish().map_err(Error::from)?;
        let (documents, sampled_bytes) = (texts.len(), texts.iter().map(|text| text.len() as u64).sum::<u64>());
        let mut trainer = Trainer::new(config)?;
        let mut counted = 0;
        let mut left = texts.into_iter();
        while left.len() > 0 && !trainer.is_full() {
            let (mut texts, mut bytes) = (Vec::new(), 0);
            while texts.len() < FEED_DOCUMENTS
                && bytes < FEED_BYTES
                && let Some(text) = left.next()
            {
                bytes += text.len();
                texts.push(text);
            }
            trainer.feed(&texts.iter().map(|text| &**text).collect::<Vec<_>>());
            counted += bytes as u64;
            task.progress(counted, Some(sampled_bytes), format!("{} words counted", trainer.distinct_words()));
        }
        if left.len() > 0 {
            tracing::warn!(
                "the tokenizer learns from {counted} of the {sampled_bytes} bytes of its sample, whose words fill \
                 tokenize.tokenizer.word_bytes = {}: raise that for more, or lower sample_bytes for less memory",
                config.word_bytes
            );
        }
        drop(left);
        let (distinct_words, word_bytes) = (trainer.distinct_words(), trainer.word_bytes());
        let (run, size) = (task.run.clone(), u64::from(self.config.tokenizer.rounded_vocab_size()));
        let tokenizer = tokio::task::spawn_blocking(move || trainer.finish(|tokens| report(&run, tokens as u64, size)))
            .await
            .map_err(Error::shard)??
            .ok_or(Error::Interrupted)?;
        let json = tokenizer.to_string(false).map_err(Error::shard)?;
        let notes = serde_json::json!({
            "documents": seen,
            "text_bytes": text_bytes,
            "sample_documents": documents,
            "sample_bytes": sampled_bytes,
            "sample_bytes_by_source": by_source,
            "counted_bytes": counted,
            "distinct_words": distinct_words,
            "word_bytes": word_bytes,
        });
        Ok((json.into_bytes(), seen, notes))
    }
}

/// Offer the documents of a batch, but the fraction that is held out. `tell` gets the documents and bytes that were offered so far,
/// while no other batch is: what it gets never falls.
fn offer(batch: &RecordBatch, held_out: f64, sample: &Mutex<Sample>, tell: impl FnOnce(u64, u64)) -> Result<()> {
    let ids = batch.column(0).as_fixed_size_binary_opt();
    let wrong = || Error::Arrow(arrow::error::ArrowError::SchemaError("ids are not 16 bytes".into()));
    let ids = ids.ok_or_else(wrong)?;
    let sources = cast_array(batch.column(1), &DataType::Utf8View)?;
    let texts = cast_array(batch.column(2), &DataType::Utf8View)?;
    let (sources, texts) = (sources.as_string_view(), texts.as_string_view());
    // Reading all of a text is done before others have to wait.
    let offered: Vec<usize> = (0..batch.num_rows()).filter(|&row| !is_held_out(texts.value(row), held_out)).collect();
    let mut sample = sample.lock().unwrap_or_else(PoisonError::into_inner);
    for row in offered {
        let id: [u8; 16] = ids.value(row).try_into().map_err(|_| wrong())?;
        sample.offer(id, sources.value(row), texts.value(row));
    }
    let (documents, bytes) = sample.seen();
    tell(documents, bytes);
    Ok(())
}

/// Tell how many tokens are learnt; whether to go on.
fn report(run: &Arc<RunContext>, tokens: u64, size: u64) -> bool {
    let message = format!("{tokens} tokens learnt");
    run.emit(&Event::Progress { stage: TOKENIZER.into(), done: tokens, total: Some(size), message });
    !run.stop_requested()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use arrow::array::{ArrayRef, FixedSizeBinaryArray, StringArray};

    use super::*;

    #[test]
    fn progress_of_batches_offered_side_by_side_never_falls() {
        let ids: ArrayRef = Arc::new(FixedSizeBinaryArray::try_from_iter((0..4u8).map(|n| [n; 16])).unwrap());
        let sources: ArrayRef = Arc::new(StringArray::from(vec!["a"; 4]));
        let texts: ArrayRef = Arc::new(StringArray::from(vec!["some text"; 4]));
        let batch = RecordBatch::try_from_iter([("id", ids), ("source", sources), ("text", texts)]).unwrap();
        let sample = Mutex::new(Sample::new(100, &BTreeMap::new(), 0));
        let told = Mutex::new(Vec::new());
        // Every other one is slow: long enough for the next to come before it.
        let tell = |documents: u64, _: u64| {
            if documents % 8 == 4 {
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            told.lock().unwrap().push(documents);
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..25 {
                        offer(&batch, 0.0, &sample, tell).unwrap();
                    }
                });
            }
        });
        let told = told.into_inner().unwrap();
        assert_eq!((told.len(), told.last()), (100, Some(&400)));
        assert!(told.is_sorted());
    }
}
