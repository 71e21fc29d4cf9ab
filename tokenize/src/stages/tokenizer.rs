//! Stage `tokenizer`: one task that leaves a `tokenizer.json`.

use std::io::Write;
use std::sync::Arc;

use arrow::array::{AsArray, RecordBatch};
use arrow::compute::cast as cast_array;
use arrow::datatypes::DataType;
use async_trait::async_trait;
use futures::StreamExt;
use pipeline::digest::Digest;
use pipeline::{Error, Event, Result, RunContext, Stage, Task, TaskContext, TaskReport};

use super::{TOKENIZER, refuse_empty};
use crate::config::TokenizeConfig;
use crate::encoder::Encoder;
use crate::sample::Sample;
use crate::shuffle::is_held_out;
use crate::train::Trainer;

/// Name of the file in the stage's directory.
pub(super) const FILE: &str = "tokenizer.json";
/// Documents whose words are counted at a time, on all threads.
const FEED: usize = 1024;

/// Trains a tokenizer on a sample of the documents, or takes the one of the recipe.
pub(super) struct TrainTokenizer {
    pub config: TokenizeConfig,
    pub documents: String,
    pub seed: u64,
}

#[async_trait]
impl Stage for TrainTokenizer {
    fn name(&self) -> &str {
        TOKENIZER
    }

    fn version(&self) -> u32 {
        2
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
                let digest = Digest::of_file(path).map_err(|e| Error::io(path, e))?;
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
        for (role, token) in
            [("eos_id", &self.config.tokenizer.eos_token), ("bos_id", &self.config.tokenizer.bos_token)]
        {
            if role == "eos_id" || self.config.add_bos {
                notes[role] = encoder.token_id(token)?.into();
            }
        }
        let mut file = task.create_file(FILE)?;
        file.write_all(&json).map_err(|e| Error::io(&path, e))?;
        let files = vec![file.finish(0)?];
        Ok(TaskReport { files, rows_read: documents, rows_kept: documents, notes, ..TaskReport::default() })
    }
}

impl TrainTokenizer {
    /// The trained `tokenizer.json`, the number of documents it was trained on, and notes.
    async fn train(&self, task: &TaskContext) -> Result<(Vec<u8>, u64, serde_json::Value)> {
        let config = &self.config.tokenizer;
        let shards = task.run.shards(&self.documents)?;
        let rows: u64 = shards.iter().map(|shard| shard.rows).sum();
        let mut sample = Sample::new(config.sample_bytes, &config.source_weights, self.seed);
        if !shards.is_empty() {
            let plan = task.read_all(&task.session(), &self.documents).await?;
            let mut batches = plan.select_columns(&["id", "source", "text"])?.execute_stream().await?;
            while let Some(batch) = batches.next().await {
                self.offer(&batch?, &mut sample)?;
                let (documents, bytes) = sample.seen();
                task.progress(documents, Some(rows), format!("{} MB of text looked at", bytes / 1_000_000));
            }
        }
        let (seen, text_bytes) = sample.seen();
        let (texts, by_source) = sample.finish().map_err(Error::from)?;
        let (documents, sampled_bytes) = (texts.len(), texts.iter().map(|text| text.len() as u64).sum::<u64>());
        let mut trainer = Trainer::new(config)?;
        let mut counted = 0;
        for texts in texts.chunks(FEED) {
            trainer.feed(&texts.iter().map(|text| &**text).collect::<Vec<_>>());
            counted += texts.iter().map(|text| text.len() as u64).sum::<u64>();
            task.progress(counted, Some(sampled_bytes), format!("{} words counted", trainer.distinct_words()));
        }
        drop(texts);
        let distinct_words = trainer.distinct_words();
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
            "distinct_words": distinct_words,
        });
        Ok((json.into_bytes(), seen, notes))
    }

    /// Offer the documents of a batch, but those that are held out.
    fn offer(&self, batch: &RecordBatch, sample: &mut Sample) -> Result<()> {
        let ids = batch.column(0).as_fixed_size_binary_opt();
        let wrong = || Error::Arrow(arrow::error::ArrowError::SchemaError("ids are not 16 bytes".into()));
        let ids = ids.ok_or_else(wrong)?;
        let sources = cast_array(batch.column(1), &DataType::Utf8View)?;
        let texts = cast_array(batch.column(2), &DataType::Utf8View)?;
        let (sources, texts) = (sources.as_string_view(), texts.as_string_view());
        for row in 0..batch.num_rows() {
            let id: [u8; 16] = ids.value(row).try_into().map_err(|_| wrong())?;
            if !is_held_out(&id, self.config.validation_fraction) {
                sample.offer(id, sources.value(row), texts.value(row));
            }
        }
        Ok(())
    }
}

/// Tell how many tokens are learnt; whether to go on.
fn report(run: &Arc<RunContext>, tokens: u64, size: u64) -> bool {
    let message = format!("{tokens} tokens learnt");
    run.emit(&Event::Progress { stage: TOKENIZER.into(), done: tokens, total: Some(size), message });
    !run.stop_requested()
}
