//! Stage `tokenizer`: one task that leaves a `tokenizer.json`.

use std::io::Write;
use std::sync::Arc;

use arrow::array::AsArray;
use arrow::compute::cast as cast_array;
use arrow::datatypes::DataType;
use async_trait::async_trait;
use datafusion::prelude::col;
use futures::StreamExt;
use pipeline::digest::Digest;
use pipeline::{Error, Event, Result, RunContext, Stage, Task, TaskContext, TaskReport};

use super::{TOKENIZER, refuse_empty};
use crate::config::TokenizeConfig;
use crate::encoder::Encoder;
use crate::functions::tokenizer_sample;
use crate::train::Trainer;

/// Name of the file in the stage's directory.
pub(super) const FILE: &str = "tokenizer.json";

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
        1
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
        let shards = task.run.shards(&self.documents)?;
        let session = task.session();
        // From the footers, so that the text is read once.
        let mut text_bytes = 0;
        for shard in &shards {
            text_bytes += pipeline::shard::text_bytes(&shard.path)?;
        }
        let fraction = (self.config.tokenizer.sample_bytes as f64 / text_bytes.max(1) as f64).min(1.0);
        let mut trainer = Trainer::new(&self.config.tokenizer)?;
        let (mut documents, mut sampled_bytes) = (0u64, 0u64);
        if !shards.is_empty() {
            let sample = tokenizer_sample(self.seed, self.config.validation_fraction, fraction);
            let plan = task.read_all(&session, &self.documents).await?;
            let plan = plan.filter(sample.call(vec![col("id")]))?.select(vec![col("text")])?;
            let mut rows = plan.execute_stream().await?;
            while let Some(batch) = rows.next().await {
                let texts = cast_array(batch?.column(0), &DataType::Utf8View)?;
                let texts: Vec<&str> = texts.as_string_view().iter().flatten().collect();
                trainer.feed(&texts);
                documents += texts.len() as u64;
                sampled_bytes += texts.iter().map(|t| t.len() as u64).sum::<u64>();
                let message = format!("{} words counted", trainer.distinct_words());
                task.progress(sampled_bytes, Some(text_bytes.min(self.config.tokenizer.sample_bytes)), message);
            }
        }
        let distinct_words = trainer.distinct_words();
        let (run, size) = (task.run.clone(), u64::from(self.config.tokenizer.rounded_vocab_size()));
        let tokenizer = tokio::task::spawn_blocking(move || trainer.finish(|tokens| report(&run, tokens as u64, size)))
            .await
            .map_err(Error::shard)??
            .ok_or(Error::Interrupted)?;
        let json = tokenizer.to_string(false).map_err(Error::shard)?;
        let notes = serde_json::json!({
            "sample_documents": documents,
            "sample_bytes": sampled_bytes,
            "distinct_words": distinct_words,
        });
        Ok((json.into_bytes(), documents, notes))
    }
}

/// Tell how many tokens are learnt; whether to go on.
fn report(run: &Arc<RunContext>, tokens: u64, size: u64) -> bool {
    let message = format!("{tokens} tokens learnt");
    run.emit(&Event::Progress { stage: TOKENIZER.into(), done: tokens, total: Some(size), message });
    !run.stop_requested()
}
